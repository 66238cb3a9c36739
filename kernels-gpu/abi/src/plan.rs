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
    /// Zero.
    pub reserved: [u32; 4],
}

impl PlanHeader {
    /// The items start right behind the header, so that a kernel can load its item without waiting for the header.
    pub const ITEMS_OFFSET_BYTES: u32 = size_of::<Self>() as u32;
}

/// The unit of work: one run of KV tokens against up to M rows of one pack, for every KV head (one CTA per KV head).
///
/// The rows of a pack are its (query, head in group) pairs: packed row `p` is query `p / group` of the pack and query
/// head `kv_head * group + p % group`. An item covers packed rows `row_begin .. row_begin + row_count`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct WorkItem {
    /// Index, in the page-id array, of the page that holds the first token. A chunk starts at a page's first token.
    pub page_begin: u32,
    /// KV tokens of the chunk, at least 1. It spans `ceil(token_count / page_size)` pages.
    pub token_count: u32,
    /// Index, in the [`PackQuery`] array, of the pack's first query.
    pub query_begin: u32,
    /// First packed row.
    pub row_begin: u32,
    /// Packed rows of this item, 1 to the variant's M.
    pub row_count: u32,
    /// Which chunk of its pack this is: added to [`PackQuery::slot`] (unless that is [`DIRECT_SLOT`]).
    pub slot_offset: u32,
    /// The pack this item belongs to (for reports; kernels ignore it).
    pub pack: u32,
    /// Zero.
    pub reserved: u32,
}

/// One query of a pack.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PackQuery {
    /// Row of the batch.
    pub sequence: u32,
    /// Partial slot of the pack's first chunk for this sequence, or [`DIRECT_SLOT`].
    pub slot: u32,
}

/// A sequence whose output the merge kernel writes: two or more partials, or none (length 0: output 0, LSE −inf).
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
