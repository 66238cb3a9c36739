//! Which rows attend to which keys of a tile, and the pages that hold them.

use super::smem::Smem;
use crate::plan_words::AtOnce;
use crate::ptx::ldst::load_shared_u32x4;
use crate::ptx::shuffle::from_lane_u32;
use crate::ptx::switches::zero_without_windows;
use crate::window::first_token_in_window;
use pat_abi::manifest::{MASK_KEYS, box_tokens};
use pat_abi::reader::{PlanView, Work};
use pat_abi::{ForwardParams, PageMask};

/// What the rows of a tile attend to among 16 of its keys: bits 0..8 the first row, 8..16 the end of the rows, 16..24 the
/// keys up to the last that counts, bits 24..29 those in front of the first (in kernels that are compiled for windows), bit 31 set where
/// TMA has filled all keys behind the last with zeros. The first mask of a tile without
/// exceptions is [`Self::TILE_IS_FULL`].
#[derive(Clone, Copy)]
pub(super) struct KeyMask(pub(super) u32);

impl KeyMask {
    pub(super) const KEYS: u32 = MASK_KEYS;
    /// Every row, all keys.
    pub(super) const FULL: u32 = 0xff00 | Self::KEYS << 16;
    /// Every row attends to every key of the tile: one word says so. Finding it out from four is a chain of uniform
    /// instructions that every tile would wait for.
    pub(super) const TILE_IS_FULL: u32 = 1 << 30;
    /// Keys that do not count are zeros.
    pub(super) const ABSENT: u32 = 1 << 31;

    /// Whether `row` attends to the keys that count.
    #[inline(always)]
    pub(super) fn has_row(self, row: u32) -> bool {
        row >= (self.0 & 0xff) && row < (self.0 >> 8 & 0xff)
    }

    /// Where keys that count end, in masks that have some in front of the first: behind the last key a number that is not
    /// [`Self::KEYS`], so that [`all_keys`] need not look at the first.
    const END_BEHIND_FIRST: u32 = 2 * Self::KEYS;

    /// Keys in front of the first that counts, in kernels that are compiled for windows.
    #[inline(always)]
    pub(super) fn first(self) -> u32 {
        self.0 >> 24 & 0x1f
    }

    /// Where the keys end that count for `row`.
    #[inline(always)]
    pub(super) fn limit(self, row: u32) -> u32 {
        if self.has_row(row) { self.0 >> 16 & 0xff } else { 0 }
    }

    /// Whether a row of `begin .. end` attends to keys that count.
    #[inline(always)]
    pub(super) fn has_row_of(self, (begin, end): (u32, u32)) -> bool {
        begin < (self.0 >> 8 & 0xff) && end > (self.0 & 0xff) && self.0 >> 16 & 0xff != 0
    }

    /// The mask of 16 keys as it is without the word for a whole tile, [`Self::TILE_IS_FULL`].
    #[inline(always)]
    pub(super) fn of_full_tile(word: u32) -> Self {
        Self(if word == Self::TILE_IS_FULL { Self::FULL } else { word })
    }

    /// First key whose values must not be used: the pool may hold NaN there, and 0 * NaN is NaN.
    #[inline(always)]
    pub(super) fn values_end(self) -> u32 {
        if self.0 & Self::ABSENT != 0 { Self::KEYS } else { self.0 >> 16 & 0xff }
    }
}

/// Up to 32 consecutive pages of an item, one per lane: their ids and, where the item has masks, these.
#[derive(Clone, Copy)]
pub(super) struct PageWindow {
    pub(super) lane_id: u32,
    pub(super) lane_mask: PageMask,
}

impl PageWindow {
    /// Pages `first .. first + 32` of the item, as far as it has them.
    ///
    /// # Safety
    /// `work` is an item of the plan; all lanes of one warp.
    #[inline(always)]
    pub(super) unsafe fn load(p: &ForwardParams, plan: PlanView, work: &Work, first: u32, lane: u32) -> Self {
        let last = p.page_keys.divide(work.token_count - 1);
        let index = first + lane;
        let mut window = Self { lane_id: p.num_pages, lane_mask: PageMask(0) };
        if index <= last {
            // SAFETY: the item has `last + 1` page ids, and as many masks if it has any.
            let words = unsafe { AtOnce::new() };
            window.lane_id = plan.page_id(words, work, index);
            if work.has_masks() {
                window.lane_mask = plan.mask(words, work, index);
            }
        }
        window
    }

    /// The mask of page `page` of the item, which the window holds, in all lanes.
    #[inline(always)]
    pub(super) fn mask(&self, page: u32) -> PageMask {
        PageMask(from_lane_u32(self.lane_mask.0, page & 31))
    }

    /// The mask of the 16 keys that begin at `token` of the stream; the window holds their page.
    ///
    /// # Safety
    /// `work` is an item of the plan, which is one for windows where the kernel is compiled for them; all lanes of one warp.
    #[inline(always)]
    pub(super) unsafe fn key_mask<const HAS_WINDOWS: bool>(
        &self,
        p: &ForwardParams,
        plan: PlanView,
        work: &Work,
        token: u32,
    ) -> KeyMask {
        let (page, in_page) = p.page_keys.divide_remainder(token);
        let mask = self.mask(page);
        if token >= work.token_count {
            // A box is absent where it begins past the end; in a box that begins before it, keys are merely invalid.
            let box_begin = token & !(box_tokens(p.page_keys.divisor) - 1);
            return KeyMask(if box_begin >= work.token_count { KeyMask::ABSENT } else { 0 });
        }
        let in_pool = p.page_size.divisor - in_page;
        let (rows, end) = if work.has_masks() {
            (mask.0 & 0xffff, mask.token_end().saturating_sub(in_page))
        } else {
            let left = work.token_count - token;
            (KeyMask::FULL & 0xffff, if left < in_pool { left } else { in_pool })
        };
        let keys = if end < KeyMask::KEYS { end } else { KeyMask::KEYS };
        let zeros = if in_pool < KeyMask::KEYS && keys == in_pool { KeyMask::ABSENT } else { 0 };
        let mask = KeyMask(rows | keys << 16 | zeros);
        if !HAS_WINDOWS {
            return mask;
        }
        // SAFETY: the caller's contract; the token is one of the item's.
        let first = unsafe { first_token_in_window(p, plan, work, page) }.saturating_sub(in_page);
        let first = if first < KeyMask::KEYS { first } else { KeyMask::KEYS };
        let more = if first > 0 && keys == KeyMask::KEYS { KeyMask::END_BEHIND_FIRST - KeyMask::KEYS } else { 0 };
        KeyMask(mask.0 + zero_without_windows(first << 24 | more << 16))
    }
}

/// The masks of a tile: four for each 64 of its keys.
pub(super) type TileMasks<const SPANS: usize> = [[KeyMask; 4]; SPANS];

/// The masks that lie beside the tile of a stage.
///
/// # Safety
/// The stage's K has arrived.
#[inline(always)]
pub(super) unsafe fn load_masks<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32, const SPANS: usize>(
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    stage: u32,
) -> TileMasks<SPANS> {
    let mut masks = [[KeyMask(0); 4]; SPANS];
    for span in 0..SPANS {
        // SAFETY: the producer wrote them before its arrival on the K barrier.
        masks[span] = unsafe { load_shared_u32x4(smem.masks(stage) + 16 * span as u32) }.map(KeyMask);
    }
    masks
}

/// Whether every row attends to every key of the tile.
#[inline(always)]
pub(super) fn all_full<const SPANS: usize>(masks: TileMasks<SPANS>) -> bool {
    masks[0][0].0 == KeyMask::TILE_IS_FULL
}

/// Whether all keys of the tile count (for some row).
#[inline(always)]
pub(super) fn all_keys<const SPANS: usize>(masks: TileMasks<SPANS>) -> bool {
    // No other count of keys has this bit.
    masks.into_iter().flatten().fold(u32::MAX, |bits, mask| bits & mask.0) & KeyMask::KEYS << 16 != 0
}

/// [`values_ends`] of 64 keys all of whose values may be used.
pub(super) const ALL_VALUES: u32 = KeyMask::KEYS * 0x0101_0101;

/// [`KeyMask::values_end`] of the masks, a byte each.
#[inline(always)]
pub(super) fn values_ends<const SPANS: usize>(masks: TileMasks<SPANS>) -> [u32; SPANS] {
    if all_full(masks) {
        return [ALL_VALUES; SPANS];
    }
    masks.map(|masks| {
        let mut ends = 0;
        for (i, mask) in masks.into_iter().enumerate() {
            ends |= mask.values_end() << (8 * i);
        }
        ends
    })
}
