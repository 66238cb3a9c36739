//! Forward kernels for 16 rows: `mma16`, whose four warps split the KV tokens of an item between them, and `leaf16`, whose
//! warps serve an item each.
//!
//! A short leaf is a chain of latencies (plan, page ids, KV, output) with little to do in between; `leaf16` keeps the
//! largest number of such chains going at a time. Longer items want the four warps.
//!
//! In `mma16` warp w takes 32-token units w, w+4, ..., in `leaf16` every unit of its item. Each warp gathers K and V of its units into a ring of its own with `cp.async`,
//! so the main loop has no CTA barrier: warps drift apart and keep the memory system busy. A stage is refilled as soon
//! as its K (then its V) has been consumed. The four states are combined in shared memory at the end.

use pat_abi::{ForwardParams, TileVariant};

use crate::element::{Bf16, Element, F16};
use crate::item::Item;
use crate::ptx::{barrier, cp_async, math, special};
use crate::softmax::{RowStates, normaliser};
use crate::tile::fragment::{Accumulator, accumulate, load_queries, mask, rescale, scores, to_operand};
use crate::tile::gather::{Pool, Token, gather, row_of_lane};
use crate::tile::reduce::{combine_and_store, scratch_bytes};

const WARPS: u32 = 4;
const UNIT_TOKENS: u32 = 32;

/// `HEAD_STEPS` is head_dim / 16. `STAGES` units (K and V each) are in flight per warp, `PENDING = 2*STAGES - 1` copies.
///
/// # Safety
/// `params` describes live buffers and a plan made for them; the launch is as the manifest says.
#[inline(always)]
unsafe fn forward<
    E: Element,
    const HEAD_STEPS: usize,
    const STAGES: u32,
    const PENDING: u32,
    const WARPS_PER_ITEM: u32,
>(
    params: &ForwardParams,
) {
    const { assert!(WARPS_PER_ITEM == 1 || WARPS_PER_ITEM == WARPS) };
    const { assert!(PENDING == 2 * STAGES - 1) };
    let unit_bytes = UNIT_TOKENS * 32 * HEAD_STEPS as u32;
    let ring_bytes = 2 * STAGES * unit_bytes;
    const { assert!(scratch_bytes(16 * HEAD_STEPS as u32) <= 2 * STAGES * UNIT_TOKENS * 32 * HEAD_STEPS as u32) };
    let thread = special::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    let (variant, work) = if WARPS_PER_ITEM == 1 {
        (TileVariant::Leaf16, special::cta_index() * WARPS + warp)
    } else {
        (TileVariant::Mma16, special::cta_index())
    };
    // SAFETY: the caller's contract.
    let Some(item) = (unsafe { Item::load(params, variant, work) }) else { return };
    let ring = special::dynamic_smem() + warp * ring_bytes;
    let located = row_of_lane::<HEAD_STEPS>(lane);
    let keys = Pool::keys(params, item.kv_head);
    let values = Pool::values(params, item.kv_head);

    // Units are known by their first token; the warp's next one is WARPS_PER_ITEM units further.
    let stride = WARPS_PER_ITEM * UNIT_TOKENS;
    let mut unit = warp % WARPS_PER_ITEM * UNIT_TOKENS;
    let mut incoming = unit;
    // SAFETY: the plan's page ids; stages are free before their first use.
    let mut place = unsafe { Token::locate(&item, params.page_size, incoming + located) };
    for stage in 0..STAGES {
        let k_stage = ring + stage * 2 * unit_bytes;
        if incoming < item.token_count {
            let valid = item.token_count - incoming;
            // SAFETY: as above.
            unsafe { gather::<HEAD_STEPS, UNIT_TOKENS>(k_stage, 0, keys, place, valid, lane) };
            cp_async::commit_group();
            // SAFETY: as above.
            unsafe { gather::<HEAD_STEPS, UNIT_TOKENS>(k_stage + unit_bytes, 0, values, place, valid, lane) };
            cp_async::commit_group();
        } else {
            cp_async::commit_group();
            cp_async::commit_group();
        }
        incoming += stride;
        // SAFETY: as above.
        place = unsafe { Token::locate(&item, params.page_size, incoming + located) };
    }

    // SAFETY: the caller's contract.
    let q = unsafe { load_queries::<HEAD_STEPS>(params, &item, 0, lane) };
    let mut output = [[[0.0; 4]; 2]; HEAD_STEPS];
    let mut states = RowStates::EMPTY;
    let mut k_stage = ring;
    while unit < item.token_count {
        let v_stage = k_stage + unit_bytes;
        let refill = incoming < item.token_count;
        // Wraps when there is nothing to refill; not used then.
        let refill_valid = item.token_count.wrapping_sub(incoming);

        cp_async::wait_group::<PENDING>();
        barrier::sync_warp();
        // SAFETY: this unit's K has arrived, for all lanes.
        let mut s = unsafe { scores::<E, HEAD_STEPS, 2>(&q, k_stage, lane) };
        barrier::sync_warp();
        if refill {
            // SAFETY: all lanes have read K.
            unsafe { gather::<HEAD_STEPS, UNIT_TOKENS>(k_stage, 0, keys, place, refill_valid, lane) };
        }
        cp_async::commit_group();

        let valid = item.token_count - unit;
        if valid < UNIT_TOKENS {
            mask(&mut s, valid, lane);
        }
        let factors = states.update(&mut s, params.scale_log2);
        rescale(&mut output, factors);
        let p = to_operand::<E, 2>(&s);

        cp_async::wait_group::<PENDING>();
        barrier::sync_warp();
        // SAFETY: this unit's V has arrived, for all lanes.
        unsafe { accumulate::<E, HEAD_STEPS, 2>(&mut output, &p, v_stage, lane) };
        barrier::sync_warp();
        if refill {
            // SAFETY: all lanes have read V.
            unsafe { gather::<HEAD_STEPS, UNIT_TOKENS>(v_stage, 0, values, place, refill_valid, lane) };
        }
        cp_async::commit_group();

        unit += stride;
        incoming += stride;
        // SAFETY: the plan's page ids. The load has the whole next unit to arrive.
        place = unsafe { Token::locate(&item, params.page_size, incoming + located) };
        k_stage += 2 * unit_bytes;
        if k_stage == ring + ring_bytes {
            k_stage = ring;
        }
    }
    states.finish();
    if WARPS_PER_ITEM == 1 {
        // SAFETY: the caller's contract.
        unsafe { store_rows::<E, HEAD_STEPS>(params, &item, &output, &states, lane) };
        return;
    }
    cp_async::wait_group::<0>();
    barrier::sync_warp();
    // SAFETY: the scratch is the warp's own, now idle, ring.
    unsafe {
        let smem = special::dynamic_smem();
        combine_and_store::<E, HEAD_STEPS, 1, WARPS>(params, &item, smem, ring_bytes, &output, &states, thread);
    }
}

/// Normalises and writes the rows of one warp's item from its registers.
///
/// # Safety
/// As [`forward`].
#[inline(always)]
unsafe fn store_rows<E: Element, const HEAD_STEPS: usize>(
    params: &ForwardParams,
    item: &Item,
    output: &Accumulator<HEAD_STEPS>,
    states: &RowStates,
    lane: u32,
) {
    for r in 0..2 {
        let index = lane / 4 + 8 * r as u32;
        if index >= item.row_count {
            continue;
        }
        // SAFETY: the row is one of the item's, and this lane's columns are nobody else's.
        unsafe {
            let row = item.row(params, index);
            let scale = normaliser(states.sum[r]);
            for step in 0..HEAD_STEPS {
                for half in 0..2 {
                    let column = (16 * step + 8 * half) as u32 + 2 * (lane % 4);
                    let tile = &output[step][half];
                    let pair = [tile[2 * r] * scale, tile[2 * r + 1] * scale];
                    row.store_pair::<E>(params, 16 * HEAD_STEPS as u32, column, pair);
                }
            }
            if lane % 4 == 0 {
                row.store_lse(params, states.max[r] + math::log2(states.sum[r]));
            }
        }
    }
}

macro_rules! entry {
    ($name:ident, $element:ty, $head_steps:literal, stages $stages:literal, pending $pending:literal, warps per item $warps:literal) => {
        /// See the module.
        ///
        /// # Safety
        /// `params` describes live buffers and a plan made for them; launched as the manifest says.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name(params: ForwardParams) {
            // SAFETY: the caller's contract.
            unsafe { forward::<$element, $head_steps, $stages, $pending, $warps>(&params) }
        }
    };
}

// Both head dimensions keep 16 KiB per warp in flight.
entry!(pat_forward_mma16_d128_f16, F16, 8, stages 1, pending 1, warps per item 4);
entry!(pat_forward_leaf16_d128_f16, F16, 8, stages 1, pending 1, warps per item 1);
entry!(pat_forward_mma16_d128_bf16, Bf16, 8, stages 1, pending 1, warps per item 4);
entry!(pat_forward_leaf16_d128_bf16, Bf16, 8, stages 1, pending 1, warps per item 1);
entry!(pat_forward_mma16_d64_f16, F16, 4, stages 2, pending 3, warps per item 4);
entry!(pat_forward_leaf16_d64_f16, F16, 4, stages 2, pending 3, warps per item 1);
entry!(pat_forward_mma16_d64_bf16, Bf16, 4, stages 2, pending 3, warps per item 4);
entry!(pat_forward_leaf16_d64_bf16, Bf16, 4, stages 2, pending 3, warps per item 1);
