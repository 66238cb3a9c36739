//! Row tiles: which sequences a CTA serves together, and into how many chunks their KV is cut.
//!
//! In forest order, sequences that share a prefix are neighbours. A row tile is a run of neighbours; its *stream* is every
//! page that one of them reads, once: a shared node is read once per tile, and each row attends to its own pages only.

use super::forest::Forest;
use crate::DecodeBatch;

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
    /// Place of its first page in the block tables: 0, but where chunks are fixed.
    pub page_begin: u32,
    /// Pages of its stream.
    pub page_count: u32,
    /// Pages that all of its sequences share.
    pub common_pages: u32,
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

/// How a stream is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    /// Pages of each, the last one excepted.
    pub(super) pages: u32,
    pub(super) count: u32,
}

/// How streams become row tiles and chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
pub(super) fn cut(extents: &[Extent], rule: TilingRule, mut sink: impl FnMut(RowTile)) {
    let mut rest = extents;
    while let [first, others @ ..] = rest {
        let (mut page_count, mut common_pages) = (first.pages, first.pages);
        // Up to the chosen boundary.
        let (mut sequences, mut chosen_pages, mut chosen_common) = (1, page_count, common_pages);
        // Pages shared across it.
        let mut crossing = u32::MAX;
        let most_others = others.len().min(rule.most_sequences as usize - 1);
        for (taken, next) in (2..).zip(&others[..most_others]) {
            let added_pages = next.pages - next.shared;
            page_count = page_count.saturating_add(added_pages);
            common_pages = common_pages.min(next.shared);
            if page_count - common_pages > rule.chunk_pages && next.shared <= added_pages {
                break;
            }
            let behind = rest.get(taken).map_or(0, |extent| extent.shared);
            if behind <= crossing || 2 * sequences < taken {
                (sequences, chosen_pages, chosen_common, crossing) = (taken, page_count, common_pages, behind);
            }
        }
        let order_begin = (extents.len() - rest.len()) as u32;
        sink(RowTile {
            order_begin,
            order_end: order_begin + sequences as u32,
            page_begin: 0,
            page_count: chosen_pages,
            common_pages: chosen_common,
            chunk_pages: chosen_pages,
            chunks: 1,
        });
        rest = &rest[sequences..];
    }
}

/// Cuts every sequence into chunks of `rule.chunk_pages` pages, from its first page on. Sequences that share a whole chunk are
/// served together there, as many as the rule takes; the rest of a sequence is its own. So where a sequence is cut, and what
/// its rows read side by side, depends on that sequence alone. Tiles are in the order of their first pages, those of a
/// sequence in its own order.
pub(super) fn cut_fixed(extents: &[Extent], rule: TilingRule, tiles: &mut Vec<RowTile>) {
    let TilingRule { most_sequences, chunk_pages, .. } = rule;
    // Of the chunks of a sequence, those that the one before it has as well.
    let shared_chunks = |extent: &Extent| extent.shared / chunk_pages;
    let mut chunk = 0;
    loop {
        // Up to there neighbours share as they do here; behind the last shared chunk every sequence is by itself.
        let next = extents.iter().map(shared_chunks).filter(|shared| *shared > chunk).min();
        let page_begin = chunk * chunk_pages;
        let mut order_begin = 0;
        for run in extents.chunk_by(|_, behind| shared_chunks(behind) > chunk) {
            for together in run.chunks(most_sequences as usize) {
                let order_end = order_begin + together.len() as u32;
                let own_end = together[0].pages;
                let page_end = next.map_or(own_end, |next| own_end.min(next * chunk_pages));
                if page_begin < page_end {
                    let page_count = page_end - page_begin;
                    tiles.push(RowTile {
                        order_begin,
                        order_end,
                        page_begin,
                        page_count,
                        common_pages: page_count,
                        chunk_pages,
                        chunks: page_count.div_ceil(chunk_pages),
                    });
                }
                order_begin = order_end;
            }
        }
        match next {
            Some(next) => chunk = next,
            None => return,
        }
    }
}

impl TilingRule {
    /// How a stream of `page_count` pages is cut, where the key tile of its variant is `key_tile_pages` long. Depends on
    /// page counts, not on tokens: the cut mostly stays what it is from step to step.
    pub(super) fn chunks(self, page_count: u32, key_tile_pages: u32) -> Chunks {
        let most_pages = self.chunk_pages.max(1);
        if self.exact {
            return Chunks { pages: most_pages, count: page_count.div_ceil(most_pages) };
        }
        if page_count <= most_pages {
            return Chunks { pages: page_count, count: 1 };
        }
        // Of equal length, rounded up to whole key tiles.
        let pages = page_count.div_ceil(page_count.div_ceil(most_pages)).next_multiple_of(key_tile_pages);
        Chunks { pages, count: page_count.div_ceil(pages) }
    }
}

/// Row tiles that the cost model does not tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TileClass {
    pub(super) sequences: u32,
    pub(super) page_count: u32,
    pub(super) common_pages: u32,
    /// How many there are.
    pub(super) count: u32,
}

impl TileClass {
    /// Pages of all streams.
    pub(super) fn stream_pages(&self) -> u64 {
        u64::from(self.page_count) * u64::from(self.count)
    }

    /// Whether the two differ in count at most.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        Self { count: other.count, ..*self } == *other
    }

    /// About how many partials the sequences of one tile have together: those of a tile that is not cut have none.
    pub(super) fn partials(&self, chunks: Chunks) -> u32 {
        if chunks.count == 1 {
            return 0;
        }
        let common_chunks = self.common_pages.div_ceil(chunks.pages).min(chunks.count);
        self.sequences * (common_chunks + u32::from(common_chunks < chunks.count))
            + (chunks.count - common_chunks).saturating_sub(1)
    }
}

impl From<RowTile> for TileClass {
    fn from(tile: RowTile) -> Self {
        let RowTile { page_count, common_pages, .. } = tile;
        Self { sequences: tile.sequence_count(), page_count, common_pages, count: 1 }
    }
}
