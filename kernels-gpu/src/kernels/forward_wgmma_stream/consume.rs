//! The consumer warpgroups: scores, weights, outputs.

use super::masks::{ALL_VALUES, KeyMask, TileMasks, all_full, all_keys, load_masks, values_ends};
use super::online_softmax::OnlineSoftmax;
use super::smem::{QSlots, Ring, Smem, tile_offset};
use super::work::{Batch, PlanView, Work, work_index};
use super::{GROUP_ROWS, PRODUCER_WARPS, SPAN_KEYS};
use crate::element::Element;
use crate::finish::Finish;
use crate::isolation::{RowSoftmax, restore_rows};
use crate::item::Row;
use crate::ptx::barrier::sync_named;
use crate::ptx::ldst::{request_global_u32x2, store_shared_u32x4};
use crate::ptx::mbarrier;
use crate::ptx::mma::ldmatrix_x4;
use crate::ptx::shuffle::{any, xor_u32};
use crate::ptx::special::{thread_index, thread_index_here};
use crate::ptx::wgmma::{self, HeadDim, WgmmaOps};
use crate::softmax::cap_scores;
use pat_abi::{ForwardParams, NO_MASKS, NamedBarrier};

/// Consumer warpgroup `group`.
///
/// # Safety
/// One whole, aligned warpgroup; barriers initialised.
#[inline(always)]
pub(super) unsafe fn consume<
    E: Element,
    const HEAD_DIM: u32,
    const GROUPS: u32,
    const Q_REGS: usize,
    const O_REGS: usize,
    const SPANS: usize,
>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS>,
    group: u32,
) where
    (E, HeadDim<HEAD_DIM>): WgmmaOps<Q_REGS, O_REGS, SPANS>,
{
    let warp = (thread_index() & 127) >> 5;
    let (lane, rows) = consumer_rows(thread_index());
    let mut ring = Ring::<GROUPS> { stage: 0, phase: 0 };
    let mut q_slots = QSlots::<GROUPS> { next: 0, phases: 0 };
    let mut round = 0;
    let mut index = work_index(round);
    if index >= plan.work_count {
        return;
    }
    // SAFETY: over the whole function, items come from the plan, addresses from the checked launch parameters; every branch on
    // item fields is uniform over the warpgroup.
    unsafe {
        let mut batch = Batch::load(p, plan, round, lane);
        let mut in_batch = 0;
        while index < plan.work_count {
            if in_batch == 32 {
                in_batch = 0;
                batch = Batch::load(p, plan, round, lane);
            }
            let work = batch.get(in_batch);
            in_batch += 1;
            round += 1;
            index = work_index(round);
            let destinations = rows.map(|row| request_global_u32x2(work.query_address(p, plan, row).0));

            let mut q = [0u32; Q_REGS];
            let (slot, slot_count) = q_slots.take(work.row_count);
            for i in 0..slot_count {
                mbarrier::wait(smem.q_full(slot + i), q_slots.parity(slot + i));
            }
            // With 16 rows or fewer, all warps compute the rows of the first: only it has something to store.
            let q_slot = if slot_count == 1 { slot } else { group * QSlots::<GROUPS>::PER_GROUP + warp };
            // Registers are short: offsets that do not change are not kept from item to item.
            let q_lane = thread_index_here() & 31;
            let q_row = q_slot % QSlots::<GROUPS>::PER_GROUP * QSlots::<GROUPS>::ROWS + (q_lane & 15);
            let q_tile = smem.q(q_slot / QSlots::<GROUPS>::PER_GROUP);
            for k in 0..Q_REGS / 4 {
                let fragment = ldmatrix_x4(q_tile + tile_offset(GROUP_ROWS, q_row, 2 * k as u32 + (q_lane >> 4)));
                for i in 0..4 {
                    q[4 * k + i] = fragment[i];
                }
            }
            for i in 0..slot_count {
                release(smem.q_empty(slot + i), lane);
            }

            let mut o = [0f32; O_REGS];
            let mut s = [[0f32; 32]; SPANS];
            let mut weights = [[0u32; 16]; SPANS];
            let mut softmax = OnlineSoftmax::new(p.scale_log2);

            // Scores of the first tile; in the loop, the scores of a tile are computed while the values of the tile
            // before it are accumulated.
            mbarrier::wait(smem.k_full(ring.stage), ring.phase);
            <(E, HeadDim<HEAD_DIM>)>::scores(&mut s, &q, smem.k(ring.stage));
            let masks = load_masks(smem, ring.stage);
            wgmma::wait_scores::<0, SPANS>(&mut s);
            release(smem.k_empty(ring.stage), lane);
            let mut ends = values_ends(masks);
            if Smem::<HEAD_DIM, GROUPS>::CAPS_SCORES {
                cap_scores(p, s.as_flattened_mut());
            }
            mask_scores(&mut s, masks);
            softmax.update(&mut s);
            pack_weights::<E, SPANS>(&s, &mut weights);
            let mut previous = ring;
            ring.advance();
            let mut token = Smem::<HEAD_DIM, GROUPS>::KEYS;
            while token < work.token_count {
                mbarrier::wait(smem.k_full(ring.stage), ring.phase);
                if ends != [ALL_VALUES; SPANS] {
                    mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                    zero_values::<HEAD_DIM, GROUPS, SPANS>(smem.v(previous.stage), ends);
                }
                let masks = load_masks(smem, ring.stage);
                <(E, HeadDim<HEAD_DIM>)>::scores(&mut s, &q, smem.k(ring.stage));
                mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                <(E, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, smem.v(previous.stage));
                wgmma::wait_scores::<1, SPANS>(&mut s);
                release(smem.k_empty(ring.stage), lane);
                ends = values_ends(masks);
                if Smem::<HEAD_DIM, GROUPS>::CAPS_SCORES {
                    cap_scores(p, s.as_flattened_mut());
                }
                mask_scores(&mut s, masks);
                let correction = softmax.update(&mut s);
                <(E, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
                release(smem.v_empty(previous.stage), lane);
                if let Some(correction) = correction {
                    for i in 0..O_REGS {
                        o[i] *= correction[(i >> 1) & 1];
                    }
                }
                pack_weights::<E, SPANS>(&s, &mut weights);
                previous = ring;
                ring.advance();
                token += Smem::<HEAD_DIM, GROUPS>::KEYS;
            }
            mbarrier::wait(smem.v_full(previous.stage), previous.phase);
            if ends != [ALL_VALUES; SPANS] {
                zero_values::<HEAD_DIM, GROUPS, SPANS>(smem.v(previous.stage), ends);
            }
            <(E, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, smem.v(previous.stage));
            <(E, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
            release(smem.v_empty(previous.stage), lane);

            let (sums, references) = softmax.finish();
            let has_masks = work.mask_begin != NO_MASKS;
            let mut not_finite = [false; 2];
            let mut scales = [0.0; 2];
            for half in 0..2 {
                let [sequence, slot] = destinations[half];
                let (_, head) = work.query_address(p, plan, rows[half]);
                let row = Row::new(p, sequence, head, slot);
                let Finish { scale: inverse, lse_log2 } = Finish::new(references[half], sums[half], row.sink(p));
                scales[half] = inverse;
                // Four lanes hold a row, two columns of every eight each; after the exchange each holds eight neighbours of
                // every 32.
                let mut octets = [[0u32; 4]; 4];
                for i in 0..O_REGS / 16 {
                    let pair = |block: usize| {
                        let first = 16 * i + 4 * block + 2 * half;
                        E::pack(o[first] * inverse, o[first + 1] * inverse)
                    };
                    octets[i] = transpose_quad([pair(0), pair(1), pair(2), pair(3)], lane);
                }
                if rows[half] >= work.row_count {
                    continue;
                }
                if has_masks {
                    let words = octets.as_flattened()[..O_REGS / 4].iter();
                    let sum = words.fold(0, |sum, &word| E::add_zero_times(sum, word));
                    not_finite[half] = sum & 0x7fff_7fff != 0;
                }
                if row.is_partial() {
                    for i in 0..O_REGS / 4 {
                        let pair = [o[4 * i + 2 * half] * inverse, o[4 * i + 2 * half + 1] * inverse];
                        row.store_partial_pair(p, HEAD_DIM, 8 * i as u32 + 2 * (lane & 3), pair);
                    }
                } else {
                    for i in 0..O_REGS / 16 {
                        row.store_octet(p, 32 * i as u32 + 8 * (lane & 3), octets[i]);
                    }
                }
                if lane & 3 == 0 {
                    row.store_lse(p, lse_log2);
                }
            }
            if has_masks && any(not_finite[0] || not_finite[1]) {
                // Registers are short: nothing that only this needs is kept through the main loop.
                let thread = thread_index_here();
                let (lane, first_row) = (thread % 32, (thread / 32 - PRODUCER_WARPS) * 16);
                let plan = PlanView::load(p, Smem::<HEAD_DIM, GROUPS>::VARIANT);
                let work = Work::load(p, plan, work_index(round - 1));
                let softmaxes = [0, 1].map(|half| RowSoftmax { reference: references[half], scale: scales[half] });
                let locate = |row| {
                    let (query, head) = work.query_address(p, plan, row);
                    let [sequence, slot] = request_global_u32x2(query);
                    Row::new(p, sequence, head, slot)
                };
                let stream = work.stream(plan);
                if Smem::<HEAD_DIM, GROUPS>::CAPS_SCORES {
                    restore_rows::<E, true>(
                        p,
                        stream,
                        work.kv_head,
                        first_row,
                        not_finite,
                        softmaxes,
                        HEAD_DIM,
                        lane,
                        locate,
                    );
                } else {
                    restore_rows::<E, false>(
                        p,
                        stream,
                        work.kv_head,
                        first_row,
                        not_finite,
                        softmaxes,
                        HEAD_DIM,
                        lane,
                        locate,
                    );
                }
            }
        }
    }
}

/// Transposes a 4 x 4 matrix whose row `l` lane `l` of a quad holds. All lanes of a warp.
#[inline(always)]
pub(super) fn transpose_quad(row: [u32; 4], lane: u32) -> [u32; 4] {
    let [a, b, c, d] = row;
    // Exchange 2 x 2 blocks across lane bit 1, then elements across lane bit 0.
    let high = lane & 2 != 0;
    let (keep, send) = if high { ([c, d], [a, b]) } else { ([a, b], [c, d]) };
    let received = send.map(|word| xor_u32(word, 2));
    let [e, f] = keep;
    let [g, h] = received;
    // Columns `2 * (lane / 2) ..` of rows `lane` and `lane ^ 2`.
    let odd = lane & 1 != 0;
    let (kept, sent) = if odd { ([f, h], [e, g]) } else { ([e, g], [f, h]) };
    let [i, j] = sent.map(|word| xor_u32(word, 1));
    // Column `lane` of rows lane, lane ^ 2, and of lane ^ 1, lane ^ 3.
    let own = [kept[0], kept[1], i, j];
    let at = |source: u32| {
        let difference = source ^ lane & 3;
        let low = if difference & 2 == 0 { [own[0], own[2]] } else { [own[1], own[3]] };
        if difference & 1 == 0 { low[0] } else { low[1] }
    };
    [at(0), at(1), at(2), at(3)]
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

/// The lane of a consumer thread, and the two tile rows it holds scores of.
#[inline(always)]
pub(super) fn consumer_rows(thread: u32) -> (u32, [u32; 2]) {
    let (warp, lane) = (thread / 32 - PRODUCER_WARPS, thread % 32);
    let row = warp * 16 + lane / 4;
    (lane, [row, row + 8])
}

/// Sets the scores of keys that a row does not attend to to -inf.
#[inline(always)]
pub(super) fn mask_scores<const SPANS: usize>(s: &mut [[f32; 32]; SPANS], masks: TileMasks<SPANS>) {
    if all_full(masks) {
        return;
    }
    let (lane, rows) = consumer_rows(thread_index_here());
    if all_keys(masks) {
        // Nearly all tiles of private pages: a choice per row, not per key.
        for (span, step) in spans_and_steps::<SPANS>() {
            for half in 0..2 {
                let attends = masks[span][step].has_row(rows[half]);
                for i in 0..4 {
                    let score = &mut s[span][8 * step + (i >> 1) * 4 + 2 * half + (i & 1)];
                    *score = if attends { *score } else { f32::NEG_INFINITY };
                }
            }
        }
        return;
    }
    for (span, step) in spans_and_steps::<SPANS>() {
        for half in 0..2 {
            let limit = masks[span][step].limit(rows[half]);
            for i in 0..4 {
                let key = (i as u32 >> 1) * 8 + (lane & 3) * 2 + (i as u32 & 1);
                if key >= limit {
                    s[span][8 * step + (i >> 1) * 4 + 2 * half + (i & 1)] = f32::NEG_INFINITY;
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
pub(super) unsafe fn zero_values<const HEAD_DIM: u32, const GROUPS: u32, const SPANS: usize>(
    tile: u32,
    ends: [u32; SPANS],
) {
    let thread = thread_index_here() - 32 * PRODUCER_WARPS;
    let chunks_per_row = HEAD_DIM / 8;
    let mut row = thread / chunks_per_row;
    while row < Smem::<HEAD_DIM, GROUPS>::KEYS {
        let of_span = if row < SPAN_KEYS { ends[0] } else { ends[SPANS - 1] };
        let end = of_span >> (row % SPAN_KEYS / KeyMask::KEYS * 8) & 0xff;
        if row % KeyMask::KEYS >= end {
            // SAFETY: the row lies in the tile.
            unsafe {
                store_shared_u32x4(
                    tile + tile_offset(Smem::<HEAD_DIM, GROUPS>::KEYS, row, thread % chunks_per_row),
                    [0; 4],
                )
            };
        }
        row += 128 * GROUPS / chunks_per_row;
    }
    mbarrier::fence_async_proxy();
    sync_named(NamedBarrier::Consumers, 32 * Smem::<HEAD_DIM, GROUPS>::CONSUMER_WARPS);
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
