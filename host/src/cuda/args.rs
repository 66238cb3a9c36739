//! The arguments of a run: raw device memory with explicit strides, checked before anything is launched.

use super::plan_buffers::{PlanBuffers, Uploaded, Workspace};
use super::tensor_map::TensorMapSpec;
use crate::plan::PlanGeneration;
use crate::{AttentionShape, Error, KvStrides, Result, RowStrides};
use pat_abi::{FastDivisor, ForwardParams, MergeParams, TileVariant};
use std::marker::PhantomData;

/// Bytes of an element of Q, K, V and O.
const ELEMENT_BYTES: i64 = 2;
/// Bytes of an element of LSE.
const LSE_BYTES: i64 = 4;
/// What the kernels' 128-bit loads, cp.async and TMA need of addresses and strides.
const VECTOR_BYTES: u64 = 16;

/// A range of device memory, borrowed from a [`DeviceBuffer`](super::DeviceBuffer) or vouched for by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSpan<'a> {
    address: u64,
    bytes: u64,
    owner: PhantomData<&'a ()>,
}

impl<'a> DeviceSpan<'a> {
    /// `bytes` bytes of device memory at `address`, allocated by somebody else (torch, candle, an engine).
    ///
    /// # Safety
    /// The range is accessible from the device's primary context, and stays allocated until all work that was given
    /// the span (graphs that captured it included) has finished. Where it is given as an output or workspace, nothing
    /// else accesses it meanwhile.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn from_raw(address: u64, bytes: u64) -> Self {
        Self::borrowed(address, bytes)
    }

    pub(super) fn borrowed(address: u64, bytes: u64) -> Self {
        Self { address, bytes, owner: PhantomData }
    }

    /// Device address of the first byte.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// The part from `offset_bytes` on (V inside K's row; a row subset; LSE behind O).
    ///
    /// # Errors
    /// `offset_bytes` is beyond the end.
    pub fn skip(self, offset_bytes: u64) -> Result<Self> {
        if offset_bytes > self.bytes {
            return Err(Error::invalid("offset_bytes", offset_bytes, format!("at most {} bytes", self.bytes)));
        }
        Ok(Self { address: self.address + offset_bytes, bytes: self.bytes - offset_bytes, owner: PhantomData })
    }
}

/// One call of the operation: tensors in device memory. Strides are in elements.
///
/// Base addresses of Q, K, V and O are multiples of 16 bytes, their strides multiples of 8 elements, all strides 0 or
/// positive; the innermost dimension is contiguous.
#[derive(Clone, Copy, Debug)]
pub struct RunArgs<'a> {
    /// The plan that is meant ([`crate::Plan::generation`]): a run is refused where another one is uploaded, so that a
    /// plan of an earlier step is not taken for this one's. `None`: whatever is uploaded, as a captured graph must.
    pub generation: Option<PlanGeneration>,
    /// The model's attention shape; must be the plan's.
    pub shape: AttentionShape,
    /// Tokens per page; must be the plan's.
    pub page_size: u32,
    /// Pages in the K and V pools; must be the plan's.
    pub num_pages: u32,
    /// Rows of Q, O and LSE: at least the plan's; rows beyond the plan's are not touched.
    pub rows: u32,
    /// Queries: 16-bit `[rows, q_heads, head_dim]`.
    pub q: DeviceSpan<'a>,
    /// Strides of Q.
    pub q_strides: RowStrides,
    /// Key pool: 16-bit `[num_pages, page_size, kv_heads, head_dim]`, in any order of the outer dimensions.
    pub k: DeviceSpan<'a>,
    /// Strides of K.
    pub k_strides: KvStrides,
    /// Value pool, as the key pool; may lie inside it.
    pub v: DeviceSpan<'a>,
    /// Strides of V.
    pub v_strides: KvStrides,
    /// Output: 16-bit `[rows, q_heads, head_dim]`.
    pub out: DeviceSpan<'a>,
    /// Strides of O.
    pub out_strides: RowStrides,
    /// Log-sum-exp output: f32 `[rows, q_heads]`, natural logarithm.
    pub lse: Option<(DeviceSpan<'a>, RowStrides)>,
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

impl RunArgs<'_> {
    /// Checks everything that can be checked on the host.
    pub(super) fn prepare(&self, plan: &PlanBuffers, workspace: &Workspace<'_>) -> Result<PreparedRun> {
        let uploaded = plan.uploaded()?;
        self.check(&uploaded, workspace.span(), plan.address())
    }

    fn check(&self, plan: &Uploaded, workspace: DeviceSpan<'_>, plan_address: u64) -> Result<PreparedRun> {
        let shape = self.shape;
        if let Some(meant) = self.generation {
            same("the plan uploaded last", plan.generation, meant)?;
        }
        same("shape", plan.shape, shape)?;
        same("page_size", plan.page_size, self.page_size)?;
        same("num_pages", plan.num_pages, self.num_pages)?;
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
        let rows = |name, span, strides: RowStrides| {
            let dims = [("sequence", row_counts[0], strides.sequence), ("head", row_counts[1], strides.head)];
            check_tensor(name, span, &dims, head_dim, ELEMENT_BYTES, VECTOR_BYTES)
        };
        rows("q", self.q, self.q_strides)?;
        rows("out", self.out, self.out_strides)?;
        let pool = |name, span, strides: KvStrides| {
            let dims = [
                ("page", u64::from(self.num_pages), strides.page),
                ("token", u64::from(self.page_size), strides.token),
                ("head", u64::from(shape.kv_heads()), strides.head),
            ];
            check_tensor(name, span, &dims, head_dim, ELEMENT_BYTES, VECTOR_BYTES)
        };
        pool("k", self.k, self.k_strides)?;
        pool("v", self.v, self.v_strides)?;
        if let Some((span, strides)) = self.lse {
            let dims = [("sequence", row_counts[0], strides.sequence), ("head", row_counts[1], strides.head)];
            check_tensor("lse", span, &dims, 1, LSE_BYTES, LSE_BYTES as u64)?;
        }
        let (partial_out, partial_lse) = Workspace::layout(workspace, shape, plan.limits.max_slots)?;

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
        let (lse, lse_strides) = self.lse.map_or((0, RowStrides { sequence: 0, head: 0 }), |(s, t)| (s.address, t));
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

    /// The tensor maps of K and V, in the order the kernels take them.
    pub(super) fn tensor_maps(&self) -> Result<[TensorMapSpec; 2]> {
        let map = |name, span: DeviceSpan<'_>, strides| {
            TensorMapSpec::new(name, span.address, strides, self.shape, self.page_size, self.num_pages)
        };
        Ok([map("k", self.k, self.k_strides)?, map("v", self.v, self.v_strides)?])
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, plan: T, call: T) -> Result<()> {
    if plan == call {
        return Ok(());
    }
    Err(Error::PlanMismatch { what: what.into(), plan: format!("{plan:?}"), call: format!("{call:?}") })
}

/// Checks the address, the strides and that the furthest element lies inside the span. `dims` are (name, size, stride
/// in elements), `row` is the length of the contiguous innermost dimension.
pub(super) fn check_tensor(
    name: &str,
    span: DeviceSpan<'_>,
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

    fn span(address: u64, elements: u64) -> DeviceSpan<'static> {
        DeviceSpan::borrowed(address, elements * 2)
    }

    fn valid() -> (RunArgs<'static>, Uploaded, DeviceSpan<'static>) {
        let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
        let strides = RowStrides::contiguous(8, 128);
        let pool = KvStrides::nhd(16, 2, 128);
        let generation = PlanGeneration::next();
        let args = RunArgs {
            generation: Some(generation),
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
            lse: Some((DeviceSpan::borrowed(0x40_0004, 4 * 8 * 4), RowStrides::lse(8))),
            softmax_scale: 0.125,
        };
        let mut limits = super::super::LaunchGeometry { max_sequences: 3, max_slots: 5, ..Default::default() };
        limits.max_items[TileVariant::Mma16.index()] = 6;
        limits.max_merge_rows = 2;
        let uploaded = Uploaded { generation, shape, page_size: 16, num_pages: 10, limits };
        (args, uploaded, DeviceSpan::borrowed(0x50_0000, 5 * 8 * 129 * 4))
    }

    #[test]
    fn valid_arguments_become_byte_strides_and_grids() {
        let (args, plan, workspace) = valid();
        let run = args.check(&plan, workspace, 0x60_0000).unwrap();
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
        let with = |change: &dyn Fn(&mut RunArgs<'static>)| {
            let mut args = good;
            change(&mut args);
            args
        };
        let q_span = good.q;
        let cases = [
            ("q:", with(&|a| a.q = span(0x1008, 1 << 20))),
            ("q:", with(&|a| a.q = span(0, 1 << 20))),
            ("q:", with(&|a| a.q = DeviceSpan::borrowed(q_span.address(), q_span.bytes() - 2))),
            ("k:", with(&|a| a.k = span(0x10_0000, 10 * 16 * 2 * 128 - 1))),
            ("v:", with(&|a| a.v = span(0x20_0002, 1 << 20))),
            ("out:", with(&|a| a.out = span(0x30_0000, 8))),
            ("q_strides.head", with(&|a| a.q_strides.head = 129)),
            ("q_strides.sequence", with(&|a| a.q_strides.sequence = -1024)),
            ("k_strides.page", with(&|a| a.k_strides.page = i64::MAX)),
            ("v_strides.token", with(&|a| a.v_strides.token = 4)),
            ("lse:", with(&|a| a.lse = Some((DeviceSpan::borrowed(0x2, 1 << 20), RowStrides::lse(8))))),
            ("softmax_scale", with(&|a| a.softmax_scale = f32::NAN)),
            ("the plan uploaded last", with(&|a| a.generation = Some(PlanGeneration::next()))),
            ("rows", with(&|a| a.rows = 2)),
            ("num_pages", with(&|a| a.num_pages = 11)),
            ("page_size", with(&|a| a.page_size = 32)),
            ("shape", with(&|a| a.shape = AttentionShape::new(8, 4, 128, Dtype::F16).unwrap())),
        ];
        for (name, args) in cases {
            let error = args.check(&plan, workspace, 0x60_0000).unwrap_err().to_string();
            assert!(error.contains(name), "{name}: {error}");
        }
        let small = DeviceSpan::borrowed(workspace.address(), workspace.bytes() - 4);
        let error = good.check(&plan, small, 0x60_0000).unwrap_err().to_string();
        assert!(error.contains("workspace"), "{error}");
    }

    #[test]
    fn v_may_lie_inside_the_rows_of_k() {
        let (mut args, plan, workspace) = valid();
        let pool = KvStrides { page: 16 * 2 * 256, token: 2 * 256, head: 256 };
        args.k = span(0x10_0000, 10 * 16 * 2 * 256);
        args.v = args.k.skip(256).unwrap();
        (args.k_strides, args.v_strides) = (pool, pool);
        args.check(&plan, workspace, 0x60_0000).unwrap();
        assert!(args.k.skip(args.k.bytes() + 1).is_err());
    }
}
