//! Merge of two attention states by their log-sum-exps: a warp takes a (row, head), its lanes 8 elements each.

use core::f32::consts::LN_2;

use pat_abi::manifest::SUPPORT_THREADS;
use pat_abi::row_params::{MergeStatesParams, StateParams};

use crate::element::{Bf16, Element, F16};
use crate::item::strided;
use crate::ptx::barrier::sync_warp;
use crate::ptx::ldst::{load_global_l2_f32, load_global_l2_f32x4, store_global_f32, store_global_u32x4};
use crate::ptx::{math, special};

const WARPS: u32 = SUPPORT_THREADS / 32;
const CHUNK_BYTES: u64 = 16;
const LOG2_E: f32 = 1.0 / LN_2;

/// # Safety
/// `params` describes live buffers, the merged state writable; launched as the manifest says.
#[inline(always)]
unsafe fn merge_states<E: Element>(params: &MergeStatesParams) {
    let thread = special::thread_index();
    let lane = thread % 32;
    let rows = params.rows * params.heads.divisor;
    let mut index = special::cta_index() * WARPS + thread / 32;
    while index < rows {
        let (row, head) = params.heads.divide_remainder(index);
        index += special::cta_count() * WARPS;
        let lse_address =
            |state: &StateParams| strided(state.lse, row, state.lse_row_stride, head, state.lse_head_stride);
        let out_address =
            |state: &StateParams| strided(state.out, row, state.out_row_stride, head, state.out_head_stride);
        // SAFETY: row and head are below the sizes.
        let [lse_a, lse_b] = [&params.a, &params.b].map(|state| unsafe { load_global_l2_f32(lse_address(state)) });
        let maximum = math::max(lse_a, lse_b);
        let is_empty = maximum == f32::NEG_INFINITY;
        let share = |lse: f32| if is_empty { 0.0 } else { math::exp2((lse - maximum) * LOG2_E) };
        let (share_a, share_b) = (share(lse_a), share(lse_b));
        let total = share_a + share_b;
        let scale = if is_empty { 0.0 } else { math::reciprocal(total) };
        let weights = [share_a * scale, share_b * scale];
        // The result may lie where a state does: every lane has read the log-sum-exps before one is written.
        sync_warp();
        if lane == 0 {
            let lse = if is_empty { maximum } else { math::fma(math::log2(total), LN_2, maximum) };
            // SAFETY: as above.
            unsafe { store_global_f32(lse_address(&params.merged), lse) };
        }
        let mut chunk = lane;
        while chunk < params.chunks {
            let offset = chunk as u64 * CHUNK_BYTES;
            let words = |state: &StateParams| {
                // SAFETY: inside the head's row.
                unsafe { load_global_l2_f32x4(out_address(state) + offset) }.map(f32::to_bits)
            };
            let (a, b) = (words(&params.a), words(&params.b));
            let merged: [u32; 4] = core::array::from_fn(|i| {
                let ([a_low, a_high], [b_low, b_high]) = (E::unpack(a[i]), E::unpack(b[i]));
                // A state without tokens may hold anything, NaN included.
                let part = |weight: f32, value: f32| if weight == 0.0 { 0.0 } else { weight * value };
                let joined = |a, b| part(weights[0], a) + part(weights[1], b);
                E::pack(joined(a_low, b_low), joined(a_high, b_high))
            });
            // SAFETY: as above; this lane alone reads and writes the chunk.
            unsafe { store_global_u32x4(out_address(&params.merged) + offset, merged) };
            chunk += 32;
        }
    }
}

/// Merges binary16 states.
///
/// # Safety
/// As [`MergeStatesParams`] says.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pat_merge_states_f16(params: MergeStatesParams) {
    // SAFETY: the caller's contract.
    unsafe { merge_states::<F16>(&params) }
}

/// Merges bfloat16 states.
///
/// # Safety
/// As [`MergeStatesParams`] says.
#[unsafe(no_mangle)]
pub unsafe extern "ptx-kernel" fn pat_merge_states_bf16(params: MergeStatesParams) {
    // SAFETY: the caller's contract.
    unsafe { merge_states::<Bf16>(&params) }
}
