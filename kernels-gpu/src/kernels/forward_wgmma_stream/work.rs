//! Which pieces of work a CTA serves, and their records.

use crate::item::Stream;
use crate::ptx::ldst::{request_global_u32, request_global_u32x2, request_global_u32x4};
use crate::ptx::shuffle::from_lane_u32;
use crate::ptx::special::{cta_count, cta_index};
use core::mem::offset_of;
use pat_abi::{ForwardParams, MAX_TILE_VARIANTS, PLAN_MAGIC, PackQuery, PlanHeader, TileVariant, WorkItem};

/// Where the plan lies and how much of it this variant serves.
#[derive(Clone, Copy)]
pub(super) struct PlanView {
    pub(super) items: u64,
    pub(super) queries: u64,
    pub(super) pages: u64,
    pub(super) masks: u64,
    /// Items of the variant times KV heads.
    pub(super) work_count: u32,
}

impl PlanView {
    /// # Safety
    /// `p.plan` is the address of a plan buffer.
    #[inline(always)]
    pub(super) unsafe fn load(p: &ForwardParams, variant: TileVariant) -> Self {
        let word = |index: usize| p.plan + 4 * index as u64;
        // All asked for before any is used: the latency of one load, where `load_*` ones would wait for the magic number first.
        // SAFETY: all words lie in the header, which every plan buffer has.
        let (magic, [queries_offset, pages_offset], begin, count, masks_offset) = unsafe {
            (
                request_global_u32(word(0)),
                request_global_u32x2(word(8)),
                request_global_u32(word(12 + variant.index())),
                request_global_u32(word(12 + MAX_TILE_VARIANTS + variant.index())),
                request_global_u32(p.plan + offset_of!(PlanHeader, masks_offset_bytes) as u64),
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
pub(super) struct Work {
    pub(super) page_begin: u32,
    pub(super) token_count: u32,
    pub(super) query_begin: u32,
    pub(super) row_count: u32,
    pub(super) mask_begin: u32,
    pub(super) kv_head: u32,
}

impl Work {
    /// # Safety
    /// `work < plan.work_count`.
    #[inline(always)]
    pub(super) unsafe fn load(p: &ForwardParams, plan: PlanView, work: u32) -> Self {
        let (item, kv_head) = p.kv_heads_divisor.divide_remainder(work);
        let address = plan.items + item as u64 * size_of::<WorkItem>() as u64;
        // SAFETY: the item is one of the variant's.
        let ([page_begin, token_count, query_begin, row_count], mask_begin) =
            unsafe { (request_global_u32x4(address), request_global_u32(address + 16)) };
        Self { page_begin, token_count, query_begin, row_count, mask_begin, kv_head }
    }

    /// The KV tokens; without masks their address is not one.
    #[inline(always)]
    pub(super) fn stream(&self, plan: PlanView) -> Stream {
        Stream {
            page_ids: plan.pages + self.page_begin as u64 * 4,
            masks: plan.masks + self.mask_begin as u64 * 4,
            token_count: self.token_count,
        }
    }

    /// The query of tile row `row` and the row's query head; row 0's for rows the item does not have.
    #[inline(always)]
    pub(super) fn query_address(&self, p: &ForwardParams, plan: PlanView, row: u32) -> (u64, u32) {
        let row = if row < self.row_count { row } else { 0 };
        let (query, head) = p.group.divide_remainder(row);
        let address = plan.queries + (self.query_begin + query) as u64 * size_of::<PackQuery>() as u64;
        (address, self.kv_head * p.group.divisor + head)
    }
}

/// The piece of work this CTA serves in round `round`. Work is sorted by length: dealt out to and fro, whoever has the longest
/// of one round has the shortest of the next.
#[inline(always)]
pub(super) fn work_index(round: u32) -> u32 {
    let (place, count) = (cta_index(), cta_count());
    round * count + if round & 1 == 0 { place } else { count - 1 - place }
}

/// The records of 32 consecutive pieces of work of this CTA, one per lane: rounds `first`, `first + 1`, ...
#[derive(Clone, Copy)]
pub(super) struct Batch {
    pub(super) lane_work: Work,
}

impl Batch {
    /// No work.
    pub(super) const EMPTY: Self = Self {
        lane_work: Work { page_begin: 0, token_count: 0, query_begin: 0, row_count: 0, mask_begin: 0, kv_head: 0 },
    };

    /// # Safety
    /// All lanes of one warp.
    #[inline(always)]
    pub(super) unsafe fn load(p: &ForwardParams, plan: PlanView, first: u32, lane: u32) -> Self {
        let index = work_index(first + lane);
        let index = if index < plan.work_count { index } else { 0 };
        // SAFETY: the index is in range (the callers have at least one piece of work).
        Self { lane_work: unsafe { Work::load(p, plan, index) } }
    }

    /// The record that lane `lane` holds, in all lanes.
    #[inline(always)]
    pub(super) fn get(&self, lane: u32) -> Work {
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
