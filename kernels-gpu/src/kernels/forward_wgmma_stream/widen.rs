//! The warps that widen 8-bit tiles of K and V to the 16-bit ones that wgmma multiplies, once for all rows.
//!
//! Eight lanes at a time read 16 codes each of two rows, and write these as two 16-byte chunks each. Rows and codes are chosen so
//! that neither meets bank conflicts: in the 16-bit tile, the even chunks of one row and the odd ones of the other lie in all
//! banks.

use super::smem::{Ring, Smem, Stage, Tensor};
use super::work::{Batch, work_index};
use crate::eight_bit::Code;
use crate::ptx::barrier::sync_warp;
use crate::ptx::ldst::{load_shared_u32x4, store_shared_u32x4};
use crate::ptx::mbarrier;
use crate::ptx::special::thread_index;
use pat_abi::ForwardParams;
use pat_abi::reader::PlanView;

/// Warps that widen.
pub(super) const WIDENING_WARPS: u32 = 2;

/// Rows that a warp has at hand at a time: after so many, the swizzles begin again.
const ROWS: u32 = 8;

/// Chunks of 16 codes that a lane has in registers.
const CHUNKS: usize = 4;

/// A widening warp: warp `warp` of [`WIDENING_WARPS`].
///
/// # Safety
/// One whole warp; barriers initialised.
#[inline(always)]
pub(super) unsafe fn widen<C: Code, const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    warp: u32,
) {
    let lane = thread_index() & 31;
    let mut narrow = Ring { stage: 0, phase: 0 };
    let mut wide = Ring { stage: 0, phase: 1 };
    let mut round = 0;
    let mut index = work_index(round);
    if index >= plan.work_count {
        return;
    }
    // SAFETY: over the whole function, items come from the plan, stages are used in the order of the barriers.
    unsafe {
        let mut batch = Batch::load(p, plan, round, lane);
        let mut in_batch = 0;
        while index < plan.work_count {
            if in_batch == 32 {
                in_batch = 0;
                batch = Batch::load(p, plan, round, lane);
            }
            let token_count = batch.get(in_batch).token_count;
            in_batch += 1;
            round += 1;
            index = work_index(round);
            let mut token = 0;
            while token < token_count {
                let widen_tile_of = |tensor: Tensor| {
                    let (from, to) = (smem.arriving(tensor, narrow.stage), smem.stage(tensor, wide.stage));
                    mbarrier::wait(from.full, narrow.phase);
                    mbarrier::wait(to.empty, wide.phase);
                    if tensor == Tensor::K && warp == 0 {
                        for span in 0..Smem::<HEAD_DIM, GROUPS, BYTES>::SPANS {
                            let masks = load_shared_u32x4(smem.arriving_masks(narrow.stage) + 16 * span);
                            if lane == 0 {
                                // Written by the lane that arrives: its arrival publishes them.
                                store_shared_u32x4(smem.masks(wide.stage) + 16 * span, masks);
                            }
                        }
                    }
                    widen_tile::<C, HEAD_DIM, GROUPS, BYTES>(from, to, warp, lane);
                    mbarrier::fence_async_proxy();
                    sync_warp();
                    mbarrier::arrive_lane_0(to.full, lane);
                    mbarrier::arrive_lane_0(from.empty, lane);
                };
                widen_tile_of(Tensor::K);
                widen_tile_of(Tensor::V);
                narrow.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::ARRIVING_STAGES);
                wide.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::STAGES);
                token += Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
            }
        }
    }
}

/// This warp's share of a tile.
///
/// # Safety
/// One whole warp; the one tile is complete, the other free.
#[inline(always)]
unsafe fn widen_tile<C: Code, const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    from: Stage,
    to: Stage,
    warp: u32,
    lane: u32,
) {
    const { assert!(BYTES == 1 && (HEAD_DIM == 64 || HEAD_DIM == 128)) };
    let keys = Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
    // Chunks of a lane among `ROWS` rows: of each 64 elements.
    let blocks = const { HEAD_DIM / 64 };
    let rows_at_a_time = const { ROWS * CHUNKS as u32 / (HEAD_DIM / 64) };
    let (place, chunk, is_second) = (lane / 8, lane % 4, lane % 8 / 4);
    // Narrow rows of 128 bytes are swizzled: these two have chunks 0 to 3 in different banks, and one of them is odd. Of 64 bytes
    // they are not: two are one behind the other.
    let row = if HEAD_DIM == 128 { place ^ (5 * is_second) } else { 2 * place + is_second };
    let source = if HEAD_DIM == 128 { row * 128 + ((chunk ^ row) & 7) * 16 } else { 16 * lane };
    let target = row * 128 + (((2 * chunk) ^ row) & 7) * 16;
    let mut first_row = warp * (keys / WIDENING_WARPS);
    let end = first_row + keys / WIDENING_WARPS;
    while first_row < end {
        // SAFETY: over the loop, addresses are inside the tiles.
        unsafe {
            let mut codes = [[0; 4]; CHUNKS];
            for i in 0..CHUNKS {
                let (rows, block) = (first_row + i as u32 / blocks * ROWS, i as u32 % blocks);
                codes[i] = load_shared_u32x4(from.tile + rows * HEAD_DIM + (source ^ (64 * block)));
            }
            for i in 0..CHUNKS {
                let (rows, block) = (first_row + i as u32 / blocks * ROWS, i as u32 % blocks);
                let tile = to.tile + block * Smem::<HEAD_DIM, GROUPS, BYTES>::BLOCK_BYTES + rows * 128;
                let [[a, b], [c, d], [e, f], [g, h]] = codes[i].map(C::exact);
                store_shared_u32x4(tile + target, [a, b, c, d]);
                store_shared_u32x4(tile + (target ^ 16), [e, f, g, h]);
            }
        }
        first_row += rows_at_a_time;
    }
}
