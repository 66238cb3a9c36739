//! Append kernel: copies new rows of K and V into their slots of a paged cache.

use pat_abi::manifest::SUPPORT_THREADS as THREADS;
use pat_abi::row_params::AppendParams;

use crate::item::strided;
use crate::ptx::ldst::{load_global_u32x2, load_global_u32x4, store_global_u32x4};
use crate::ptx::special;

const CHUNK_BYTES: u64 = 16;

/// 16-bit elements of any type are copied as they are.
///
/// # Safety
/// `params` describes live buffers, the caches writable; launched as the manifest says.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pat_append_kv(params: AppendParams) {
    let AppendParams { heads, chunks, page_size, .. } = params;
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
        let copy =
            |new: u64, [row_stride, head_stride]: [i64; 2], cache: u64, [page_of, token_of, head_of]: [i64; 3]| {
                let from = strided(new, row, row_stride, head, head_stride) + offset;
                let at_token = strided(cache, page, page_of, token, token_of);
                let to = strided(at_token, head, head_of, 0, 0) + offset;
                // SAFETY: inside both tensors: row, head, page and token are below their sizes.
                unsafe { store_global_u32x4(to, load_global_u32x4(from)) };
            };
        copy(
            params.k_new,
            [params.k_new_row_stride, params.k_new_head_stride],
            params.k_cache,
            [params.k_page_stride, params.k_token_stride, params.k_head_stride],
        );
        copy(
            params.v_new,
            [params.v_new_row_stride, params.v_new_head_stride],
            params.v_cache,
            [params.v_page_stride, params.v_token_stride, params.v_head_stride],
        );
    }
}
