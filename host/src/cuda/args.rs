//! The arguments of a run: device memory with explicit strides, checked before anything is launched.

use super::CudaDevice;
use super::plan_buffers::{BindingTerms, PlanTerms, Workspace};
use super::tensor_map::TensorMapSpec;
use crate::arguments::{Accessed, LSE_BYTES, RunTensors};
use crate::eligibility::VECTOR_BYTES;
use crate::features::SINK_BYTES;
use crate::{AttentionShape, Error, KvScale, KvStrides, Problem, Result, RowStrides};
use pat_abi::manifest::MergeShape;
use pat_abi::{
    FastDivisor, ForwardParams, GroupParts, MergeParams, PlanHeader, RUN_PAGES, ScaledForwardParams, TileVariant,
};
use std::any::Any;
use std::sync::Arc;

/// A range of device memory, and whatever keeps it allocated.
///
/// Spans of a [`DeviceBuffer`](super::DeviceBuffer) keep the buffer's memory. Those of other libraries' memory
/// ([`Self::from_raw`]) can be given an owner ([`Self::with_owner`]), which a [`BoundRun`](super::BoundRun) then holds.
#[derive(Clone, Debug)]
pub struct DeviceSpan {
    home: Home,
    address: u64,
    bytes: u64,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

/// Where a span's memory is.
#[derive(Clone, Copy, Debug)]
enum Home {
    Device(CudaDevice),
    /// Of other libraries' memory it is not known.
    Foreign,
    /// On no device: a span that nothing is launched with.
    #[cfg(any(test, feature = "launch-records"))]
    Nowhere,
}

impl DeviceSpan {
    /// `bytes` bytes of device memory at `address`, allocated by somebody else (torch, candle, an engine).
    ///
    /// # Safety
    /// The range is accessible from the primary context of the device it is used with, and stays allocated until all work
    /// that was given the span has finished: runs, bound runs and graphs that hold them. An owner ([`Self::with_owner`])
    /// that keeps the range allocated as long as it lives fulfils the latter. Where it is given as an output or workspace,
    /// nothing else accesses it meanwhile.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn from_raw(address: u64, bytes: u64) -> Self {
        Self { home: Home::Foreign, address, bytes, owner: None }
    }

    pub(super) fn owned(device: CudaDevice, address: u64, bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { home: Home::Device(device), address, bytes, owner: Some(owner) }
    }

    /// A span that nothing is launched with.
    #[cfg(any(test, feature = "launch-records"))]
    pub(super) fn of_nothing(address: u64, bytes: u64) -> Self {
        Self { home: Home::Nowhere, address, bytes, owner: None }
    }

    /// The same range; `owner` is kept as long as the span, its clones, and the runs bound to it. It may be dropped on any
    /// thread.
    pub fn with_owner(self, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let owner = match self.owner {
            None => owner,
            Some(former) => Arc::new((former, owner)),
        };
        Self { owner: Some(owner), ..self }
    }

    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The part from `offset_bytes` on (V inside K's row; a row subset; LSE behind O).
    ///
    /// # Errors
    /// `offset_bytes` is beyond the end.
    pub fn skip(&self, offset_bytes: u64) -> Result<Self> {
        if offset_bytes > self.bytes {
            return Err(Error::invalid("offset_bytes", offset_bytes, format!("at most {} bytes", self.bytes)));
        }
        Ok(Self { address: self.address + offset_bytes, bytes: self.bytes - offset_bytes, ..self.clone() })
    }

    pub(super) fn owner(&self) -> Option<&Arc<dyn Any + Send + Sync>> {
        self.owner.as_ref()
    }

    /// Refuses memory that is known to be another device's.
    pub(super) fn check_device(&self, name: &str, device: CudaDevice) -> Result<()> {
        let own = match self.home {
            Home::Device(own) if own != device => format!("memory of device {}", own.ordinal()),
            Home::Device(_) | Home::Foreign => return Ok(()),
            #[cfg(any(test, feature = "launch-records"))]
            Home::Nowhere => "memory of no device".into(),
        };
        Err(Error::invalid(name, own, format!("memory of device {}", device.ordinal())))
    }
}

/// One call of the operation: tensors in device memory. Strides are in elements.
///
/// Base addresses of Q, K, V and O are multiples of 16 bytes, their strides multiples of 8 elements, all strides 0 or
/// positive; the innermost dimension is contiguous.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RunArgs {
    /// What is computed; must be what the plan was made for, but for what happens to scores.
    pub problem: Problem,
    /// Pages in the K and V pools; must be the plan's.
    pub num_pages: u32,
    /// Rows of Q, O and LSE: at least the plan's; rows beyond the plan's are not touched.
    pub rows: u32,
    /// Queries: 16-bit `[rows, q_heads, head_dim]`.
    pub q: DeviceSpan,
    /// Strides of Q.
    pub q_strides: RowStrides,
    /// Key pool: 16-bit `[num_pages, page_size, kv_heads, head_dim]`, in any order of the outer dimensions.
    pub k: DeviceSpan,
    /// Strides of K.
    pub k_strides: KvStrides,
    /// Value pool, as the key pool; may lie inside it.
    pub v: DeviceSpan,
    /// Strides of V.
    pub v_strides: KvStrides,
    /// Output: 16-bit `[rows, q_heads, head_dim]`.
    pub out: DeviceSpan,
    /// Strides of O.
    pub out_strides: RowStrides,
    /// Log-sum-exp output: f32 `[rows, q_heads]`, natural logarithm.
    pub lse: Option<(DeviceSpan, RowStrides)>,
    /// Attention sinks: f32 `[q_heads]`; given where the problem has some.
    pub sinks: Option<DeviceSpan>,
    /// Factor of K's elements.
    pub k_scale: DeviceKvScale,
    /// Factor of V's elements.
    pub v_scale: DeviceKvScale,
}

/// What the elements of an 8-bit K or V are multiplied with; of other types it is 1.
#[derive(Clone, Debug)]
pub enum DeviceKvScale {
    /// All with the same factor.
    Tensor(f32),
    /// Those of a KV head with that head's: f32 `[kv_heads]`. They are not looked at: rows of a head whose factor is not
    /// finite or not positive have no defined output.
    Heads(DeviceSpan),
}

impl DeviceKvScale {
    pub(super) fn check(&self, name: &'static str, kv_heads: u32, is_eight_bit: bool) -> Result<()> {
        match self {
            Self::Tensor(scale) => KvScale::Tensor(*scale).check(name, kv_heads, is_eight_bit),
            Self::Heads(_) if !is_eight_bit => {
                Err(Error::invalid(name, "factors of heads", "1 where K and V do not have 8 bits"))
            }
            Self::Heads(span) => {
                let needed = u64::from(kv_heads) * u64::from(SCALE_BYTES);
                if span.bytes < needed {
                    let got = format!("{} factors", span.bytes / u64::from(SCALE_BYTES));
                    let expected = format!("at least {kv_heads}, one for each KV head");
                    return Err(Error::invalid(name, got, expected));
                }
                Ok(())
            }
        }
    }

    pub(super) fn span(&self) -> Option<&DeviceSpan> {
        match self {
            Self::Tensor(_) => None,
            Self::Heads(span) => Some(span),
        }
    }

    /// The factor of all elements, and the address of the heads' or 0.
    pub(super) fn params(&self) -> (f32, u64) {
        match self {
            Self::Tensor(scale) => (*scale, 0),
            Self::Heads(span) => (1.0, span.address),
        }
    }
}

/// Bytes of a factor.
pub(super) const SCALE_BYTES: u32 = 4;

/// Bytes of an element of a partial.
const PARTIAL_BYTES: u32 = 4;

/// A run whose every check has passed: what the launch functions accept. Made by [`RunArgs::prepare`] only.
#[derive(Clone, Copy, Debug)]
pub(super) struct PreparedRun {
    /// Of the items whose entries are pages, and of those in runs of pages.
    pub(super) forward: [ForwardLaunches; 2],
    pub(super) merge: MergeParams,
    /// (merge row, query head) pairs, at wide heads in parts ([`MergeShape`]); the kernel deals them to the CTAs there are.
    pub(super) merge_rows: u64,
    pub(super) shape: AttentionShape,
}

impl PreparedRun {
    /// Whether some launch is of this variant.
    pub(super) fn launches(&self, variant: TileVariant) -> bool {
        self.forward.iter().any(|launches| launches.grids[variant.index()] > 0)
    }
}

/// The forward launches of items with entries of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct ForwardLaunches {
    /// Kernels of 16-bit K and V take the first part of it alone.
    params: ScaledForwardParams,
    /// Pieces of work per tile variant.
    pub(super) grids: [u32; TileVariant::ALL.len()],
    /// [`super::LaunchGeometry::ctas`].
    pub(super) ctas: [u32; TileVariant::ALL.len()],
    shape: AttentionShape,
}

impl ForwardLaunches {
    /// `max_items` are the items of each variant.
    fn new(
        params: ScaledForwardParams,
        shape: AttentionShape,
        max_items: [u32; TileVariant::ALL.len()],
        ctas: [u32; TileVariant::ALL.len()],
    ) -> Result<Self> {
        let mut grids = [0; TileVariant::ALL.len()];
        for variant in TileVariant::ALL {
            let items = max_items[variant.index()];
            grids[variant.index()] =
                items.checked_mul(shape.kv_heads()).filter(|&ctas| ctas < 1 << 31).ok_or_else(|| {
                    Error::invalid(format!("plan items of {}", variant.name()), items, "fewer than 2^31 / kv_heads")
                })?;
        }
        Ok(Self { params, grids, ctas, shape })
    }

    /// With Q and O at other addresses.
    pub(super) fn with_addresses(self, q: u64, out: u64) -> Self {
        let forward = ForwardParams { q, out, ..self.params.forward };
        Self { params: ScaledForwardParams { forward, ..self.params }, ..self }
    }

    /// The parameters of each launch of a tile variant's kernel: one for each part of a group.
    pub(super) fn of_variant(&self, variant: TileVariant) -> impl Iterator<Item = ScaledForwardParams> {
        let ScaledForwardParams { forward, .. } = self.params;
        let head_bytes = u64::from(self.shape.v_head_dim()) * u64::from(PARTIAL_BYTES);
        GroupParts::new(self.shape.group(), variant).first_heads().map(move |first_head| {
            let moved = |address: u64, head_stride: i64| match address {
                0 => 0,
                address => address.wrapping_add_signed(i64::from(first_head) * head_stride),
            };
            let forward = ForwardParams {
                q: moved(forward.q, forward.q_head_stride),
                out: moved(forward.out, forward.out_head_stride),
                lse: moved(forward.lse, forward.lse_head_stride),
                partial_out: forward.partial_out + u64::from(first_head) * head_bytes,
                partial_lse: forward.partial_lse + u64::from(first_head) * u64::from(PARTIAL_BYTES),
                denominators: forward.denominators.from_head(first_head),
                ..forward
            };
            ScaledForwardParams { forward, ..self.params }
        })
    }
}

/// The pages of a pool whose pages have one token, seen in runs: page `s` of this view are the pages from `s` on.
fn in_runs(strides: KvStrides) -> KvStrides {
    KvStrides { token: strides.page, ..strides }
}

/// Pages of that view: the last one ends with the pool.
fn runs_of(num_pages: u32) -> u32 {
    num_pages.saturating_sub(RUN_PAGES - 1)
}

impl RunArgs {
    /// A run without LSE on contiguous rows of Q and O and pools
    /// `[num_pages, page_size, kv_heads, head_dim]`; `(q, k, v, out)` are the tensors.
    pub fn new(
        problem: Problem,
        num_pages: u32,
        rows: u32,
        (q, k, v, out): (DeviceSpan, DeviceSpan, DeviceSpan, DeviceSpan),
    ) -> Self {
        let shape = problem.shape();
        let pool = |head_dim| KvStrides::nhd(problem.page_size(), shape.kv_heads(), head_dim);
        Self {
            problem,
            num_pages,
            rows,
            q,
            q_strides: RowStrides::contiguous(shape.q_heads(), shape.head_dim()),
            k,
            k_strides: pool(shape.head_dim()),
            v,
            v_strides: pool(shape.v_head_dim()),
            out,
            out_strides: RowStrides::contiguous(shape.q_heads(), shape.v_head_dim()),
            lse: None,
            sinks: None,
            k_scale: DeviceKvScale::Tensor(1.0),
            v_scale: DeviceKvScale::Tensor(1.0),
        }
    }

    /// With pools of other layouts.
    pub fn with_kv_strides(self, k_strides: KvStrides, v_strides: KvStrides) -> Self {
        Self { k_strides, v_strides, ..self }
    }

    /// With other layouts of Q and O.
    pub fn with_row_strides(self, q_strides: RowStrides, out_strides: RowStrides) -> Self {
        Self { q_strides, out_strides, ..self }
    }

    /// With log-sum-exps.
    pub fn with_lse(self, lse: DeviceSpan, strides: RowStrides) -> Self {
        Self { lse: Some((lse, strides)), ..self }
    }

    /// With attention sinks.
    pub fn with_sinks(self, sinks: DeviceSpan) -> Self {
        Self { sinks: Some(sinks), ..self }
    }

    /// With factors of K's and V's elements, which have 8 bits.
    pub fn with_kv_scales(self, k_scale: DeviceKvScale, v_scale: DeviceKvScale) -> Self {
        Self { k_scale, v_scale, ..self }
    }

    pub(super) fn terms(&self) -> PlanTerms {
        PlanTerms { planned: self.problem.planned(), num_pages: self.num_pages }
    }

    /// Checks everything that can be checked on the host, for plans of these arguments' [terms](Self::terms) at `plan_address`.
    pub(super) fn prepare(&self, plan: &BindingTerms, plan_address: u64, workspace: &Workspace) -> Result<PreparedRun> {
        let shape = self.problem.shape();
        plan.terms.check_are(&self.terms(), "the plan")?;
        if self.rows < plan.limits.max_sequences {
            return Err(Error::invalid(
                "rows",
                self.rows,
                format!("at least the plan's {}", plan.limits.max_sequences),
            ));
        }
        let is_eight_bit = shape.kv_dtype().bytes() == 1;
        self.k_scale.check("k_scale", shape.kv_heads(), is_eight_bit)?;
        self.v_scale.check("v_scale", shape.kv_heads(), is_eight_bit)?;
        let accessed = self.tensors().check(plan.terms.planned)?;
        self.problem.check_sinks(self.sinks.as_ref().map(|span| span.bytes / u64::from(SINK_BYTES)))?;
        self.check_memory(&accessed, workspace)?;
        let (partial_out, partial_lse) = workspace.layout(shape, plan.limits.max_slots)?;
        let (lse, lse_strides) = self
            .lse
            .as_ref()
            .map_or((0, RowStrides { sequence: 0, head: 0 }), |(span, strides)| (span.address, *strides));
        // `RunTensors::check` has shown that every stride in bytes fits.
        let [q_bytes, kv_bytes, out_bytes] =
            [shape.dtype(), shape.kv_dtype(), shape.out_dtype()].map(|dtype| i64::from(dtype.bytes()));
        let [scale_log2, map_scale] = self.problem.score_params();
        let forward = ForwardParams {
            plan: plan_address,
            q: self.q.address,
            k: self.k.address,
            v: self.v.address,
            out: self.out.address,
            lse,
            partial_out,
            partial_lse,
            denominators: self.problem.denominators(self.sinks.as_ref().map_or(0, |span| span.address)),
            q_sequence_stride: self.q_strides.sequence * q_bytes,
            q_head_stride: self.q_strides.head * q_bytes,
            k_page_stride: self.k_strides.page * kv_bytes,
            k_token_stride: self.k_strides.token * kv_bytes,
            k_head_stride: self.k_strides.head * kv_bytes,
            v_page_stride: self.v_strides.page * kv_bytes,
            v_token_stride: self.v_strides.token * kv_bytes,
            v_head_stride: self.v_strides.head * kv_bytes,
            out_sequence_stride: self.out_strides.sequence * out_bytes,
            out_head_stride: self.out_strides.head * out_bytes,
            lse_sequence_stride: lse_strides.sequence * i64::from(LSE_BYTES),
            lse_head_stride: lse_strides.head * i64::from(LSE_BYTES),
            scale_log2,
            kv_heads: shape.kv_heads(),
            group: FastDivisor::new(shape.group()),
            page_size: FastDivisor::new(self.problem.page_size()),
            kv_heads_divisor: FastDivisor::new(shape.kv_heads()),
            num_pages: self.num_pages,
            map_scale,
            page_keys: page_keys(self.problem.page_size()),
        };
        let merge = MergeParams {
            plan: plan_address,
            out: forward.out,
            lse,
            partial_out,
            partial_lse,
            denominators: forward.denominators,
            out_sequence_stride: forward.out_sequence_stride,
            out_head_stride: forward.out_head_stride,
            lse_sequence_stride: forward.lse_sequence_stride,
            lse_head_stride: forward.lse_head_stride,
            q_heads: FastDivisor::new(shape.q_heads()),
        };
        let parts = MergeShape::of(shape.v_head_dim()).parts;
        let merge_rows = u64::from(plan.limits.max_merge_rows) * u64::from(shape.q_heads() * parts);
        // The merge kernels divide a row index with `FastDivisor`, which takes dividends below 2^31.
        if merge_rows >= 1 << 31 {
            return Err(Error::invalid("plan merge rows * q_heads", merge_rows, "fewer than 2^31"));
        }
        let ((k_scale, k_scales), (v_scale, v_scales)) = (self.k_scale.params(), self.v_scale.params());
        let forward = ScaledForwardParams { forward, k_scale, v_scale, k_scales, v_scales };
        // Only plans for pages of one token have items in runs.
        let of_runs = ForwardParams {
            plan: plan_address + u64::from(PlanHeader::RUNS_OFFSET_BYTES),
            k_token_stride: in_runs(self.k_strides).token * kv_bytes,
            v_token_stride: in_runs(self.v_strides).token * kv_bytes,
            page_size: FastDivisor::new(RUN_PAGES),
            page_keys: page_keys(RUN_PAGES),
            num_pages: runs_of(self.num_pages),
            ..forward.forward
        };
        let forward = [
            ForwardLaunches::new(forward, shape, plan.limits.max_items, plan.limits.ctas)?,
            ForwardLaunches::new(
                ScaledForwardParams { forward: of_runs, ..forward },
                shape,
                plan.limits.max_run_items,
                [0; TileVariant::ALL.len()],
            )?,
        ];
        Ok(PreparedRun { forward, merge, merge_rows, shape })
    }

    /// The tensors as both executors check them.
    fn tensors(&self) -> RunTensors {
        let shape = self.problem.shape();
        let elements = |span: &DeviceSpan, element_bytes: u32| span.bytes / u64::from(element_bytes);
        RunTensors {
            problem: self.problem,
            num_pages: self.num_pages,
            rows: self.rows,
            q: (elements(&self.q, shape.dtype().bytes()), self.q_strides),
            k: (elements(&self.k, shape.kv_dtype().bytes()), self.k_strides),
            v: (elements(&self.v, shape.kv_dtype().bytes()), self.v_strides),
            out: (elements(&self.out, shape.out_dtype().bytes()), self.out_strides),
            lse: self.lse.as_ref().map(|(span, strides)| (elements(span, LSE_BYTES), *strides)),
        }
    }

    /// Checks where the tensors lie: aligned, and what is written apart from everything else.
    fn check_memory(&self, accessed: &Accessed, workspace: &Workspace) -> Result<()> {
        let shape = self.problem.shape();
        let kv_bytes = shape.kv_dtype().bytes();
        let q = Used::new("q", &self.q, accessed.q, shape.dtype().bytes(), VECTOR_BYTES)?;
        let k = Used::new("k", &self.k, accessed.k, kv_bytes, VECTOR_BYTES)?;
        let v = Used::new("v", &self.v, accessed.v, kv_bytes, VECTOR_BYTES)?;
        let out = Used::new("out", &self.out, accessed.out, shape.out_dtype().bytes(), VECTOR_BYTES)?;
        let lse = Used::optional("lse", self.lse.as_ref().map(|(span, _)| span), accessed.lse, LSE_BYTES)?;
        let sinks = Used::optional("sinks", self.sinks.as_ref(), u64::from(shape.q_heads()), SINK_BYTES)?;
        let of_heads =
            |name, scale: &DeviceKvScale| Used::optional(name, scale.span(), u64::from(shape.kv_heads()), SCALE_BYTES);
        let (k_scale, v_scale) = (of_heads("k_scale", &self.k_scale)?, of_heads("v_scale", &self.v_scale)?);
        let workspace = workspace.span();
        let workspace = Used { name: "workspace", address: workspace.address, bytes: workspace.bytes };
        for (written, others) in [
            (out, &[q, k, v, sinks, k_scale, v_scale, lse, workspace][..]),
            (lse, &[q, k, v, sinks, k_scale, v_scale, workspace]),
            (workspace, &[q, k, v, sinks, k_scale, v_scale]),
        ] {
            others.iter().try_for_each(|other| written.check_apart_from(other))?;
        }
        Ok(())
    }

    /// Every span with its name.
    pub(super) fn spans(&self) -> impl Iterator<Item = (&'static str, &DeviceSpan)> {
        let fixed = [("q", &self.q), ("k", &self.k), ("v", &self.v), ("out", &self.out)];
        let lse = self.lse.iter().map(|(span, _)| ("lse", span));
        let scales = [("k_scale", self.k_scale.span()), ("v_scale", self.v_scale.span())];
        let scales = scales.into_iter().filter_map(|(name, span)| span.map(|span| (name, span)));
        fixed.into_iter().chain(lse).chain(self.sinks.iter().map(|span| ("sinks", span))).chain(scales)
    }

    /// The tensor maps of K and V, in the order the kernels take them. Kernels that take some serve pages of one token in runs
    /// alone.
    pub(super) fn tensor_maps(&self) -> Result<[TensorMapSpec; 2]> {
        let shape = self.problem.shape();
        let map = |name, span: &DeviceSpan, strides| {
            if self.problem.page_size() == 1 {
                let pages = (runs_of(self.num_pages), RUN_PAGES);
                TensorMapSpec::new(name, span.address, in_runs(strides), shape, pages)
            } else {
                TensorMapSpec::new(name, span.address, strides, shape, (self.num_pages, self.problem.page_size()))
            }
        };
        Ok([map("k", &self.k, self.k_strides)?, map("v", &self.v, self.v_strides)?])
    }
}

/// Of the kernels that have [`ForwardParams::page_keys`].
fn page_keys(page_size: u32) -> FastDivisor {
    FastDivisor::new(TileVariant::Wgmma64.page_keys(page_size))
}

/// # Errors
/// The span starts at 0, or not at a multiple of `alignment` bytes.
pub(super) fn check_address(name: &str, span: &DeviceSpan, alignment: u32) -> Result<()> {
    if span.address != 0 && span.address.is_multiple_of(u64::from(alignment)) {
        return Ok(());
    }
    let expected = format!("a device address that is a multiple of {alignment} bytes");
    Err(Error::invalid(name, format!("address {:#x}", span.address), expected))
}

/// The memory that a run uses of a tensor, from its first byte to its last.
#[derive(Clone, Copy, Debug)]
struct Used {
    name: &'static str,
    address: u64,
    bytes: u64,
}

impl Used {
    /// The first `elements` elements of `span`, which holds them.
    ///
    /// # Errors
    /// There are some, and the span starts at 0 or not at a multiple of `alignment` bytes.
    fn new(name: &'static str, span: &DeviceSpan, elements: u64, element_bytes: u32, alignment: u32) -> Result<Self> {
        if elements > 0 {
            check_address(name, span, alignment)?;
        }
        Ok(Self { name, address: span.address, bytes: elements * u64::from(element_bytes) })
    }

    /// As [`Self::new`], aligned to elements, of a tensor that need not be there.
    fn optional(name: &'static str, span: Option<&DeviceSpan>, elements: u64, element_bytes: u32) -> Result<Self> {
        let absent = Self { name, address: 0, bytes: 0 };
        span.map_or(Ok(absent), |span| Self::new(name, span, elements, element_bytes, element_bytes))
    }

    /// # Errors
    /// The two share a byte.
    fn check_apart_from(&self, other: &Self) -> Result<()> {
        let end = |used: &Self| used.address.saturating_add(used.bytes);
        if self.bytes == 0 || other.bytes == 0 || self.address >= end(other) || other.address >= end(self) {
            return Ok(());
        }
        Err(Error::invalid(
            self.name,
            format!("{} bytes from {:#x} on", self.bytes, self.address),
            format!("memory apart from that of {}, {} bytes from {:#x} on", other.name, other.bytes, other.address),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn span(address: u64, elements: u64) -> DeviceSpan {
        DeviceSpan::of_nothing(address, elements * 2)
    }

    fn valid() -> (RunArgs, BindingTerms, Workspace) {
        let problem = Problem::new(AttentionShape::new(8, 2, 128, Dtype::F16).unwrap(), 16);
        let (rows, pages) = (4 * 8 * 128, 10 * 16 * 2 * 128);
        let spans = (span(0x1000, rows), span(0x10_0000, pages), span(0x20_0000, pages), span(0x30_0000, rows));
        let args = RunArgs::new(problem, 10, 4, spans)
            .with_lse(DeviceSpan::of_nothing(0x40_0004, 4 * 8 * 4), RowStrides::lse(8));
        let mut limits = super::super::LaunchGeometry { max_sequences: 3, max_slots: 5, ..Default::default() };
        limits.max_items[TileVariant::Mma16.index()] = 6;
        limits.max_merge_rows = 2;
        let plan = BindingTerms { terms: args.terms(), limits, generation: None };
        (args, plan, Workspace::from_span(DeviceSpan::of_nothing(0x50_0000, 5 * 8 * 129 * 4)))
    }

    #[test]
    fn valid_arguments_become_byte_strides_and_grids() {
        let (args, plan, workspace) = valid();
        let run = args.prepare(&plan, 0x60_0000, &workspace).unwrap();
        let [forward, of_runs] = run.forward;
        assert_eq!(forward.params.forward.k_page_stride, 16 * 2 * 128 * 2);
        assert_eq!(forward.params.forward.lse_sequence_stride, 32);
        assert_eq!(forward.params.forward.group.divisor, 4);
        assert_eq!(forward.grids[TileVariant::Mma16.index()], 12);
        assert_eq!(of_runs.grids, [0; TileVariant::ALL.len()]);
        assert_eq!(run.merge_rows, 16);
        let params = forward.params.forward;
        assert_eq!(params.partial_lse - params.partial_out, 5 * 8 * 128 * 4);
    }

    #[test]
    fn every_bad_argument_is_named() {
        let (good, plan, workspace) = valid();
        let with = |change: &dyn Fn(&mut RunArgs)| {
            let mut args = good.clone();
            change(&mut args);
            args
        };
        let q_bytes = good.q.bytes();
        let cases = [
            ("q:", with(&|a| a.q = span(0x1008, 1 << 20))),
            ("q:", with(&|a| a.q = span(0, 1 << 20))),
            ("q:", with(&|a| a.q = DeviceSpan::of_nothing(0x1000, q_bytes - 2))),
            ("k:", with(&|a| a.k = span(0x10_0000, 10 * 16 * 2 * 128 - 1))),
            ("v:", with(&|a| a.v = span(0x20_0002, 1 << 20))),
            ("out:", with(&|a| a.out = span(0x30_0000, 8))),
            ("q_strides.head", with(&|a| a.q_strides.head = 129)),
            ("q_strides.sequence", with(&|a| a.q_strides.sequence = -1024)),
            ("k_strides.page", with(&|a| a.k_strides.page = i64::MAX)),
            ("v_strides.token", with(&|a| a.v_strides.token = 4)),
            ("lse:", with(&|a| a.lse = Some((DeviceSpan::of_nothing(0x2, 1 << 20), RowStrides::lse(8))))),
            ("sinks", with(&|a| a.problem = a.problem.with_sinks())),
            ("sinks", with(&|a| a.sinks = Some(DeviceSpan::of_nothing(0x70_0000, 32)))),
            ("softmax_scale", with(&|a| a.problem = a.problem.with_scale(f32::NAN))),
            ("rows", with(&|a| a.rows = 2)),
            ("num_pages", with(&|a| a.num_pages = 11)),
            ("page_size", with(&|a| a.problem = Problem::new(a.problem.shape(), 32))),
            ("shape", with(&|a| a.problem = Problem::new(AttentionShape::new(8, 4, 128, Dtype::F16).unwrap(), 16))),
            ("out_strides.sequence", with(&|a| a.out_strides.sequence = 0)),
            (
                "out: got 8192 bytes from 0x2ff0 on, expected memory apart from that of q",
                with(&|a| a.out = span(0x2ff0, 1 << 20)),
            ),
            ("out: got", with(&|a| a.out = span(0x20_0000 + 2 * 10 * 16 * 2 * 128 - 16, 1 << 20))),
            ("out: got 8192 bytes from 0x4fe010 on", with(&|a| a.out = span(0x4f_e010, 1 << 20))),
            ("lse: got 128 bytes from 0x1000 on", with(&|a| a.lse = Some((span(0x1000, 64), RowStrides::lse(8))))),
        ];
        for (name, args) in cases {
            let error = args.prepare(&plan, 0x60_0000, &workspace).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        // Side by side is apart.
        with(&|a| a.out = span(0x3000, 4 * 8 * 128)).prepare(&plan, 0x60_0000, &workspace).unwrap();
        let small = Workspace::from_span(DeviceSpan::of_nothing(0x50_0000, 5 * 8 * 129 * 4 - 4));
        let error = good.prepare(&plan, 0x60_0000, &small).unwrap_err().to_string();
        assert!(error.contains("workspace"), "{error}");
    }

    #[test]
    fn v_may_lie_inside_the_rows_of_k() {
        let (mut args, plan, workspace) = valid();
        let pool = KvStrides { page: 16 * 2 * 256, token: 2 * 256, head: 256 };
        args.k = span(0x10_0000, 10 * 16 * 2 * 256);
        args.v = args.k.skip(256).unwrap();
        (args.k_strides, args.v_strides) = (pool, pool);
        args.prepare(&plan, 0x60_0000, &workspace).unwrap();
        assert!(args.k.skip(args.k.bytes() + 1).is_err());
    }
}
