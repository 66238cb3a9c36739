//! Combining, in shared memory, the states of the warps that split the KV tokens of the same rows.

use pat_abi::ForwardParams;
use pat_abi::tile::state_pitch_bytes;

use crate::cache::Cache;
use crate::element::Element;
use crate::finish::Finish;
use crate::isolation::{RowSoftmax, attend_pair};
use crate::item::Item;
use crate::ptx::ldst::{load_shared_f32x2, store_shared_f32x2};
use crate::ptx::{barrier, math, shuffle};
use crate::softmax::{OnlineSoftmax, subtrahend};
use crate::tile::fragment::Accumulator;

/// Combines and writes out the rows of a CTA of `M_WARPS * KV_WARPS` warps; warp w holds the KV share `w / M_WARPS` of
/// rows `16 * (w % M_WARPS) ..`. Warp w's scratch is at `smem + w * scratch_stride`. One CTA barrier. Convergent (CTA).
///
/// # Safety
/// Each warp's scratch is free of the other warps' accesses; `params` and `item` are as in the forward kernels.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the state of one warp, by parts")]
pub unsafe fn combine_and_store<
    E: Element,
    C: Cache,
    const HEAD_STEPS: usize,
    const VALUE_STEPS: usize,
    const M_WARPS: u32,
    const KV_WARPS: u32,
>(
    params: &ForwardParams,
    cache: C,
    item: &Item,
    smem: u32,
    scratch_stride: u32,
    accumulator: &Accumulator<VALUE_STEPS>,
    softmax: &OnlineSoftmax,
    thread: u32,
) {
    let (head_dim, v_head_dim) = (16 * HEAD_STEPS as u32, 16 * VALUE_STEPS as u32);
    let pitch = state_pitch_bytes(v_head_dim);
    let (warp, lane) = (thread / 32, thread % 32);
    let own = smem + warp * scratch_stride;
    for r in 0..2 {
        let row = lane / 4 + 8 * r as u32;
        // SAFETY: the warp's own scratch.
        unsafe {
            for step in 0..VALUE_STEPS {
                for half in 0..2 {
                    let column = (16 * step + 8 * half) as u32 + 2 * (lane % 4);
                    let tile = &accumulator[step][half];
                    store_shared_f32x2(own + row * pitch + column * 4, [tile[2 * r], tile[2 * r + 1]]);
                }
            }
            if lane % 4 == 0 {
                store_shared_f32x2(own + 16 * pitch + row * 8, [softmax.references[r], softmax.sums[r]]);
            }
        }
    }
    barrier::sync_cta();
    // Whole warps to a row. Where its columns are no power of two, the last lanes compute, and write, what their neighbours do.
    let lanes = const { (8 * VALUE_STEPS as u32).next_power_of_two() };
    let rows_per_pass = 32 * M_WARPS * KV_WARPS / lanes;
    let spread = 2 * (thread % lanes);
    let beyond = const { 2 * (8 * VALUE_STEPS as u32).next_power_of_two() - 16 * VALUE_STEPS as u32 };
    let column = if const { VALUE_STEPS.is_power_of_two() } || spread < v_head_dim { spread } else { spread - beyond };
    let mut row = thread / lanes;
    while row < item.row_count {
        let first = smem + row / 16 * scratch_stride;
        let (in_tile, share_stride) = (row % 16, M_WARPS * scratch_stride);
        let mut shares = [[0.0; 2]; 8];
        let mut max = f32::NEG_INFINITY;
        for share in 0..KV_WARPS {
            // SAFETY: written above, ordered by the barrier.
            let state = unsafe { load_shared_f32x2(first + share * share_stride + 16 * pitch + in_tile * 8) };
            shares[share as usize] = state;
            max = math::max(max, state[0]);
        }
        let reference = subtrahend(max);
        let (mut sum, mut pair) = (0.0, [0.0; 2]);
        for share in 0..KV_WARPS {
            let [share_max, share_sum] = shares[share as usize];
            let weight = math::exp2(share_max - reference);
            // SAFETY: as above.
            let o = unsafe { load_shared_f32x2(first + share * share_stride + in_tile * pitch + column * 4) };
            sum = math::fma(share_sum, weight, sum);
            pair = [math::fma(o[0], weight, pair[0]), math::fma(o[1], weight, pair[1])];
        }
        // SAFETY: `row < row_count`, and one thread owns the pair; the lanes of a warp have the same row.
        unsafe {
            let target = item.row(params, row);
            let Finish { scale, lse_log2 } = Finish::new(max, sum, target.terms(params));
            let mut pair = [pair[0] * scale, pair[1] * scale];
            if item.stream.has_masks() {
                let softmax = RowSoftmax { reference: max, scale };
                let not_finite = math::fma(pair[1], 0.0, pair[0] * 0.0) != 0.0;
                if shuffle::any(not_finite && softmax.is_finite()) {
                    let columns = (head_dim, column);
                    pair = attend_pair::<E, C, true, true>(
                        params,
                        cache,
                        item.stream,
                        item.kv_head,
                        row,
                        target,
                        softmax,
                        columns,
                        lane,
                    );
                }
            }
            target.store_pair::<E>(params, v_head_dim, column, pair);
            if column == 0 {
                target.store_lse(params, lse_log2);
            }
        }
        row += rows_per_pass;
    }
}
