//! The one reader of plan records, of the kernels and of the CPU executor: what they use of them, each field by its offset.
//!
//! Addresses are device addresses or, on the host, offsets in a buffer ([`PlanBytes`]). How words are loaded is up to the caller
//! ([`PlanWords`]): on the device a load that stands early hides its latency, and a load that stands late needs no register.
//!
//! Sums wrap, as they do on the device: of records that no planner wrote, the host reads zeros or other records of the buffer,
//! never what lies outside.

use core::mem::offset_of;

use crate::{
    FastDivisor, ItemQuery, LoneTiles, MergeRow, NO_MASKS, NONE, PLAN_MAGIC, PageMask, PlanHeader, TileVariant,
    VariantItems, WorkItem,
};

/// Loads words of a plan buffer.
pub trait PlanWords: Copy {
    /// The word at `address`, a multiple of 4.
    fn word(self, address: u64) -> u32;
    /// Two neighbours; `address` is a multiple of 8.
    #[inline(always)]
    fn pair(self, address: u64) -> [u32; 2] {
        [0, 4].map(|offset| self.word(address + offset))
    }
    /// Four neighbours; `address` is a multiple of 16.
    #[inline(always)]
    fn quad(self, address: u64) -> [u32; 4] {
        [0, 4, 8, 12].map(|offset| self.word(address + offset))
    }
}

/// A plan buffer of the host, from address 0 on. Behind its end there are zeros.
#[derive(Clone, Copy, Debug)]
pub struct PlanBytes<'a>(pub &'a [u8]);

impl PlanWords for PlanBytes<'_> {
    fn word(self, address: u64) -> u32 {
        let bytes = self.0.get(address as usize..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }
}

// What is loaded together stands together, and is aligned to its size.
const _: () = {
    let queries = offset_of!(PlanHeader, queries_offset_bytes);
    assert!(queries % 16 == 0 && offset_of!(PlanHeader, pages_offset_bytes) == queries + 4);
    assert!(offset_of!(PlanHeader, masks_offset_bytes) == queries + 8);
    assert!(offset_of!(PlanHeader, variants) % 8 == 0 && size_of::<VariantItems>() == 8);
    assert!(offset_of!(VariantItems, begin) == 0 && offset_of!(VariantItems, count) == 4);
    assert!(PlanHeader::ITEMS_OFFSET_BYTES.is_multiple_of(16) && size_of::<WorkItem>().is_multiple_of(16));
    assert!(offset_of!(WorkItem, page_begin) == 0 && offset_of!(WorkItem, token_count) == 4);
    assert!(offset_of!(WorkItem, query_begin) == 8 && offset_of!(WorkItem, row_count) == 12);
    assert!(offset_of!(ItemQuery, query_token) == 0 && offset_of!(ItemQuery, slot) == 4);
    assert!(size_of::<ItemQuery>().is_multiple_of(8) && size_of::<PageMask>() == 4);
    assert!(offset_of!(WorkItem, kv_limit_begin) == offset_of!(WorkItem, first_token_begin) + 4);
    assert!(offset_of!(WorkItem, lone_tiles) == offset_of!(WorkItem, run_pages) + 2);
    assert!(offset_of!(MergeRow, sequence) == 0 && offset_of!(MergeRow, slot_begin) == 4);
    assert!(offset_of!(MergeRow, slot_count) == 8 && size_of::<MergeRow>() == 16);
};

/// Where the records of a plan lie, and how much of it is a variant's.
#[derive(Clone, Copy, Debug)]
pub struct PlanView {
    items: u64,
    queries: u64,
    pages: u64,
    masks: u64,
    /// Pieces of work: the variant's items times KV heads. 0 where the buffer holds no plan of this version.
    pub work_count: u32,
}

impl PlanView {
    /// Of the plan buffer at `plan`. The loads do not wait for each other.
    #[inline(always)]
    pub fn load(words: impl PlanWords, plan: u64, variant: TileVariant, kv_heads: u32) -> Self {
        let variants = offset_of!(PlanHeader, variants) + size_of::<VariantItems>() * variant.index();
        let magic = words.word(plan + offset_of!(PlanHeader, magic) as u64);
        let [queries, pages, masks, _] = words.quad(plan + offset_of!(PlanHeader, queries_offset_bytes) as u64);
        let [begin, count] = words.pair(plan + variants as u64);
        Self {
            items: plan
                + begin.wrapping_mul(size_of::<WorkItem>() as u32).wrapping_add(PlanHeader::ITEMS_OFFSET_BYTES) as u64,
            queries: plan + queries as u64,
            pages: plan + pages as u64,
            masks: plan + masks as u64,
            work_count: if magic == PLAN_MAGIC { count.wrapping_mul(kv_heads) } else { 0 },
        }
    }

    /// Piece of work `index`, below [`Self::work_count`].
    #[inline(always)]
    pub fn work(&self, words: impl PlanWords, index: u32, kv_heads: FastDivisor) -> Work {
        let (item, kv_head) = kv_heads.divide_remainder(index);
        let address = self.items + item as u64 * size_of::<WorkItem>() as u64;
        let [page_begin, token_count, query_begin, row_count] = words.quad(address);
        let mask_begin = words.word(address + offset_of!(WorkItem, mask_begin) as u64);
        Work { page_begin, token_count, query_begin, row_count, mask_begin, kv_head }
    }

    /// Which tiles few rows of piece of work `index` attend to.
    #[inline(always)]
    pub fn lone_tiles(&self, words: impl PlanWords, index: u32, kv_heads: FastDivisor) -> LoneTiles {
        let item = self.items + kv_heads.divide(index) as u64 * size_of::<WorkItem>() as u64;
        // Two fields of 16 bits share a word, the first its lower half.
        LoneTiles((words.word(item + offset_of!(WorkItem, run_pages) as u64) >> 16) as u16)
    }

    /// The KV tokens of `work`.
    #[inline(always)]
    pub fn stream(&self, work: &Work) -> Stream {
        Stream {
            page_ids: self.pages + work.page_begin as u64 * 4,
            masks: if work.has_masks() {
                self.masks + work.mask_begin as u64 * size_of::<PageMask>() as u64
            } else {
                0
            },
            token_count: work.token_count,
        }
    }

    /// Row `row` of `work`, below its row count: the address of its query's record, and its query head.
    #[inline(always)]
    pub fn row(&self, work: &Work, row: u32, group: FastDivisor) -> (QueryAddress, u32) {
        let (query, in_group) = group.divide_remainder(row);
        let address = self.queries + work.query_begin.wrapping_add(query) as u64 * size_of::<ItemQuery>() as u64;
        (QueryAddress(address), work.kv_head * group.divisor + in_group)
    }

    /// The page id of entry `entry` of `work`'s stream.
    #[inline(always)]
    pub fn page_id(&self, words: impl PlanWords, work: &Work, entry: u32) -> u32 {
        words.word(self.pages + work.page_begin.wrapping_add(entry) as u64 * 4)
    }

    /// As [`Stream::first_token`], of `work`, which has masks.
    #[inline(always)]
    pub fn first_token(&self, words: impl PlanWords, plan: u64, work: &Work, entry: u32) -> u32 {
        let first_tokens = words.word(plan + offset_of!(PlanHeader, words_offset_bytes) as u64);
        words.word(plan + first_tokens as u64 + work.mask_begin.wrapping_add(entry) as u64 * 4)
    }

    /// The mask of entry `entry` of `work`, which has masks.
    #[inline(always)]
    pub fn mask(&self, words: impl PlanWords, work: &Work, entry: u32) -> PageMask {
        let address = self.masks + work.mask_begin.wrapping_add(entry) as u64 * size_of::<PageMask>() as u64;
        PageMask(words.word(address))
    }
}

/// One item for one KV head: what a CTA does at a time.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// [`WorkItem::page_begin`].
    pub page_begin: u32,
    /// [`WorkItem::token_count`].
    pub token_count: u32,
    /// [`WorkItem::query_begin`].
    pub query_begin: u32,
    /// [`WorkItem::row_count`].
    pub row_count: u32,
    /// [`WorkItem::mask_begin`].
    pub mask_begin: u32,
    /// The KV head.
    pub kv_head: u32,
}

impl Work {
    /// Whether rows of the item attend to different tokens.
    #[inline(always)]
    pub const fn has_masks(&self) -> bool {
        self.mask_begin != NO_MASKS
    }
}

/// The KV tokens of an item: entries of a page id and, where there are masks, a mask.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    page_ids: u64,
    /// Address of the first entry's mask; 0 where all rows attend to all tokens.
    masks: u64,
    /// Number of tokens, at least 1.
    pub token_count: u32,
}

impl Stream {
    /// Whether rows attend to different tokens.
    #[inline(always)]
    pub const fn has_masks(&self) -> bool {
        self.masks != 0
    }

    /// The page id of an entry.
    #[inline(always)]
    pub fn page_id(&self, words: impl PlanWords, entry: u32) -> u32 {
        words.word(self.page_ids + entry as u64 * 4)
    }

    /// The mask of an entry; the stream has masks.
    #[inline(always)]
    pub fn mask(&self, words: impl PlanWords, entry: u32) -> PageMask {
        PageMask(words.word(self.masks + entry as u64 * size_of::<PageMask>() as u64))
    }

    /// The first token that counts of the page of an entry; the stream is of the plan buffer at `plan`, made for a sliding
    /// window, and has masks: first tokens stand in their order ([`WorkItem::first_token_begin`]).
    #[inline(always)]
    pub fn first_token(&self, words: impl PlanWords, plan: u64, entry: u32) -> u32 {
        let masks = words.word(plan + offset_of!(PlanHeader, masks_offset_bytes) as u64);
        let first_tokens = words.word(plan + offset_of!(PlanHeader, words_offset_bytes) as u64);
        words.word(self.masks + first_tokens.wrapping_sub(masks) as u64 + entry as u64 * size_of::<PageMask>() as u64)
    }
}

/// What a few items have beside their stream and queries: [`WorkItem::first_token_begin`], [`WorkItem::kv_limit_begin`].
#[derive(Clone, Copy, Debug)]
pub struct Exceptions {
    /// Address of the words; 0 where there are none.
    first_tokens: u64,
    kv_limits: u64,
}

impl Exceptions {
    /// Of the `index`-th piece of work of `view`, of the plan buffer at `plan`.
    #[inline(always)]
    pub fn load(words: impl PlanWords, plan: u64, view: &PlanView, index: u32, kv_heads: FastDivisor) -> Self {
        let offset = words.word(plan + offset_of!(PlanHeader, words_offset_bytes) as u64);
        let item = view.items + kv_heads.divide(index) as u64 * size_of::<WorkItem>() as u64;
        let of = |begin: usize| match words.word(item + begin as u64) {
            NONE => 0,
            begin => plan + offset as u64 + begin as u64 * 4,
        };
        Self {
            first_tokens: of(offset_of!(WorkItem, first_token_begin)),
            kv_limits: of(offset_of!(WorkItem, kv_limit_begin)),
        }
    }

    /// Whether pages have first tokens.
    #[inline(always)]
    pub const fn has_first_tokens(&self) -> bool {
        self.first_tokens != 0
    }

    /// The first token that counts of the page of an entry.
    #[inline(always)]
    pub fn first_token(&self, words: impl PlanWords, entry: u32) -> u32 {
        if self.first_tokens == 0 { 0 } else { words.word(self.first_tokens + entry as u64 * 4) }
    }

    /// Where a query's view of the stream ends.
    #[inline(always)]
    pub fn kv_limit(&self, words: impl PlanWords, query: u32) -> u32 {
        if self.kv_limits == 0 { u32::MAX } else { words.word(self.kv_limits + query as u64 * 4) }
    }
}

/// Address of the [`ItemQuery`] of a row.
#[derive(Clone, Copy, Debug)]
pub struct QueryAddress(u64);

impl QueryAddress {
    /// The query token: row of Q, O and LSE.
    #[inline(always)]
    pub fn query_token(self, words: impl PlanWords) -> u32 {
        words.word(self.0)
    }

    /// The query token and the slot.
    #[inline(always)]
    pub fn token_and_slot(self, words: impl PlanWords) -> [u32; 2] {
        words.pair(self.0)
    }
}

/// The rows of a plan that are to be merged.
#[derive(Clone, Copy, Debug)]
pub struct MergeView {
    rows: u64,
    /// Their number. 0 where the buffer holds no plan of this version.
    pub count: u32,
}

impl MergeView {
    /// Of the plan buffer at `plan`. The loads do not wait for each other.
    #[inline(always)]
    pub fn load(words: impl PlanWords, plan: u64) -> Self {
        let magic = words.word(plan + offset_of!(PlanHeader, magic) as u64);
        let count = words.word(plan + offset_of!(PlanHeader, merge_count) as u64);
        let offset = words.word(plan + offset_of!(PlanHeader, merges_offset_bytes) as u64);
        Self { rows: plan + offset as u64, count: if magic == PLAN_MAGIC { count } else { 0 } }
    }

    /// Row `index`, below the count.
    #[inline(always)]
    pub fn row(&self, words: impl PlanWords, index: u32) -> MergeRow {
        let [sequence, slot_begin, slot_count, reserved] =
            words.quad(self.rows + index as u64 * size_of::<MergeRow>() as u64);
        MergeRow { sequence, slot_begin, slot_count, reserved }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::PLAN_VERSION;
    use bytemuck::Zeroable;
    use std::vec::Vec;

    const PLAN_ITEMS: u64 = PlanHeader::ITEMS_OFFSET_BYTES as u64;

    /// Two items of `mma32` (index 1) behind one of `mma16`; the first of the two has no masks, the second has.
    fn buffer(magic: u32) -> Vec<u8> {
        let item = |page_begin, token_count, query_begin, row_count, mask_begin| WorkItem {
            page_begin,
            token_count,
            query_begin,
            row_count,
            mask_begin,
            first_token_begin: NONE,
            kv_limit_begin: NONE,
            run_pages: 0,
            lone_tiles: LoneTiles::NONE,
        };
        let lone_tiles = LoneTiles::from(5);
        let last =
            WorkItem { first_token_begin: 1, kv_limit_begin: 3, run_pages: 16, lone_tiles, ..item(2, 8, 1, 4, 0) };
        let items = [item(9, 9, 9, 9, 9), item(0, 5, 0, 2, NO_MASKS), last];
        let query = |query_token, slot| ItemQuery { query_token, slot };
        let queries = [query(7, 3), query(8, 4), query(9, 5)];
        let words = [77u32, 0, 1, 6, u32::MAX];
        let pages = [40u32, 41, 42, 43];
        let masks = [PageMask::new((0, PageMask::ALL_ROWS), 4), PageMask::new((2, 4), 3)];
        let merges = [MergeRow { sequence: 8, slot_begin: 4, slot_count: 2, reserved: 0 }];
        let mut header = PlanHeader::zeroed();
        header.magic = magic;
        header.variants[1] = VariantItems { begin: 1, count: 2 };
        header.merge_count = 1;
        let mut bytes = Vec::from(bytemuck::bytes_of(&header));
        bytes.extend_from_slice(bytemuck::cast_slice(&items));
        let mut section = |data: &[u8]| {
            let offset = bytes.len() as u32;
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            offset
        };
        header.queries_offset_bytes = section(bytemuck::cast_slice(&queries));
        header.pages_offset_bytes = section(bytemuck::cast_slice(&pages));
        header.masks_offset_bytes = section(bytemuck::cast_slice(&masks));
        header.merges_offset_bytes = section(bytemuck::cast_slice(&merges));
        header.words_offset_bytes = section(bytemuck::cast_slice(&words));
        bytes[..PLAN_ITEMS as usize].copy_from_slice(bytemuck::bytes_of(&header));
        bytes
    }

    #[test]
    fn every_field_is_found() {
        let buffer = buffer(PLAN_MAGIC);
        let (words, kv_heads, group) = (PlanBytes(&buffer), FastDivisor::new(3), FastDivisor::new(2));
        let plan = PlanView::load(words, 0, TileVariant::Mma32, 3);
        assert_eq!(plan.work_count, 6);
        let work = plan.work(words, 1, kv_heads);
        assert_eq!((work.row_count, work.kv_head, work.has_masks()), (2, 1, false));
        let stream = plan.stream(&work);
        assert_eq!((stream.token_count, stream.has_masks(), stream.page_id(words, 1)), (5, false, 41));
        let work = plan.work(words, 5, kv_heads);
        assert_eq!((work.row_count, work.kv_head, work.has_masks()), (4, 2, true));
        assert_eq!([1, 5].map(|index| plan.lone_tiles(words, index, kv_heads)), [LoneTiles::NONE, LoneTiles::from(5)]);
        let stream = plan.stream(&work);
        assert_eq!(plan.page_id(words, &work, 1), 43);
        assert_eq!(stream.page_id(words, 1), 43);
        let mask = stream.mask(words, 1);
        assert_eq!((mask, plan.mask(words, &work, 1)), (PageMask::new((2, 4), 3), mask));
        assert_eq!(mask.token_end(), 3);
        assert_eq!([1, 2, 3, 4].map(|row| mask.has_row(row)), [false, true, true, false]);
        assert!(stream.mask(words, 0).is_for_all_rows() && !mask.is_for_all_rows());
        let (query, head) = plan.row(&work, 1, group);
        assert_eq!((query.token_and_slot(words), head), ([8, 4], 5));
        let (query, head) = plan.row(&work, 2, group);
        assert_eq!((query.query_token(words), head), (9, 4));
        assert_eq!([0, 1].map(|entry| stream.first_token(words, 0, entry)), [77, 0]);
        assert_eq!([0, 1].map(|entry| plan.first_token(words, 0, &work, entry)), [77, 0]);
        let exceptions = Exceptions::load(words, 0, &plan, 5, kv_heads);
        assert_eq!([0, 1].map(|entry| exceptions.first_token(words, entry)), [0, 1]);
        assert_eq!([0, 1].map(|query| exceptions.kv_limit(words, query)), [6, u32::MAX]);
        let none = Exceptions::load(words, 0, &plan, 1, kv_heads);
        assert_eq!((none.first_token(words, 1), none.kv_limit(words, 0)), (0, u32::MAX));
        let merges = MergeView::load(words, 0);
        assert_eq!((merges.count, merges.row(words, 0).slot_begin), (1, 4));
    }

    #[test]
    fn a_plan_of_another_version_and_no_plan_have_no_work() {
        let other = u32::from_le_bytes([b'P', b'A', b'T', PLAN_VERSION + 1]);
        for buffer in [buffer(other), buffer(0), Vec::new()] {
            assert_eq!(PlanView::load(PlanBytes(&buffer), 0, TileVariant::Mma32, 3).work_count, 0);
            assert_eq!(MergeView::load(PlanBytes(&buffer), 0).count, 0);
        }
        assert_eq!(PlanView::load(PlanBytes(&buffer(PLAN_MAGIC)), 0, TileVariant::Mma64, 3).work_count, 0);
    }

    #[test]
    fn masks_hold_the_largest_page() {
        let mask = PageMask::new((0, 128), PageMask::MAX_TOKENS);
        assert_eq!((mask.row_end(), mask.token_end()), (128, 65_536));
    }
}
