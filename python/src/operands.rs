//! The tensors of one call, checked in the caller's terms before anything is enqueued or written.

use crate::device::Device;
use crate::errors::{Result, invalid};
use crate::foreign;
use crate::scores::Scores;
use crate::tensor::{Element, Tensor};
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::cuda::{DeviceKvScale, RunArgs};
use pat_rs::{AttentionShape, Dtype, KvStrides, Plan, Problem, Reach, RowStrides};

/// What the kernels' 16-byte accesses need of addresses and of strides.
const ALIGNMENT_BYTES: u64 = 16;

/// A range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
}

impl Span {
    /// What a tensor's sizes and strides reach.
    pub(crate) fn of(tensor: &Tensor<'_>) -> Result<Self> {
        Ok(Self { address: tensor.address, bytes: tensor.span_elements()? * tensor.element.bytes() })
    }

    /// Whether the two share memory.
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.address < other.address + other.bytes && other.address < self.address + self.bytes
    }
}

/// What a plan, or the plans of one set of buffers, asks of a call's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) shape: AttentionShape,
    pub(crate) page_size: u32,
    /// How far back rows see.
    pub(crate) reach: Reach,
    /// Whether the query tokens may form trees.
    pub(crate) query_tree: bool,
    pub(crate) num_pages: u32,
    /// Least rows of Q, O and LSE.
    pub(crate) rows: u32,
    /// Where the plan is to run, if that is fixed.
    pub(crate) device: Option<Device>,
}

impl Facts {
    pub(crate) fn of(plan: &Plan, device: Option<Device>) -> Self {
        Self {
            shape: plan.shape(),
            page_size: plan.page_size(),
            reach: plan.problem().visibility().reach,
            query_tree: plan.problem().visibility().is_tree,
            num_pages: plan.num_pages(),
            rows: plan.sequence_count(),
            device,
        }
    }
}

/// The order of the dimensions of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KvLayout {
    /// `[pages, page_size, kv_heads, head_dim]`.
    Nhd,
    /// `[pages, kv_heads, page_size, head_dim]`.
    Hnd,
}

impl KvLayout {
    fn name(self) -> &'static str {
        match self {
            Self::Nhd => "NHD",
            Self::Hnd => "HND",
        }
    }

    pub(crate) fn parse(text: &str) -> Result<Self> {
        match text {
            "NHD" => Ok(Self::Nhd),
            "HND" => Ok(Self::Hnd),
            other => Err(invalid("kv_layout", format!("{other:?}"), "\"NHD\" or \"HND\"")),
        }
    }
}

/// The tensors of a call.
pub(crate) struct Tensors<'py> {
    pub(crate) q: Tensor<'py>,
    pub(crate) k: Tensor<'py>,
    pub(crate) v: Tensor<'py>,
    pub(crate) out: Tensor<'py>,
    pub(crate) lse: Option<Tensor<'py>>,
    pub(crate) sinks: Option<Tensor<'py>>,
    /// Factors of K's heads.
    pub(crate) k_scale: Option<Tensor<'py>>,
    /// Factors of V's heads.
    pub(crate) v_scale: Option<Tensor<'py>>,
}

impl Tensors<'_> {
    /// See [`Tensor::settle`].
    pub(crate) fn settle(&mut self) -> Result<()> {
        let Self { q, k, v, out, lse, sinks, k_scale, v_scale } = self;
        let optional = [lse, sinks, k_scale, v_scale];
        if [&q, &k, &v, &out].iter().all(|tensor| !tensor.runs_code) && optional.iter().all(|tensor| tensor.is_none()) {
            return Ok(());
        }
        Tensor::settle([q, k, v, out].into_iter().chain(optional.into_iter().flatten()))
    }

    pub(crate) fn all(&self) -> Vec<&Tensor<'_>> {
        [&self.q, &self.k, &self.v, &self.out]
            .into_iter()
            .chain(&self.lse)
            .chain(&self.sinks)
            .chain(&self.k_scale)
            .chain(&self.v_scale)
            .collect()
    }
}

/// Addresses, extents and strides of a call whose every check has passed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// What is computed.
    pub(crate) problem: Problem,
    num_pages: u32,
    pub(crate) device: Device,
    rows: u32,
    pub(crate) q: Span,
    pub(crate) q_strides: RowStrides,
    pub(crate) k: Span,
    pub(crate) k_strides: KvStrides,
    pub(crate) v: Span,
    pub(crate) v_strides: KvStrides,
    pub(crate) out: Span,
    pub(crate) out_strides: RowStrides,
    pub(crate) lse: Option<(Span, RowStrides)>,
    pub(crate) sinks: Option<Span>,
    pub(crate) k_scale: Scale,
    pub(crate) v_scale: Scale,
}

/// The factor of a cache's elements.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Scale {
    Tensor(f32),
    /// Float32, one for each KV head.
    Heads(Span),
}

impl Scale {
    /// A number, 1 where there is none, or a tensor of the heads' on that device.
    pub(crate) fn new(
        of_all: Option<f32>,
        of_heads: Option<&Tensor<'_>>,
        (device, why): (Device, &str),
        kv_heads: u32,
    ) -> Result<Self> {
        let Some(of_heads) = of_heads else { return Ok(Self::Tensor(of_all.unwrap_or(1.0))) };
        of_heads.expect_element(&Element::F32)?;
        of_heads.expect_device(device, why)?;
        check_heads(of_heads, kv_heads, "KV head, or a number")?;
        Ok(Self::Heads(Span::of(of_heads)?))
    }

    pub(crate) fn span(self) -> Option<Span> {
        match self {
            Self::Tensor(_) => None,
            Self::Heads(span) => Some(span),
        }
    }

    pub(crate) fn of_device(self) -> DeviceKvScale {
        match self {
            Self::Tensor(scale) => DeviceKvScale::Tensor(scale),
            Self::Heads(span) => DeviceKvScale::Heads(foreign::device_span(span)),
        }
    }
}

impl Operands {
    /// Checks types, devices, sizes, strides, addresses and what becomes of the scores.
    pub(crate) fn new(facts: &Facts, tensors: &Tensors<'_>, layout: KvLayout, scores: Scores) -> Result<Self> {
        let Tensors { q, k, v, out, lse, sinks, k_scale, v_scale } = tensors;
        if let Some(device) = facts.device {
            q.expect_device(device, "where the plan is to run")?;
        }
        let device = q.device;
        let (shape, element) = (facts.shape, Element::from(facts.shape.dtype()));
        let stored = Element::from(facts.shape.kv_dtype());
        for (tensor, is_cache) in [(q, false), (k, true), (v, true), (out, false)] {
            if is_cache {
                tensor.expect_stored(&stored)?
            } else {
                tensor.expect_element(&element)?
            }
            tensor.expect_device(device, "as q")?;
        }
        out.expect_writable()?;
        let (head_dim, v_head_dim) = (shape.head_dim(), shape.v_head_dim());
        let rows = |tensor: &Tensor<'_>, head_dim: u32| {
            row_strides(tensor, facts.rows, shape.q_heads(), Some(i64::from(head_dim)))
        };
        // Ahead of the output, whose rows are as long as those of the values where the call has made it.
        let pool = |tensor: &Tensor<'_>, head_dim: u32| kv_strides(tensor, facts, layout, head_dim);
        let (k_strides, v_strides) = (pool(k, head_dim)?, pool(v, v_head_dim)?);
        let mut least_rows = q.sizes[0].min(out.sizes[0]);
        let (q_strides, out_strides) = (rows(q, head_dim)?, rows(out, v_head_dim)?);
        check_distinct_rows(out)?;
        let lse = match lse {
            None => None,
            Some(lse) => {
                lse.expect_element(&Element::F32)?;
                lse.expect_device(device, "as q")?;
                lse.expect_writable()?;
                let strides = row_strides(lse, facts.rows, shape.q_heads(), None)?;
                check_distinct_rows(lse)?;
                least_rows = least_rows.min(lse.sizes[0]);
                Some((Span::of(lse)?, strides))
            }
        };
        let mut problem = scores.of(Problem::new(shape, facts.page_size).with_reach(facts.reach));
        if facts.query_tree {
            problem = problem.with_query_tree(1);
        }
        let sinks = match sinks {
            None => None,
            Some(sinks) => {
                sinks.expect_element(&Element::F32)?;
                sinks.expect_device(device, "as q")?;
                check_heads(sinks, shape.q_heads(), "query head")?;
                problem = problem.with_sinks();
                Some(Span::of(sinks)?)
            }
        };
        Ok(Self {
            k_scale: Scale::new(scores.k_scale, k_scale.as_ref(), (device, "as q"), shape.kv_heads())?,
            v_scale: Scale::new(scores.v_scale, v_scale.as_ref(), (device, "as q"), shape.kv_heads())?,
            problem,
            num_pages: facts.num_pages,
            device,
            rows: u32::try_from(least_rows).unwrap_or(u32::MAX),
            q: Span::of(q)?,
            q_strides,
            k: Span::of(k)?,
            k_strides,
            v: Span::of(v)?,
            v_strides,
            out: Span::of(out)?,
            out_strides,
            lse,
            sinks,
        })
    }

    /// The call on device memory.
    pub(crate) fn args(&self) -> RunArgs {
        let spans = [self.q, self.k, self.v, self.out].map(foreign::device_span);
        let mut args = RunArgs::new(self.problem, self.num_pages, self.rows, spans.into())
            .with_kv_strides(self.k_strides, self.v_strides)
            .with_row_strides(self.q_strides, self.out_strides)
            .with_kv_scales(self.k_scale.of_device(), self.v_scale.of_device());
        if let Some((span, strides)) = self.lse {
            args = args.with_lse(foreign::device_span(span), strides);
        }
        match self.sinks {
            Some(span) => args.with_sinks(foreign::device_span(span)),
            None => args,
        }
    }

    /// Refuses outputs that share memory with an input or with each other.
    pub(crate) fn check_outputs_are_apart(&self) -> Result<()> {
        let sinks = self.sinks.map(|span| ("sinks", span));
        let scales = [("k_scale", self.k_scale), ("v_scale", self.v_scale)];
        let scales = scales.into_iter().filter_map(|(name, scale)| scale.span().map(|span| (name, span)));
        let inputs = [("q", self.q), ("k_cache", self.k), ("v_cache", self.v)].into_iter().chain(sinks).chain(scales);
        let lse = self.lse.map(|(span, _)| ("lse", span));
        for (name, output) in std::iter::once(("out", self.out)).chain(lse) {
            let others = inputs.clone().chain(lse);
            if let Some((other, _)) = others.filter(|other| other.0 != name).find(|other| other.1.overlaps(output)) {
                return Err(invalid(name, format!("memory of {other}"), "memory of its own"));
            }
        }
        Ok(())
    }

    /// Refuses on host memory, ahead of any plan, what [`Self::run_host`] would: attention that no kernel computes, and factors.
    pub(crate) fn check_host(&self, tensors: &Tensors<'_>) -> Result<()> {
        pat_rs::supports(&self.problem, Some((self.k_strides, self.v_strides)), None).map_err(pat_rs::Error::from)?;
        foreign::check_host_scales(self, &tensors.all())
    }

    /// Executes on host memory.
    pub(crate) fn run_host(&self, plan: &Plan, tensors: &Tensors<'_>) -> Result<()> {
        let held = tensors.all();
        let shape = self.problem.shape();
        match (shape.dtype(), shape.kv_dtype()) {
            (Dtype::F16, Dtype::F16) => foreign::run_host::<half::f16, half::f16>(plan, self, &held),
            (Dtype::F16, Dtype::E4m3) => foreign::run_host::<half::f16, E4m3>(plan, self, &held),
            (Dtype::F16, Dtype::E5m2) => foreign::run_host::<half::f16, E5m2>(plan, self, &held),
            (Dtype::Bf16, Dtype::Bf16) => foreign::run_host::<half::bf16, half::bf16>(plan, self, &held),
            (Dtype::Bf16, Dtype::E4m3) => foreign::run_host::<half::bf16, E4m3>(plan, self, &held),
            (Dtype::Bf16, Dtype::E5m2) => foreign::run_host::<half::bf16, E5m2>(plan, self, &held),
            (other, _) => Err(invalid("q", other.name(), "float16 or bfloat16")),
        }
    }
}

/// Strides of Q or O, `[rows, q_heads, head_dim]`, or of LSE, `[rows, q_heads]`.
pub(crate) fn row_strides(tensor: &Tensor<'_>, rows: u32, q_heads: u32, head_dim: Option<i64>) -> Result<RowStrides> {
    let sizes = &tensor.sizes[..tensor.rank];
    let fits = match *sizes {
        [of_rows, heads] => head_dim.is_none() && of_rows >= i64::from(rows) && heads == i64::from(q_heads),
        [of_rows, heads, dim] => Some(dim) == head_dim && of_rows >= i64::from(rows) && heads == i64::from(q_heads),
        _ => false,
    };
    if !fits {
        let inner = head_dim.map_or(String::new(), |dim| format!(", {dim}"));
        let expected = format!("[rows, {q_heads}{inner}] with at least the plan's {rows} rows");
        return Err(invalid(tensor.name, format!("shape {}", tensor.shape()), expected));
    }
    check_strides(tensor, head_dim.is_some())?;
    Ok(RowStrides { sequence: tensor.strides[0], head: tensor.strides[1] })
}

/// Strides of a KV cache.
fn kv_strides(tensor: &Tensor<'_>, facts: &Facts, layout: KvLayout, head_dim: u32) -> Result<KvStrides> {
    let (page_size, kv_heads) = (i64::from(facts.page_size), i64::from(facts.shape.kv_heads()));
    let head_dim = i64::from(head_dim);
    let wanted = match layout {
        KvLayout::Nhd => [page_size, kv_heads, head_dim],
        KvLayout::Hnd => [kv_heads, page_size, head_dim],
    };
    if tensor.rank != 4 || tensor.sizes[1..] != wanted || tensor.sizes[0] < i64::from(facts.num_pages) {
        let expected = format!(
            "[pages, {}, {}, {}] ({}) with at least the plan's {} pages",
            wanted[0],
            wanted[1],
            wanted[2],
            layout.name(),
            facts.num_pages
        );
        return Err(invalid(tensor.name, format!("shape {}", tensor.shape()), expected));
    }
    check_strides(tensor, true)?;
    let [page, second, third, _] = tensor.strides;
    Ok(match layout {
        KvLayout::Nhd => KvStrides { page, token: second, head: third },
        KvLayout::Hnd => KvStrides { page, token: third, head: second },
    })
}

/// Refuses strides and addresses that no kernel can follow; a tensor of rows has a contiguous last dimension.
pub(crate) fn check_strides(tensor: &Tensor<'_>, has_rows: bool) -> Result<()> {
    let (sizes, strides) = (&tensor.sizes[..tensor.rank], &tensor.strides[..tensor.rank]);
    let is_empty = sizes.contains(&0);
    if is_empty {
        return Ok(());
    }
    let (outer, unit) = if has_rows {
        let inner = tensor.rank - 1;
        if strides[inner] != 1 {
            let expected = "a contiguous last dimension (stride 1)";
            return Err(invalid(tensor.name, format!("strides {strides:?}"), expected));
        }
        (&strides[..inner], (ALIGNMENT_BYTES / tensor.element.bytes().max(1)) as i64)
    } else {
        (strides, 1)
    };
    // A dimension of one entry has no stride that matters; torch gives it any number.
    let bad = |(&size, &stride): (&i64, &i64)| stride < 0 || (size > 1 && stride % unit != 0);
    if sizes.iter().zip(outer).any(bad) {
        let expected = format!("multiples of {unit} elements from 0 up in front of the last dimension");
        return Err(invalid(tensor.name, format!("strides {strides:?}"), expected));
    }
    let alignment = if has_rows { ALIGNMENT_BYTES } else { tensor.element.bytes() };
    if tensor.device != Device::Cpu && !tensor.address.is_multiple_of(alignment) {
        let expected = format!("an address that is a multiple of {alignment} bytes");
        return Err(invalid(tensor.name, format!("address {:#x}", tensor.address), expected));
    }
    Ok(())
}

/// Refuses outputs whose rows lie on top of each other, as an expanded tensor's do.
pub(crate) fn check_distinct_rows(tensor: &Tensor<'_>) -> Result<()> {
    let inner = if tensor.rank == 3 { tensor.sizes[2] } else { 1 };
    let dims = [(tensor.sizes[0], tensor.strides[0]), (tensor.sizes[1], tensor.strides[1])];
    let [slow, fast] = if dims[0].1 >= dims[1].1 { dims } else { [dims[1], dims[0]] };
    let fast_is_apart = fast.0 <= 1 || fast.1 >= inner;
    let fast_extent = (fast.0.max(1) - 1).saturating_mul(fast.1).saturating_add(inner);
    let slow_is_apart = slow.0 <= 1 || slow.1 >= fast_extent;
    // Interleaved rows, [a, b] with strides like (64, 96), are apart as well in rare cases; nobody lays out tensors so.
    if fast_is_apart && slow_is_apart {
        return Ok(());
    }
    let strides = &tensor.strides[..tensor.rank];
    Err(invalid(tensor.name, format!("strides {strides:?}"), "rows that do not overlap"))
}

/// Refuses sinks and factors that are not one number after the other, one for each of so many heads.
fn check_heads(numbers: &Tensor<'_>, heads: u32, of: &str) -> Result<()> {
    if numbers.rank != 1 || numbers.sizes[0] != i64::from(heads) {
        return Err(invalid(numbers.name, format!("shape {}", numbers.shape()), format!("[{heads}], one per {of}")));
    }
    if heads > 1 && numbers.strides[0] != 1 {
        let got = format!("strides [{}]", numbers.strides[0]);
        return Err(invalid(numbers.name, got, "a contiguous tensor (stride 1)"));
    }
    check_strides(numbers, false)
}
