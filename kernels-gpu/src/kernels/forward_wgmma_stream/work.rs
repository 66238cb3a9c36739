//! Which pieces of work a CTA serves, and their records.

use crate::plan_words::AtOnce;
use crate::ptx::shuffle::from_lane_u32;
use crate::ptx::special::{cta_count, cta_index, run_time};
use pat_abi::reader::{PlanView, QueryAddress, Work};
use pat_abi::{ForwardParams, LoneTiles, NO_MASKS};

/// The query of tile row `row` and the row's query head; row 0's for rows the item does not have.
#[inline(always)]
pub(super) fn query_of_row(p: &ForwardParams, plan: PlanView, work: &Work, row: u32) -> (QueryAddress, u32) {
    let row = if row < work.row_count { row } else { 0 };
    plan.row(work, row, p.group)
}

/// The piece of work this CTA serves in round `round`. Work is sorted by length: dealt out to and fro, whoever has the longest
/// of one round has the shortest of the next.
#[inline(always)]
pub(super) fn work_index(round: u32) -> u32 {
    let (place, count) = (cta_index(), cta_count());
    round * count + if round & 1 == 0 { place } else { count - 1 - place }
}

/// In a lane's count of rows, whether the item has masks.
const HAS_MASKS: u32 = 1 << 15;

/// The records of 32 consecutive pieces of work of this CTA, one per lane: rounds `first`, `first + 1`, ... Their tokens are counted
/// as keys of their tiles, where pages may take more of these than they have tokens.
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
        let mut lane_work = plan.work(unsafe { AtOnce::new() }, index, p.kv_heads_divisor);
        let full_pages = p.page_size.divide(lane_work.token_count - 1);
        lane_work.token_count += full_pages * (p.page_keys.divisor - p.page_size.divisor);
        Self { lane_work }
    }

    /// As [`Self::load`], with what [`Self::get_with_lone_tiles`] gives: registers are short, and a count of rows is small.
    ///
    /// # Safety
    /// As [`Self::load`].
    #[inline(always)]
    pub(super) unsafe fn load_with_lone_tiles(p: &ForwardParams, plan: PlanView, first: u32, lane: u32) -> Self {
        let index = work_index(first + lane);
        let index = if index < plan.work_count { index } else { 0 };
        // SAFETY: as in `load`.
        let (LoneTiles(lone), mut batch) =
            unsafe { (plan.lone_tiles(AtOnce::new(), index, p.kv_heads_divisor), Self::load(p, plan, first, lane)) };
        batch.lane_work.row_count |= u32::from(lone) << 16 | if batch.lane_work.has_masks() { HAS_MASKS } else { 0 };
        batch
    }

    /// What a consumer takes of the record that lane `lane` holds: neither where pages nor where masks begin. And the tiles that
    /// few rows attend to.
    #[inline(always)]
    pub(super) fn get_with_lone_tiles(&self, lane: u32) -> (Work, LoneTiles) {
        let Work { token_count, query_begin, row_count, kv_head, .. } = self.lane_work;
        let broadcast = |value| from_lane_u32(value, lane);
        let row_count = broadcast(row_count);
        let work = Work {
            page_begin: 0,
            token_count: broadcast(token_count),
            query_begin: broadcast(query_begin),
            row_count: row_count & (HAS_MASKS - 1),
            mask_begin: if row_count & HAS_MASKS != 0 { 0 } else { NO_MASKS },
            kv_head: broadcast(kv_head),
        };
        (work, LoneTiles((row_count >> 16) as u16))
    }

    /// [`Work::token_count`] of the record before lane `lane`, asked for anew: not kept for this.
    #[inline(always)]
    pub(super) fn token_count_before(&self, lane: u32) -> u32 {
        from_lane_u32(self.lane_work.token_count, run_time(lane) - 1)
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

    /// As [`Self::get`], of the queries alone: registers and exchanges are short where these are copied.
    #[inline(always)]
    pub(super) fn queries(&self, lane: u32) -> Work {
        let Work { query_begin, row_count, kv_head, .. } = self.lane_work;
        let broadcast = |value| from_lane_u32(value, lane);
        Work {
            query_begin: broadcast(query_begin),
            row_count: broadcast(row_count),
            kv_head: broadcast(kv_head),
            ..Self::EMPTY.lane_work
        }
    }
}
