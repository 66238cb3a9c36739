//! Q and KV pools drawn from the counter-based generator of [`pat_abi::generator`].

use crate::OwnedBatch;
use pat_abi::generator::{self, Tensor};
use pat_rs::{AttentionShape, Element, HostTensors, KvElement, KvStrides, Problem};
use rayon::prelude::*;

/// How K and V lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolLayout {
    /// Two pools `[pages, page_size, kv_heads, head_dim]`.
    Nhd,
    /// Two pools `[pages, kv_heads, page_size, head_dim]`.
    Hnd,
    /// One pool `[pages, page_size, kv_heads, 2, head_dim]`: V stands behind K in the same row.
    Interleaved,
}

impl PoolLayout {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Nhd, Self::Hnd, Self::Interleaved];

    /// Strides of K and of V.
    pub fn strides(self, shape: AttentionShape, page_size: u32) -> KvStrides {
        match self {
            Self::Nhd => KvStrides::nhd(page_size, shape.kv_heads(), shape.head_dim()),
            Self::Hnd => KvStrides::hnd(page_size, shape.kv_heads(), shape.head_dim()),
            Self::Interleaved => {
                let KvStrides { page, token, head } = KvStrides::nhd(page_size, shape.kv_heads(), shape.head_dim());
                KvStrides { page: 2 * page, token: 2 * token, head: 2 * head }
            }
        }
    }
}

/// Attention sinks of measurements, one for each query head, where the problem has some: evenly spread from -4 to 4, beside scores
/// of about -3 to 3.
pub fn sinks(problem: &Problem) -> Option<Vec<f32>> {
    let q_heads = problem.shape().q_heads();
    let sink = |head| 8.0 * head as f32 / (q_heads.max(2) - 1) as f32 - 4.0;
    problem.has_sinks().then(|| (0..q_heads).map(sink).collect())
}

/// Inputs of a decode step. KV rows that no sequence of the batch owns are NaN, so that reading one shows. K and V are of Q's type
/// unless another one is named.
#[derive(Clone, Debug)]
pub struct Tensors<T, C = T> {
    /// Queries, `[sequences, q_heads, head_dim]`.
    pub q: Vec<T>,
    /// K and V.
    pub kv: Vec<C>,
    /// Where V starts in [`Self::kv`], in elements; K starts at 0.
    pub v_begin: usize,
    /// Strides of K and of V.
    pub kv_strides: KvStrides,
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

        let kv_strides = layout.strides(shape, batch.page_size);
        let pages = batch.num_pages as usize;
        let mut kv = vec![C::zeroed(); 2 * pages * batch.page_size as usize * shape.kv_heads() as usize * head_dim];
        let fill_page = |tensor: Tensor, page: usize, values: &mut [C]| {
            for token in 0..batch.page_size {
                for head in 0..shape.kv_heads() {
                    let at = i64::from(token) * kv_strides.token + i64::from(head) * kv_strides.head;
                    let row = &mut values[at as usize..][..head_dim];
                    if token < owned_tokens[page] {
                        fill_row(generator::row_key(seed, tensor as u32, page as u32, token, head), row);
                    } else {
                        row.fill(C::from_f32(f32::NAN));
                    }
                }
            }
        };
        let v_begin = if layout == PoolLayout::Interleaved { head_dim } else { kv.len() / 2 };
        kv.par_chunks_mut((kv_strides.page as usize).max(1)).enumerate().for_each(|(chunk, values)| {
            if layout == PoolLayout::Interleaved {
                fill_page(Tensor::K, chunk, values);
                fill_page(Tensor::V, chunk, &mut values[head_dim..]);
            } else if chunk < pages {
                fill_page(Tensor::K, chunk, values);
            } else {
                fill_page(Tensor::V, chunk - pages, values);
            }
        });
        let problem = batch.problem(shape.with_kv_dtype(C::DTYPE));
        Ok(Self { q, kv, v_begin, kv_strides, problem })
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
        let KvStrides { page: of_page, token: of_token, head: of_head } = self.kv_strides;
        let offset = i64::from(page) * of_page + i64::from(token) * of_token + i64::from(head) * of_head;
        offset as usize + if tensor == Tensor::V { self.v_begin } else { 0 }
    }

    /// The tensors as the CPU executor takes them, with contiguous outputs; plain attention.
    pub fn host(&self, softmax_scale: f32) -> HostTensors<'_, T, C> {
        self.host_of(self.problem.with_scale(softmax_scale), None)
    }

    /// As [`Self::host`], of a problem of the same shape, with its sinks.
    pub fn host_of<'a>(&'a self, problem: Problem, sinks: Option<&'a [f32]>) -> HostTensors<'a, T, C> {
        let v = &self.kv[self.v_begin.min(self.kv.len())..];
        let mut tensors =
            HostTensors::new(problem, &self.q, &self.kv, v).with_kv_strides(self.kv_strides, self.kv_strides);
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

    /// The pool's elements as those of another type; the pool becomes what they stand for. `scale` is the factor of a KV head's elements:
    /// with powers of 2, what 8 bits stand for is exact in 16.
    pub fn narrow<C: KvElement>(&mut self, scale: impl Fn(Tensor, u32) -> f32) -> Vec<C> {
        // Between rows there is nothing.
        let mut codes = vec![C::from_f32(f32::NAN); self.kv.len()];
        let (shape, page_size) = (self.shape(), self.problem.page_size());
        let pages = self.kv.len() as u64
            / 2
            / (u64::from(page_size) * u64::from(shape.kv_heads()) * u64::from(shape.head_dim()));
        for page in 0..pages as u32 {
            for token in 0..page_size {
                for head in 0..shape.kv_heads() {
                    for tensor in [Tensor::K, Tensor::V] {
                        let (scale, begin) = (scale(tensor, head), self.row_begin(tensor, page, token, head));
                        let row = &mut self.kv[begin..][..shape.head_dim() as usize];
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
        &elements[begin..][..self.shape().head_dim() as usize]
    }

    /// As [`Self::row`], to be changed.
    pub fn row_mut(&mut self, tensor: Tensor, page: u32, token: u32, head: u32) -> &mut [T] {
        let (begin, head_dim) = (self.row_begin(tensor, page, token, head), self.shape().head_dim() as usize);
        let elements = if tensor == Tensor::Q { &mut self.q } else { &mut self.kv };
        &mut elements[begin..][..head_dim]
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
