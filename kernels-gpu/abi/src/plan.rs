//! The records of a plan. The planner writes them; [`crate::reader`] reads them, on the device and on the host.

use bytemuck::{Pod, Zeroable};

/// Version of the records: of their fields, sizes and meaning. Goes up when any of these changes.
pub const PLAN_VERSION: u8 = 3;

/// First word of every plan buffer: "PAT" and the version. A kernel that finds something else there returns without writing.
pub const PLAN_MAGIC: u32 = u32::from_le_bytes([b'P', b'A', b'T', PLAN_VERSION]);

/// [`ItemQuery::slot`] of a query that has exactly one partial: the forward kernel writes the final output itself.
pub const DIRECT_SLOT: u32 = u32::MAX;

/// Number of tile variants a header can describe (the discriminants of [`crate::TileVariant`] are below it).
pub const MAX_TILE_VARIANTS: usize = 16;

/// Start of a plan buffer. All offsets are in bytes from the start of the buffer and multiples of 16.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PlanHeader {
    /// [`PLAN_MAGIC`].
    pub magic: u32,
    /// Bytes of the buffer that carry data (header included).
    pub total_bytes: u32,
    /// Rows of the batch (sequences, empty ones included).
    pub sequence_count: u32,
    /// Number of partial slots; partial buffers hold `slot_count * q_heads` rows.
    pub slot_count: u32,
    /// Offset of the [`ItemQuery`] array. One load of 16 bytes gets this and the three offsets behind it.
    pub queries_offset_bytes: u32,
    /// Offset of the page ids.
    pub pages_offset_bytes: u32,
    /// Offset of the [`PageMask`] array.
    pub masks_offset_bytes: u32,
    /// Offset of the [`MergeRow`] array.
    pub merges_offset_bytes: u32,
    /// Number of [`WorkItem`]s; items are grouped by tile variant, in launch order.
    pub item_count: u32,
    /// Number of [`ItemQuery`] records.
    pub query_count: u32,
    /// Number of page ids.
    pub page_count: u32,
    /// Number of page masks.
    pub mask_count: u32,
    /// Number of [`MergeRow`]s: sequences with two or more partials, and empty sequences.
    pub merge_count: u32,
    /// Tokens per page the plan was made for.
    pub page_size: u32,
    /// Offset of the words for a few items ([`WorkItem::first_token_begin`], [`WorkItem::kv_limit_begin`]).
    pub words_offset_bytes: u32,
    /// Number of these words.
    pub word_count: u32,
    /// The items of each tile variant (by discriminant).
    pub variants: [VariantItems; MAX_TILE_VARIANTS],
}

/// Which items are a variant's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VariantItems {
    /// Index of the first.
    pub begin: u32,
    /// Their number.
    pub count: u32,
}

impl PlanHeader {
    /// The items start right behind the header, so that a kernel can load its item without waiting for the header.
    pub const ITEMS_OFFSET_BYTES: u32 = size_of::<Self>() as u32;

    /// What kernels fetch to L2 from a header on, before they know how long the plan is.
    pub const LEAST_BUFFER_BYTES: u32 = 16 * 1024;

    /// Offset of the second header that plans for pages of one token have: of the items in runs ([`WorkItem::run_pages`]). To
    /// a kernel that is given its address, it is the start of a plan: offsets and the begin of its variants' items count from
    /// there.
    pub const RUNS_OFFSET_BYTES: u32 = size_of::<Self>() as u32;

    /// Least size of a plan buffer on a device, however small the plan.
    pub const LEAST_ALLOCATION_BYTES: u32 = Self::RUNS_OFFSET_BYTES + Self::LEAST_BUFFER_BYTES;
}

/// [`WorkItem::mask_begin`] of an item without masks: every row attends to every token.
pub const NO_MASKS: u32 = u32::MAX;

/// [`WorkItem::first_token_begin`] and [`WorkItem::kv_limit_begin`] of an item without first tokens, without KV limits.
pub const NONE: u32 = u32::MAX;

/// The unit of work: a stream of KV pages against up to M rows, for every KV head (one CTA per KV head).
///
/// The rows of an item are its (query, head in group) pairs: row `r` is query `r / group` of the item and query head
/// `kv_head * group + r % group`. Where a group has more heads than the tile has rows, the rows are those of one query and one
/// part of the group ([`crate::GroupParts`]), and the item is computed once for each part.
///
/// An entry of the stream says page, rows and tokens: a page id; in items that have masks, the [`PageMask`] with the same
/// index; in items that have first tokens, the first token of the page that counts. The stream may hold pages that only some
/// of the rows attend to: a node of the prefix forest, then the leaves of its sequences. A page may stand in several entries,
/// for different rows or different tokens. What an item does not need takes no bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct WorkItem {
    /// Index, in the page-id array, of the first page.
    pub page_begin: u32,
    /// KV tokens of the stream, at least 1; it spans `ceil(token_count / page_size)` pages, or entries in runs. With masks it
    /// is a multiple of the page size: the masks say which tokens of each page count.
    pub token_count: u32,
    /// Index, in the [`ItemQuery`] array, of the first query.
    pub query_begin: u32,
    /// Rows, 1 to the variant's M: a multiple of the group, or of a group that does not fit those of one part.
    pub row_count: u32,
    /// Index, in the mask array, of the first page's mask, or [`NO_MASKS`].
    pub mask_begin: u32,
    /// Index, among the words for a few items, of the first page's first token that counts, followed by those of its other
    /// pages; or [`NONE`]: tokens count from the first of a page on. In plans for kernels with
    /// [`crate::Switches::window`] every item with masks has them, at [`Self::mask_begin`], and no other has: so they find them.
    pub first_token_begin: u32,
    /// Index, among the words for a few items, of the first query's KV limit, followed by those of its other queries: its rows
    /// attend to none of the item's stream from this token on, whatever the entries say. Or [`NONE`]. The CPU executor reads
    /// it, no kernel does yet, and no planner writes it.
    pub kv_limit_begin: u32,
    /// 0, or [`RUN_PAGES`]: so many consecutive pages of one token are an entry of the stream, whose page id is that of the
    /// first. To kernels these are pages of as many tokens; they are told so by their parameters, and do not read it.
    pub run_pages: u16,
    /// Tiles that few of the rows attend to. The wgmma kernels read it, for speed alone: results do not depend on it.
    pub lone_tiles: LoneTiles,
}

/// Tiles (main-loop steps) at one end of an item's stream that hold pages of few rows each. The warps of a wgmma kernel compute
/// these each for itself, if it has rows that attend to them, and side by side; the others, which all rows attend to, the
/// warpgroup computes. At least one tile is left to it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct LoneTiles(pub u16);

impl LoneTiles {
    /// There are none.
    pub const NONE: Self = Self(0);
    const IN_FRONT: u32 = 1 << 15;
    /// Largest number of a tile.
    const MAX: u32 = Self::IN_FRONT - 1;

    /// The first `count` tiles, or as many as can be said.
    pub const fn first(count: u32) -> Self {
        let count = if count < Self::MAX { count } else { Self::MAX };
        if count == 0 { Self::NONE } else { Self((Self::IN_FRONT | count) as u16) }
    }

    /// Tile `begin`, at least 1, and those behind it, if that can be said.
    pub const fn from(begin: u32) -> Self {
        if begin <= Self::MAX { Self(begin as u16) } else { Self::NONE }
    }

    /// Where, in a stream of `tile_count` tiles, those begin that are not among these, and where they end: at least one.
    #[inline(always)]
    pub const fn others(self, tile_count: u32) -> (u32, u32) {
        let place = self.0 as u32 & Self::MAX;
        let last = tile_count - 1;
        if self.0 as u32 & Self::IN_FRONT != 0 {
            (if place < last { place } else { last }, tile_count)
        } else {
            (0, if place > 0 && place < tile_count { place } else { tile_count })
        }
    }
}

/// Consecutive pages of one token that an entry may hold: a common page size, which every kernel serves.
pub const RUN_PAGES: u32 = 16;

/// Which rows of an item attend to a page, and where the tokens end that they attend to: bits 0..8 the first row, 8..16 the
/// end of the rows ([`PageMask::ALL_ROWS`] where it is all of them), 16..32 the end of the tokens less one.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PageMask(pub u32);

impl PageMask {
    /// The end of the rows where all of an item's rows attend.
    pub const ALL_ROWS: u32 = 255;
    /// Most tokens of a page that a mask can describe.
    pub const MAX_TOKENS: u32 = 1 << 16;

    /// Rows `rows.0..rows.1` (0 to [`Self::ALL_ROWS`] for all of them) attend to the page's tokens before `token_end` (1 to
    /// [`Self::MAX_TOKENS`]).
    pub const fn new(rows: (u32, u32), token_end: u32) -> Self {
        Self(rows.0 | rows.1 << 8 | (token_end - 1) << 16)
    }

    /// First row.
    pub const fn row_begin(self) -> u32 {
        self.0 & 0xff
    }

    /// End of the rows, or [`Self::ALL_ROWS`].
    pub const fn row_end(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Whether row `row` of the item attends.
    pub const fn has_row(self, row: u32) -> bool {
        row >= self.row_begin() && row < self.row_end()
    }

    /// Whether all of the item's rows attend.
    pub const fn is_for_all_rows(self) -> bool {
        self.0 & 0xffff == Self::ALL_ROWS << 8
    }

    /// End of the tokens that count.
    pub const fn token_end(self) -> u32 {
        (self.0 >> 16) + 1
    }
}

/// One query of an item.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct ItemQuery {
    /// The query token: its row of Q, O and LSE. A row of the batch is a query token, the only one of its sequence or one of
    /// several.
    pub query_token: u32,
    /// The partial slot the item writes for this query, or [`DIRECT_SLOT`].
    pub slot: u32,
}

/// A sequence whose output the merge kernel writes: two or more partials, or none (length 0: output 0, LSE −inf or the sink).
/// Rows of a plan are in the order of their partials, most first, then of their sequences: they are dealt out in turn.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct MergeRow {
    /// Row of the batch.
    pub sequence: u32,
    /// First of the sequence's consecutive partial slots.
    pub slot_begin: u32,
    /// Number of partials; 0 for an empty sequence.
    pub slot_count: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = {
    assert!(size_of::<PlanHeader>() == 192);
    // Items behind a second header are as many items behind the first.
    assert!((PlanHeader::RUNS_OFFSET_BYTES as usize).is_multiple_of(size_of::<WorkItem>()));
    assert!(size_of::<WorkItem>() == 32);
    assert!(size_of::<PageMask>() == 4);
    assert!(size_of::<ItemQuery>() == 8);
    assert!(size_of::<MergeRow>() == 16);
};
