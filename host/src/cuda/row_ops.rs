//! What an engine needs around attention: writing new rows of K and V into a cache, and merging attention states. Device memory
//! with explicit strides, checked before anything is launched; `cpu::append_rows` and `cpu::merge_states` are the same on
//! the host.

use super::CudaEngine;
use super::DeviceSpan;
use super::args::{DeviceKvScale, SCALE_BYTES, check_address};
use super::driver::{self, Stream};
use crate::arguments::{Dimension, LSE_BYTES, check_apart, check_lse, check_tensor};
use crate::cpu::CacheLayout;
use crate::eligibility::VECTOR_BYTES;
use crate::{Dtype, Error, Result, RowStrides};
use pat_abi::{
    AppendParams, Family, FastDivisor, KernelSpec, MergeStatesParams, ScaledAppendParams, StateParams, Switches,
    manifest,
};

/// Bytes of an element of new rows, and of O.
const ELEMENT_BYTES: i64 = 2;
const SLOT_BYTES: u32 = 8;

/// New rows of K and V, `[rows, kv_heads, head_dim]`, and the caches they go to. K and V may have different head dims, each a
/// multiple of 8.
#[derive(Clone, Debug)]
pub struct AppendArgs {
    /// Type of the new rows, of 16 bits.
    pub dtype: Dtype,
    /// Type of the caches: that of the rows, or of 8 bits. Into the latter, elements are divided by their factor (in f32) and
    /// rounded to nearest even; what is too large, infinities among it, becomes the largest finite element, NaN the code 0x7f.
    pub kv_dtype: Dtype,
    /// Factor of K's elements; 1 where the caches do not have 8 bits.
    pub k_scale: DeviceKvScale,
    /// Likewise of V's.
    pub v_scale: DeviceKvScale,
    /// Rows.
    pub rows: u32,
    /// New K.
    pub k_new: DeviceSpan,
    /// Its layout.
    pub k_new_strides: RowStrides,
    /// New V.
    pub v_new: DeviceSpan,
    /// Its layout.
    pub v_new_strides: RowStrides,
    /// K cache.
    pub k_cache: DeviceSpan,
    /// Its extent and layout.
    pub k_layout: CacheLayout,
    /// V cache, of as many pages, tokens and heads; may lie inside the rows of the K cache.
    pub v_cache: DeviceSpan,
    /// Its extent and layout.
    pub v_layout: CacheLayout,
    /// `i64` for each row, `page * page_size + token in the page`. Rows with a negative slot, or one beyond the cache, are not
    /// written: the host cannot look at them.
    pub slots: DeviceSpan,
}

/// Outputs `[rows, heads, head_dim]` and natural log-sum-exps `[rows, heads]` of attention over some tokens.
#[derive(Clone, Debug)]
pub struct DeviceState {
    /// Outputs, 16-bit.
    pub out: DeviceSpan,
    /// Their layout.
    pub out_strides: RowStrides,
    /// Log-sum-exps, f32; −inf where there are no tokens, whatever the output is there.
    pub lse: DeviceSpan,
    /// Their layout.
    pub lse_strides: RowStrides,
}

impl CudaEngine {
    /// Enqueues the copy of new rows of K and V into their slots.
    ///
    /// # Errors
    /// An argument is refused (nothing has been launched), or the driver refuses the launch.
    pub fn append_kv(&self, args: &AppendArgs, stream: &Stream) -> Result<()> {
        let append = CheckedAppend::new(args)?;
        if args.rows == 0 {
            return Ok(());
        }
        let device = *self.device();
        for (name, span) in [
            ("k_new", &args.k_new),
            ("v_new", &args.v_new),
            ("k_cache", &args.k_cache),
            ("v_cache", &args.v_cache),
            ("slots", &args.slots),
        ] {
            span.check_device(name, device)?;
        }
        for (name, scale) in [("k_scale", &args.k_scale), ("v_scale", &args.v_scale)] {
            scale.span().map_or(Ok(()), |span| span.check_device(name, device))?;
        }
        let kernel = device.kernel(append.kernel, Switches::OFF)?;
        driver::launch_append(kernel, &append, &stream.enter(device)?)
    }

    /// Enqueues the merge of two attention states over disjoint sets of tokens. `merged` may be one of the two, and overlaps
    /// them no other way.
    ///
    /// # Errors
    /// An argument is refused (nothing has been launched), or the driver refuses the launch.
    pub fn merge_states(
        &self,
        (rows, heads, head_dim): (u32, u32, u32),
        dtype: Dtype,
        [a, b]: [&DeviceState; 2],
        merged: &DeviceState,
        stream: &Stream,
    ) -> Result<()> {
        let checked = CheckedMergeStates::new((rows, heads, head_dim), [a, b, merged])?;
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let device = *self.device();
        for state in [a, b, merged] {
            state.out.check_device("out", device)?;
            state.lse.check_device("lse", device)?;
        }
        let kernel = device.kernel(row_kernel(Family::MergeStates, dtype)?, Switches::OFF)?;
        driver::launch_merge_states(kernel, &checked, &stream.enter(device)?)
    }
}

/// Parameters whose tensors were checked to hold what the kernel reads and writes.
pub(super) struct CheckedAppend {
    pub(super) kernel: &'static KernelSpec,
    /// The kernel of caches of the rows' type takes the first part of it alone.
    pub(super) params: ScaledAppendParams,
    pub(super) ctas: u32,
}

impl CheckedAppend {
    pub(super) fn new(args: &AppendArgs) -> Result<Self> {
        if args.dtype.bytes() != 2 {
            return Err(Error::invalid("k_new", args.dtype.name(), "a type of 16 bits"));
        }
        let kernel = manifest::find_append(args.dtype, args.kv_dtype).ok_or_else(|| {
            let expected = format!("{}, or a type of 8 bits", args.dtype.name());
            Error::invalid("k_cache", args.kv_dtype.name(), expected)
        })?;
        let CacheLayout { num_pages, page_size, kv_heads, head_dim: k_dim, strides: k } = args.k_layout;
        let CacheLayout { head_dim: v_dim, strides: v, .. } = args.v_layout;
        if !args.v_layout.has_slots_and_heads_of(&args.k_layout) {
            let extent = |layout: &CacheLayout| {
                let CacheLayout { num_pages, page_size, kv_heads, .. } = layout;
                format!("{num_pages} pages of {page_size} tokens and {kv_heads} heads")
            };
            return Err(Error::invalid("v_cache", extent(&args.v_layout), extent(&args.k_layout)));
        }
        let (k_chunks, v_chunks) = (head_chunks("k_layout.head_dim", k_dim)?, head_chunks("v_layout.head_dim", v_dim)?);
        let chunks = k_chunks.max(v_chunks);
        if page_size == 0 || kv_heads == 0 {
            return Err(Error::invalid("page_size, kv_heads", format!("{page_size}, {kv_heads}"), "at least 1"));
        }
        let slots_end = below_2_31("num_pages * page_size", args.k_layout.slots())?;
        let work = below_2_31("rows * kv_heads * head_dim / 8", product([args.rows, kv_heads, chunks]))?;
        for (name, span, strides, head_dim) in
            [("k_new", &args.k_new, args.k_new_strides, k_dim), ("v_new", &args.v_new, args.v_new_strides, v_dim)]
        {
            let dims = [("sequence", args.rows, strides.sequence), ("head", kv_heads, strides.head)];
            check_span(name, span, &dims, head_dim, args.dtype)?;
        }
        for (name, span, strides, head_dim) in
            [("k_cache", &args.k_cache, k, k_dim), ("v_cache", &args.v_cache, v, v_dim)]
        {
            let dims = [
                ("page", num_pages, strides.page),
                ("token", page_size, strides.token),
                ("head", kv_heads, strides.head),
            ];
            check_span(name, span, &dims, head_dim, args.kv_dtype)?;
        }
        for (name, scale) in [("k_scale", &args.k_scale), ("v_scale", &args.v_scale)] {
            scale.check(name, kv_heads, args.kv_dtype.bytes() == 1)?;
            scale.span().map_or(Ok(()), |span| check_address(name, span, SCALE_BYTES))?;
        }
        if args.slots.bytes() < u64::from(args.rows) * u64::from(SLOT_BYTES) {
            let expected = format!("{SLOT_BYTES} for each of {} rows", args.rows);
            return Err(Error::invalid("slots", format!("{} bytes", args.slots.bytes()), expected));
        }
        if args.rows > 0 {
            check_address("slots", &args.slots, SLOT_BYTES)?;
        }
        let cache_bytes = i64::from(args.kv_dtype.bytes());
        let append = AppendParams {
            k_new: args.k_new.address(),
            v_new: args.v_new.address(),
            k_cache: args.k_cache.address(),
            v_cache: args.v_cache.address(),
            slots: args.slots.address(),
            k_new_row_stride: args.k_new_strides.sequence * ELEMENT_BYTES,
            k_new_head_stride: args.k_new_strides.head * ELEMENT_BYTES,
            v_new_row_stride: args.v_new_strides.sequence * ELEMENT_BYTES,
            v_new_head_stride: args.v_new_strides.head * ELEMENT_BYTES,
            k_page_stride: k.page * cache_bytes,
            k_token_stride: k.token * cache_bytes,
            k_head_stride: k.head * cache_bytes,
            v_page_stride: v.page * cache_bytes,
            v_token_stride: v.token * cache_bytes,
            v_head_stride: v.head * cache_bytes,
            page_size: FastDivisor::new(page_size),
            heads: FastDivisor::new(kv_heads),
            chunks: FastDivisor::new(chunks),
            k_chunks,
            v_chunks,
            rows: args.rows,
            slots_end,
        };
        let ((k_scale, k_scales), (v_scale, v_scales)) = (args.k_scale.params(), args.v_scale.params());
        let params = ScaledAppendParams { append, k_scale, v_scale, k_scales, v_scales };
        Ok(Self { kernel, params, ctas: work.div_ceil(manifest::SUPPORT_THREADS) })
    }
}

/// Likewise.
pub(super) struct CheckedMergeStates(pub(super) MergeStatesParams, pub(super) u32);

impl CheckedMergeStates {
    pub(super) fn new((rows, heads, head_dim): (u32, u32, u32), states: [&DeviceState; 3]) -> Result<Self> {
        const NAMES: [[&str; 2]; 3] = [["out_a", "lse_a"], ["out_b", "lse_b"], ["out", "lse"]];
        let chunks = head_chunks("head_dim", head_dim)?;
        let warps = below_2_31("rows * heads", product([rows, heads, 1]))?;
        for (state, [out, lse]) in states.into_iter().zip(NAMES) {
            let dims = |strides: RowStrides| [("sequence", rows, strides.sequence), ("head", heads, strides.head)];
            let (of_out, of_lse) = (dims(state.out_strides), dims(state.lse_strides));
            // Of any 16-bit type: only its size counts.
            check_span(out, &state.out, &of_out, head_dim, Dtype::F16)?;
            if check_lse(lse, state.lse.bytes() / u64::from(LSE_BYTES), &of_lse)? > 0 {
                check_address(lse, &state.lse, LSE_BYTES)?;
            }
            if out == "out" {
                check_apart(out, &of_out, head_dim)?;
                check_apart(lse, &of_lse, 1)?;
            }
        }
        let [a, b, merged] = states.map(|state| StateParams {
            out: state.out.address(),
            lse: state.lse.address(),
            out_row_stride: state.out_strides.sequence * ELEMENT_BYTES,
            out_head_stride: state.out_strides.head * ELEMENT_BYTES,
            lse_row_stride: state.lse_strides.sequence * i64::from(LSE_BYTES),
            lse_head_stride: state.lse_strides.head * i64::from(LSE_BYTES),
        });
        let params = MergeStatesParams { a, b, merged, heads: FastDivisor::new(heads.max(1)), rows, chunks };
        Ok(Self(params, warps.div_ceil(manifest::SUPPORT_THREADS / 32)))
    }
}

/// Strides, extent and address of a tensor.
fn check_span(name: &str, span: &DeviceSpan, dims: &[Dimension], head_dim: u32, dtype: Dtype) -> Result<()> {
    match check_tensor(name, span.bytes() / u64::from(dtype.bytes()), dims, head_dim, dtype)? {
        0 => Ok(()),
        _ => check_address(name, span, VECTOR_BYTES),
    }
}

fn head_chunks(name: &str, head_dim: u32) -> Result<u32> {
    if head_dim == 0 || !head_dim.is_multiple_of(8) {
        return Err(Error::invalid(name, head_dim, "a positive multiple of 8"));
    }
    Ok(head_dim / 8)
}

fn product(factors: [u32; 3]) -> u64 {
    factors.iter().fold(1, |product, &factor| product.saturating_mul(u64::from(factor)))
}

fn below_2_31(what: &str, count: u64) -> Result<u32> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count < 1 << 31)
        .ok_or_else(|| Error::invalid(what, count, "fewer than 2^31"))
}

pub(super) fn row_kernel(family: Family, dtype: Dtype) -> Result<&'static pat_abi::KernelSpec> {
    manifest::find(family, dtype, 0)
        .ok_or_else(|| Error::invalid("dtype", format!("{dtype:?}"), "one that there is a kernel for"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvStrides;

    fn append() -> AppendArgs {
        let strides = KvStrides::nhd(16, 2, 64);
        let layout = CacheLayout { num_pages: 4, page_size: 16, kv_heads: 2, head_dim: 64, strides };
        let rows = RowStrides::contiguous(2, 64);
        AppendArgs {
            dtype: Dtype::F16,
            kv_dtype: Dtype::F16,
            k_scale: DeviceKvScale::Tensor(1.0),
            v_scale: DeviceKvScale::Tensor(1.0),
            rows: 3,
            k_new: DeviceSpan::of_nothing(0x1000, 3 * 128 * 2),
            k_new_strides: rows,
            v_new: DeviceSpan::of_nothing(0x2000, 3 * 128 * 2),
            v_new_strides: rows,
            k_cache: DeviceSpan::of_nothing(0x10_0000, 64 * 128 * 2),
            k_layout: layout,
            v_cache: DeviceSpan::of_nothing(0x20_0000, 64 * 128 * 2),
            v_layout: layout,
            slots: DeviceSpan::of_nothing(0x3000, 24),
        }
    }

    #[test]
    fn append_parameters_are_in_bytes() {
        let CheckedAppend { kernel, params: ScaledAppendParams { append: params, .. }, ctas } =
            CheckedAppend::new(&append()).unwrap();
        assert_eq!((params.k_page_stride, params.k_head_stride, params.v_new_row_stride), (16 * 256, 128, 256));
        assert_eq!((params.slots_end, params.chunks.divisor, ctas, kernel.entry), (64, 8, 1, "pat_append_kv"));

        let narrow = CacheLayout { head_dim: 48, ..append().k_layout };
        for (k_layout, v_layout, chunks) in
            [(append().k_layout, narrow, [8, 8, 6]), (narrow, append().k_layout, [8, 6, 8])]
        {
            let params = CheckedAppend::new(&AppendArgs { k_layout, v_layout, ..append() }).unwrap().params.append;
            assert_eq!([params.chunks.divisor, params.k_chunks, params.v_chunks], chunks);
        }

        let eight_bit = AppendArgs { dtype: Dtype::Bf16, kv_dtype: Dtype::E5m2, ..append() };
        let CheckedAppend { kernel, params, .. } = CheckedAppend::new(&eight_bit).unwrap();
        assert_eq!((params.append.k_page_stride, params.append.k_head_stride), (16 * 128, 64));
        assert_eq!((params.append.v_new_row_stride, kernel.entry), (256, "pat_append_kv_bf16_e5m2"));
    }

    #[test]
    fn bad_arguments_of_append_are_named() {
        type Change = fn(&mut AppendArgs);
        let cases: [(&str, Change); 18] = [
            ("k_new: got", |a| a.k_new = DeviceSpan::of_nothing(0x1000, 3 * 128 * 2 - 2)),
            ("v_new: got", |a| a.v_new = DeviceSpan::of_nothing(0x2008, 1 << 20)),
            ("k_new_strides.head", |a| a.k_new_strides.head = 65),
            ("k_cache: got", |a| a.k_cache = DeviceSpan::of_nothing(0x10_0000, 64)),
            ("v_cache: got 5 pages", |a| a.v_layout.num_pages = 5),
            ("v_cache: got 4 pages of 16 tokens and 1 heads, expected 4", |a| a.v_layout.kv_heads = 1),
            ("v_layout.head_dim: got 36", |a| a.v_layout.head_dim = 36),
            ("v_new: got", |a| a.v_layout.head_dim = 72),
            ("slots: got", |a| a.slots = DeviceSpan::of_nothing(0x3000, 16)),
            ("slots: got", |a| a.slots = DeviceSpan::of_nothing(0x3004, 1 << 10)),
            ("num_pages * page_size", |a| {
                (a.k_layout.num_pages, a.v_layout.num_pages) = (1 << 30, 1 << 30);
            }),
            ("k_layout.head_dim: got 60", |a| (a.k_layout.head_dim, a.v_layout.head_dim) = (60, 60)),
            ("k_new: got e4m3", |a| a.dtype = Dtype::E4m3),
            ("k_cache: got bf16, expected f16, or a type of 8 bits", |a| a.kv_dtype = Dtype::Bf16),
            ("k_scale: got 2, expected 1 where", |a| a.k_scale = DeviceKvScale::Tensor(2.0)),
            ("v_scale: got inf", |a| {
                (a.kv_dtype, a.v_scale) = (Dtype::E4m3, DeviceKvScale::Tensor(f32::INFINITY));
            }),
            ("v_scale: got 1 factors", |a| {
                (a.kv_dtype, a.v_scale) = (Dtype::E4m3, DeviceKvScale::Heads(DeviceSpan::of_nothing(0x4000, 4)));
            }),
            ("k_cache_strides.head: got 8 elements", |a| {
                (a.kv_dtype, a.k_layout.strides.head) = (Dtype::E4m3, 8);
            }),
        ];
        for (message, change) in cases {
            let mut args = append();
            change(&mut args);
            let error = CheckedAppend::new(&args).err().expect(message).to_string();
            assert!(error.starts_with(message), "{message}: {error}");
        }
    }

    #[test]
    fn states_are_checked_by_name() {
        let state = |out: u64, bytes: u64| DeviceState {
            out: DeviceSpan::of_nothing(out, bytes),
            out_strides: RowStrides::contiguous(7, 64),
            lse: DeviceSpan::of_nothing(out + (1 << 20), bytes / 32),
            lse_strides: RowStrides::lse(7),
        };
        let good = state(0x10_0000, 3 * 7 * 64 * 2);
        let CheckedMergeStates(params, ctas) = CheckedMergeStates::new((3, 7, 64), [&good, &good, &good]).unwrap();
        assert_eq!((params.merged.out_row_stride, params.a.lse_row_stride, params.chunks, ctas), (896, 28, 8, 3));
        let short = state(0x10_0000, 3 * 7 * 64 * 2 - 2);
        for (index, name) in ["out_a: got", "out_b: got", "out: got"].into_iter().enumerate() {
            let mut states = [&good, &good, &good];
            states[index] = &short;
            let error = CheckedMergeStates::new((3, 7, 64), states).err().expect(name).to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }
}
