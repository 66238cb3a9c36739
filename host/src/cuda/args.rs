//! The arguments of a run: device memory with explicit strides, checked before anything is launched.

use super::CudaDevice;
use super::plan_buffers::{BindingTerms, PlanTerms, Workspace};
use super::tensor_map::TensorMapSpec;
use crate::{AttentionShape, Error, KvStrides, Result, RowStrides};
use pat_abi::{FastDivisor, ForwardParams, MergeParams, TileVariant};
use std::any::Any;
use std::sync::Arc;

/// Bytes of an element of Q, K, V and O.
const ELEMENT_BYTES: i64 = 2;
/// Bytes of an element of LSE.
const LSE_BYTES: i64 = 4;
/// What the kernels' 128-bit loads, cp.async and TMA need of addresses and strides.
pub(super) const VECTOR_BYTES: u64 = 16;

/// A range of device memory, and whatever keeps it allocated.
///
/// Spans of a [`DeviceBuffer`](super::DeviceBuffer) keep the buffer's memory. Those of other libraries' memory
/// ([`Self::from_raw`]) can be given an owner ([`Self::with_owner`]), which a [`BoundRun`](super::BoundRun) then holds.
#[derive(Clone, Debug)]
pub struct DeviceSpan {
    /// Unknown for memory of other libraries.
    device: Option<CudaDevice>,
    address: u64,
    bytes: u64,
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl DeviceSpan {
    /// `bytes` bytes of device memory at `address`, allocated by somebody else (torch, candle, an engine).
    ///
    /// # Safety
    /// The range is accessible from the primary context of the device it is used with, and stays allocated until all work
    /// that was given the span has finished: runs, bound runs and graphs that hold them. An owner ([`Self::with_owner`])
    /// that keeps the range allocated as long as it lives fulfils the latter. Where it is given as an output or workspace,
    /// nothing else accesses it meanwhile.
    pub unsafe fn from_raw(address: u64, bytes: u64) -> Self {
        Self { device: None, address, bytes, owner: None }
    }

    pub(super) fn owned(device: CudaDevice, address: u64, bytes: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { device: Some(device), address, bytes, owner: Some(owner) }
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
        match self.device {
            Some(own) if own != device => Err(Error::invalid(
                name,
                format!("memory of device {}", own.ordinal()),
                format!("memory of device {}", device.ordinal()),
            )),
            _ => Ok(()),
        }
    }
}

/// One call of the operation: tensors in device memory. Strides are in elements.
///
/// Base addresses of Q, K, V and O are multiples of 16 bytes, their strides multiples of 8 elements, all strides 0 or
/// positive; the innermost dimension is contiguous.
#[derive(Clone, Debug)]
pub struct RunArgs {
    /// The model's attention shape; must be the plan's.
    pub shape: AttentionShape,
    /// Tokens per page; must be the plan's.
    pub page_size: u32,
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
    /// Factor on Q·K, usually `1 / sqrt(head_dim)`.
    pub softmax_scale: f32,
}

/// A run whose every check has passed: what the launch functions accept. Made by [`RunArgs::prepare`] only.
#[derive(Clone, Copy, Debug)]
pub(super) struct PreparedRun {
    pub(super) forward: ForwardParams,
    pub(super) merge: MergeParams,
    /// CTAs per tile variant.
    pub(super) forward_grids: [u32; TileVariant::ALL.len()],
    /// (merge row, query head) pairs; the kernel deals them to the CTAs there are.
    pub(super) merge_rows: u64,
    pub(super) shape: AttentionShape,
}

impl RunArgs {
    pub(super) fn terms(&self) -> PlanTerms {
        PlanTerms { shape: self.shape, page_size: self.page_size, num_pages: self.num_pages }
    }

    /// Checks everything that can be checked on the host, for plans of these arguments' [terms](Self::terms) at `plan_address`.
    pub(super) fn prepare(&self, plan: &BindingTerms, plan_address: u64, workspace: &Workspace) -> Result<PreparedRun> {
        let shape = self.shape;
        plan.terms.check_are(&self.terms(), "the plan")?;
        if self.rows < plan.limits.max_sequences {
            return Err(Error::invalid(
                "rows",
                self.rows,
                format!("at least the plan's {}", plan.limits.max_sequences),
            ));
        }
        // The kernels scale the running maximum, which only a positive factor keeps a maximum.
        if !(self.softmax_scale.is_finite() && self.softmax_scale > 0.0) {
            return Err(Error::invalid("softmax_scale", self.softmax_scale, "a positive finite number"));
        }
        let row_counts = [u64::from(self.rows), u64::from(shape.q_heads())];
        let head_dim = u64::from(shape.head_dim());
        let rows = |name, span: &DeviceSpan, strides: RowStrides| {
            let dims = [("sequence", row_counts[0], strides.sequence), ("head", row_counts[1], strides.head)];
            check_tensor(name, span, &dims, head_dim, ELEMENT_BYTES, VECTOR_BYTES)
        };
        rows("q", &self.q, self.q_strides)?;
        rows("out", &self.out, self.out_strides)?;
        let pool = |name, span: &DeviceSpan, strides: KvStrides| {
            let dims = [
                ("page", u64::from(self.num_pages), strides.page),
                ("token", u64::from(self.page_size), strides.token),
                ("head", u64::from(shape.kv_heads()), strides.head),
            ];
            check_tensor(name, span, &dims, head_dim, ELEMENT_BYTES, VECTOR_BYTES)
        };
        pool("k", &self.k, self.k_strides)?;
        pool("v", &self.v, self.v_strides)?;
        if let Some((span, strides)) = &self.lse {
            let dims = [("sequence", row_counts[0], strides.sequence), ("head", row_counts[1], strides.head)];
            check_tensor("lse", span, &dims, 1, LSE_BYTES, LSE_BYTES as u64)?;
        }
        let (partial_out, partial_lse) = workspace.layout(shape, plan.limits.max_slots)?;

        let mut forward_grids = [0; TileVariant::ALL.len()];
        for variant in TileVariant::ALL {
            forward_grids[variant.index()] = plan.limits.max_items[variant.index()]
                .checked_mul(shape.kv_heads())
                .filter(|&ctas| ctas < 1 << 31)
                .ok_or_else(|| {
                    let items = plan.limits.max_items[variant.index()];
                    Error::invalid(format!("plan items of {}", variant.name()), items, "fewer than 2^31 / kv_heads")
                })?;
        }
        let (lse, lse_strides) = self
            .lse
            .as_ref()
            .map_or((0, RowStrides { sequence: 0, head: 0 }), |(span, strides)| (span.address, *strides));
        // `check_tensor` has shown that every stride in bytes fits.
        let forward = ForwardParams {
            plan: plan_address,
            q: self.q.address,
            k: self.k.address,
            v: self.v.address,
            out: self.out.address,
            lse,
            partial_out,
            partial_lse,
            q_sequence_stride: self.q_strides.sequence * ELEMENT_BYTES,
            q_head_stride: self.q_strides.head * ELEMENT_BYTES,
            k_page_stride: self.k_strides.page * ELEMENT_BYTES,
            k_token_stride: self.k_strides.token * ELEMENT_BYTES,
            k_head_stride: self.k_strides.head * ELEMENT_BYTES,
            v_page_stride: self.v_strides.page * ELEMENT_BYTES,
            v_token_stride: self.v_strides.token * ELEMENT_BYTES,
            v_head_stride: self.v_strides.head * ELEMENT_BYTES,
            out_sequence_stride: self.out_strides.sequence * ELEMENT_BYTES,
            out_head_stride: self.out_strides.head * ELEMENT_BYTES,
            lse_sequence_stride: lse_strides.sequence * LSE_BYTES,
            lse_head_stride: lse_strides.head * LSE_BYTES,
            scale_log2: self.softmax_scale * std::f32::consts::LOG2_E,
            kv_heads: shape.kv_heads(),
            group: FastDivisor::new(shape.group()),
            page_size: FastDivisor::new(self.page_size),
            kv_heads_divisor: FastDivisor::new(shape.kv_heads()),
            num_pages: self.num_pages,
            reserved: 0,
        };
        let merge = MergeParams {
            plan: plan_address,
            out: forward.out,
            lse,
            partial_out,
            partial_lse,
            out_sequence_stride: forward.out_sequence_stride,
            out_head_stride: forward.out_head_stride,
            lse_sequence_stride: forward.lse_sequence_stride,
            lse_head_stride: forward.lse_head_stride,
            q_heads: FastDivisor::new(shape.q_heads()),
        };
        let merge_rows = u64::from(plan.limits.max_merge_rows) * u64::from(shape.q_heads());
        // The merge kernels divide a row index with `FastDivisor`, which takes dividends below 2^31.
        if merge_rows >= 1 << 31 {
            return Err(Error::invalid("plan merge rows * q_heads", merge_rows, "fewer than 2^31"));
        }
        Ok(PreparedRun { forward, merge, forward_grids, merge_rows, shape })
    }

    /// Every span with its name.
    pub(super) fn spans(&self) -> impl Iterator<Item = (&'static str, &DeviceSpan)> {
        let fixed = [("q", &self.q), ("k", &self.k), ("v", &self.v), ("out", &self.out)];
        fixed.into_iter().chain(self.lse.iter().map(|(span, _)| ("lse", span)))
    }

    /// The tensor maps of K and V, in the order the kernels take them.
    pub(super) fn tensor_maps(&self) -> Result<[TensorMapSpec; 2]> {
        let map = |name, span: &DeviceSpan, strides| {
            TensorMapSpec::new(name, span.address, strides, self.shape, self.page_size, self.num_pages)
        };
        Ok([map("k", &self.k, self.k_strides)?, map("v", &self.v, self.v_strides)?])
    }
}

pub(super) fn same<T: PartialEq + std::fmt::Debug>(what: &str, plan: T, call: T) -> Result<()> {
    if plan == call {
        return Ok(());
    }
    Err(Error::PlanMismatch { what: what.into(), plan: format!("{plan:?}"), call: format!("{call:?}") })
}

/// Checks the address, the strides and that the furthest element lies inside the span. `dims` are (name, size, stride
/// in elements), `row` is the length of the contiguous innermost dimension.
pub(super) fn check_tensor(
    name: &str,
    span: &DeviceSpan,
    dims: &[(&str, u64, i64)],
    row: u64,
    element_bytes: i64,
    alignment: u64,
) -> Result<()> {
    let mut last = i128::from(row) - 1;
    for &(dim, size, stride) in dims {
        let aligned =
            stride.checked_mul(element_bytes).is_some_and(|b| b >= 0 && b.unsigned_abs().is_multiple_of(alignment));
        if !aligned {
            return Err(Error::invalid(
                format!("{name}_strides.{dim}"),
                format!("{stride} elements"),
                format!("0 or a positive multiple of {} elements", alignment / element_bytes.unsigned_abs()),
            ));
        }
        last += (i128::from(size) - 1).max(0) * i128::from(stride);
    }
    if dims.iter().any(|&(_, size, _)| size == 0) {
        return Ok(());
    }
    if span.address == 0 || !span.address.is_multiple_of(alignment) {
        return Err(Error::invalid(
            name,
            format!("address {:#x}", span.address),
            format!("a device address that is a multiple of {alignment} bytes"),
        ));
    }
    let needed = (last + 1) * i128::from(element_bytes);
    if needed > i128::from(span.bytes) {
        return Err(Error::invalid(
            name,
            format!("{} bytes", span.bytes),
            format!("at least {needed} bytes, which its sizes and strides span"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    /// Nothing is launched here.
    fn bytes_at(address: u64, bytes: u64) -> DeviceSpan {
        DeviceSpan { device: None, address, bytes, owner: None }
    }

    fn span(address: u64, elements: u64) -> DeviceSpan {
        bytes_at(address, elements * 2)
    }

    fn valid() -> (RunArgs, BindingTerms, Workspace) {
        let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
        let strides = RowStrides::contiguous(8, 128);
        let pool = KvStrides::nhd(16, 2, 128);
        let args = RunArgs {
            shape,
            page_size: 16,
            num_pages: 10,
            rows: 4,
            q: span(0x1000, 4 * 8 * 128),
            q_strides: strides,
            k: span(0x10_0000, 10 * 16 * 2 * 128),
            k_strides: pool,
            v: span(0x20_0000, 10 * 16 * 2 * 128),
            v_strides: pool,
            out: span(0x30_0000, 4 * 8 * 128),
            out_strides: strides,
            lse: Some((bytes_at(0x40_0004, 4 * 8 * 4), RowStrides::lse(8))),
            softmax_scale: 0.125,
        };
        let mut limits = super::super::LaunchGeometry { max_sequences: 3, max_slots: 5, ..Default::default() };
        limits.max_items[TileVariant::Mma16.index()] = 6;
        limits.max_merge_rows = 2;
        let plan = BindingTerms { terms: args.terms(), limits, generation: None };
        (args, plan, Workspace::from_span(bytes_at(0x50_0000, 5 * 8 * 129 * 4)))
    }

    #[test]
    fn valid_arguments_become_byte_strides_and_grids() {
        let (args, plan, workspace) = valid();
        let run = args.prepare(&plan, 0x60_0000, &workspace).unwrap();
        assert_eq!(run.forward.k_page_stride, 16 * 2 * 128 * 2);
        assert_eq!(run.forward.lse_sequence_stride, 32);
        assert_eq!(run.forward.group.divisor, 4);
        assert_eq!(run.forward_grids[TileVariant::Mma16.index()], 12);
        assert_eq!(run.merge_rows, 16);
        assert_eq!(run.forward.partial_lse - run.forward.partial_out, 5 * 8 * 128 * 4);
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
            ("q:", with(&|a| a.q = bytes_at(0x1000, q_bytes - 2))),
            ("k:", with(&|a| a.k = span(0x10_0000, 10 * 16 * 2 * 128 - 1))),
            ("v:", with(&|a| a.v = span(0x20_0002, 1 << 20))),
            ("out:", with(&|a| a.out = span(0x30_0000, 8))),
            ("q_strides.head", with(&|a| a.q_strides.head = 129)),
            ("q_strides.sequence", with(&|a| a.q_strides.sequence = -1024)),
            ("k_strides.page", with(&|a| a.k_strides.page = i64::MAX)),
            ("v_strides.token", with(&|a| a.v_strides.token = 4)),
            ("lse:", with(&|a| a.lse = Some((bytes_at(0x2, 1 << 20), RowStrides::lse(8))))),
            ("softmax_scale", with(&|a| a.softmax_scale = f32::NAN)),
            ("rows", with(&|a| a.rows = 2)),
            ("num_pages", with(&|a| a.num_pages = 11)),
            ("page_size", with(&|a| a.page_size = 32)),
            ("shape", with(&|a| a.shape = AttentionShape::new(8, 4, 128, Dtype::F16).unwrap())),
        ];
        for (name, args) in cases {
            let error = args.prepare(&plan, 0x60_0000, &workspace).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        let small = Workspace::from_span(bytes_at(0x50_0000, 5 * 8 * 129 * 4 - 4));
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
