//! Who is served together, kept from step to step: sequences leave their row tiles and join others, the rest stays.

use super::choice::TileChoice;
use super::forest::{Forest, common_prefix};
use super::snapshot::Snapshot;
use super::tiling::{Chunks, Extent, RowTile, TilingRule};
use crate::DecodeBatch;

/// The row tiles of the newest plan, by sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct KeptTiles {
    /// By position in [`Forest::order`], the number of the tile.
    tile_of: Vec<u32>,
    /// By number.
    tiles: Vec<KeptTile>,
    /// By position, the page by which a sequence parts from the one before it: the first full one that the two do not share, or
    /// [`NO_PAGE`]. Empty while no sequence has joined or left.
    parting: Vec<u32>,
    /// By position in the order, the leading full pages that a sequence shares with the one that joins.
    shared: Vec<u32>,
}

/// Page ids are below it.
const NO_PAGE: u32 = u32::MAX;

/// What is to be looked up.
const STALE: u32 = u32::MAX - 1;

#[derive(Clone, Copy, Debug, Default)]
struct KeptTile {
    /// Into how many chunks its stream is cut; `None` before that is settled.
    chunks: Option<u32>,
    sequences: u32,
    /// Pages of its stream.
    pages: u32,
    /// Pages that all of its sequences share.
    common: u32,
}

impl KeptTile {
    /// With the next sequence of the order.
    fn with(self, extent: Extent) -> Self {
        let is_first = self.sequences == 0;
        Self {
            sequences: self.sequences + 1,
            pages: self.pages + extent.pages - if is_first { 0 } else { extent.shared },
            common: if is_first { extent.pages } else { self.common.min(extent.shared) },
            ..self
        }
    }
}

/// Where a sequence joins.
#[derive(Clone, Copy, Debug)]
struct Place {
    position: usize,
    /// `None`: a tile of its own.
    tile: Option<u32>,
}

impl KeptTiles {
    /// Takes the tiles of a plan.
    pub(super) fn take(&mut self, tiles: &[RowTile]) {
        self.parting.clear();
        self.number(tiles);
    }

    fn number(&mut self, tiles: &[RowTile]) {
        self.tile_of.clear();
        self.tiles.clear();
        for (number, tile) in (0u32..).zip(tiles) {
            self.tile_of.extend((0..tile.sequence_count()).map(|_| number));
            self.tiles.push(KeptTile { chunks: Some(tile.chunks), ..KeptTile::default() });
        }
    }

    /// Lets the sequences leave and join that the snapshot of `batch` names, those that do both with other pages. What
    /// stays keeps its order. `rule` is how the tiles were cut. Returns how many pages of their own these sequences had and have.
    pub(super) fn change_sequences(
        &mut self,
        batch: &DecodeBatch<'_>,
        snapshot: &mut Snapshot,
        forest: &mut Forest,
        extents: &mut Vec<Extent>,
        rule: TilingRule,
    ) -> u64 {
        let mut moved_pages = 0;
        // Of rows that have changed, those before it are of no use; they leave.
        let parting = |row: u32, shared: u32| {
            let full_pages = batch.length(row as usize) / batch.page_size();
            if shared < full_pages {
                batch.first_pages(row as usize, shared as usize + 1)[shared as usize]
            } else {
                NO_PAGE
            }
        };
        let is_known = !self.parting.is_empty();
        for &row in snapshot.left() {
            let order = forest.order_mut();
            let position = order.iter().position(|&other| other == row).expect("a row that was planned");
            order.remove(position);
            self.tile_of.remove(position);
            let Extent { shared, pages } = extents.remove(position);
            moved_pages += u64::from(pages - shared);
            if is_known {
                self.parting.remove(position);
            }
            if let Some(next) = extents.get_mut(position)
                && shared < next.shared
            {
                next.shared = shared;
                if is_known {
                    self.parting[position] = STALE;
                }
            }
        }
        forest.order_mut().iter_mut().for_each(|row| *row = snapshot.row_now(*row));
        if !is_known {
            self.parting.resize(extents.len(), STALE);
        }
        for ((page, extent), &row) in self.parting.iter_mut().zip(&*extents).zip(forest.order()) {
            if *page == STALE {
                *page = parting(row, extent.shared);
            }
        }
        snapshot.measure(forest, extents);
        self.tiles.iter_mut().for_each(|tile| *tile = KeptTile { chunks: tile.chunks, ..KeptTile::default() });
        for (extent, &tile) in extents.iter().zip(&self.tile_of) {
            let tile = &mut self.tiles[tile as usize];
            *tile = tile.with(*extent);
        }
        for index in 0..snapshot.joined().len() {
            let row = snapshot.joined()[index];
            let pages = batch.pages(row as usize);
            let full_pages = batch.length(row as usize) / batch.page_size();
            self.compare(batch, &pages[..full_pages as usize], forest.order(), extents);
            let Place { position, tile } = self.place(pages.len() as u32, extents, rule);
            let shared_before = position.checked_sub(1).map_or(0, |before| self.shared[before]);
            let extent = Extent { pages: pages.len() as u32, shared: shared_before };
            let tile = tile.unwrap_or_else(|| {
                self.tiles.push(KeptTile::default());
                self.tiles.len() as u32 - 1
            });
            if let Some(next) = extents.get_mut(position) {
                next.shared = self.shared[position];
                self.parting[position] = parting(forest.order()[position], next.shared);
                snapshot.raise_shared(forest.order()[position], next.shared);
                snapshot.raise_shared(row, next.shared);
            }
            if position > 0 {
                snapshot.raise_shared(forest.order()[position - 1], shared_before);
                snapshot.raise_shared(row, shared_before);
            }
            moved_pages += u64::from(extent.pages - extent.shared);
            forest.order_mut().insert(position, row);
            extents.insert(position, extent);
            self.parting.insert(position, parting(row, shared_before));
            self.tile_of.insert(position, tile);
            let tile = &mut self.tiles[tile as usize];
            *tile = tile.with(extent);
        }
        forest.find_nodes(batch.sequence_count(), extents.iter().map(|extent| extent.shared));
        moved_pages
    }

    /// Finds what every sequence shares with one that has these full pages.
    fn compare(&mut self, batch: &DecodeBatch<'_>, full_pages: &[u32], order: &[u32], extents: &[Extent]) {
        self.shared.clear();
        let mut shared = 0;
        for ((extent, &row), &parting) in extents.iter().zip(order).zip(&self.parting) {
            if extent.shared <= shared {
                shared = extent.shared;
                if full_pages.get(shared as usize) == Some(&parting) {
                    let row = row as usize;
                    let others = batch.first_pages(row, (batch.length(row) / batch.page_size()) as usize);
                    shared += common_prefix(&full_pages[shared as usize..], &others[shared as usize..]) as u32;
                }
            }
            self.shared.push(shared);
        }
    }

    /// The place of a sequence of `pages` pages that shares [`Self::shared`]: among those that share most with it, in the tile
    /// with the shortest stream that the rule lets it join.
    fn place(&self, pages: u32, extents: &[Extent], rule: TilingRule) -> Place {
        let most_shared = self.shared.iter().copied().max().unwrap_or(0);
        let begin = self.shared.iter().position(|&shared| shared == most_shared).unwrap_or(0);
        let end = self.shared.iter().rposition(|&shared| shared == most_shared).map_or(0, |last| last + 1);
        let added_pages = pages - most_shared;
        let may_join = |tile: KeptTile| {
            let unshared = tile.pages + added_pages - tile.common.min(most_shared);
            tile.sequences < rule.most_sequences && (unshared <= rule.chunk_pages || most_shared > added_pages)
        };
        let mut place = Place { position: end, tile: None };
        let (mut least_pages, mut is_between) = (u32::MAX, false);
        for position in begin..=end {
            // Not between sequences that share more with each other.
            let is_inside = position > begin && position < end;
            if is_inside && extents.get(position).is_some_and(|extent| extent.shared > most_shared) {
                continue;
            }
            let [before, behind] =
                [position.checked_sub(1), Some(position)].map(|at| at.and_then(|at| self.tile_of.get(at)).copied());
            if before != behind && !is_between && place.tile.is_none() {
                (place.position, is_between) = (position, true);
            }
            // Of the two, those among which it shares most.
            let tiles = [before.filter(|_| position > begin), behind.filter(|_| position < end)];
            for number in tiles.into_iter().flatten() {
                let tile = self.tiles[number as usize];
                if tile.pages < least_pages && may_join(tile) {
                    least_pages = tile.pages;
                    place = Place { position, tile: Some(number) };
                }
            }
        }
        place
    }

    /// The tiles of the sequences as they are: `choice` and `rule` are those by which they were cut.
    pub(super) fn tiles(
        &mut self,
        extents: &[Extent],
        choice: &TileChoice,
        rule: TilingRule,
        tiles: &mut Vec<RowTile>,
    ) {
        tiles.clear();
        let mut begin = 0;
        for same in self.tile_of.chunk_by(|a, b| a == b) {
            let end = begin + same.len();
            let sum = extents[begin..end].iter().fold(KeptTile::default(), |tile, extent| tile.with(*extent));
            let key_tile_pages = choice.key_tile_pages(choice.variant(sum.sequences));
            let chunks = match self.tiles[same[0] as usize].chunks {
                Some(1) => Chunks { pages: sum.pages, count: 1 },
                Some(count) => {
                    let pages = sum.pages.div_ceil(count).next_multiple_of(key_tile_pages);
                    Chunks { pages, count: sum.pages.div_ceil(pages) }
                }
                None => rule.chunks(sum.pages, key_tile_pages),
            };
            tiles.push(RowTile {
                order_begin: begin as u32,
                order_end: end as u32,
                page_begin: 0,
                page_count: sum.pages,
                common_pages: sum.common,
                chunk_pages: chunks.pages,
                chunks: chunks.count,
            });
            begin = end;
        }
        self.number(tiles);
    }
}
