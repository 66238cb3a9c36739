//! Row tiles: which sequences a CTA serves together, and into how many chunks their KV is cut.
//!
//! In forest order, sequences that share a prefix are neighbours. A row tile is a run of neighbours; its *stream* is every
//! page that one of them reads, once: a shared node is read once per tile, and each row attends to its own pages only.

use crate::DecodeBatch;
use pat_abi::TileVariant;

use super::forest::Forest;

/// One sequence, in forest order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// Pages of the sequence, the partial last one included.
    pub(super) pages: u32,
    /// Leading pages that the sequence before it in the order reads as well; 0 for the first.
    pub(super) shared: u32,
}

/// Consecutive sequences of [`Forest::order`] that are served together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowTile {
    /// First of its sequences in [`Forest::order`].
    pub order_begin: u32,
    /// End of its sequences, likewise.
    pub order_end: u32,
    /// Pages of its stream.
    pub page_count: u32,
    /// Pages that all of its sequences share.
    pub common_pages: u32,
    /// The smallest tile variant that holds its rows.
    pub variant: TileVariant,
    /// Pages per chunk of the stream.
    pub chunk_pages: u32,
    /// Chunks: work items per KV head.
    pub chunks: u32,
}

impl RowTile {
    /// Sequences.
    pub fn sequence_count(&self) -> u32 {
        self.order_end - self.order_begin
    }
}

/// How streams become row tiles and chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TilingRule {
    /// Most sequences per tile.
    pub(super) most_sequences: u32,
    /// Pages after which a stream is cut. While what not all of a tile's sequences share fits a chunk, the tile takes in
    /// any sequence; then only those that share more than they add.
    pub(super) chunk_pages: u32,
    /// Cut at exactly this many pages instead of into equal chunks of whole key tiles.
    pub(super) exact: bool,
}

/// Fills `extents` for a batch and its forest.
pub(super) fn measure(batch: &DecodeBatch<'_>, forest: &Forest, extents: &mut Vec<Extent>) {
    extents.clear();
    extents.extend(
        forest
            .order()
            .iter()
            .map(|&sequence| Extent { pages: batch.length(sequence as usize).div_ceil(batch.page_size()), shared: 0 }),
    );
    // Parents come first: the deepest node that holds two neighbours writes last.
    for node in forest.nodes() {
        for extent in &mut extents[node.order_begin as usize + 1..node.order_end as usize] {
            extent.shared = node.page_end;
        }
    }
}

/// Cuts the order into tiles. A boundary makes the pages shared across it be read once more, so of the boundaries that
/// leave a tile at least half full the one with the fewest shared pages is taken.
pub(super) fn cut(extents: &[Extent], rule: TilingRule, finish: impl Fn(&mut RowTile), tiles: &mut Vec<RowTile>) {
    tiles.clear();
    let count = extents.len();
    let mut begin = 0;
    while begin < count {
        let mut tile = single(extents, begin);
        let mut chosen = tile;
        // Pages shared across the chosen boundary, behind `chosen`.
        let mut crossing = u32::MAX;
        let mut end = begin + 1;
        while end < count && end - begin < rule.most_sequences as usize {
            let next = extents[end];
            let page_count = tile.page_count.saturating_add(next.pages - next.shared);
            let common_pages = tile.common_pages.min(next.shared);
            if page_count - common_pages > rule.chunk_pages && next.shared <= next.pages - next.shared {
                break;
            }
            end += 1;
            tile = RowTile { order_end: end as u32, page_count, common_pages, ..tile };
            let behind = extents.get(end).map_or(0, |extent| extent.shared);
            if behind <= crossing || 2 * (chosen.sequence_count() as usize) < end - begin {
                (chosen, crossing) = (tile, behind);
            }
        }
        finish(&mut chosen);
        begin = chosen.order_end as usize;
        tiles.push(chosen);
    }
}

fn single(extents: &[Extent], position: usize) -> RowTile {
    let pages = extents[position].pages;
    RowTile {
        order_begin: position as u32,
        order_end: position as u32 + 1,
        page_count: pages,
        common_pages: pages,
        variant: TileVariant::Mma16,
        chunk_pages: pages,
        chunks: 1,
    }
}

/// The smallest of the variants that holds the rows, else the largest.
pub(super) fn choose_variant(variants: &[TileVariant], rows: u32) -> TileVariant {
    let fitting = variants.iter().copied().filter(|v| v.rows() >= rows).min_by_key(|v| v.rows());
    fitting.or_else(|| variants.iter().copied().max_by_key(|v| v.rows())).expect("at least one variant is allowed")
}

impl RowTile {
    /// Cuts the stream into chunks. Depends on page counts, not on tokens: the cut mostly stays what it is from step to
    /// step.
    pub(super) fn split(&mut self, rule: TilingRule, page_size: u32) {
        self.chunk_pages = rule.chunk_pages.max(1);
        self.chunks = self.page_count.div_ceil(self.chunk_pages);
        if !rule.exact {
            let key_tile_pages = (self.variant.keys() / page_size).max(1);
            self.chunk_pages = self.page_count.div_ceil(self.chunks).next_multiple_of(key_tile_pages);
            self.chunks = self.page_count.div_ceil(self.chunk_pages);
        }
    }

    /// About how many partials its sequences have together: those of a tile that is not cut have none.
    pub(super) fn partials(&self) -> u32 {
        if self.chunks == 1 {
            return 0;
        }
        let common_chunks = self.common_pages.div_ceil(self.chunk_pages).min(self.chunks);
        self.sequence_count() * (common_chunks + u32::from(common_chunks < self.chunks))
            + (self.chunks - common_chunks).saturating_sub(1)
    }
}
