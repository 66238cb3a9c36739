//! Forward attention with wgmma fed by TMA, as one persistent stream of tiles.
//!
//! A CTA serves work `c, c + grid, c + 2 grid, ...` (work = item x KV head). Its producer warps run ahead of its consumer
//! warpgroup *across* items: while the last tile of one item is multiplied, queries, keys and values of the next are
//! already on their way. A short leaf therefore costs its bytes, not a latency chain. Launched with one CTA per piece of
//! work the same code is an ordinary, non-persistent kernel.
//!
//! Shared memory, every tile `head_dim / 64` blocks of `[64 rows][128 bytes]` (128-byte swizzle):
//! `[K0 V0 | K1 V1 | ... | Q | barriers | masks]`.
//!
//! `wgmma64` has one consumer warpgroup and two CTAs per multiprocessor. `wgmma128` has two consumers, which multiply the
//! same K and V tiles with 64 rows each: a node shared by many sequences is read from L2 half as often, and that is what
//! bounds it.
//!
//! An item's stream may hold pages that only some rows attend to ([`pat_abi::PageMask`]). The producer resolves the masks
//! to one word per 16 keys of a tile and puts them beside the tile; tiles without exception cost a comparison.

use crate::element::{Bf16, Element, F16};
use crate::item::{Row, strided};
use crate::ptx::barrier::{sync_cta, sync_named};
use crate::ptx::ldst::{
    load_global_u32, load_global_u32x4, load_shared_u32x4, prefetch_l2, request_global_u32, request_global_u32x2,
    request_global_u32x4, store_shared_u32x4,
};
use crate::ptx::mma::ldmatrix_x4;
use crate::ptx::shuffle::{any, from_lane_u32, from_segment_u64, xor_f32, xor_u32};
use crate::ptx::special::{cta_count, cta_index, dynamic_smem, thread_index, thread_index_here};
use crate::ptx::wgmma::{self, HeadDim, WgmmaOps};
use crate::ptx::{cp_async, math, mbarrier, pdl, tma};
use crate::softmax::subtrahend;
use core::mem::offset_of;
use pat_abi::{
    ForwardParams, MAX_TILE_VARIANTS, NO_MASKS, PLAN_MAGIC, PackQuery, PageMask, PlanHeader, TileVariant, WorkItem,
};

const TILE_KEYS: u32 = 64;
/// Rows of a consumer warpgroup.
const GROUP_ROWS: u32 = 64;
const BLOCK_BYTES: u32 = 64 * 128;
/// Warps of the producer warpgroup, which comes first.
const PRODUCER_WARPS: u32 = 4;

/// Shared-memory addresses of one CTA with `GROUPS` consumer warpgroups.
#[derive(Clone, Copy)]
struct Smem<const HEAD_DIM: u32, const GROUPS: u32> {
    base: u32,
}

impl<const HEAD_DIM: u32, const GROUPS: u32> Smem<HEAD_DIM, GROUPS> {
    /// Two CTAs share a multiprocessor where each has one consumer, else one has all of it.
    const STAGES: u32 = if GROUPS == 1 { 3 } else { 6 };
    const CONSUMER_WARPS: u32 = 4 * GROUPS;
    const Q_SLOTS: u32 = 4 * GROUPS;
    const Q_GROUP_BYTES: u32 = GROUP_ROWS * HEAD_DIM * 2;
    const TILE_BYTES: u32 = TILE_KEYS * HEAD_DIM * 2;
    const STAGE_BYTES: u32 = 2 * Self::TILE_BYTES;
    const Q_OFFSET: u32 = Self::STAGES * Self::STAGE_BYTES;
    const BARRIER_OFFSET: u32 = Self::Q_OFFSET + GROUPS * Self::Q_GROUP_BYTES;

    fn k(self, stage: u32) -> u32 {
        self.base + stage * Self::STAGE_BYTES
    }
    fn v(self, stage: u32) -> u32 {
        self.k(stage) + Self::TILE_BYTES
    }
    /// The Q rows of a consumer warpgroup.
    fn q(self, group: u32) -> u32 {
        self.base + Self::Q_OFFSET + group * Self::Q_GROUP_BYTES
    }
    fn k_full(self, stage: u32) -> u32 {
        self.base + Self::BARRIER_OFFSET + stage * 32
    }
    fn v_full(self, stage: u32) -> u32 {
        self.k_full(stage) + 8
    }
    fn k_empty(self, stage: u32) -> u32 {
        self.k_full(stage) + 16
    }
    fn v_empty(self, stage: u32) -> u32 {
        self.k_full(stage) + 24
    }
    /// The [`KeyMask`]s of a stage.
    fn masks(self, stage: u32) -> u32 {
        self.base + Self::BARRIER_OFFSET + Self::STAGES * 32 + Self::Q_SLOTS * 16 + stage * 16
    }
    fn q_full(self, slot: u32) -> u32 {
        self.base + Self::BARRIER_OFFSET + Self::STAGES * 32 + slot * 16
    }
    fn q_empty(self, slot: u32) -> u32 {
        self.q_full(slot) + 8
    }
}

/// Position in the ring of stages: the stage and the parity of its current phase.
#[derive(Clone, Copy)]
struct Ring<const GROUPS: u32> {
    stage: u32,
    phase: u32,
}

impl<const GROUPS: u32> Ring<GROUPS> {
    #[inline(always)]
    fn advance(&mut self) {
        self.stage += 1;
        if self.stage == Smem::<64, GROUPS>::STAGES {
            self.stage = 0;
            self.phase ^= 1;
        }
    }
}

/// Where the plan lies and how much of it this variant serves.
#[derive(Clone, Copy)]
struct PlanView {
    items: u64,
    queries: u64,
    pages: u64,
    masks: u64,
    /// Items of the variant times KV heads.
    work_count: u32,
}

impl PlanView {
    /// # Safety
    /// `p.plan` is the address of a plan buffer.
    #[inline(always)]
    unsafe fn load(p: &ForwardParams, variant: TileVariant) -> Self {
        let word = |index: usize| p.plan + 4 * index as u64;
        // SAFETY: all words lie in the header, which every plan buffer has.
        let ([magic, _, _, _], [queries_offset, pages_offset, _, _], begin, count, masks_offset) = unsafe {
            (
                load_global_u32x4(word(0)),
                load_global_u32x4(word(8)),
                load_global_u32(word(12 + variant.index())),
                load_global_u32(word(12 + MAX_TILE_VARIANTS + variant.index())),
                load_global_u32(p.plan + offset_of!(PlanHeader, masks_offset_bytes) as u64),
            )
        };
        Self {
            items: p.plan + (PlanHeader::ITEMS_OFFSET_BYTES + begin * size_of::<WorkItem>() as u32) as u64,
            queries: p.plan + queries_offset as u64,
            pages: p.plan + pages_offset as u64,
            masks: p.plan + masks_offset as u64,
            work_count: if magic == PLAN_MAGIC { count * p.kv_heads } else { 0 },
        }
    }
}

/// The fields of a work item the kernel uses, and the KV head.
#[derive(Clone, Copy)]
struct Work {
    page_begin: u32,
    token_count: u32,
    query_begin: u32,
    row_count: u32,
    mask_begin: u32,
    kv_head: u32,
}

impl Work {
    /// # Safety
    /// `work < plan.work_count`.
    #[inline(always)]
    unsafe fn load(p: &ForwardParams, plan: PlanView, work: u32) -> Self {
        let (item, kv_head) = p.kv_heads_divisor.divide_remainder(work);
        let address = plan.items + item as u64 * size_of::<WorkItem>() as u64;
        // SAFETY: the item is one of the variant's.
        let ([page_begin, token_count, query_begin, row_count], mask_begin) =
            unsafe { (request_global_u32x4(address), request_global_u32(address + 16)) };
        Self { page_begin, token_count, query_begin, row_count, mask_begin, kv_head }
    }

    /// The query of tile row `row` and the row's query head; row 0's for rows the item does not have.
    #[inline(always)]
    fn query_address(&self, p: &ForwardParams, plan: PlanView, row: u32) -> (u64, u32) {
        let row = if row < self.row_count { row } else { 0 };
        let (query, head) = p.group.divide_remainder(row);
        let address = plan.queries + (self.query_begin + query) as u64 * size_of::<PackQuery>() as u64;
        (address, self.kv_head * p.group.divisor + head)
    }
}

/// The piece of work this CTA serves in round `round`. Work is sorted by length: dealt out to and fro, whoever has the longest
/// of one round has the shortest of the next.
#[inline(always)]
fn work_index(round: u32) -> u32 {
    let (place, count) = (cta_index(), cta_count());
    round * count + if round & 1 == 0 { place } else { count - 1 - place }
}

/// The records of 32 consecutive pieces of work of this CTA, one per lane: rounds `first`, `first + 1`, ...
#[derive(Clone, Copy)]
struct Batch {
    lane_work: Work,
}

impl Batch {
    /// No work.
    const EMPTY: Self = Self {
        lane_work: Work { page_begin: 0, token_count: 0, query_begin: 0, row_count: 0, mask_begin: 0, kv_head: 0 },
    };

    /// # Safety
    /// All lanes of one warp.
    #[inline(always)]
    unsafe fn load(p: &ForwardParams, plan: PlanView, first: u32, lane: u32) -> Self {
        let index = work_index(first + lane);
        let index = if index < plan.work_count { index } else { 0 };
        // SAFETY: the index is in range (the callers have at least one piece of work).
        Self { lane_work: unsafe { Work::load(p, plan, index) } }
    }

    /// The record that lane `lane` holds, in all lanes.
    #[inline(always)]
    fn get(&self, lane: u32) -> Work {
        let Work { page_begin, token_count, query_begin, row_count, mask_begin, kv_head } = self.lane_work;
        let broadcast = |value| from_lane_u32(value, lane);
        Work {
            page_begin: broadcast(page_begin),
            token_count: broadcast(token_count),
            query_begin: broadcast(query_begin),
            row_count: broadcast(row_count),
            mask_begin: broadcast(mask_begin),
            kv_head: broadcast(kv_head),
        }
    }
}

/// The Q tile is slots of 16 rows. An item of at most 16 rows takes the next slot, a larger one all: several short items
/// are on their way at a time. Producer and consumer step through the same sequence of slots.
#[derive(Clone, Copy)]
struct QSlots<const GROUPS: u32> {
    next: u32,
    /// Bit `s`: parity of slot `s`'s current phase.
    phases: u32,
}

impl<const GROUPS: u32> QSlots<GROUPS> {
    const COUNT: u32 = Smem::<64, GROUPS>::Q_SLOTS;
    const PER_GROUP: u32 = 4;
    const ROWS: u32 = 16;

    /// First slot and number of slots of an item.
    #[inline(always)]
    fn take(&mut self, row_count: u32) -> (u32, u32) {
        if row_count <= Self::ROWS {
            let slot = self.next;
            self.next = (slot + 1) % Self::COUNT;
            (slot, 1)
        } else {
            self.next = 0;
            (0, Self::COUNT)
        }
    }

    /// The parity to wait for on `slot`; flips it.
    #[inline(always)]
    fn parity(&mut self, slot: u32) -> u32 {
        let parity = (self.phases >> slot) & 1;
        self.phases ^= 1 << slot;
        parity
    }
}

/// What the rows of a tile attend to among 16 of its keys: bits 0..8 the first row, 8..16 the end of the rows, 16..24 the
/// keys that count, bit 31 set where no box was loaded (TMA has filled the keys with zeros).
#[derive(Clone, Copy)]
struct KeyMask(u32);

impl KeyMask {
    const KEYS: u32 = 16;
    /// Every row, all keys.
    const FULL: u32 = 0xff00 | Self::KEYS << 16;
    /// No key.
    const ABSENT: u32 = 1 << 31;

    /// Keys that count for `row`.
    #[inline(always)]
    fn limit(self, row: u32) -> u32 {
        let attends = row >= (self.0 & 0xff) && row < (self.0 >> 8 & 0xff);
        if attends { self.0 >> 16 & 0xff } else { 0 }
    }

    /// First key whose values must not be used: the pool may hold NaN there, and 0 * NaN is NaN.
    #[inline(always)]
    fn values_end(self) -> u32 {
        if self.0 & Self::ABSENT != 0 { Self::KEYS } else { self.0 >> 16 & 0xff }
    }
}

/// Up to 32 consecutive pages of an item, one per lane: their ids and, where the item has masks, these.
#[derive(Clone, Copy)]
struct PageWindow {
    lane_id: u32,
    lane_mask: PageMask,
}

impl PageWindow {
    /// Pages `first .. first + 32` of the item, as far as it has them.
    ///
    /// # Safety
    /// `work` is an item of the plan; all lanes of one warp.
    #[inline(always)]
    unsafe fn load(p: &ForwardParams, plan: PlanView, work: &Work, first: u32, lane: u32) -> Self {
        let last = p.page_size.divide(work.token_count - 1);
        let index = first + lane;
        let mut window = Self { lane_id: p.num_pages, lane_mask: PageMask(0) };
        if index <= last {
            // SAFETY: the item has `last + 1` page ids, and as many masks if it has any.
            unsafe {
                window.lane_id = request_global_u32(plan.pages + (work.page_begin + index) as u64 * 4);
                if work.mask_begin != NO_MASKS {
                    window.lane_mask.0 = request_global_u32(plan.masks + (work.mask_begin + index) as u64 * 4);
                }
            }
        }
        window
    }

    /// The mask of the 16 keys that begin at `token` of the stream; the window holds their page.
    #[inline(always)]
    fn key_mask(&self, p: &ForwardParams, work: &Work, token: u32) -> KeyMask {
        let (page, in_page) = p.page_size.divide_remainder(token);
        let mask = PageMask(from_lane_u32(self.lane_mask.0, page & 31));
        if token >= work.token_count {
            // A box is absent where it begins past the end; in a box that begins before it, keys are merely invalid.
            let box_begin = token - in_page;
            return KeyMask(if box_begin >= work.token_count { KeyMask::ABSENT } else { 0 });
        }
        let (rows, end) = if work.mask_begin == NO_MASKS {
            (0xff00, work.token_count - token)
        } else {
            (mask.0 & 0xffff, mask.tokens().saturating_sub(in_page))
        };
        let keys = if end < KeyMask::KEYS { end } else { KeyMask::KEYS };
        KeyMask(rows | keys << 16)
    }
}

/// The KV producer: one warp that issues the tensor copies of all items. The page ids of an item are loaded while the item
/// before it is served.
///
/// # Safety
/// One whole warp; barriers initialised; maps as `abi` describes them.
#[inline(always)]
unsafe fn produce_kv<const HEAD_DIM: u32, const GROUPS: u32>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS>,
    maps: (u64, u64),
) {
    let lane = thread_index() & 31;
    let box_keys = if p.page_size.divisor < TILE_KEYS { p.page_size.divisor } else { TILE_KEYS };
    let in_page_bits = p.page_size.divisor - 1;
    let mut ring = Ring::<GROUPS> { stage: 0, phase: 1 };
    let mut first = true;
    let mut round = 0;
    let mut index = work_index(round);
    if index >= plan.work_count {
        return;
    }
    // SAFETY: over the whole function, items come from the plan, addresses from the checked launch parameters.
    unsafe {
        let mut batch = Batch::load(p, plan, round, lane);
        let mut in_batch = 0;
        let mut next_window = PageWindow::load(p, plan, &batch.get(0), 0, lane);
        while index < plan.work_count {
            let (work, mut window) = (batch.get(in_batch), next_window);
            round += 1;
            index = work_index(round);
            if index < plan.work_count {
                in_batch += 1;
                if in_batch == 32 {
                    in_batch = 0;
                    batch = Batch::load(p, plan, round, lane);
                }
                next_window = PageWindow::load(p, plan, &batch.get(in_batch), 0, lane);
            }
            let mut token = 0;
            while token < work.token_count {
                let tile_page = p.page_size.divide(token);
                if tile_page & 31 == 0 && token & in_page_bits == 0 && token > 0 {
                    window = PageWindow::load(p, plan, &work, tile_page, lane);
                }
                // Lane `l` issues box `l / blocks` of the tile, block `l % blocks`. Registers are short: not kept.
                let (blocks, place) = (HEAD_DIM / 64, thread_index_here() & 31);
                let (box_row, block) = (place / blocks * box_keys, place % blocks);
                let issues = box_row < TILE_KEYS;
                let box_offset = block * BLOCK_BYTES + box_row * 128;
                let (page, in_page) = p.page_size.divide_remainder(token + box_row);
                let id = from_lane_u32(window.lane_id, page & 31);
                let id = if token + box_row < work.token_count { id } else { p.num_pages };
                let page_mask = PageMask(from_lane_u32(window.lane_mask.0, page & 31));
                // Pages of some rows only are read once; the others should still be in L2 when the next tile reads them.
                let read_once = work.mask_begin != NO_MASKS && !page_mask.is_for_all_rows();

                let coordinates = [block * 64, in_page, work.kv_head, id];
                let (tile, full) = (smem.k(ring.stage), smem.k_full(ring.stage));
                mbarrier::wait(smem.k_empty(ring.stage), ring.phase);
                if issues {
                    load_box(tile + box_offset, maps.0, coordinates, full, read_once);
                }
                // The copies are under way; the phase ends when they have landed and lane 0 has arrived.
                let mask = window.key_mask(p, &work, token + (lane & 3) * KeyMask::KEYS);
                let masks = [0, 1, 2, 3].map(|step| from_lane_u32(mask.0, step));
                if lane == 0 {
                    // Written by the lane that arrives: its arrival publishes them.
                    store_shared_u32x4(smem.masks(ring.stage), masks);
                    mbarrier::arrive_expect_bytes(full, Smem::<HEAD_DIM, GROUPS>::TILE_BYTES);
                }
                if first {
                    queries_requested();
                    first = false;
                }
                let (tile, full) = (smem.v(ring.stage), smem.v_full(ring.stage));
                mbarrier::wait(smem.v_empty(ring.stage), ring.phase);
                if issues {
                    load_box(tile + box_offset, maps.1, coordinates, full, read_once);
                }
                if lane == 0 {
                    mbarrier::arrive_expect_bytes(full, Smem::<HEAD_DIM, GROUPS>::TILE_BYTES);
                }
                ring.advance();
                token += TILE_KEYS;
            }
        }
    }
}

/// # Safety
/// As [`tma::load_4d`].
#[inline(always)]
unsafe fn load_box(destination: u32, map: u64, coordinates: [u32; 4], barrier: u32, read_once: bool) {
    // SAFETY: the caller's contract.
    unsafe {
        if read_once {
            tma::load_4d_once(destination, map, coordinates, barrier);
        } else {
            tma::load_4d(destination, map, coordinates, barrier);
        }
    }
}

/// Producer warps that copy Q rows: all but the one that copies K and V.
const Q_WARPS: u32 = PRODUCER_WARPS - 1;

/// Where the producer warps meet once: the queries of a CTA's first item are requested right behind the first keys, the rest
/// after them. Memory serves requests in about the order in which they are made, and nothing begins without the queries.
#[inline(always)]
fn queries_requested() {
    sync_named::<2, { 32 * PRODUCER_WARPS }>();
}

/// The Q producers: warps that copy the items' Q rows to the Q slots. The first item of a CTA has nothing to hide behind:
/// one warp would take longer for 64 rows than the first keys take to arrive.
///
/// # Safety
/// Warp `warp` of [`Q_WARPS`], whole; barriers initialised.
#[inline(always)]
unsafe fn produce_q<const HEAD_DIM: u32, const GROUPS: u32>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS>,
    warp: u32,
) {
    let lane = thread_index() & 31;
    let mut slots = QSlots::<GROUPS> { next: 0, phases: u32::MAX };
    let mut round = 0;
    let mut index = work_index(round);
    let mut in_batch = 32;
    let mut batch = Batch::EMPTY;
    let mut lane_sequence = 0;
    while index < plan.work_count {
        // SAFETY: over the whole loop, items come from the plan, addresses from the checked launch parameters.
        unsafe {
            if in_batch == 32 {
                in_batch = 0;
                batch = Batch::load(p, plan, round, lane);
                lane_sequence = request_global_u32(batch.lane_work.query_address(p, plan, 0).0);
            }
            let work = batch.get(in_batch);
            // Rows of one query, a leaf's case, need no further load.
            let first_sequence = from_lane_u32(lane_sequence, in_batch);
            let one_query = work.row_count <= p.group.divisor;
            // Lane `l` locates rows `l`, `l + 32`, ...
            let mut sequences = [first_sequence; 4];
            if !one_query {
                for i in 0..2 * GROUPS {
                    sequences[i as usize] = request_global_u32(work.query_address(p, plan, lane + 32 * i).0);
                }
            }
            let mut sources = [0u64; 4];
            for i in 0..2 * GROUPS {
                let (_, head) = work.query_address(p, plan, lane + 32 * i);
                sources[i as usize] = strided(p.q, sequences[i as usize], p.q_sequence_stride, head, p.q_head_stride);
            }
            let (slot, slot_count) = slots.take(work.row_count);
            for i in 0..slot_count {
                mbarrier::wait(smem.q_empty(slot + i), slots.parity(slot + i));
            }
            copy_q::<HEAD_DIM, GROUPS>(smem, work.row_count, sources, slot * QSlots::<GROUPS>::ROWS, warp, lane);
            if round == 0 {
                queries_requested();
            }
            for i in 0..slot_count {
                mbarrier::arrive_on_copies(smem.q_full(slot + i));
            }
        }
        round += 1;
        index = work_index(round);
        in_batch += 1;
    }
}

/// This warp's share of copying `row_count` Q rows to shared memory from tile row `first_row` on, 16 bytes per lane,
/// 128-byte swizzled. Lane `l` holds the addresses of rows `l`, `l + 32`, ... Rows the item does not have stay what they
/// are: tile rows never mix, and theirs are not stored.
///
/// # Safety
/// One whole warp; the addresses are Q rows; the Q slots are free.
#[inline(always)]
unsafe fn copy_q<const HEAD_DIM: u32, const GROUPS: u32>(
    smem: Smem<HEAD_DIM, GROUPS>,
    row_count: u32,
    sources: [u64; 4],
    first_row: u32,
    warp: u32,
    lane: u32,
) {
    let chunks_per_row = HEAD_DIM / 8;
    let rows_per_step = 32 / chunks_per_row;
    let (step_row, chunk) = (lane / chunks_per_row, lane % chunks_per_row);
    for i in 0..2 * GROUPS {
        let mut begin = warp * rows_per_step;
        while begin < 32 && 32 * i + begin < row_count {
            let source = from_segment_u64::<32>(sources[i as usize], begin + step_row) + chunk as u64 * 16;
            let row = 32 * i + begin + step_row;
            if row < row_count {
                let tile_row = first_row + row;
                let target = smem.q(tile_row / GROUP_ROWS) + tile_offset(tile_row % GROUP_ROWS, chunk);
                // SAFETY: the row is one of the item's; Q rows are 16-byte aligned (checked by the host).
                unsafe { cp_async::copy_16_bytes(target, source, 16) };
            }
            begin += Q_WARPS * rows_per_step;
        }
    }
}

/// Byte offset of 16-byte chunk `chunk` of row `row` in a 64-row tile: blocks of 64 elements, 128-byte swizzle.
#[inline(always)]
fn tile_offset(row: u32, chunk: u32) -> u32 {
    (chunk >> 3) * BLOCK_BYTES + row * 128 + (((chunk ^ row) & 7) << 4)
}

/// Consumer warpgroup `group`.
///
/// # Safety
/// One whole, aligned warpgroup; barriers initialised.
#[inline(always)]
unsafe fn consume<E: Element, const HEAD_DIM: u32, const GROUPS: u32, const Q_REGS: usize, const O_REGS: usize>(
    p: &ForwardParams,
    plan: PlanView,
    smem: Smem<HEAD_DIM, GROUPS>,
    group: u32,
) where
    (E, HeadDim<HEAD_DIM>): WgmmaOps<Q_REGS, O_REGS>,
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
            let q_row = q_slot % QSlots::<GROUPS>::PER_GROUP * QSlots::<GROUPS>::ROWS + (lane & 15);
            let q_tile = smem.q(q_slot / QSlots::<GROUPS>::PER_GROUP);
            for k in 0..Q_REGS / 4 {
                let fragment = ldmatrix_x4(q_tile + tile_offset(q_row, 2 * k as u32 + (lane >> 4)));
                for i in 0..4 {
                    q[4 * k + i] = fragment[i];
                }
            }
            for i in 0..slot_count {
                release(smem.q_empty(slot + i), lane);
            }

            let mut o = [0f32; O_REGS];
            let mut s = [0f32; 32];
            let mut weights = [0u32; 16];
            let mut softmax = OnlineSoftmax::new(p.scale_log2);

            // Scores of the first tile; in the loop, the scores of a tile are computed while the values of the tile
            // before it are accumulated.
            mbarrier::wait(smem.k_full(ring.stage), ring.phase);
            <(E, HeadDim<HEAD_DIM>)>::scores(&mut s, &q, smem.k(ring.stage));
            let masks = load_masks(smem, ring.stage);
            wgmma::wait_scores::<0>(&mut s);
            release(smem.k_empty(ring.stage), lane);
            let mut ends = values_ends(masks);
            mask_scores(&mut s, masks);
            softmax.update(&mut s);
            pack_weights::<E>(&s, &mut weights);
            let mut previous = ring;
            ring.advance();
            let mut token = TILE_KEYS;
            while token < work.token_count {
                mbarrier::wait(smem.k_full(ring.stage), ring.phase);
                if ends != ALL_VALUES {
                    mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                    zero_values::<HEAD_DIM, GROUPS>(smem.v(previous.stage), ends);
                }
                <(E, HeadDim<HEAD_DIM>)>::scores(&mut s, &q, smem.k(ring.stage));
                mbarrier::wait(smem.v_full(previous.stage), previous.phase);
                <(E, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, smem.v(previous.stage));
                let masks = load_masks(smem, ring.stage);
                wgmma::wait_scores::<1>(&mut s);
                release(smem.k_empty(ring.stage), lane);
                ends = values_ends(masks);
                mask_scores(&mut s, masks);
                let correction = softmax.update(&mut s);
                <(E, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
                release(smem.v_empty(previous.stage), lane);
                if let Some(correction) = correction {
                    for i in 0..O_REGS {
                        o[i] *= correction[(i >> 1) & 1];
                    }
                }
                pack_weights::<E>(&s, &mut weights);
                previous = ring;
                ring.advance();
                token += TILE_KEYS;
            }
            mbarrier::wait(smem.v_full(previous.stage), previous.phase);
            if ends != ALL_VALUES {
                zero_values::<HEAD_DIM, GROUPS>(smem.v(previous.stage), ends);
            }
            <(E, HeadDim<HEAD_DIM>)>::accumulate(&mut o, &weights, smem.v(previous.stage));
            <(E, HeadDim<HEAD_DIM>)>::wait_output(&mut o, &mut weights);
            release(smem.v_empty(previous.stage), lane);

            let (sums, references) = softmax.finish();
            for half in 0..2 {
                let inverse = math::reciprocal(sums[half]);
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
                let [sequence, slot] = destinations[half];
                let (_, head) = work.query_address(p, plan, rows[half]);
                let row = Row::new(p, sequence, head, slot);
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
                    row.store_lse(p, references[half] + math::log2(sums[half]));
                }
            }
        }
    }
}

/// Transposes a 4 x 4 matrix whose row `l` lane `l` of a quad holds. All lanes of a warp.
#[inline(always)]
fn transpose_quad(row: [u32; 4], lane: u32) -> [u32; 4] {
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
unsafe fn release(empty: u32, lane: u32) {
    if lane == 0 {
        // SAFETY: the caller's contract.
        unsafe { mbarrier::arrive(empty) };
    }
}

/// The masks of a tile.
///
/// # Safety
/// The stage's K has arrived.
#[inline(always)]
unsafe fn load_masks<const HEAD_DIM: u32, const GROUPS: u32>(smem: Smem<HEAD_DIM, GROUPS>, stage: u32) -> [KeyMask; 4] {
    // SAFETY: the producer wrote them before its arrival on the K barrier.
    unsafe { load_shared_u32x4(smem.masks(stage)) }.map(KeyMask)
}

/// Whether every row attends to every key of the tile.
#[inline(always)]
fn all_full(masks: [KeyMask; 4]) -> bool {
    masks.iter().all(|mask| mask.0 == KeyMask::FULL)
}

/// The lane of a consumer thread, and the two tile rows it holds scores of.
#[inline(always)]
fn consumer_rows(thread: u32) -> (u32, [u32; 2]) {
    let (warp, lane) = (thread / 32 - PRODUCER_WARPS, thread % 32);
    let row = warp * 16 + lane / 4;
    (lane, [row, row + 8])
}

/// Sets the scores of keys that a row does not attend to to -inf.
#[inline(always)]
fn mask_scores(s: &mut [f32; 32], masks: [KeyMask; 4]) {
    if all_full(masks) {
        return;
    }
    let (lane, rows) = consumer_rows(thread_index_here());
    for step in 0..4 {
        for half in 0..2 {
            let limit = masks[step].limit(rows[half]);
            for i in 0..4 {
                let key = (i as u32 >> 1) * 8 + (lane & 3) * 2 + (i as u32 & 1);
                if key >= limit {
                    s[8 * step + (i >> 1) * 4 + 2 * half + (i & 1)] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// [`values_ends`] of a tile all of whose values may be used.
const ALL_VALUES: u32 = KeyMask::KEYS * 0x0101_0101;

/// [`KeyMask::values_end`] of the four masks, a byte each.
#[inline(always)]
fn values_ends(masks: [KeyMask; 4]) -> u32 {
    let mut ends = 0;
    for (i, mask) in masks.into_iter().enumerate() {
        ends |= mask.values_end() << (8 * i);
    }
    ends
}

/// Zeroes the V rows that [`values_ends`] leaves out.
///
/// # Safety
/// All consumers; the V tile is complete.
#[inline(always)]
unsafe fn zero_values<const HEAD_DIM: u32, const GROUPS: u32>(tile: u32, ends: u32) {
    let thread = thread_index_here() - 32 * PRODUCER_WARPS;
    let chunks_per_row = HEAD_DIM / 8;
    let mut row = thread / chunks_per_row;
    while row < TILE_KEYS {
        let end = ends >> (row / KeyMask::KEYS * 8) & 0xff;
        if row % KeyMask::KEYS >= end {
            // SAFETY: the row lies in the tile.
            unsafe { store_shared_u32x4(tile + tile_offset(row, thread % chunks_per_row), [0; 4]) };
        }
        row += 128 * GROUPS / chunks_per_row;
    }
    mbarrier::fence_async_proxy();
    if GROUPS == 1 {
        sync_named::<1, 128>();
    } else {
        sync_named::<1, 256>();
    }
}

/// Running sum of the two rows of a thread, and the exponent it is relative to.
///
/// The reference follows the row maximum (times the scale) only when that has grown by more than [`Self::SLACK`]: after
/// the first tiles, outputs need no correction any more. Weights stay below 2^SLACK, far from overflow in 16 bits.
struct OnlineSoftmax {
    scale_log2: f32,
    references: [f32; 2],
    sums: [f32; 2],
}

impl OnlineSoftmax {
    const SLACK: f32 = 8.0;

    #[inline(always)]
    fn new(scale_log2: f32) -> Self {
        Self { scale_log2, references: [f32::NEG_INFINITY; 2], sums: [0.0; 2] }
    }

    /// Turns scores into weights `2^(scale * s - reference)`; returns what the output so far must be multiplied by, if by
    /// anything (the same answer in all lanes of a warp).
    #[inline(always)]
    fn update(&mut self, s: &mut [f32; 32]) -> Option<[f32; 2]> {
        // Two rows side by side, as trees: the latencies of the exchanges and of the maxima overlap.
        let mut maxima = [0, 1].map(|half| {
            let mut tree = [0f32; 16];
            for i in 0..8 {
                tree[2 * i] = s[4 * i + 2 * half];
                tree[2 * i + 1] = s[4 * i + 2 * half + 1];
            }
            for width in [8, 4, 2, 1] {
                for i in 0..width {
                    tree[i] = math::max(tree[i], tree[i + width]);
                }
            }
            tree[0]
        });
        for lane_bit in [1, 2] {
            let others = maxima.map(|maximum| xor_f32(maximum, lane_bit));
            maxima = [0, 1].map(|half| math::max(maxima[half], others[half]));
        }
        maxima = maxima.map(|maximum| maximum * self.scale_log2);
        let grown = [0, 1].map(|half| maxima[half] > self.references[half] + Self::SLACK);
        let mut correction = None;
        if any(grown[0] || grown[1]) {
            let mut factors = [1f32; 2];
            for half in 0..2 {
                let reference = math::max(self.references[half], maxima[half]);
                // A row that attends to nothing so far weighs 0, not NaN.
                factors[half] = math::exp2(self.references[half] - subtrahend(reference));
                self.sums[half] *= factors[half];
                self.references[half] = reference;
            }
            correction = Some(factors);
        }
        for half in 0..2 {
            let reference = subtrahend(self.references[half]);
            let mut sum = 0f32;
            for i in 0..8 {
                for e in 0..2 {
                    let weight = math::exp2(math::fma(s[4 * i + 2 * half + e], self.scale_log2, -reference));
                    s[4 * i + 2 * half + e] = weight;
                    sum += weight;
                }
            }
            self.sums[half] += sum;
        }
        correction
    }

    /// Sums over the row's four lanes, and the references.
    #[inline(always)]
    fn finish(&self) -> ([f32; 2], [f32; 2]) {
        let sums = self.sums.map(|sum| {
            let sum = sum + xor_f32(sum, 1);
            sum + xor_f32(sum, 2)
        });
        (sums, self.references)
    }
}

/// Rounds the weights to the 16-bit type: accumulator layout and A-operand layout coincide.
#[inline(always)]
fn pack_weights<E: Element>(s: &[f32; 32], weights: &mut [u32; 16]) {
    for i in 0..16 {
        weights[i] = E::pack(s[2 * i], s[2 * i + 1]);
    }
}

/// The whole kernel. `maps` are the generic addresses of the K and V tensor maps.
///
/// # Safety
/// Launched as the manifest says, with parameters the host has checked.
#[inline(always)]
unsafe fn forward<E: Element, const HEAD_DIM: u32, const GROUPS: u32, const Q_REGS: usize, const O_REGS: usize>(
    p: &ForwardParams,
    variant: TileVariant,
    maps: (u64, u64),
) where
    (E, HeadDim<HEAD_DIM>): WgmmaOps<Q_REGS, O_REGS>,
{
    let smem = Smem::<HEAD_DIM, GROUPS> { base: dynamic_smem() };
    let thread = thread_index();
    // SAFETY: the barriers lie in this CTA's shared memory; the roles are whole warpgroups; a plan buffer has at least
    // `LEAST_BUFFER_BYTES`.
    unsafe {
        if (96..128).contains(&thread) {
            // Header, item, page ids: each load waits for the one before. A small plan is in L2 by the second.
            const LINES: u32 = PlanHeader::LEAST_BUFFER_BYTES / 128;
            let line = (cta_index() * 32 + thread - 96) % LINES;
            prefetch_l2(p.plan + line as u64 * 128);
        }
        if thread == 0 {
            for stage in 0..Smem::<HEAD_DIM, GROUPS>::STAGES {
                mbarrier::init(smem.k_full(stage), 1);
                mbarrier::init(smem.v_full(stage), 1);
                mbarrier::init(smem.k_empty(stage), Smem::<HEAD_DIM, GROUPS>::CONSUMER_WARPS);
                mbarrier::init(smem.v_empty(stage), Smem::<HEAD_DIM, GROUPS>::CONSUMER_WARPS);
            }
            for slot in 0..QSlots::<GROUPS>::COUNT {
                mbarrier::init(smem.q_full(slot), 32 * Q_WARPS);
                mbarrier::init(smem.q_empty(slot), Smem::<HEAD_DIM, GROUPS>::CONSUMER_WARPS);
            }
            mbarrier::fence_init();
            tma::prefetch_map(maps.0);
            tma::prefetch_map(maps.1);
        }
        let plan = PlanView::load(p, variant);
        sync_cta();
        pdl::launch_dependents();
        if thread < 128 {
            if GROUPS == 1 {
                wgmma::shrink_registers::<56>();
            } else {
                wgmma::shrink_registers::<80>();
            }
            if thread < 32 {
                produce_kv::<HEAD_DIM, GROUPS>(p, plan, smem, maps);
            } else {
                produce_q::<HEAD_DIM, GROUPS>(p, plan, smem, thread / 32 - 1);
            }
        } else {
            if GROUPS == 1 {
                wgmma::grow_registers::<200>();
            } else {
                wgmma::grow_registers::<208>();
            }
            consume::<E, HEAD_DIM, GROUPS, Q_REGS, O_REGS>(p, plan, smem, thread / 128 - 1);
        }
    }
}

/// A tensor map (`CUtensorMap`), passed by value. rustc cannot pass a type aligned to 64 bytes: the xtask raises the
/// alignment of the parameter in the PTX.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

macro_rules! entry {
    ($name:ident, $variant:ident, $groups:literal, $element:ty, $head_dim:literal) => {
        /// # Safety
        /// Launched by the host with checked parameters.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name(p: ForwardParams, _map_k: TensorMap, _map_v: TensorMap) {
            let (map_k, map_v): (u64, u64);
            // SAFETY: takes the addresses of the parameters, which live as long as the kernel runs.
            unsafe {
                core::arch::asm!(
                    concat!("{{ .reg .b64 t; mov.b64 t, ", stringify!($name), "_param_1; cvta.param.u64 {0}, t; }}"),
                    out(reg64) map_k, options(pure, nomem, nostack, preserves_flags));
                core::arch::asm!(
                    concat!("{{ .reg .b64 t; mov.b64 t, ", stringify!($name), "_param_2; cvta.param.u64 {0}, t; }}"),
                    out(reg64) map_v, options(pure, nomem, nostack, preserves_flags));
                forward::<$element, $head_dim, $groups, { $head_dim / 4 }, { $head_dim / 2 }>(
                    &p, TileVariant::$variant, (map_k, map_v));
            }
        }
    };
}

entry!(pat_forward_wgmma64_d128_f16, Wgmma64, 1, F16, 128);
entry!(pat_forward_wgmma64_d128_bf16, Wgmma64, 1, Bf16, 128);
entry!(pat_forward_wgmma64_d64_f16, Wgmma64, 1, F16, 64);
entry!(pat_forward_wgmma64_d64_bf16, Wgmma64, 1, Bf16, 64);
entry!(pat_forward_wgmma128_d128_f16, Wgmma128, 2, F16, 128);
entry!(pat_forward_wgmma128_d128_bf16, Wgmma128, 2, Bf16, 128);
entry!(pat_forward_wgmma128_d64_f16, Wgmma128, 2, F16, 64);
entry!(pat_forward_wgmma128_d64_bf16, Wgmma128, 2, Bf16, 64);
