//! The records of a plan, as the device reads them.

use bytemuck::{Pod, Zeroable};

/// First word of every plan buffer ("PAT1"); a kernel that finds something else there returns without writing.
pub const PLAN_MAGIC: u32 = 0x3154_4150;

/// [`PackQuery::slot`] of a sequence that has exactly one partial: the forward kernel writes the final output itself.
pub const DIRECT_SLOT: u32 = u32::MAX;

/// Number of tile variants a header can describe (the discriminants of [`crate::TileVariant`] are below it).
pub const MAX_TILE_VARIANTS: usize = 8;

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
    /// Number of [`WorkItem`]s; items are grouped by tile variant, in launch order.
    pub item_count: u32,
    /// Number of [`PackQuery`] records.
    pub query_count: u32,
    /// Number of page ids.
    pub page_count: u32,
    /// Number of [`MergeRow`]s: sequences with two or more partials, and empty sequences.
    pub merge_count: u32,
    /// Number of partial slots; partial buffers hold `slot_count * q_heads` rows.
    pub slot_count: u32,
    /// Offset of the [`PackQuery`] array.
    pub queries_offset_bytes: u32,
    /// Offset of the page ids.
    pub pages_offset_bytes: u32,
    /// Offset of the [`MergeRow`] array.
    pub merges_offset_bytes: u32,
    /// Tokens per page the plan was made for.
    pub page_size: u32,
    /// For each tile variant (by discriminant), index of its first item.
    pub variant_begin: [u32; MAX_TILE_VARIANTS],
    /// For each tile variant (by discriminant), number of its items.
    pub variant_count: [u32; MAX_TILE_VARIANTS],
    /// Offset of the [`PageMask`] array.
    pub masks_offset_bytes: u32,
    /// Number of page masks.
    pub mask_count: u32,
    /// Zero.
    pub reserved: [u32; 2],
}

impl PlanHeader {
    /// The items start right behind the header, so that a kernel can load its item without waiting for the header.
    pub const ITEMS_OFFSET_BYTES: u32 = size_of::<Self>() as u32;

    /// Least size of a plan buffer on a device, however small the plan: kernels fetch as much to L2 before they know.
    pub const LEAST_BUFFER_BYTES: u32 = 16 * 1024;
}

/// [`WorkItem::mask_begin`] of an item without masks: every row attends to every token.
pub const NO_MASKS: u32 = u32::MAX;

/// The unit of work: a stream of KV pages against up to M rows, for every KV head (one CTA per KV head).
///
/// The rows of an item are its (query, head in group) pairs: row `r` is query `r / group` of the item and query head
/// `kv_head * group + r % group`.
///
/// The stream may hold pages that only some of the rows attend to: a node of the prefix forest, then the leaves of its
/// sequences. Each page of such an item has a [`PageMask`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct WorkItem {
    /// Index, in the page-id array, of the first page.
    pub page_begin: u32,
    /// KV tokens of the stream, at least 1; it spans `ceil(token_count / page_size)` pages. With masks it is a multiple of
    /// the page size: the masks say how many tokens of each page count.
    pub token_count: u32,
    /// Index, in the [`PackQuery`] array, of the first query.
    pub query_begin: u32,
    /// Rows, a multiple of the group, 1 to the variant's M.
    pub row_count: u32,
    /// Index, in the mask array, of the first page's mask, or [`NO_MASKS`].
    pub mask_begin: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

/// Which rows of an item attend to a page, and to how many of its tokens: bits 0..8 the first row, 8..16 the end of the
/// rows ([`PageMask::ALL_ROWS`] where it is all of them), 16..32 the tokens less one.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PageMask(pub u32);

impl PageMask {
    /// The end of the rows where all of an item's rows attend.
    pub const ALL_ROWS: u32 = 255;
    /// Most tokens of a page a mask can count.
    pub const MAX_TOKENS: u32 = 1 << 16;

    /// Rows `row_begin..row_end` (0 to [`Self::ALL_ROWS`] for all of them) attend to the first `tokens` (1 to [`Self::MAX_TOKENS`]) of the page.
    pub const fn new(row_begin: u32, row_end: u32, tokens: u32) -> Self {
        Self(row_begin | row_end << 8 | (tokens - 1) << 16)
    }

    /// First row.
    pub const fn row_begin(self) -> u32 {
        self.0 & 0xff
    }

    /// End of the rows, or [`Self::ALL_ROWS`].
    pub const fn row_end(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Whether all of the item's rows attend.
    pub const fn is_for_all_rows(self) -> bool {
        self.0 & 0xffff == Self::ALL_ROWS << 8
    }

    /// Tokens that count.
    pub const fn tokens(self) -> u32 {
        (self.0 >> 16) + 1
    }
}

/// One query of an item.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PackQuery {
    /// Row of the batch.
    pub sequence: u32,
    /// The partial slot the item writes for this sequence, or [`DIRECT_SLOT`].
    pub slot: u32,
}

/// A sequence whose output the merge kernel writes: two or more partials, or none (length 0: output 0, LSE −inf). Rows of a
/// plan are in the order of their partials, most first, then of their sequences: they are dealt out in turn.
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
    assert!(size_of::<PlanHeader>() == 128);
    assert!(size_of::<WorkItem>() == 32);
    assert!(size_of::<PackQuery>() == 8);
    assert!(size_of::<MergeRow>() == 16);
};
