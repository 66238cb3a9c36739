//! The producer warps: one copies K, one V, the others queries.

use super::masks::{KeyMask, PageWindow};
use super::smem::{QSlots, Ring, Smem, Stage, Tensor, tile_offset};
use super::widen::WIDENING_WARPS;
use super::work::{Batch, query_of_row, work_index};
use super::{GROUP_ROWS, PRODUCER_WARPS};
use crate::item::strided;
use crate::plan_words::AtOnce;
use crate::ptx::barrier::sync_named_anywhere;
use crate::ptx::ldst::store_shared_u32x4;
use crate::ptx::shuffle::{any, from_lane_u32, from_segment_u64};
use crate::ptx::special::{run_time, thread_index, thread_index_here};
use crate::ptx::{cp_async, mbarrier, tma};
use pat_abi::manifest::box_tokens;
use pat_abi::reader::{PlanView, Work};
use pat_abi::{ForwardParams, NamedBarrier};

/// A KV producer: one warp that issues the tensor copies of K or V, or of both, for all items. The maps are
/// those of `tensor` and, where the warp copies V behind K, of V. The page ids of an item are asked for behind the
/// first copies of the item before it. A warp issues one copy after the other, some 70 cycles each, whichever lane asks for it: with
/// pages of 16 tokens one warp for both tensors is slower than memory.
///
/// # Safety
/// One whole warp; barriers initialised; maps as `abi` describes them.
#[inline(always)]
pub(super) unsafe fn produce_kv<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    (tensor, map): (Tensor, u64),
    map_of_v_too: Option<u64>,
) {
    let lane = thread_index() & 31;
    let box_keys = box_tokens(p.page_keys.divisor);
    let mut ring = Ring { stage: 0, phase: 1 };
    let mut first = true;
    let mut round = 0;
    let mut index = work_index(round);
    if index >= plan.work_count {
        return;
    }
    // SAFETY: over the whole function, items come from the plan, addresses from the checked launch parameters.
    unsafe {
        // A batch has 32 rounds, and lanes are counted modulo 32: the round says which lane has a piece of work.
        let mut batch = Batch::load(p, plan, round, lane);
        let mut next_window = PageWindow::load(p, plan, &batch.get(0), 0, lane);
        while index < plan.work_count {
            let (work, mut window) = (batch.get(round), next_window);
            round += 1;
            index = work_index(round);
            let mut token = 0;
            while token < work.token_count {
                // Pages of 32 lanes are whole tiles, since a page takes a multiple of 16 keys.
                let (tile_page, in_page) = p.page_keys.divide_remainder(token);
                if tile_page & 31 == 0 && in_page == 0 && token > 0 {
                    // Registers are short: what is computed of the length is not kept from tile to tile for this.
                    let work = Work { token_count: run_time(work.token_count), ..work };
                    window = PageWindow::load(p, plan, &work, tile_page, lane);
                }
                // Lane `l` issues box `l / blocks` of the tile, block `l % blocks`. Registers are short: not kept.
                let (blocks, place) =
                    (HEAD_DIM / Smem::<HEAD_DIM, GROUPS, BYTES>::BOX_ELEMENTS, thread_index_here() & 31);
                let (box_row, block) = (place / blocks * box_keys, place % blocks);
                let issues = box_row < Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
                let box_offset = block * Smem::<HEAD_DIM, GROUPS, BYTES>::BLOCK_BYTES
                    + box_row * Smem::<HEAD_DIM, GROUPS, BYTES>::BOX_ROW_BYTES;
                let (page, in_page) = p.page_keys.divide_remainder(token + box_row);
                let id = from_lane_u32(window.lane_id, page & 31);
                let id = if token + box_row < work.token_count { id } else { p.num_pages };
                let page_mask = window.mask(page);
                // Pages of some rows only are read once; the others should still be in L2 when the next tile reads them.
                let read_once = work.has_masks() && !page_mask.is_for_all_rows();

                let Stage { tile, full, empty } = smem.arriving(tensor, ring.stage);
                mbarrier::wait(empty, ring.phase);
                let first_element = block * Smem::<HEAD_DIM, GROUPS, BYTES>::BOX_ELEMENTS;
                let coordinates = [first_element, in_page, work.kv_head, id];
                if issues {
                    load_box(tile + box_offset, map, coordinates, full, read_once);
                }
                // The copies are under way; the phase ends when they have landed and lane 0 has arrived.
                if tensor == Tensor::K {
                    let words = 4 * Smem::<HEAD_DIM, GROUPS, BYTES>::SPANS;
                    let first_key = token + (lane & (words - 1)) * KeyMask::KEYS;
                    let mask = if Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_WINDOWS {
                        window.key_mask::<true>(p, plan, &work, first_key)
                    } else {
                        window.key_mask::<false>(p, plan, &work, first_key)
                    };
                    let is_full = !any(mask.0 != KeyMask::FULL);
                    for span in 0..Smem::<HEAD_DIM, GROUPS, BYTES>::SPANS {
                        let mut masks = [0, 1, 2, 3].map(|word| from_lane_u32(mask.0, 4 * span + word));
                        if span == 0 && is_full {
                            masks[0] = KeyMask::TILE_IS_FULL;
                        }
                        if lane == 0 {
                            // Written by the lane that arrives: its arrival publishes them.
                            store_shared_u32x4(smem.arriving_masks(ring.stage) + 16 * span, masks);
                        }
                    }
                }
                if lane == 0 {
                    mbarrier::arrive_expect_bytes(full, Smem::<HEAD_DIM, GROUPS, BYTES>::ARRIVING_BYTES);
                }
                if first && tensor == Tensor::K {
                    queries_requested();
                    first = false;
                }
                if let Some(map) = map_of_v_too {
                    let Stage { tile, full, empty } = smem.arriving(Tensor::V, ring.stage);
                    mbarrier::wait(empty, ring.phase);
                    if issues {
                        load_box(tile + box_offset, map, coordinates, full, read_once);
                    }
                    if lane == 0 {
                        mbarrier::arrive_expect_bytes(full, Smem::<HEAD_DIM, GROUPS, BYTES>::ARRIVING_BYTES);
                    }
                }
                // Behind the item's first copies, which would wait for these loads: ptxas keeps one account for them and the item's own.
                if token == 0 && index < plan.work_count {
                    if round & 31 == 0 {
                        batch = Batch::load(p, plan, round, lane);
                    }
                    next_window = PageWindow::load(p, plan, &batch.get(round), 0, lane);
                }
                ring.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::ARRIVING_STAGES);
                token += Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
            }
        }
    }
}

/// # Safety
/// As [`tma::load_4d`].
#[inline(always)]
pub(super) unsafe fn load_box(destination: u32, map: u64, coordinates: [u32; 4], barrier: u32, read_once: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        if read_once {
            tma::load_4d_once(destination, map, coordinates, barrier);
        } else {
            tma::load_4d(destination, map, coordinates, barrier);
        }
    }
}

/// Producer warps that copy Q rows of a CTA's first item: all but the one that copies K. Of the others one less, which copies V;
/// where tiles are widened, those less that widen them.
pub(super) const FIRST_Q_WARPS: u32 = PRODUCER_WARPS - 1;

/// Those that stay for the others.
pub(super) const fn q_warps(widens: bool) -> u32 {
    if widens { FIRST_Q_WARPS - WIDENING_WARPS } else { FIRST_Q_WARPS - 1 }
}

/// Where the producer warps meet once: the queries of a CTA's first item are requested right behind the first keys, the rest
/// after them. Memory serves requests in about the order in which they are made, and nothing begins without the queries.
#[inline(always)]
pub(super) fn queries_requested() {
    sync_named_anywhere(NamedBarrier::Producers, 32 * PRODUCER_WARPS);
}

/// The Q producers: warps that copy the items' Q rows to the Q slots. The first item of a CTA has nothing to hide behind:
/// one warp would take longer for 64 rows than the first keys take to arrive. The warps from [`q_warps`] on return behind it.
///
/// # Safety
/// Warp `warp` of [`FIRST_Q_WARPS`], whole; barriers initialised.
#[inline(always)]
pub(super) unsafe fn produce_q<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    warp: u32,
) {
    let lane = thread_index() & 31;
    let staying = const { q_warps(Smem::<HEAD_DIM, GROUPS, BYTES>::WIDENS) };
    // SAFETY: records of the plan.
    let words = unsafe { AtOnce::new() };
    let mut slots = QSlots::<GROUPS> { next: 0, phases: u32::MAX };
    let mut round = 0;
    let mut index = work_index(round);
    let mut in_batch = 32;
    let mut batch = Batch::EMPTY;
    let mut lane_token = 0;
    while index < plan.work_count {
        // SAFETY: over the whole loop, items come from the plan, addresses from the checked launch parameters.
        unsafe {
            if in_batch == 32 {
                in_batch = 0;
                batch = Batch::load(p, plan, round, lane);
                lane_token = query_of_row(p, plan, &batch.lane_work, 0).0.query_token(words);
            }
            let work = batch.queries(in_batch);
            // Rows of one query, a leaf's case, need no further load.
            let first_token = from_lane_u32(lane_token, in_batch);
            let one_query = work.row_count <= p.group.divisor;
            let stay = Smem::<HEAD_DIM, GROUPS, BYTES>::QUERIES_STAY;
            let (slot, slot_count) = if stay { (0, 0) } else { slots.take(work.row_count) };
            // A consumer's rows at a time: registers are short.
            for group in 0..GROUPS {
                let first_row = GROUP_ROWS * group;
                // Lane `l` locates rows `l` and `l + 32`.
                let mut tokens = [first_token; 2];
                if !one_query {
                    for i in 0..2 {
                        let (query, _) = query_of_row(p, plan, &work, first_row + lane + 32 * i);
                        tokens[i as usize] = query.query_token(words);
                    }
                }
                let mut sources = [0u64; 2];
                for i in 0..2 {
                    let (_, head) = query_of_row(p, plan, &work, first_row + lane + 32 * i);
                    let token = tokens[i as usize];
                    sources[i as usize] = strided(p.q, token, p.q_sequence_stride, head, p.q_head_stride);
                }
                if stay {
                    mbarrier::wait(smem.q_empty(group), round & 1 ^ 1);
                } else if group == 0 {
                    for i in 0..slot_count {
                        mbarrier::wait(smem.q_empty(slot + i), slots.parity(slot + i));
                    }
                }
                let rows = (first_row, work.row_count);
                let warps = (warp, if round == 0 { FIRST_Q_WARPS } else { staying });
                copy_q::<HEAD_DIM, GROUPS, BYTES>(smem, rows, sources, slot * QSlots::<GROUPS>::ROWS, warps, lane);
                if stay {
                    mbarrier::arrive_on_copies(smem.q_full(group));
                    if round > 0 && warp == 0 {
                        for _ in staying..FIRST_Q_WARPS {
                            mbarrier::arrive_on_copies(smem.q_full(group));
                        }
                    }
                }
            }
            if round == 0 {
                queries_requested();
            }
            for i in 0..slot_count {
                mbarrier::arrive_on_copies(smem.q_full(slot + i));
                // For the warps that are not there any more.
                if round > 0 && warp == 0 {
                    mbarrier::arrive_on_copies(smem.q_full(slot + i));
                    for _ in staying + 1..FIRST_Q_WARPS {
                        mbarrier::arrive_on_copies(smem.q_full(slot + i));
                    }
                }
            }
        }
        if warp == staying || Smem::<HEAD_DIM, GROUPS, BYTES>::WIDENS && warp > staying {
            break;
        }
        round += 1;
        index = work_index(round);
        in_batch += 1;
    }
}

/// This warp's share (`warp` of `warps`) of copying the Q rows of an item (rows `first_row` to `first_row + 64` of
/// `row_count`) to shared memory from tile row `first_tile_row` on, 16 bytes per lane, 128-byte swizzled. Lane `l`
/// holds the addresses of rows `first_row + l` and `first_row + 32 + l`. Rows the item does not have stay what they
/// are: tile rows never mix, and theirs are not stored.
///
/// # Safety
/// One whole warp; the addresses are Q rows; the Q slots are free.
#[inline(always)]
pub(super) unsafe fn copy_q<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    (first_row, row_count): (u32, u32),
    sources: [u64; 2],
    first_tile_row: u32,
    (warp, warps): (u32, u32),
    lane: u32,
) {
    let chunks_per_row = HEAD_DIM / 8;
    let rows_per_step = 32 / chunks_per_row;
    let (step_row, chunk) = (lane / chunks_per_row, lane % chunks_per_row);
    for i in 0..2 {
        let mut begin = warp * rows_per_step;
        while begin < 32 && first_row + 32 * i + begin < row_count {
            let source = from_segment_u64::<32>(sources[i as usize], begin + step_row) + chunk as u64 * 16;
            let row = first_row + 32 * i + begin + step_row;
            if row < row_count {
                let tile_row = first_tile_row + row;
                let target = smem.q(tile_row / GROUP_ROWS) + tile_offset(GROUP_ROWS, tile_row % GROUP_ROWS, chunk);
                // SAFETY: the row is one of the item's; Q rows are 16-byte aligned (checked by the host).
                unsafe { cp_async::copy_16_bytes(target, source, 16) };
            }
            begin += warps * rows_per_step;
        }
    }
}
