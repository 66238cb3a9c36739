//! Append kernels: new rows of K and V go into their slots of a paged cache, as they are or rounded to 8 bits.

use pat_abi::manifest::SUPPORT_THREADS as THREADS;
use pat_abi::row_params::{AppendParams, ScaledAppendParams};

use crate::eight_bit::{self, Code, factor_of_head};
use crate::element::{self, Element};
use crate::item::strided;
use crate::ptx::ldst::{load_global_u32x2, load_global_u32x4, store_global_u32x2, store_global_u32x4};
use crate::ptx::special;

/// What a thread takes at a time, in the new rows.
const CHUNK_BYTES: u64 = 16;

/// Calls `copy_k` and `copy_v` with the head, the chunk's address in the new rows and its address in the cache, whose elements
/// have `CACHE_BYTES`.
///
/// # Safety
/// `params` describes live buffers, the caches writable; launched as the manifest says.
#[inline(always)]
unsafe fn for_each_chunk<const CACHE_BYTES: u64>(
    params: &AppendParams,
    copy_k: impl Fn(u32, u64, u64),
    copy_v: impl Fn(u32, u64, u64),
) {
    let AppendParams { heads, chunks, k_chunks, v_chunks, page_size, .. } = *params;
    let total = params.rows * heads.divisor * chunks.divisor;
    let step = special::cta_count() * THREADS;
    let mut index = special::cta_index() * THREADS + special::thread_index();
    while index < total {
        let (head, chunk) = chunks.divide_remainder(index);
        let (row, head) = heads.divide_remainder(head);
        index += step;
        // SAFETY: one slot per row.
        let [low, high] = unsafe { load_global_u32x2(params.slots + row as u64 * 8) };
        // Negative slots have their high half set.
        if high != 0 || low >= params.slots_end {
            continue;
        }
        let (page, token) = page_size.divide_remainder(low);
        let offset = chunk as u64 * CHUNK_BYTES;
        let addresses =
            |new: u64, [row_stride, head_stride]: [i64; 2], cache: u64, [page_of, token_of, head_of]: [i64; 3]| {
                let from = strided(new, row, row_stride, head, head_stride) + offset;
                let at_token = strided(cache, page, page_of, token, token_of);
                (from, strided(at_token, head, head_of, 0, 0) + offset / (2 / CACHE_BYTES))
            };
        if chunk < k_chunks {
            let (from, to) = addresses(
                params.k_new,
                [params.k_new_row_stride, params.k_new_head_stride],
                params.k_cache,
                [params.k_page_stride, params.k_token_stride, params.k_head_stride],
            );
            copy_k(head, from, to);
        }
        if chunk < v_chunks {
            let (from, to) = addresses(
                params.v_new,
                [params.v_new_row_stride, params.v_new_head_stride],
                params.v_cache,
                [params.v_page_stride, params.v_token_stride, params.v_head_stride],
            );
            copy_v(head, from, to);
        }
    }
}

/// 16-bit elements of any type are copied as they are.
///
/// # Safety
/// `params` describes live buffers, the caches writable; launched as the manifest says.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pat_append_kv(params: AppendParams) {
    // SAFETY: inside both tensors: row, head, page and token are below their sizes.
    let copy = |_: u32, from: u64, to: u64| unsafe { store_global_u32x4(to, load_global_u32x4(from)) };
    // SAFETY: the caller's contract.
    unsafe { for_each_chunk::<2>(&params, copy, copy) };
}

/// 16-bit elements are divided by their factor and rounded to 8 bits.
///
/// # Safety
/// As [`pat_append_kv`]; where `params` names factors, there is one for each KV head.
#[inline(always)]
unsafe fn append_rounded<E: Element, C: Code>(params: &ScaledAppendParams) {
    let copy = |factor: f32, factors: u64| {
        move |head: u32, from: u64, to: u64| {
            // SAFETY: inside both tensors: row, head, page and token are below their sizes; so is the head below the factors'.
            let (words, factor) = unsafe { (load_global_u32x4(from), factor * factor_of_head(factors, head)) };
            let four = |low: u32, high: u32| {
                let ([a, b], [c, d]) = (E::unpack(low), E::unpack(high));
                C::nearest_four([a / factor, b / factor, c / factor, d / factor])
            };
            // SAFETY: as above; half as many bytes, whose address is a multiple of 8.
            unsafe { store_global_u32x2(to, [four(words[0], words[1]), four(words[2], words[3])]) };
        }
    };
    let (copy_k, copy_v) = (copy(params.k_scale, params.k_scales), copy(params.v_scale, params.v_scales));
    // SAFETY: the caller's contract.
    unsafe { for_each_chunk::<1>(&params.append, copy_k, copy_v) };
}

macro_rules! entries {
    ($([$element:ident $code:ident $name:literal])*) => {
        $(const _: () = {
            /// Rounds elements of the first type to the second.
            ///
            /// # Safety
            /// As [`append_rounded`].
            #[unsafe(export_name = concat!("pat_append_kv_", $name))]
            unsafe extern "ptx-kernel" fn entry(params: ScaledAppendParams) {
                // SAFETY: the caller's contract.
                unsafe { append_rounded::<element::$element, eight_bit::$code>(&params) }
            }
        };)*
    };
}

pat_abi::rounding_kernel_types!(entries! {});
