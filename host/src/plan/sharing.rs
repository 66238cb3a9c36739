//! How often the shared nodes of a batch are read, and why.

use super::PlanMode;
use super::forest::{Forest, Node};
use super::tiling::{self, Extent, RowTile, TilingRule};
use serde::Serialize;
use std::cmp::Reverse;

/// Shared nodes that a plan treats alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SharedNodes {
    /// How many there are: the figures below are those of one.
    pub nodes: u32,
    /// Sequences that share the node.
    pub sequences: u32,
    /// Its tokens, whole pages.
    pub tokens: u32,
    /// How often it is read: once per row tile with one of its sequences. Of chunks of fixed length, which may have a part of
    /// it: in the mean of its pages, rounded up.
    pub reads: u32,
    /// How often it would be read by the widest tiles.
    pub fewest_reads: u32,
    /// KV bytes (K and V, all KV heads) that are not read, which every sequence would read for itself without sharing.
    pub saved_kv_bytes: u64,
    /// Why it is read that often.
    pub reason: ReadReason,
}

/// Why a shared node is read as often as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadReason {
    /// Read once: one row tile serves all of its sequences.
    OneTile,
    /// Read as often as its rows fill tiles: the widest ones would read it no less.
    TileRows,
    /// Narrower tiles are predicted to be faster: they make more CTAs of the same sequences.
    NarrowTiles,
    /// Tiles end where the next sequence would add more pages of its own than it shares, and the stream is long enough to
    /// be cut.
    LongPrivateRuns,
    /// Not packed: reading every sequence by itself is predicted to be faster.
    SharingCosts,
    /// Chunks are fixed, and sequences that share part of one read it each for itself.
    PartsOfChunks,
    /// Not packed: the mode asks for no sharing.
    Mode,
}

/// What is known of a plan's tiles.
pub(super) struct Sharing<'a> {
    pub(super) forest: &'a Forest,
    pub(super) extents: &'a [Extent],
    /// As [`crate::Planner::tiles`].
    pub(super) tiles: &'a [RowTile],
    /// The rule they were cut by.
    pub(super) rule: TilingRule,
    /// Most sequences that a tile can have.
    pub(super) widest: u32,
    pub(super) mode: PlanMode,
    pub(super) page_size: u32,
    /// KV bytes of a page.
    pub(super) page_bytes: u64,
}

impl Sharing<'_> {
    /// The at most `most` kinds of nodes that would save most if each were read once.
    pub(super) fn largest(&self, most: usize) -> Vec<SharedNodes> {
        let uncut = TilingRule { chunk_pages: u32::MAX, ..self.rule };
        let [uncut, widest] =
            [uncut, TilingRule { most_sequences: self.widest, ..uncut }].map(|rule| self.tiles_by(rule));
        let of_node = |node: &Node| {
            let [reads, uncut_reads, fewest_reads] = [self.tiles, &uncut, &widest].map(|tiles| readers(node, tiles));
            let all_reads = u64::from(node.page_count()) * u64::from(node.sequence_count());
            let saved_pages = all_reads - pages_read(node, self.tiles);
            SharedNodes {
                nodes: 1,
                sequences: node.sequence_count(),
                tokens: node.page_count() * self.page_size,
                reads,
                fewest_reads,
                saved_kv_bytes: saved_pages * self.page_bytes,
                reason: self.reason(reads, uncut_reads, fewest_reads),
            }
        };
        let mut kinds: Vec<SharedNodes> = self.forest.nodes().iter().map(of_node).collect();
        kinds.sort_by_key(|node| {
            let at_stake = u64::from(node.tokens) * u64::from(node.sequences - 1);
            (Reverse(at_stake), node.sequences, node.reads, node.fewest_reads, node.reason)
        });
        kinds.dedup_by(|next, kept| {
            let alike = SharedNodes { nodes: kept.nodes, ..*next } == *kept;
            kept.nodes += u32::from(alike);
            alike
        });
        kinds.truncate(most);
        kinds
    }

    fn reason(&self, reads: u32, uncut_reads: u32, fewest_reads: u32) -> ReadReason {
        match self.mode {
            _ if reads == 1 => ReadReason::OneTile,
            PlanMode::Flat => ReadReason::Mode,
            _ if reads <= fewest_reads => ReadReason::TileRows,
            PlanMode::FixedChunk { .. } => ReadReason::PartsOfChunks,
            _ if self.rule.most_sequences == 1 => ReadReason::SharingCosts,
            _ if reads > uncut_reads => ReadReason::LongPrivateRuns,
            _ => ReadReason::NarrowTiles,
        }
    }

    fn tiles_by(&self, rule: TilingRule) -> Vec<RowTile> {
        let mut tiles = Vec::new();
        tiling::cut(self.extents, rule, |tile| tiles.push(tile));
        tiles
    }
}

/// Row tiles ([`crate::Planner::tiles`]) with a sequence of the node: each reads it once. Tiles of fixed chunks may have a
/// part of it: how often it is read in the mean of its pages, rounded up.
pub fn readers(node: &Node, tiles: &[RowTile]) -> u32 {
    pages_read(node, tiles).div_ceil(u64::from(node.page_count())) as u32
}

/// Pages of the node that the tiles read, as often as they do.
fn pages_read(node: &Node, tiles: &[RowTile]) -> u64 {
    let pages = |tile: &RowTile| {
        // The pages of a sequence are at most those of its tile's stream.
        let end = node.page_end.min(tile.page_begin + tile.page_count);
        u64::from(end.saturating_sub(node.page_begin.max(tile.page_begin)))
    };
    let (mut rest, mut read) = (tiles, 0);
    // Tiles are in the order of their first pages, those with the same one in forest order.
    while let Some(&RowTile { page_begin, .. }) = rest.first().filter(|tile| tile.page_begin < node.page_end) {
        let (side_by_side, behind) = rest.split_at(rest.partition_point(|tile| tile.page_begin == page_begin));
        let first = side_by_side.partition_point(|tile| tile.order_end <= node.order_begin);
        read +=
            side_by_side[first..].iter().take_while(|tile| tile.order_begin < node.order_end).map(pages).sum::<u64>();
        rest = behind;
    }
    read
}
