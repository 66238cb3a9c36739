//! The consumer warpgroups: scores, weights, outputs.

use super::format::Format;
use super::lone::lone_tiles;
use super::masks::{ALL_VALUES, KeyMask, TileMasks, all_full, all_keys, load_masks, values_ends};
use super::smem::{QSlots, Ring, Smem, tile_offset};
use super::work::{Batch, query_of_row, work_index};
use super::{GROUP_ROWS, PRODUCER_WARPS, SPAN_KEYS};
use crate::element::Element;
use crate::epilogue::{Columns, Ends, Row, Written, write_rows};
use crate::isolation::restore_rows;
use crate::plan_words::AtOnce;
use crate::ptx::barrier::{arrive_numbered, sync_named, sync_numbered};
use crate::ptx::ldst::store_shared_u32x4;
use crate::ptx::mbarrier;
use crate::ptx::mma::ldmatrix_x4;
use crate::ptx::shuffle::{any, uniform};
use crate::ptx::special::{run_time_address, thread_index, thread_index_here};
use crate::ptx::switches::below_in_window;
use crate::ptx::wgmma::{self, HeadDim, WgmmaOps};
use crate::softmax::{OnlineSoftmax, cap_scores, rescale, value_of_row};
use core::borrow::Borrow;
use pat_abi::reader::PlanView;
use pat_abi::{LoneTiles, NamedBarrier};

/// Consumer warpgroup `consumer`. Q and O are of type `E`; what is multiplied is of type `M`.
///
/// # Safety
/// One whole, aligned warpgroup; barriers initialised.
#[inline(always)]
pub(super) unsafe fn consume<
    E: Element,
    M: Element,
    F: Format,
    const HEAD_DIM: u32,
    const GROUPS: u32,
    const BYTES: u32,
    const Q_REGS: usize,
    const O_REGS: usize,
    const SPANS: usize,
>(
    params: &F::Params,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    consumer: u32,
) where
    (M, HeadDim<HEAD_DIM>): WgmmaOps<Q_REGS, O_REGS, SPANS>,
{
    let p = F::forward(params);
    // SAFETY: records of the plan.
    let words = unsafe { AtOnce::new() };
    let splits = Smem::<HEAD_DIM, GROUPS, BYTES>::COLUMN_SPLITS;
    let (group, part) = (consumer / splits, consumer % splits);
    let has_lone_tiles = const { Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_LONE_TILES };
    let has_own_rows = const { Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_OWN_ROWS };
    // Two consumers have no registers for records of work that they do not serve yet: they ask for the next one at an item's end.
    let keeps_batch = const { GROUPS == 1 };
    let warp = (thread_index() & 127) >> 5;
    let lane = thread_index() & 31;
    let mut ring = Ring { stage: 0, phase: 0 };
    let mut q_slots = QSlots::<GROUPS> { next: 0, phases: 0 };
    let mut round = 0;
    let mut index = work_index(round);
    if index >= plan.work_count {
        return;
    }
    if Smem::<HEAD_DIM, GROUPS, BYTES>::TAKES_TURNS && group == 1 {
        pass_turn(1);
    }
    // SAFETY: over the whole function, items come from the plan, addresses from the checked launch parameters; every branch on
    // item fields is uniform over the warpgroup.
    unsafe {
        // Rows are repaired outside the loop over items, whose code is then in one piece: the queue's state is all that goes there.
        loop {
            let load_batch = |round| {
                // Of one piece of work, all lanes load the same.
                let lane = if keeps_batch { lane } else { 0 };
                if has_lone_tiles {
                    Batch::load_with_lone_tiles(p, plan, round, lane)
                } else {
                    Batch::load(p, plan, round, lane)
                }
            };
            let mut batch = load_batch(round);
            let mut in_batch = 0;
            let Written { not_finite, softmaxes } = loop {
                if keeps_batch && in_batch == 32 {
                    in_batch = 0;
                    batch = load_batch(round);
                }
                let (work, lone) = if has_lone_tiles {
                    batch.get_with_lone_tiles(in_batch)
                } else {
                    (batch.get(in_batch), LoneTiles::NONE)
                };
                // Where the tiles begin and end that the warpgroup computes.
                let (begin, end) = if has_lone_tiles {
                    let tiles = work.token_count.div_ceil(Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS);
                    let (begin, end) = lone.others(tiles);
                    // Registers of two consumers do not suffice for both ends of a stream.
                    let begin = if GROUPS == 1 { begin } else { 0 };
                    (begin * Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS, end * Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS)
                } else {
                    (0, work.token_count)
                };
                in_batch += keeps_batch as u32;
                round += 1;
                index = work_index(round);
                let (_, of_head) = F::of_head(params, work.kv_head);
                let p = of_head.borrow();
                // Registers are short: where rows do not depend on the item, they are known already.
                let thread = if has_own_rows { thread_index_here() } else { thread_index() };
                let (_, rows) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread, work.row_count);
                let destinations = rows.map(|row| query_of_row(p, plan, &work, row).0.token_and_slot(words));

                // Where time is shortest, descriptors are computed in uniform registers.
                let same =
                    |address| if Smem::<HEAD_DIM, GROUPS, BYTES>::TAKES_TURNS { uniform(address) } else { address };
                let mut q = [0u32; Q_REGS];
                let stay = Smem::<HEAD_DIM, GROUPS, BYTES>::QUERIES_STAY;
                let q_of_group = same(smem.q(group));
                if stay {
                    mbarrier::wait(smem.q_full(group), round & 1 ^ 1);
                    // They were copied through the generic proxy.
                    mbarrier::fence_async_proxy();
                } else {
                    let (slot, slot_count) = q_slots.take(work.row_count);
                    for i in 0..slot_count {
                        mbarrier::wait(smem.q_full(slot + i), q_slots.parity(slot + i));
                    }
                    // With few rows, several warps compute the same, and each stores its part of them.
                    let of_group = if has_own_rows { warp & (3 >> few_rows(work.row_count)) } else { warp };
                    let q_slot = if slot_count == 1 { slot } else { group * QSlots::<GROUPS>::PER_GROUP + of_group };
                    // Registers are short: offsets that do not change are not kept from item to item.
                    let q_lane = thread_index_here() & 31;
                    let q_row = q_slot % QSlots::<GROUPS>::PER_GROUP * QSlots::<GROUPS>::ROWS + (q_lane & 15);
                    let q_tile = smem.q(q_slot / QSlots::<GROUPS>::PER_GROUP);
                    for k in 0..Q_REGS / 4 {
                        let fragment =
                            ldmatrix_x4(q_tile + tile_offset(GROUP_ROWS, q_row, 2 * k as u32 + (q_lane >> 4)));
                        for i in 0..4 {
                            q[4 * k + i] = fragment[i];
                        }
                    }
                    for i in 0..slot_count {
                        release(smem.q_empty(slot + i), lane);
                    }
                }
                let scores = |s: &mut [[f32; 32]; SPANS], q: &[u32; Q_REGS], k| {
                    if stay {
                        <(M, HeadDim<HEAD_DIM>)>::scores_of_shared(s, q_of_group, k);
                    } else {
                        <(M, HeadDim<HEAD_DIM>)>::scores(s, q, k);
                    }
                };
                let factors = F::arrange::<E>(q.as_chunks_mut().0);

                let mut o = [0f32; O_REGS];
                let mut s = [[0f32; 32]; SPANS];
                let mut weights = [[0u32; 16]; SPANS];
                let mut softmax = OnlineSoftmax::EMPTY;

                macro_rules! lone_tiles {
                    ($begin:expr, $end:expr) => {
                        lone_tiles::<E, M, F, HEAD_DIM, GROUPS, BYTES, Q_REGS, O_REGS>(
                            p,
                            smem,
                            &mut ring,
                            $begin,
                            $end,
                            work.row_count,
                            &q,
                            factors,
                            &mut softmax,
                            &mut o,
                            part,
                        )
                    };
                }
                if has_lone_tiles && begin > 0 {
                    lone_tiles!(0, begin);
                }

                // Scores of the first tile; in the loop, the scores of a tile are computed while the values of the tile
                // before it are accumulated.
                mbarrier::wait(smem.k_full(ring.stage), ring.phase);
                scores(&mut s, &q, same(smem.k(ring.stage)));
                let masks = load_masks(smem, ring.stage);
                wgmma::wait_scores::<0, SPANS>(&mut s);
                release(smem.k_empty(ring.stage), lane);
                let mut ends = values_ends(masks);
                F::scale::<E>(s.as_flattened_mut(), factors);
                if Smem::<HEAD_DIM, GROUPS, BYTES>::CAPS_SCORES {
                    cap_scores(p, s.as_flattened_mut());
                }
                mask_scores::<HEAD_DIM, GROUPS, BYTES, SPANS>(&mut s, masks, work.row_count);
                let correction = softmax.update::<true, _>(&mut s, p.scale_log2);
                if has_lone_tiles
                    && begin > 0
                    && let Some(correction) = correction
                {
                    rescale(&mut o, correction);
                }
                pack_weights::<M, SPANS>(&s, &mut weights);
                let mut previous = ring;
                ring.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::STAGES);
                let mut token = begin + Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
                while token < end {
                    mbarrier::wait(smem.k_full(ring.stage), ring.phase);
                    if ends != [ALL_VALUES; SPANS] {
                        mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                        zero_values::<HEAD_DIM, GROUPS, BYTES, SPANS>(smem.v(previous.stage), ends);
                    }
                    let masks = load_masks(smem, ring.stage);
                    let (k_tile, v_tile) = (same(smem.k(ring.stage)), same(smem.v_columns(previous.stage, part)));
                    if Smem::<HEAD_DIM, GROUPS, BYTES>::TAKES_TURNS {
                        take_turn(group);
                    }
                    scores(&mut s, &q, k_tile);
                    mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                    <(M, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, v_tile);
                    if Smem::<HEAD_DIM, GROUPS, BYTES>::TAKES_TURNS {
                        pass_turn(group);
                    }
                    wgmma::wait_scores::<1, SPANS>(&mut s);
                    release(smem.k_empty(ring.stage), lane);
                    ends = values_ends(masks);
                    F::scale::<E>(s.as_flattened_mut(), factors);
                    if Smem::<HEAD_DIM, GROUPS, BYTES>::CAPS_SCORES {
                        cap_scores(p, s.as_flattened_mut());
                    }
                    mask_scores::<HEAD_DIM, GROUPS, BYTES, SPANS>(&mut s, masks, work.row_count);
                    let correction = softmax.update::<true, _>(&mut s, p.scale_log2);
                    <(M, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
                    release(smem.v_empty(previous.stage), lane);
                    if let Some(correction) = correction {
                        rescale(&mut o, correction);
                    }
                    pack_weights::<M, SPANS>(&s, &mut weights);
                    previous = ring;
                    ring.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::STAGES);
                    token += Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
                }
                if stay {
                    release(smem.q_empty(group), lane);
                }
                mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                if ends != [ALL_VALUES; SPANS] {
                    zero_values::<HEAD_DIM, GROUPS, BYTES, SPANS>(smem.v(previous.stage), ends);
                }
                <(M, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, smem.v_columns(previous.stage, part));
                let find_ends = |mut softmax: OnlineSoftmax| {
                    softmax.finish();
                    // Registers are short: not kept through the main loop.
                    let thread = thread_index_here();
                    let (lane, rows) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread, work.row_count);
                    let exist = if has_own_rows {
                        let (begin, end) = own_rows::<HEAD_DIM, GROUPS, BYTES>(thread, work.row_count);
                        rows.map(|row| row >= begin && row < end)
                    } else {
                        rows.map(|row| row < work.row_count)
                    };
                    let targets = [0, 1].map(|half| {
                        let (_, head) = query_of_row(p, plan, &work, rows[half]);
                        Row::of_query(p, destinations[half], head)
                    });
                    (lane, Ends::new(p, targets, exist, &softmax))
                };
                // While the last values are multiplied, where registers suffice.
                let early = if HEAD_DIM <= 128 && GROUPS == 1 { Some(find_ends(softmax)) } else { None };
                if !keeps_batch {
                    batch = load_batch(round);
                }
                <(M, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
                release(smem.v_empty(previous.stage), lane);
                let mut early = early;
                if has_lone_tiles {
                    let token_count = if keeps_batch { batch.token_count_before(in_batch) } else { work.token_count };
                    if end < token_count {
                        lone_tiles!(end, token_count);
                        early = early.map(|_| find_ends(softmax));
                    }
                }
                let (lane, item_ends) = early.unwrap_or_else(|| find_ends(softmax));

                let (format, _) = F::of_head(params, work.kv_head);
                format.finish(&mut o);
                let has_masks = work.has_masks();
                let columns = consumer_columns::<HEAD_DIM, GROUPS, BYTES>(part);
                let written = write_rows::<E>(p, &o, columns, &item_ends, has_masks, lane);
                if has_masks && any(written.not_finite[0] || written.not_finite[1]) {
                    break written;
                }
                if index >= plan.work_count {
                    end_turns::<HEAD_DIM, GROUPS, BYTES>(group);
                    return;
                }
            };
            // Of the item before.
            let thread = thread_index_here();
            let lane = thread % 32;
            let (_, [mut first_row, _]) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread - lane, GROUPS * GROUP_ROWS);
            // At head dim 256 it is the other way round: with it registers do not suffice.
            let address = if HEAD_DIM == 256 { p.plan } else { run_time_address(p.plan) };
            let plan = PlanView::load(words, address, Smem::<HEAD_DIM, GROUPS, BYTES>::VARIANT, p.kv_heads);
            let work = plan.work(words, work_index(round - 1), p.kv_heads_divisor);
            if has_own_rows {
                (_, [first_row, _]) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread - lane, work.row_count);
            }
            let (format, of_head) = F::of_head(params, work.kv_head);
            let p = of_head.borrow();
            let columns = consumer_columns::<HEAD_DIM, GROUPS, BYTES>(part);
            let locate = |row| {
                let (query, head) = query_of_row(p, plan, &work, row);
                Row::new(p, query, head, words)
            };
            let (stream, kv_head) = (plan.stream(&work), work.kv_head);
            macro_rules! restore {
                ($caps_scores:literal, $has_windows:literal) => {
                    restore_rows::<E, F, $caps_scores, $has_windows>(
                        p, format, stream, kv_head, first_row, not_finite, softmaxes, columns, lane, locate,
                    )
                };
            }
            match (Smem::<HEAD_DIM, GROUPS, BYTES>::CAPS_SCORES, Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_WINDOWS) {
                (true, true) => restore!(true, true),
                (true, false) => restore!(true, false),
                (false, true) => restore!(false, true),
                (false, false) => restore!(false, false),
            }
            if index >= plan.work_count {
                end_turns::<HEAD_DIM, GROUPS, BYTES>(group);
                return;
            }
        }
    }
}

/// Threads of two consumer warpgroups.
const TURN_THREADS: u32 = 8 * 32;

/// Waits until the other consumer warpgroup lets this one, `group`, multiply.
#[inline(always)]
fn take_turn(group: u32) {
    sync_numbered(NamedBarrier::Turns, group, TURN_THREADS);
}

/// Lets the other consumer warpgroup multiply behind what this one has issued.
#[inline(always)]
fn pass_turn(group: u32) {
    arrive_numbered(NamedBarrier::Turns, group ^ 1, TURN_THREADS);
}

/// Behind the last item the second warpgroup has passed once more than the first one has taken.
#[inline(always)]
fn end_turns<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(group: u32) {
    if Smem::<HEAD_DIM, GROUPS, BYTES>::TAKES_TURNS && group == 0 {
        take_turn(0);
    }
}

/// The columns that a consumer multiplies, the `part`-th.
#[inline(always)]
fn consumer_columns<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(part: u32) -> Columns {
    let begin = part * Smem::<HEAD_DIM, GROUPS, BYTES>::COLUMNS;
    let end = begin + Smem::<HEAD_DIM, GROUPS, BYTES>::COLUMNS;
    Columns { begin, end, head_dim: HEAD_DIM, v_head_dim: HEAD_DIM }
}

/// One arrival per consumer warp: the warp has finished with the stage.
///
/// # Safety
/// `empty` is an initialised barrier that counts consumer warps.
#[inline(always)]
pub(super) unsafe fn release(empty: u32, lane: u32) {
    // SAFETY: the caller's contract.
    unsafe { mbarrier::arrive_lane_0(empty, lane) };
}

/// By how many powers of two an item of `row_count` rows has fewer than the warpgroup has.
#[inline(always)]
fn few_rows(row_count: u32) -> u32 {
    (row_count <= GROUP_ROWS / 2) as u32 + (row_count <= GROUP_ROWS / 4) as u32
}

/// The lane of a consumer thread, and the two tile rows it holds scores of, in an item of `row_count` rows.
#[inline(always)]
pub(super) fn consumer_rows<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    thread: u32,
    row_count: u32,
) -> (u32, [u32; 2]) {
    let (warp, lane) = (thread / 32 - PRODUCER_WARPS, thread % 32);
    let warp = if Smem::<HEAD_DIM, GROUPS, BYTES>::COLUMN_SPLITS > 1 {
        warp % (GROUPS * GROUP_ROWS / 16)
    } else if Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_OWN_ROWS {
        warp & (3 >> few_rows(row_count))
    } else {
        warp
    };
    let row = warp * 16 + lane / 4;
    (lane, [row, row + 8])
}

/// Of the rows that a consumer thread's warp holds scores of, those that it stores, and computes lone tiles for: 16 of them, or
/// as many fewer as the item has fewer than the warpgroup. Begin and end.
#[inline(always)]
pub(super) fn own_rows<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32>(
    thread: u32,
    row_count: u32,
) -> (u32, u32) {
    let (_, [first_row, _]) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread & !31, row_count);
    let (begin, count) = if Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_OWN_ROWS {
        let (warp, few) = (thread / 32 - PRODUCER_WARPS, few_rows(row_count));
        (first_row + (warp >> (2 - few)) * (16 >> few), 16 >> few)
    } else {
        (first_row, 16)
    };
    (begin, if begin + count < row_count { begin + count } else { row_count })
}

/// Sets the scores of keys that a row does not attend to to -inf.
#[inline(always)]
pub(super) fn mask_scores<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32, const SPANS: usize>(
    s: &mut [[f32; 32]; SPANS],
    masks: TileMasks<SPANS>,
    row_count: u32,
) {
    if all_full(masks) {
        return;
    }
    let (lane, rows) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread_index_here(), row_count);
    if all_keys(masks) {
        // Nearly all tiles of private pages: a choice per row, not per key.
        for (span, step) in spans_and_steps::<SPANS>() {
            for half in 0..2 {
                let attends = masks[span][step].has_row(rows[half]);
                for i in 0..4 {
                    let score = &mut s[span][8 * step + value_of_row(half, i)];
                    *score = if attends { *score } else { f32::NEG_INFINITY };
                }
            }
        }
        return;
    }
    for (span, step) in spans_and_steps::<SPANS>() {
        let mask = masks[span][step];
        for half in 0..2 {
            let limit = mask.limit(rows[half]);
            for i in 0..4 {
                let key = (i as u32 >> 1) * 8 + (lane & 3) * 2 + (i as u32 & 1);
                let is_in_front = Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_WINDOWS && below_in_window(key, mask.first());
                if key >= limit || is_in_front {
                    s[span][8 * step + value_of_row(half, i)] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The four masks of each span of 64 keys.
#[inline(always)]
fn spans_and_steps<const SPANS: usize>() -> impl Iterator<Item = (usize, usize)> {
    (0..4 * SPANS).map(|mask| (mask / 4, mask % 4))
}

/// Zeroes the V rows that [`values_ends`] leaves out.
///
/// # Safety
/// All consumers; the V tile is complete.
#[inline(always)]
pub(super) unsafe fn zero_values<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32, const SPANS: usize>(
    tile: u32,
    ends: [u32; SPANS],
) {
    let thread = thread_index_here() - 32 * PRODUCER_WARPS;
    let chunks_per_row = HEAD_DIM / 8;
    let mut row = thread / chunks_per_row;
    while row < Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS {
        let of_span = if row < SPAN_KEYS { ends[0] } else { ends[SPANS - 1] };
        let end = of_span >> (row % SPAN_KEYS / KeyMask::KEYS * 8) & 0xff;
        if row % KeyMask::KEYS >= end {
            // SAFETY: the row lies in the tile.
            unsafe {
                store_shared_u32x4(
                    tile + tile_offset(Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS, row, thread % chunks_per_row),
                    [0; 4],
                )
            };
        }
        row += 32 * Smem::<HEAD_DIM, GROUPS, BYTES>::CONSUMER_WARPS / chunks_per_row;
    }
    mbarrier::fence_async_proxy();
    sync_named(NamedBarrier::Consumers, 32 * Smem::<HEAD_DIM, GROUPS, BYTES>::CONSUMER_WARPS);
}

/// Rounds the weights to the 16-bit type: accumulator layout and A-operand layout coincide.
#[inline(always)]
pub(super) fn pack_weights<E: Element, const SPANS: usize>(s: &[[f32; 32]; SPANS], weights: &mut [[u32; 16]; SPANS]) {
    for span in 0..SPANS {
        for i in 0..16 {
            weights[span][i] = E::pack(s[span][2 * i], s[span][2 * i + 1]);
        }
    }
}
