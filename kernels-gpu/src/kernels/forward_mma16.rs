//! Forward kernels for 16 rows: four warps split the KV tokens of an item between them.
//!
//! Warp w takes 32-token units w, w+4, ... and gathers their K and V into a ring of its own with `cp.async`, so the main
//! loop has no CTA barrier: warps drift apart and keep the memory system busy. A stage is refilled as soon as its K (then
//! its V) has been consumed. The four states are combined in shared memory at the end.

use core::borrow::Borrow;

#[cfg(pat_sm90a)]
use pat_abi::e4m3_kernel_shapes;
use pat_abi::layout::common_row_lanes;
use pat_abi::tile::warp_state_bytes;
use pat_abi::{ForwardParams, TileConfig, TileVariant};
#[cfg(not(pat_sm90a))]
use pat_abi::{mma_kernel_shapes, scaled_kernel_shapes};

#[cfg(not(pat_sm90a))]
use crate::cache::Plain;
use crate::cache::{Cache, EightBit, Rows};
use crate::eight_bit;
use crate::element::{Bf16, Element, F16};
use crate::item::Item;
use crate::ptx::{barrier, cp_async, special};
use crate::softmax::{OnlineSoftmax, cap_scores, rescale};
use crate::tile::fragment::{Queries, mask, mask_rows};
use crate::tile::gather::{Pool, Token, gather, row_of_lane};
use crate::tile::reduce::combine_and_store;

const WARPS: u32 = TileVariant::Mma16.config(128).key_splits;
/// Rows of a tile.
const ROWS: u32 = TileVariant::Mma16.config(128).rows;

/// `HEAD_STEPS` and `VALUE_STEPS` are the elements of keys and values / 16, `KEY_CHUNKS` and `VALUE_CHUNKS` their
/// bytes / 16, and `LANES` copy a row of either. Units of
/// `UNIT_TOKENS = 16 * KEY_STEPS` tokens; `STAGES` of them (K and V each) are in flight per warp, `PENDING = 2*STAGES - 1`
/// copies.
///
/// # Safety
/// `params` describes live buffers and a plan made for them; the launch is as the manifest says.
#[inline(always)]
unsafe fn forward<
    E: Element,
    C: Cache,
    const HEAD_STEPS: usize,
    const VALUE_STEPS: usize,
    const KEY_CHUNKS: u32,
    const VALUE_CHUNKS: u32,
    const LANES: u32,
    const UNIT_TOKENS: u32,
    const KEY_STEPS: usize,
    const STAGES: u32,
    const PENDING: u32,
>(
    params: &ForwardParams,
    cache: C,
) {
    let layout = const {
        let (head_dim, v_head_dim) = (16 * HEAD_STEPS as u32, 16 * VALUE_STEPS as u32);
        let config = TileVariant::Mma16.config(head_dim).of_elements(C::BYTES);
        assert!(config.rings == WARPS && config.row_warps() == 1 && config.tile_keys() == UNIT_TOKENS);
        assert!(16 * KEY_STEPS as u32 == UNIT_TOKENS && config.stages == STAGES && PENDING == 2 * STAGES - 1);
        assert!(Queries::<HEAD_STEPS>::IN_SMEM == (config.query_slots == 1));
        assert!(16 * KEY_CHUNKS == head_dim * C::BYTES && 16 * VALUE_CHUNKS == v_head_dim * C::BYTES);
        let layout = config.smem(head_dim, v_head_dim, C::BYTES);
        assert!(warp_state_bytes(v_head_dim) <= layout.ring_bytes);
        layout
    };
    let (stage_bytes, ring_bytes) = (layout.stage_bytes, layout.ring_bytes);
    let thread = special::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    // SAFETY: the caller's contract.
    let Some(item) = (unsafe { Item::load(params, TileVariant::Mma16, special::cta_index()) }) else { return };
    let ring = special::dynamic_smem() + warp * ring_bytes;
    let located = row_of_lane::<LANES>(lane);
    let keys = Pool::keys(params, item.kv_head);
    let values = Pool::values(params, item.kv_head);

    // Behind the rings: which rows attend to each token, if the item has masks.
    let ranges = special::dynamic_smem() + layout.masks + warp * STAGES * layout.mask_bytes;
    let ranges_of = |k_stage: u32| ranges + (k_stage - ring) / layout.stage_bytes * layout.mask_bytes;
    // Units are known by their first token; the warp's next one is WARPS units further.
    let stride = WARPS * UNIT_TOKENS;
    let mut unit = warp * UNIT_TOKENS;
    let mut incoming = unit;
    // SAFETY: the plan's page ids; stages are free before their first use.
    let mut place = unsafe { Token::locate(params, &item.stream, incoming + located) };
    let query_tile = special::dynamic_smem() + layout.q;
    if Queries::<HEAD_STEPS>::IN_SMEM {
        const SHARE: u32 = ROWS / WARPS;
        // SAFETY: the tile is free; each warp copies its share of it, with its first keys.
        unsafe { Queries::<HEAD_STEPS>::request::<SHARE>(params, &item, query_tile, SHARE * warp, SHARE * warp, lane) };
    }
    for stage in 0..STAGES {
        let k_stage = ring + stage * stage_bytes;
        if incoming < item.stream.token_count {
            if item.stream.has_masks() {
                // SAFETY: as above.
                unsafe { place.store_rows(ranges_of(k_stage), located, UNIT_TOKENS) };
            }
            // SAFETY: as above.
            unsafe { gather::<KEY_CHUNKS, LANES, UNIT_TOKENS>(k_stage, 0, keys, place, lane) };
            cp_async::commit_group();
            // SAFETY: as above.
            unsafe { gather::<VALUE_CHUNKS, LANES, UNIT_TOKENS>(k_stage + layout.v, 0, values, place, lane) };
            cp_async::commit_group();
        } else {
            cp_async::commit_group();
            cp_async::commit_group();
        }
        incoming += stride;
        // SAFETY: as above.
        place = unsafe { Token::locate(params, &item.stream, incoming + located) };
    }

    // SAFETY: the caller's contract.
    let q = unsafe { Queries::<HEAD_STEPS>::new::<E, C>(params, &item, query_tile, 0, lane) };
    if Queries::<HEAD_STEPS>::IN_SMEM {
        cp_async::wait_group::<PENDING>();
        barrier::sync_cta();
    }
    let mut output = [[[0.0; 4]; 2]; VALUE_STEPS];
    let mut softmax = OnlineSoftmax::EMPTY;
    let mut k_stage = ring;
    while unit < item.stream.token_count {
        let v_stage = k_stage + layout.v;
        let refill = incoming < item.stream.token_count;

        cp_async::wait_group::<PENDING>();
        barrier::sync_warp();
        // SAFETY: this unit's K has arrived, for all lanes.
        let mut s = unsafe { C::scores::<E, HEAD_STEPS, KEY_STEPS>(&q, k_stage, lane) };
        cap_scores(params, s.as_flattened_mut().as_flattened_mut());
        let valid = item.stream.token_count - unit;
        if item.stream.has_masks() {
            // SAFETY: they were written before the barrier.
            unsafe { mask_rows(&mut s, ranges_of(k_stage), 0, lane) };
        } else if valid < UNIT_TOKENS {
            mask(&mut s, valid, lane);
        }
        barrier::sync_warp();
        if refill {
            if item.stream.has_masks() {
                // SAFETY: all lanes have read the unit's ranges.
                unsafe { place.store_rows(ranges_of(k_stage), located, UNIT_TOKENS) };
            }
            // SAFETY: all lanes have read K.
            unsafe { gather::<KEY_CHUNKS, LANES, UNIT_TOKENS>(k_stage, 0, keys, place, lane) };
        }
        cp_async::commit_group();

        if let Some(factors) = softmax.update::<false, _>(s.as_flattened_mut(), params.scale_log2) {
            rescale(output.as_flattened_mut().as_flattened_mut(), factors);
        }
        let p = C::weights::<E, KEY_STEPS>(&s);

        cp_async::wait_group::<PENDING>();
        barrier::sync_warp();
        // SAFETY: this unit's V has arrived, for all lanes.
        unsafe { C::accumulate::<E, VALUE_STEPS, VALUE_STEPS, KEY_STEPS>(&mut output, &p, v_stage, lane) };
        barrier::sync_warp();
        if refill {
            // SAFETY: all lanes have read V.
            unsafe { gather::<VALUE_CHUNKS, LANES, UNIT_TOKENS>(v_stage, 0, values, place, lane) };
        }
        cp_async::commit_group();

        unit += stride;
        incoming += stride;
        // SAFETY: the plan's page ids. The load has the whole next unit to arrive.
        place = unsafe { Token::locate(params, &item.stream, incoming + located) };
        k_stage += stage_bytes;
        // A ring may end behind its stages: it also holds the warp's state.
        if k_stage == ring + STAGES * stage_bytes {
            k_stage = ring;
        }
    }
    softmax.finish();
    cache.finish(&mut output, lane);
    cp_async::wait_group::<0>();
    barrier::sync_warp();
    // SAFETY: the scratch is the warp's own, now idle, ring.
    unsafe {
        let smem = special::dynamic_smem();
        combine_and_store::<E, C, HEAD_STEPS, VALUE_STEPS, 1, WARPS>(
            params, cache, &item, smem, ring_bytes, &output, &softmax, thread,
        );
    }
}

macro_rules! entries {
    ($([$head_dim:literal $v_head_dim:literal $element:ident $name:literal])*) => {
        $(entry!($head_dim $v_head_dim $element Plain, $name);)*
    };
    ($([$head_dim:literal $v_head_dim:literal $element:ident $code:ident $name:literal])*) => {
        $(entry!($head_dim $v_head_dim $element EightBit<eight_bit::$code>, $name);)*
    };
}

macro_rules! entry {
    ($head_dim:literal $v_head_dim:literal $element:ident $cache:ty, $name:literal) => {
        const _: () = {
            const BYTES: u32 = <$cache as Rows>::BYTES;
            const CONFIG: TileConfig = TileVariant::Mma16.config($head_dim).of_elements(BYTES);
            const LANES: u32 = common_row_lanes($head_dim, $v_head_dim, BYTES);
            const UNIT_TOKENS: u32 = CONFIG.tile_keys();
            const KEY_STEPS: usize = UNIT_TOKENS as usize / 16;
            const STAGES: u32 = CONFIG.stages;
            const PENDING: u32 = 2 * STAGES - 1;
            /// See the module.
            ///
            /// # Safety
            /// `params` describes live buffers and a plan made for them; launched as the manifest says.
            #[unsafe(export_name = concat!("pat_forward_mma16_", $name))]
            unsafe extern "ptx-kernel" fn entry(params: <$cache as Cache>::Params) {
                // SAFETY: the caller's contract.
                unsafe {
                    let (cache, params) = <$cache>::of(&params);
                    forward::<
                        $element,
                        $cache,
                        { $head_dim / 16 },
                        { $v_head_dim / 16 },
                        { $head_dim * BYTES / 16 },
                        { $v_head_dim * BYTES / 16 },
                        LANES,
                        UNIT_TOKENS,
                        KEY_STEPS,
                        STAGES,
                        PENDING,
                    >(params.borrow(), cache);
                }
            }
        };
    };
}

#[cfg(not(pat_sm90a))]
const _: () = {
    mma_kernel_shapes!(entries! {});
    scaled_kernel_shapes!(entries! {});
};
#[cfg(pat_sm90a)]
e4m3_kernel_shapes!(entries! {});
