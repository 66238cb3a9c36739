//! Forward kernels for 32, 64 and 128 rows, and of head dimension 512 for 16: all warps share a two-stage ring of K and V tiles.
//!
//! `M_WARPS` warps take 16 rows each; with `KV_WARPS = 2` (32 rows) a second set of warps takes the upper half of every
//! tile's tokens, and the halves are combined at the end. K and V of a tile are separate `cp.async` groups, so that V
//! arrives under Q K^T and the softmax. Q stays in registers: it saves one `ldmatrix` in five, and shared memory is what
//! bounds these kernels.

use core::borrow::Borrow;

#[cfg(pat_sm90a)]
use pat_abi::e4m3_kernel_shapes;
use pat_abi::layout::common_row_lanes;
use pat_abi::tile::warp_state_bytes;
use pat_abi::{ForwardParams, TileConfig, TileVariant};
#[cfg(not(pat_sm90a))]
use pat_abi::{mma_kernel_shapes, mma128_kernel_shapes, scaled_kernel_shapes, split_kernel_shapes};

#[cfg(not(pat_sm90a))]
use crate::cache::Plain;
use crate::cache::{Cache, EightBit, Rows};
use crate::eight_bit;
use crate::element::{Bf16, Element, F16};
use crate::epilogue::{Columns, Ends, Written, write_rows};
use crate::isolation::restore_rows;
use crate::item::Item;
use crate::ptx::{barrier, cp_async, special};
use crate::softmax::{OnlineSoftmax, cap_scores, rescale};
use crate::tile::fragment::{Accumulator, Queries, mask, mask_rows};
use crate::tile::gather::{Pool, Token, gather, row_of_lane};
use crate::tile::reduce::combine_and_store;

const STAGES: u32 = TileVariant::Mma64.config(128).stages;

/// `VARIANT` is the variant's index. `HEAD_STEPS` and `ROW_STEPS` are the elements of keys and values / 16, `VALUE_STEPS`
/// those of the values that a warp multiplies: where they are fewer, several warps with the same rows compute all scores and
/// split V's columns. `LANES` lanes copy a row of either. `KEY_STEPS` is 16-token steps per warp and tile, `LOADED` the tokens
/// a warp gathers per tile.
///
/// # Safety
/// `params` describes live buffers and a plan made for them; the launch is as the manifest says.
#[inline(always)]
unsafe fn forward<
    E: Element,
    C: Cache,
    const VARIANT: usize,
    const HEAD_STEPS: usize,
    const VALUE_STEPS: usize,
    const ROW_STEPS: usize,
    const KEY_CHUNKS: u32,
    const VALUE_CHUNKS: u32,
    const LANES: u32,
    const M_WARPS: u32,
    const KV_WARPS: u32,
    const KEY_STEPS: usize,
    const LOADED: u32,
>(
    params: &ForwardParams,
    cache: C,
) {
    let layout = const {
        let (head_dim, v_head_dim) = (16 * HEAD_STEPS as u32, 16 * ROW_STEPS as u32);
        let config = TileVariant::ALL[VARIANT].config(head_dim);
        assert!(config.row_warps() == M_WARPS && config.key_splits == KV_WARPS && config.rings == 1);
        assert!(LOADED * config.computing_warps() == config.keys && KEY_STEPS as u32 * 16 * KV_WARPS == config.keys);
        assert!(
            config.column_splits as usize * VALUE_STEPS == ROW_STEPS && (KV_WARPS == 1 || config.column_splits == 1)
        );
        assert!(config.stages == STAGES && LOADED % 8 == 0);
        assert!(config.query_slots == if Queries::<HEAD_STEPS>::IN_SMEM { M_WARPS } else { 0 });
        assert!(16 * KEY_CHUNKS == head_dim * C::BYTES && 16 * VALUE_CHUNKS == v_head_dim * C::BYTES);
        let layout = config.smem(head_dim, v_head_dim, C::BYTES);
        // The warps' states take the place of keys, values and queries.
        assert!(KV_WARPS == 1 || M_WARPS * KV_WARPS * warp_state_bytes(v_head_dim) <= layout.barriers);
        layout
    };
    let tile_tokens = 16 * KEY_STEPS as u32 * KV_WARPS;
    let (key_bytes, value_bytes) = (16 * KEY_CHUNKS, 16 * VALUE_CHUNKS);
    let stage_bytes = layout.stage_bytes;
    // SAFETY: the caller's contract.
    let Some(item) = (unsafe { Item::load(params, TileVariant::ALL[VARIANT], special::cta_index()) }) else { return };
    let thread = special::thread_index();
    let (warp, lane) = (thread / 32, thread % 32);
    let ring = special::dynamic_smem();
    let located = row_of_lane::<LANES>(lane);
    let keys = Pool::keys(params, item.kv_head);
    let values = Pool::values(params, item.kv_head);

    let loaded_first = warp * LOADED;
    // Behind the stages: which rows attend to each token, if the item has masks.
    let ranges = ring + layout.masks;
    let ranges_of = |k_stage: u32| ranges + if k_stage == ring { 0 } else { layout.mask_bytes };
    let mut incoming = 0;
    // Lanes whose row is past LOADED locate tokens that other warps gather; their places go unused.
    // SAFETY: the plan's page ids.
    let mut place = unsafe { Token::locate(params, &item.stream, loaded_first + located) };
    let first_row = warp % M_WARPS * 16;
    let query_tile = ring + layout.q + first_row * key_bytes;
    if Queries::<HEAD_STEPS>::IN_SMEM && warp < M_WARPS {
        // SAFETY: the tile is free; its rows come with the first keys.
        unsafe { Queries::<HEAD_STEPS>::request::<16>(params, &item, query_tile, 0, first_row, lane) };
    }
    for stage in 0..STAGES {
        let k_stage = ring + stage * stage_bytes;
        if incoming < item.stream.token_count {
            if item.stream.has_masks() {
                // SAFETY: the stages are free before their first use.
                unsafe { place.store_rows(ranges_of(k_stage) + 2 * loaded_first, located, LOADED) };
            }
            // SAFETY: as above.
            unsafe { gather::<KEY_CHUNKS, LANES, LOADED>(k_stage, loaded_first, keys, place, lane) };
            cp_async::commit_group();
            // SAFETY: as above.
            unsafe { gather::<VALUE_CHUNKS, LANES, LOADED>(k_stage + layout.v, loaded_first, values, place, lane) };
            cp_async::commit_group();
        } else {
            cp_async::commit_group();
            cp_async::commit_group();
        }
        incoming += tile_tokens;
        // SAFETY: as above.
        place = unsafe { Token::locate(params, &item.stream, incoming + loaded_first + located) };
    }

    // Warps with the same rows take different keys, or different columns of all values.
    let splits_columns = const { VALUE_STEPS < ROW_STEPS };
    let first_key = if splits_columns { 0 } else { warp / M_WARPS * (tile_tokens / KV_WARPS) };
    let first_column = if splits_columns { warp / M_WARPS * (16 * VALUE_STEPS as u32) } else { 0 };
    // SAFETY: the caller's contract.
    let q = unsafe { Queries::<HEAD_STEPS>::new::<E, C>(params, &item, query_tile, first_row, lane) };
    let mut output = [[[0.0; 4]; 2]; VALUE_STEPS];
    let mut softmax = OnlineSoftmax::EMPTY;
    let mut tile = 0;
    let mut k_stage = ring;
    while tile < item.stream.token_count {
        let v_stage = k_stage + layout.v;
        cp_async::wait_group::<3>();
        barrier::sync_cta();
        // SAFETY: this tile's K has arrived, for all threads.
        let mut s = unsafe { C::scores::<E, HEAD_STEPS, KEY_STEPS>(&q, k_stage + first_key * key_bytes, lane) };
        cap_scores(params, s.as_flattened_mut().as_flattened_mut());
        if item.stream.has_masks() {
            // SAFETY: they were written before the barrier.
            unsafe { mask_rows(&mut s, ranges_of(k_stage) + 2 * first_key, first_row, lane) };
        } else if item.stream.token_count - tile < tile_tokens {
            mask(&mut s, (item.stream.token_count - tile).saturating_sub(first_key), lane);
        }
        if let Some(factors) = softmax.update::<false, _>(s.as_flattened_mut(), params.scale_log2) {
            rescale(output.as_flattened_mut().as_flattened_mut(), factors);
        }
        let p = C::weights::<E, KEY_STEPS>(&s);

        cp_async::wait_group::<2>();
        barrier::sync_cta();
        // SAFETY: this tile's V has arrived, for all threads.
        unsafe {
            let values = v_stage + first_key * value_bytes + first_column * C::BYTES;
            C::accumulate::<E, VALUE_STEPS, ROW_STEPS, KEY_STEPS>(&mut output, &p, values, lane);
        }
        barrier::sync_cta();
        if incoming < item.stream.token_count {
            if item.stream.has_masks() {
                // SAFETY: all threads have read both tiles of the stage, and its ranges before them.
                unsafe { place.store_rows(ranges_of(k_stage) + 2 * loaded_first, located, LOADED) };
            }
            // SAFETY: as above.
            unsafe { gather::<KEY_CHUNKS, LANES, LOADED>(k_stage, loaded_first, keys, place, lane) };
            cp_async::commit_group();
            // SAFETY: as above.
            unsafe { gather::<VALUE_CHUNKS, LANES, LOADED>(v_stage, loaded_first, values, place, lane) };
            cp_async::commit_group();
        } else {
            cp_async::commit_group();
            cp_async::commit_group();
        }
        tile += tile_tokens;
        incoming += tile_tokens;
        // SAFETY: the plan's page ids. The load has a whole tile to arrive.
        place = unsafe { Token::locate(params, &item.stream, incoming + loaded_first + located) };
        k_stage = if k_stage == ring { ring + stage_bytes } else { ring };
    }
    let head_dim = 16 * HEAD_STEPS as u32;
    softmax.finish();
    cache.finish(&mut output, lane);
    if KV_WARPS > 1 {
        let stride = warp_state_bytes(16 * VALUE_STEPS as u32);
        // SAFETY: the ring is idle: the last barrier of the loop followed its last read, and no copy is in flight.
        unsafe {
            combine_and_store::<E, C, HEAD_STEPS, VALUE_STEPS, M_WARPS, KV_WARPS>(
                params, cache, &item, ring, stride, &output, &softmax, thread,
            );
        }
    } else {
        // SAFETY: the caller's contract.
        unsafe {
            let (end, v_head_dim) = (first_column + 16 * VALUE_STEPS as u32, 16 * ROW_STEPS as u32);
            let columns = Columns { begin: first_column, end, head_dim, v_head_dim };
            store::<E, C, VALUE_STEPS>(params, cache, &item, first_row, columns, &output, &softmax, lane);
        }
    }
}

/// Normalises and writes the 16 rows of one warp, of which it has `columns`.
///
/// # Safety
/// As [`forward`]; the warp is the only one that holds these columns of the rows.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the state of one warp, by parts")]
unsafe fn store<E: Element, C: Cache, const VALUE_STEPS: usize>(
    params: &ForwardParams,
    cache: C,
    item: &Item,
    first_row: u32,
    columns: Columns,
    output: &Accumulator<VALUE_STEPS>,
    softmax: &OnlineSoftmax,
    lane: u32,
) {
    let rows = [0, 8].map(|half| first_row + lane / 4 + half);
    let exist = rows.map(|row| row < item.row_count);
    // SAFETY: a row of the item: the first where it does not have this one.
    let locate = |row| unsafe { item.row(params, if row < item.row_count { row } else { 0 }) };
    let (output, has_masks) = (output.as_flattened().as_flattened(), item.stream.has_masks());
    // SAFETY: the caller's contract; the rows have been written ahead of their repair, and those marked are the item's.
    unsafe {
        let ends = Ends::new(params, rows.map(locate), exist, softmax);
        let Written { not_finite, softmaxes } = write_rows::<E>(params, output, columns, &ends, has_masks, lane);
        if has_masks {
            restore_rows::<E, C, true, true>(
                params,
                cache,
                item.stream,
                item.kv_head,
                first_row,
                not_finite,
                softmaxes,
                columns,
                lane,
                locate,
            );
        }
    }
}

macro_rules! entries {
    ($variant:ident $prefix:literal $([$head_dim:literal $v_head_dim:literal $element:ident $name:literal])*) => {
        $(entry!($variant $prefix $head_dim $v_head_dim $element Plain, $name);)*
    };
    ($variant:ident $prefix:literal
        $([$head_dim:literal $v_head_dim:literal $element:ident $code:ident $name:literal])*
    ) => {
        $(entry!($variant $prefix $head_dim $v_head_dim $element EightBit<eight_bit::$code>, $name);)*
    };
}

macro_rules! entry {
    (
        $variant:ident $prefix:literal
        $head_dim:literal $v_head_dim:literal $element:ident $cache:ty, $name:literal
    ) => {
        const _: () = {
            const VARIANT: TileVariant = TileVariant::$variant;
            const CONFIG: TileConfig = VARIANT.config($head_dim);
            const BYTES: u32 = <$cache as Rows>::BYTES;
            const LANES: u32 = common_row_lanes($head_dim, $v_head_dim, BYTES);
            const ROW_WARPS: u32 = CONFIG.row_warps();
            const SPLITS: u32 = CONFIG.key_splits;
            const KEY_STEPS: usize = (CONFIG.keys / SPLITS / 16) as usize;
            const LOADED: u32 = CONFIG.keys / CONFIG.computing_warps();
            /// See the module.
            ///
            /// # Safety
            /// `params` describes live buffers and a plan made for them; launched as the manifest says.
            #[unsafe(export_name = concat!($prefix, "_", $name))]
            unsafe extern "ptx-kernel" fn entry(params: <$cache as Cache>::Params) {
                // SAFETY: the caller's contract.
                unsafe {
                    let (cache, params) = <$cache>::of(&params);
                    forward::<
                        $element,
                        $cache,
                        { VARIANT.index() },
                        { $head_dim / 16 },
                        { $v_head_dim / 16 / CONFIG.column_splits as usize },
                        { $v_head_dim / 16 },
                        { $head_dim * BYTES / 16 },
                        { $v_head_dim * BYTES / 16 },
                        LANES,
                        ROW_WARPS,
                        SPLITS,
                        KEY_STEPS,
                        LOADED,
                    >(params.borrow(), cache);
                }
            }
        };
    };
}

#[cfg(not(pat_sm90a))]
const _: () = {
    split_kernel_shapes!(entries! { Mma16 "pat_forward_mma16" });
    split_kernel_shapes!(entries! { Mma32 "pat_forward_mma32" });
    mma_kernel_shapes!(entries! { Mma32 "pat_forward_mma32" });
    mma_kernel_shapes!(entries! { Mma64 "pat_forward_mma64" });
    mma128_kernel_shapes!(entries! { Mma128 "pat_forward_mma128" });
    scaled_kernel_shapes!(entries! { Mma32 "pat_forward_mma32" });
    scaled_kernel_shapes!(entries! { Mma64 "pat_forward_mma64" });
};
#[cfg(pat_sm90a)]
const _: () = {
    e4m3_kernel_shapes!(entries! { Mma32 "pat_forward_mma32" });
    e4m3_kernel_shapes!(entries! { Mma64 "pat_forward_mma64" });
};
