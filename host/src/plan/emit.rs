//! Row tiles to the records of a plan: streams, masks, launch order, slots.

use super::PlanMode;
use super::buffer::{self, Records, StreamRun, Tail};
use super::choice::TileChoice;
use super::forest::Forest;
use super::tiling::{Extent, RowTile};
use crate::tree::PagePart;
use crate::visible::Hidden;
use crate::{AttentionShape, DecodeBatch, Result};
use pat_abi::{DIRECT_SLOT, ItemQuery, LoneTiles, MergeRow, NO_MASKS, NONE, PageMask, TileVariant, WorkItem};
use std::cmp::Reverse;

/// Rows that a warp of a wgmma kernel computes lone tiles for, in an item of `row_count` rows: `wgmma64` shares few rows out.
const fn warp_rows(variant: TileVariant, row_count: u32) -> u32 {
    match row_count {
        ..=16 if matches!(variant, TileVariant::Wgmma64) => 4,
        ..=32 if matches!(variant, TileVariant::Wgmma64) => 8,
        _ => 16,
    }
}

/// Most warps that have rows of one item.
const MAX_WARPS: usize = PageMask::ALL_ROWS.div_ceil(16) as usize;

/// Keys that a warp computes at a time.
const LONE_KEYS: u64 = 32;

/// A run of pages in a stream and the sequences of the tile that read it.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// A sequence (row of the batch) whose block table holds the pages, and where.
    sequence: u32,
    page_begin: u32,
    page_end: u32,
    /// Readers, as positions in the tile.
    reader_begin: u32,
    reader_end: u32,
    /// Whether it ends with the last page of its only reader.
    is_tail: bool,
    /// Its place in the stream of an item whose runs are put into another order.
    place: u64,
}

/// Memory reused between calls.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    runs: Vec<Run>,
    /// Of the runs of a sequence from its deepest page up, the first page and the end of the readers.
    depths: Vec<(u32, u32)>,
    /// Per batch row: partials, then the next free slot.
    slots: Vec<u32>,
}

pub(super) struct Emitter<'a> {
    pub(super) batch: &'a DecodeBatch<'a>,
    pub(super) shape: AttentionShape,
    /// What rows do not see of their pages.
    pub(super) hidden: Hidden<'a>,
    /// Whether kernels ask for the first tokens of pages that have masks.
    pub(super) has_first_tokens: bool,
    pub(super) forest: &'a Forest,
    pub(super) extents: &'a [Extent],
    pub(super) choice: &'a TileChoice,
    pub(super) mode: PlanMode,
    /// Pages that each sequence can get without a new plan.
    pub(super) room: u32,
}

impl Emitter<'_> {
    /// Writes the records of all tiles to `records`, whose former content is dropped.
    ///
    /// # Errors
    /// The plan would have 2^31 items, page ids, masks, queries, slots or bytes, or more.
    pub(super) fn emit(&self, tiles: &[RowTile], scratch: &mut Scratch, records: &mut Records) -> Result<()> {
        // The bulk is known beforehand: a plan that cannot be is not begun.
        let items: u64 = tiles.iter().map(|tile| u64::from(tile.chunks)).sum();
        let pages: u64 = tiles.iter().map(|tile| u64::from(tile.page_count)).sum();
        let pages = pages + u64::from(self.room) * self.extents.len() as u64;
        buffer::checked_count("items", items)?;
        buffer::checked_count("pages", pages)?;
        buffer::checked_count("bytes", items * size_of::<WorkItem>() as u64 + pages * size_of::<u32>() as u64)?;
        records.clear();
        // A sequence adds its private run, and at most one more per sequence that it parts from.
        scratch.runs.clear();
        scratch.runs.reserve(2 * self.choice.widest() as usize);
        scratch.depths.clear();
        scratch.depths.reserve(self.choice.widest() as usize);
        scratch.slots.clear();
        scratch.slots.resize(self.batch.sequence_count(), 0);
        records.tails.resize(self.batch.sequence_count(), Tail::NONE);
        for (index, tile) in (0u32..).zip(tiles) {
            // Shared pages come from L2 and keep the tensor cores busy, private ones come from DRAM: half of the CTAs
            // begin with these, half with those. Every other tile turns the runs of its items around.
            match self.mode {
                PlanMode::FixedChunk { .. } => self.fixed_chunks(index, tile, scratch, records)?,
                _ => self.tile(index, tile, scratch, records)?,
            }
        }
        self.assign_slots(scratch, records)?;
        records.order_items();
        Ok(())
    }

    /// Walks the stream of tile `index` in depth-first order: a node, then what lies below it.
    fn tile(&self, index: u32, tile: &RowTile, scratch: &mut Scratch, records: &mut Records) -> Result<()> {
        let extents = &self.extents[tile.order_begin as usize..tile.order_end as usize];
        let order = &self.forest.order()[tile.order_begin as usize..tile.order_end as usize];
        let count = extents.len() as u32;
        scratch.runs.clear();
        let (mut room, mut chunk) = (tile.chunk_pages, 0);
        for (reader, extent) in (0u32..).zip(extents) {
            // What the sequences before it have not read, from the deepest page up: the further up, the more readers.
            let top = if reader == 0 { 0 } else { extent.shared };
            let mut page_end = extent.pages;
            let mut reader_end = reader + 1;
            let mut shared = u32::MAX;
            scratch.depths.clear();
            while page_end > top {
                shared = if reader_end < count { shared.min(extents[reader_end as usize].shared) } else { 0 };
                if shared < page_end {
                    page_end = shared.max(top);
                    scratch.depths.push((page_end, reader_end));
                }
                reader_end += 1;
            }
            while let Some((page_begin, reader_end)) = scratch.depths.pop() {
                let page_end = scratch.depths.last().map_or(extent.pages, |&(deeper, _)| deeper);
                let is_tail = scratch.depths.is_empty() && reader_end == reader + 1;
                let sequence = order[reader as usize];
                let mut run =
                    Run { sequence, page_begin, page_end, reader_begin: reader, reader_end, is_tail, place: 0 };
                while run.page_begin < run.page_end {
                    let split = run.page_end.min(run.page_begin.saturating_add(room));
                    let is_tail = run.is_tail && split == run.page_end;
                    scratch.runs.push(Run { page_end: split, is_tail, ..run });
                    room -= split - run.page_begin;
                    run.page_begin = split;
                    if room == 0 || (self.mode == PlanMode::PerNode && run.page_begin == run.page_end) {
                        self.item(order, (index, chunk), &mut scratch.runs, &mut scratch.slots, records)?;
                        room = tile.chunk_pages;
                        chunk += 1;
                    }
                }
            }
        }
        if !scratch.runs.is_empty() {
            self.item(order, (index, chunk), &mut scratch.runs, &mut scratch.slots, records)?;
        }
        Ok(())
    }

    /// Cuts tile `index`, all of whose sequences read all of it, into chunks of one length.
    fn fixed_chunks(&self, index: u32, tile: &RowTile, scratch: &mut Scratch, records: &mut Records) -> Result<()> {
        let order = &self.forest.order()[tile.order_begin as usize..tile.order_end as usize];
        let (sequence, reader_end) = (order[0], tile.sequence_count());
        // Its own last page is no other's.
        let own_end = if reader_end == 1 { self.extents[tile.order_begin as usize].pages } else { u32::MAX };
        let end = tile.page_begin + tile.page_count;
        let mut page_begin = tile.page_begin;
        while page_begin < end {
            let page_end = page_begin.saturating_add(tile.chunk_pages).min(end);
            let is_tail = page_end == own_end;
            scratch.runs.push(Run { sequence, page_begin, page_end, reader_begin: 0, reader_end, is_tail, place: 0 });
            let chunk = page_begin / tile.chunk_pages;
            self.item(order, (index, chunk), &mut scratch.runs, &mut scratch.slots, records)?;
            page_begin = page_end;
        }
        Ok(())
    }

    /// Writes a chunk of a tile's stream, given by their numbers, as an item, and empties `runs`. `order` are the tile's
    /// sequences.
    fn item(
        &self,
        order: &[u32],
        (tile, chunk): (u32, u32),
        runs: &mut Vec<Run>,
        partials: &mut [u32],
        records: &mut Records,
    ) -> Result<()> {
        let (sequence_rows, page_size) = (self.choice.sequence_rows(), self.batch.page_size());
        let query_begin = buffer::checked_count("queries", records.queries.len() as u64)?;
        // By position in the tile, of at most 128 sequences: how many runs more a sequence reads than the one before it.
        let mut change = [0i16; 129];
        for run in runs.iter() {
            change[run.reader_begin as usize] += 1;
            change[run.reader_end as usize] -= 1;
        }
        // Likewise, the rows before it: those that read none have no row.
        let mut first_row = [0u8; 129];
        let (mut read, mut row_count) = (0, 0);
        for (position, &sequence) in order.iter().enumerate() {
            first_row[position] = row_count as u8;
            read += change[position];
            if read > 0 {
                records.queries.push(ItemQuery { query_token: sequence, slot: DIRECT_SLOT });
                partials[sequence as usize] += 1;
                row_count += sequence_rows;
            }
        }
        first_row[order.len()] = row_count as u8;
        let first_row = |reader: u32| u32::from(first_row[reader as usize]);
        let rows_of = |run: &Run| (first_row(run.reader_begin), first_row(run.reader_end));

        let is_cut = |run: &Run| self.hidden_tokens(run) > 0 || self.parts(run).next().is_some();
        let uniform = !runs.iter().any(is_cut) && runs.iter().all(|run| rows_of(run) == (0, row_count));
        let variant = self.choice.variant(row_count / sequence_rows);
        let is_turned = tile % 2 == 1 && !uniform;
        // Bits of fixed chunks do not depend on what else an item holds.
        let has_lone_tiles = !uniform
            && !matches!(self.mode, PlanMode::FixedChunk { .. })
            && variant.has_lone_tiles(self.shape.kv_dtype(), self.shape.head_dim());
        let lone_tiles = if !has_lone_tiles {
            LoneTiles::NONE
        } else {
            // Two consumers have no registers for lone tiles in front.
            let warp_rows = warp_rows(variant, row_count);
            self.lone_tiles(runs, rows_of, (variant, warp_rows), is_turned && variant == TileVariant::Wgmma64)
        };
        if is_turned && lone_tiles == LoneTiles::NONE {
            runs.reverse();
        }
        let page_begin = records.page_count;
        let mask_begin = if uniform { NO_MASKS } else { records.mask_count };
        let (mut tails, mut last_page_tokens) = (0, page_size);
        for run in runs.iter() {
            last_page_tokens = self.tokens_of_last_page(run);
            let masks = (!uniform).then(|| {
                let rows = match rows_of(run) {
                    (0, end) if end == row_count => (0, PageMask::ALL_ROWS),
                    part => part,
                };
                [PageMask::new(rows, last_page_tokens), PageMask::new(rows, page_size)]
            });
            let Run { sequence, page_begin, page_end, .. } = *run;
            records.push_run(StreamRun { sequence, page_begin, page_end, masks });
            if run.is_tail {
                tails += 1;
                let mask = if uniform { NO_MASKS } else { records.mask_count - 1 };
                records.tails[sequence as usize] = Tail { item: records.items.len() as u32, mask, tile };
            }
        }
        let page_count = records.page_count - page_begin;
        let mut token_count = u64::from(page_count) * u64::from(page_size);
        if uniform {
            // Only a sequence's own last page is partial, so only the last one here can be.
            token_count -= u64::from(page_size - last_page_tokens);
        }
        let room = tails * self.room;
        if room > 0 {
            let masks = (!uniform).then_some([PageMask::new((0, 0), 1); 2]);
            records.push_run(StreamRun { sequence: NONE, page_begin: 0, page_end: room, masks });
        }
        let token_count = buffer::checked_count("tokens of an item", token_count)?;
        buffer::checked_count(
            "keys of an item",
            u64::from(page_count + room) * u64::from(variant.page_keys(page_size)),
        )?;
        let (mut first_token_begin, kv_limit_begin) = (NONE, NONE);
        // Kernels that are compiled for windows ask for those of every item that has masks, by the place of its masks.
        if !uniform && self.has_first_tokens {
            first_token_begin = mask_begin;
            for run in runs.iter() {
                let begin = records.words.len();
                records.words.push(self.hidden_tokens(run));
                records.words.extend((run.page_begin + 1..run.page_end).map(|_| 0));
                for (entry, part) in self.parts(run) {
                    records.words[begin + entry] = part.first_token;
                }
            }
        }
        let item = WorkItem {
            page_begin,
            token_count,
            query_begin,
            row_count,
            mask_begin,
            first_token_begin,
            kv_limit_begin,
            run_pages: 0,
            lone_tiles,
        };
        records.push_item((variant, page_count, chunk), item, room);
        buffer::checked_count("items", records.items.len() as u64)?;
        runs.clear();
        Ok(())
    }

    /// Puts the runs that the rows of one warp attend to behind the others, or in front of them where the stream `is_turned`, if
    /// warps then compute enough of them side by side: of each warp in turn. Says which tiles these are.
    fn lone_tiles(
        &self,
        runs: &mut Vec<Run>,
        rows_of: impl Fn(&Run) -> (u32, u32),
        (variant, warp_rows): (TileVariant, u32),
        is_turned: bool,
    ) -> LoneTiles {
        let page_keys = u64::from(variant.page_keys(self.batch.page_size()));
        let keys_of = |run: &Run| u64::from(run.page_end - run.page_begin) * page_keys;
        let warp_of = |run: &Run| {
            let (begin, end) = rows_of(run);
            (begin / warp_rows == (end - 1) / warp_rows).then_some((begin / warp_rows) as usize)
        };
        let mut of_warps = [0; MAX_WARPS];
        let mut all_keys = 0;
        for run in runs.iter() {
            all_keys += keys_of(run);
            if let Some(keys) = warp_of(run).and_then(|warp| of_warps.get_mut(warp)) {
                *keys += keys_of(run);
            }
        }
        let lone_keys: u64 = of_warps.iter().sum();
        let longest = of_warps.iter().copied().max().unwrap_or(0);
        let tile_keys = u64::from(self.choice.keys(variant));
        if lone_keys < 2 * tile_keys || longest * 5 > lone_keys * 2 {
            return LoneTiles::NONE;
        }
        // A long run would keep the others waiting.
        let piece = (LONE_KEYS / page_keys).max(1) as u32;
        for index in 0..runs.len() {
            let run = runs[index];
            if warp_of(&run).is_some() && run.page_end - run.page_begin > piece {
                let mut end = run.page_begin + piece;
                runs[index] = Run { page_end: end, is_tail: false, ..run };
                while end < run.page_end {
                    let begin = end;
                    end = (begin + piece).min(run.page_end);
                    let is_tail = run.is_tail && end == run.page_end;
                    runs.push(Run { page_begin: begin, page_end: end, is_tail, ..run });
                }
            }
        }
        const LONE: u64 = 1 << 63;
        let mut placed = [0; MAX_WARPS];
        for (index, run) in (0u64..).zip(runs.iter_mut()) {
            run.place = match warp_of(run) {
                Some(warp) => {
                    let before = placed[warp];
                    placed[warp] += keys_of(run);
                    (if is_turned { 0 } else { LONE }) | before << 8 | warp as u64
                }
                None => (if is_turned { LONE } else { 0 }) | index,
            };
        }
        runs.sort_unstable_by_key(|run| run.place);
        if is_turned {
            LoneTiles::first((lone_keys / tile_keys) as u32)
        } else {
            LoneTiles::from(((all_keys - lone_keys).div_ceil(tile_keys)).max(1) as u32)
        }
    }

    /// Tokens at the front of a run's first page that its readers do not attend to: all of them the same.
    fn hidden_tokens(&self, run: &Run) -> u32 {
        if run.page_begin > 0 { 0 } else { self.hidden.first_tokens.get(run.sequence as usize).copied().unwrap_or(0) }
    }

    /// Page ids of a run; some may stand for parts of pages.
    fn page_ids(&self, run: &Run) -> &[u32] {
        &self.batch.first_pages(run.sequence as usize, run.page_end as usize)[run.page_begin as usize..]
    }

    /// Of a run's pages those that its readers see parts of, by their places in the run.
    fn parts(&self, run: &Run) -> impl Iterator<Item = (usize, PagePart)> {
        // Mostly there are none anywhere.
        let ids = if self.hidden.parts.is_empty() { &[] } else { self.page_ids(run) };
        let part = |(entry, &id): (usize, &u32)| Some((entry, self.hidden.part(self.batch.num_pages(), id)?));
        ids.iter().enumerate().filter_map(part)
    }

    fn tokens_of_last_page(&self, run: &Run) -> u32 {
        let page_size = self.batch.page_size();
        let end = u64::from(run.page_end) * u64::from(page_size);
        let missing = end.saturating_sub(u64::from(self.batch.length(run.sequence as usize)));
        page_size - missing as u32
    }

    /// Sequences with one partial are written directly; those with none (empty) or several are the merge's.
    fn assign_slots(&self, scratch: &mut Scratch, records: &mut Records) -> Result<()> {
        let mut slots = 0u64;
        for (sequence, entry) in (0u32..).zip(&mut scratch.slots) {
            let slot_count = std::mem::replace(entry, DIRECT_SLOT);
            if slot_count == 1 {
                continue;
            }
            let slot_begin = if slot_count == 0 { 0 } else { buffer::checked_count("slots", slots)? };
            *entry = slot_begin;
            records.merges.push(MergeRow { sequence, slot_begin, slot_count, reserved: 0 });
            slots += u64::from(slot_count);
        }
        records.slot_count = buffer::checked_count("slots", slots)?;
        // Rows are dealt out in turn: what takes longest begins first.
        records.merges.sort_unstable_by_key(|row| (Reverse(row.slot_count), row.sequence));
        for query in &mut records.queries {
            let next = &mut scratch.slots[query.query_token as usize];
            query.slot = *next;
            if *next != DIRECT_SLOT {
                *next += 1;
            }
        }
        Ok(())
    }
}
