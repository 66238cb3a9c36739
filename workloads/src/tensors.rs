//! Q and KV pools drawn from the counter-based generator of [`pat_abi::generator`].

use crate::OwnedBatch;
use pat_abi::generator::{self, Tensor};
use pat_rs::{AttentionShape, Element, HostTensors, KvElement, KvStrides, Problem};
use rayon::prelude::*;

/// How K and V lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolLayout {
    /// Two pools `[pages, page_size, kv_heads, head_dim]`, of V with its own `head_dim`.
    Nhd,
    /// Two pools `[pages, kv_heads, page_size, head_dim]`, likewise.
    Hnd,
    /// One pool `[pages, page_size, kv_heads, head_dim + v_head_dim]`: V stands behind K in the same row.
    Interleaved,
}

impl PoolLayout {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nhd, Self::Hnd, Self::Interleaved];

    /// Strides of K and of V.
    pub fn strides(self, shape: AttentionShape, page_size: u32) -> [KvStrides; 2] {
        let (kv_heads, head_dims) = (shape.kv_heads(), [shape.head_dim(), shape.v_head_dim()]);
        match self {
            Self::Nhd => head_dims.map(|head_dim| KvStrides::nhd(page_size, kv_heads, head_dim)),
            Self::Hnd => head_dims.map(|head_dim| KvStrides::hnd(page_size, kv_heads, head_dim)),
            Self::Interleaved => [KvStrides::nhd(page_size, kv_heads, head_dims[0] + head_dims[1]); 2],
        }
    }
}

/// Attention sinks of measurements, one for each query head, where the problem has some: evenly spread from -4 to 4, beside
/// scores of about -3 to 3.
pub fn sinks(problem: &Problem) -> Option<Vec<f32>> {
    let q_heads = problem.shape().q_heads();
    let sink = |head| 8.0 * head as f32 / (q_heads.max(2) - 1) as f32 - 4.0;
    problem.has_sinks().then(|| (0..q_heads).map(sink).collect())
}

/// Inputs of a decode step. KV rows that no sequence of the batch owns are NaN, so that reading one shows. K and V are of Q's
/// type unless another one is named.
#[derive(Clone, Debug)]
pub struct Tensors<T, C = T> {
    /// Queries, `[sequences, q_heads, head_dim]`.
    pub q: Vec<T>,
    /// K and V.
    pub kv: Vec<C>,
    /// Where V starts in [`Self::kv`], in elements; K starts at 0.
    pub v_begin: usize,
    /// Strides of K.
    pub k_strides: KvStrides,
    /// Strides of V.
    pub v_strides: KvStrides,
    problem: Problem,
}

impl<T: Element, C: KvElement> Tensors<T, C> {
    /// Draws the tensors of a batch, in parallel, with elements of K and V of their own type.
    ///
    /// # Errors
    /// The batch is not valid (see [`pat_rs::DecodeBatch::from_block_tables`]).
    pub fn draw_stored(
        batch: &OwnedBatch,
        shape: AttentionShape,
        layout: PoolLayout,
        seed: u32,
    ) -> pat_rs::Result<Self> {
        batch.view(&batch.rows())?;
        let owned_tokens = owned_tokens(batch);
        let head_dim = shape.head_dim() as usize;
        let mut q = vec![T::zeroed(); batch.lengths.len() * shape.q_heads() as usize * head_dim];
        q.par_chunks_mut(head_dim).enumerate().for_each(|(row, values)| {
            let (sequence, head) = (row as u32 / shape.q_heads(), row as u32 % shape.q_heads());
            fill_row(generator::row_key(seed, Tensor::Q as u32, sequence, 0, head), values);
        });

        let [k_strides, v_strides] = layout.strides(shape, batch.page_size);
        let (pages, v_head_dim) = (batch.num_pages as usize, shape.v_head_dim() as usize);
        let pool_rows = pages * batch.page_size as usize * shape.kv_heads() as usize;
        let mut kv = vec![C::zeroed(); pool_rows * (head_dim + v_head_dim)];
        let fill_page = |tensor: Tensor, page: usize, values: &mut [C]| {
            let (strides, row_elements) =
                if tensor == Tensor::K { (k_strides, head_dim) } else { (v_strides, v_head_dim) };
            for token in 0..batch.page_size {
                for head in 0..shape.kv_heads() {
                    let at = i64::from(token) * strides.token + i64::from(head) * strides.head;
                    let row = &mut values[at as usize..][..row_elements];
                    if token < owned_tokens[page] {
                        fill_row(generator::row_key(seed, tensor as u32, page as u32, token, head), row);
                    } else {
                        row.fill(C::from_f32(f32::NAN));
                    }
                }
            }
        };
        let page_elements = |strides: KvStrides| (strides.page as usize).max(1);
        let v_begin = if layout == PoolLayout::Interleaved {
            kv.par_chunks_mut(page_elements(k_strides)).enumerate().for_each(|(page, values)| {
                fill_page(Tensor::K, page, values);
                fill_page(Tensor::V, page, &mut values[head_dim..]);
            });
            head_dim
        } else {
            let (k, v) = kv.split_at_mut(pool_rows * head_dim);
            for (tensor, pool, strides) in [(Tensor::K, k, k_strides), (Tensor::V, v, v_strides)] {
                let pages = pool.par_chunks_mut(page_elements(strides)).enumerate();
                pages.for_each(|(page, values)| fill_page(tensor, page, values));
            }
            pool_rows * head_dim
        };
        let problem = batch.problem(shape.with_kv_dtype(C::DTYPE));
        Ok(Self { q, kv, v_begin, k_strides, v_strides, problem })
    }

    /// Heads, head dimension and element type.
    pub fn shape(&self) -> AttentionShape {
        self.problem.shape()
    }

    /// Where [`Self::row`] begins in its vector.
    pub fn row_begin(&self, tensor: Tensor, page: u32, token: u32, head: u32) -> usize {
        if tensor == Tensor::Q {
            return (page * self.shape().q_heads() + head) as usize * self.shape().head_dim() as usize;
        }
        let KvStrides { page: of_page, token: of_token, head: of_head } =
            if tensor == Tensor::V { self.v_strides } else { self.k_strides };
        let offset = i64::from(page) * of_page + i64::from(token) * of_token + i64::from(head) * of_head;
        offset as usize + if tensor == Tensor::V { self.v_begin } else { 0 }
    }

    /// Elements of a row of a tensor.
    fn row_elements(&self, tensor: Tensor) -> usize {
        let shape = self.shape();
        (if tensor == Tensor::V { shape.v_head_dim() } else { shape.head_dim() }) as usize
    }

    /// An output for them, contiguous, of NaN.
    pub fn nan_out(&self) -> Vec<T> {
        let rows = self.q.len() / self.shape().head_dim() as usize;
        vec![T::from_f32(f32::NAN); rows * self.shape().v_head_dim() as usize]
    }

    /// The tensors as the CPU executor takes them, with contiguous outputs; plain attention.
    pub fn host(&self, softmax_scale: f32) -> HostTensors<'_, T, C> {
        self.host_of(self.problem.with_scale(softmax_scale), None)
    }

    /// As [`Self::host`], of a problem of the same shape, with its sinks.
    pub fn host_of<'a>(&'a self, problem: Problem, sinks: Option<&'a [f32]>) -> HostTensors<'a, T, C> {
        let v = &self.kv[self.v_begin.min(self.kv.len())..];
        let mut tensors =
            HostTensors::new(problem, &self.q, &self.kv, v).with_kv_strides(self.k_strides, self.v_strides);
        tensors.sinks = sinks;
        tensors
    }
}

impl<T: Element> Tensors<T> {
    /// Draws the tensors of a batch, in parallel.
    ///
    /// # Errors
    /// As [`Self::draw_stored`].
    pub fn draw(batch: &OwnedBatch, shape: AttentionShape, layout: PoolLayout, seed: u32) -> pat_rs::Result<Self> {
        Self::draw_stored(batch, shape, layout, seed)
    }

    /// The pool's elements as those of another type; the pool becomes what they stand for. `scale` is the factor of a KV
    /// head's elements: with powers of 2, what 8 bits stand for is exact in 16.
    pub fn narrow<C: KvElement>(&mut self, scale: impl Fn(Tensor, u32) -> f32) -> Vec<C> {
        // Between rows there is nothing.
        let mut codes = vec![C::from_f32(f32::NAN); self.kv.len()];
        let (shape, page_size) = (self.shape(), self.problem.page_size());
        let row_elements = u64::from(shape.head_dim()) + u64::from(shape.v_head_dim());
        let pages = self.kv.len() as u64 / (u64::from(page_size) * u64::from(shape.kv_heads()) * row_elements).max(1);
        for page in 0..pages as u32 {
            for token in 0..page_size {
                for head in 0..shape.kv_heads() {
                    for tensor in [Tensor::K, Tensor::V] {
                        let (scale, begin) = (scale(tensor, head), self.row_begin(tensor, page, token, head));
                        let row_elements = self.row_elements(tensor);
                        let row = &mut self.kv[begin..][..row_elements];
                        for (code, element) in codes[begin..].iter_mut().zip(row) {
                            *code = C::from_f32(element.to_f32() / scale);
                            *element = T::from_f32(code.to_f32() * scale);
                        }
                    }
                }
            }
        }
        codes
    }

    /// A row of Q (`page` is the sequence, `token` 0), K or V.
    pub fn row(&self, tensor: Tensor, page: u32, token: u32, head: u32) -> &[T] {
        let begin = self.row_begin(tensor, page, token, head);
        let elements = if tensor == Tensor::Q { &self.q } else { &self.kv };
        &elements[begin..][..self.row_elements(tensor)]
    }

    /// As [`Self::row`], to be changed.
    pub fn row_mut(&mut self, tensor: Tensor, page: u32, token: u32, head: u32) -> &mut [T] {
        let (begin, row_elements) = (self.row_begin(tensor, page, token, head), self.row_elements(tensor));
        let elements = if tensor == Tensor::Q { &mut self.q } else { &mut self.kv };
        &mut elements[begin..][..row_elements]
    }
}

/// Number of tokens of each page of the pool that some sequence reads (a page's tokens are owned from its first on).
pub fn owned_tokens(batch: &OwnedBatch) -> Vec<u32> {
    let mut owned = vec![0; batch.num_pages as usize];
    for (table, &length) in batch.block_tables.iter().zip(&batch.lengths) {
        for (index, &page) in table.iter().take(length.div_ceil(batch.page_size) as usize).enumerate() {
            let tokens = (length - index as u32 * batch.page_size).min(batch.page_size);
            owned[page as usize] = tokens.max(owned[page as usize]);
        }
    }
    owned
}

/// Draws one row of `head_dim` elements.
pub fn fill_row<T: KvElement>(row_key: u32, row: &mut [T]) {
    for (dim, element) in row.iter_mut().enumerate() {
        *element = T::from_f32(generator::element(row_key, dim as u32));
    }
}
