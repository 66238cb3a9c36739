//! The plan buffer: assembly of the records into one contiguous allocation, and read access to them.

use super::PlanGeneration;
use super::cost::Prediction;
use crate::visible::Hidden;
use crate::{AttentionShape, DecodeBatch, DeviceProfile, Error, Problem, Result};
use pat_abi::{
    ItemQuery, MAX_TILE_VARIANTS, MergeRow, NO_MASKS, NONE, PLAN_MAGIC, PageMask, PlanHeader, RUN_PAGES, TileVariant,
    VariantItems, WorkItem,
};
use std::fmt;
use std::sync::Arc;

/// The records of a plan before assembly. Kept from plan to plan for the memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub(super) items: Vec<PendingItem>,
    /// Launch order: key, index in `items`.
    order: Vec<(LaunchKey, u32)>,
    /// Queries of the items.
    pub(super) queries: Vec<ItemQuery>,
    /// The items' streams, one after the other: a long run of small pages is copied once, from the block table into the plan.
    pub(super) runs: Vec<StreamRun>,
    /// Page ids of all runs.
    pub(super) page_count: u32,
    /// Sequences the merge kernel writes.
    pub(super) merges: Vec<MergeRow>,
    /// Page masks of the runs that have any.
    pub(super) mask_count: u32,
    /// First tokens of the pages of the items that have any.
    pub(super) words: Vec<u32>,
    /// Partial slots in all.
    pub(super) slot_count: u32,
    /// By batch row, where the tokens of the sequence's last page are counted.
    pub(super) tails: Vec<Tail>,
    /// By item of the plan, pages that can be appended to its stream.
    room: Vec<u32>,
    /// By index in `items`, the item's place in the plan.
    places: Vec<u32>,
}

/// A run of pages in an item's stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamRun {
    /// A row of the batch whose block table holds the pages; [`NONE`] where it is room for others.
    pub(super) sequence: u32,
    /// First page in the block table.
    pub(super) page_begin: u32,
    /// End of the pages.
    pub(super) page_end: u32,
    /// Masks of the last page and of those before it, where the item has masks.
    pub(super) masks: Option<[PageMask; 2]>,
}

/// Where an item stands in the launch order: by variant, longest first, so that what is left at the end is short. Of equally
/// long ones, the same chunks of different tiles stand together, which are served at the same time: they hold the same shared
/// pages, and a node larger than L2 is read from DRAM once, not once per tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LaunchKey(u64);

impl LaunchKey {
    const VARIANT_BITS: u32 = MAX_TILE_VARIANTS.ilog2();
    const CHUNK_BITS: u32 = 32 - Self::VARIANT_BITS;

    /// From the 2^28-th on, chunks are not told apart.
    fn new(variant: TileVariant, page_count: u32, chunk: u32) -> Self {
        const { assert!(TileVariant::ALL.len() <= MAX_TILE_VARIANTS && MAX_TILE_VARIANTS == 1 << Self::VARIANT_BITS) };
        let shortness = u64::from(u32::MAX - page_count);
        let chunk = u64::from(chunk.min((1 << Self::CHUNK_BITS) - 1));
        Self((variant.index() as u64) << (64 - Self::VARIANT_BITS) | shortness << Self::CHUNK_BITS | chunk)
    }

    fn variant_index(self) -> usize {
        (self.0 >> (64 - Self::VARIANT_BITS)) as usize
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PendingItem {
    item: WorkItem,
    room: u32,
}

/// Where the tokens of a sequence's last page are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    /// The item whose stream has the page: its index in [`Records::items`], once these are in order its place in the plan.
    /// [`NONE`] where no record counts the tokens alone: the sequence is empty or shares its last page.
    pub(super) item: u32,
    /// The page's mask, or [`NO_MASKS`] where the item has none.
    pub(super) mask: u32,
    /// The row tile that the item is of.
    pub(super) tile: u32,
}

impl Tail {
    pub(super) const NONE: Self = Self { item: NONE, mask: NO_MASKS, tile: NONE };
}

/// What a step adds to a sequence whose last page is its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Growth<'a> {
    /// Row of the batch.
    pub(super) row: u32,
    /// Tokens more, or fewer.
    pub(super) tokens: i32,
    /// Tokens of its last page, from now on.
    pub(super) last_page_tokens: u32,
    /// Pages more.
    pub(super) pages: &'a [u32],
}

/// Tokens of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenCounts {
    /// Of all rows together.
    pub(super) logical: u64,
    /// Of these, those beyond the distinct ones: only full pages, and parts of pages that rows see alike, are shared.
    pub(super) repeated: u64,
}

impl Records {
    /// Drops the records, keeps the memory.
    pub(super) fn clear(&mut self) {
        let Self {
            items,
            order,
            queries,
            runs,
            page_count,
            merges,
            mask_count,
            words,
            slot_count,
            tails,
            room,
            places,
        } = self;
        items.clear();
        order.clear();
        queries.clear();
        runs.clear();
        merges.clear();
        words.clear();
        tails.clear();
        room.clear();
        places.clear();
        (*page_count, *mask_count, *slot_count) = (0, 0, 0);
    }

    /// Adds a run to the stream of the next item, which has masks where its other runs do.
    pub(super) fn push_run(&mut self, run: StreamRun) {
        let pages = run.page_end - run.page_begin;
        self.page_count += pages;
        self.mask_count += if run.masks.is_some() { pages } else { 0 };
        self.runs.push(run);
    }

    /// `chunk` is which of its tile's chunks the item is, `room` how many pages can be appended to its stream.
    pub(super) fn push_item(
        &mut self,
        (variant, page_count, chunk): (TileVariant, u32, u32),
        item: WorkItem,
        room: u32,
    ) {
        self.order.push((LaunchKey::new(variant, page_count, chunk), self.items.len() as u32));
        self.items.push(PendingItem { item, room });
    }

    /// Writes the page ids and masks of the streams, exactly as many as there are.
    fn write_streams(
        &self,
        (batch, hidden): (&DecodeBatch<'_>, Hidden<'_>),
        mut page_ids: &mut [u32],
        mut page_masks: &mut [PageMask],
    ) {
        for &StreamRun { sequence, page_begin, page_end, masks } in &self.runs {
            let count = (page_end - page_begin) as usize;
            let ids = page_ids.split_off_mut(..count).unwrap_or_default();
            if sequence == NONE {
                ids.fill(0);
            } else {
                ids.copy_from_slice(&batch.first_pages(sequence as usize, page_end as usize)[page_begin as usize..]);
            }
            if let Some([last, others]) = masks
                && let Some(of_run) = page_masks.split_off_mut(..count)
                && let Some((last_mask, other_masks)) = of_run.split_last_mut()
            {
                other_masks.fill(others);
                *last_mask = last;
                if !hidden.parts.is_empty() {
                    // An item with parts of pages has masks.
                    for (id, mask) in ids.iter_mut().zip(of_run) {
                        if let Some(part) = hidden.part(batch.num_pages(), *id) {
                            *id = part.page;
                            *mask = PageMask::new((mask.row_begin(), mask.row_end()), part.token_end);
                        }
                    }
                }
            }
        }
    }

    /// Settles the launch order.
    pub(super) fn order_items(&mut self) {
        self.order.sort_unstable();
        self.places.resize(self.items.len(), 0);
        self.room.reserve(self.items.len());
        for (place, &(_, index)) in (0u32..).zip(&self.order) {
            self.places[index as usize] = place;
            self.room.push(self.items[index as usize].room);
        }
        for tail in self.tails.iter_mut().filter(|tail| tail.item != NONE) {
            tail.item = self.places[tail.item as usize];
        }
    }

    /// Takes the room that `pages` more pages of a sequence need; `false` where there is none.
    pub(super) fn take_room(&mut self, row: u32, pages: u32) -> bool {
        let Some(room) = self.room.get_mut(self.tails[row as usize].item as usize) else { return false };
        let left = room.checked_sub(pages);
        *room = left.unwrap_or(0);
        left.is_some()
    }
}

/// A plan: one POD buffer (uploaded with one copy) and what it was made for. Plans are equal when all of that is; their
/// generations are not compared.
#[derive(Clone)]
pub struct Plan {
    generation: PlanGeneration,
    /// 16-byte units, so that the records are aligned.
    words: Vec<[u64; 2]>,
    problem: Problem,
    profile: Arc<DeviceProfile>,
    num_pages: u32,
    logical_tokens: u64,
    unique_kv_bytes: u64,
    prediction: Prediction,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The records are many; the header counts them.
        f.debug_struct("Plan")
            .field("generation", &self.generation)
            .field("problem", &self.problem)
            .field("profile", &self.profile.name)
            .field("num_pages", &self.num_pages)
            .field("logical_tokens", &self.logical_tokens)
            .field("header", &(!self.words.is_empty()).then(|| self.header()))
            .field("prediction", &self.prediction)
            .finish_non_exhaustive()
    }
}

impl PartialEq for Plan {
    fn eq(&self, other: &Self) -> bool {
        let Self { generation: _, words, problem, profile, num_pages, logical_tokens, unique_kv_bytes, prediction } =
            self;
        *words == other.words
            && *problem == other.problem
            && *profile == other.profile
            && *num_pages == other.num_pages
            && *logical_tokens == other.logical_tokens
            && *unique_kv_bytes == other.unique_kv_bytes
            && *prediction == other.prediction
    }
}

/// Where the items of plans for pages of so many tokens begin: those of one token have a second header in front of them.
pub(super) fn items_offset(page_size: u32) -> usize {
    let runs_header = if page_size == 1 { PlanHeader::RUNS_OFFSET_BYTES } else { 0 };
    (PlanHeader::ITEMS_OFFSET_BYTES + runs_header) as usize
}

/// The index of the first item, as headers count.
pub(super) fn first_item(page_size: u32) -> u32 {
    ((items_offset(page_size) - PlanHeader::ITEMS_OFFSET_BYTES as usize) / size_of::<WorkItem>()) as u32
}

/// Writes the header of a plan, and the second one where there is one: `in_runs` are the variants' items in runs, as the first
/// header counts.
pub(super) fn write_headers(bytes: &mut [u8], header: &PlanHeader, in_runs: [VariantItems; MAX_TILE_VARIANTS]) {
    let (first, behind) = bytes.split_at_mut(size_of::<PlanHeader>());
    first.copy_from_slice(bytemuck::bytes_of(header));
    if header.page_size != 1 {
        return;
    }
    let skipped = PlanHeader::RUNS_OFFSET_BYTES;
    let items = skipped / size_of::<WorkItem>() as u32;
    let of_runs = PlanHeader {
        total_bytes: header.total_bytes - skipped,
        queries_offset_bytes: header.queries_offset_bytes - skipped,
        pages_offset_bytes: header.pages_offset_bytes - skipped,
        masks_offset_bytes: header.masks_offset_bytes - skipped,
        merges_offset_bytes: header.merges_offset_bytes - skipped,
        words_offset_bytes: header.words_offset_bytes - skipped,
        item_count: in_runs.iter().map(|variant| variant.count).sum(),
        page_size: RUN_PAGES,
        variants: in_runs.map(|VariantItems { begin, count }| VariantItems { begin: begin.max(items) - items, count }),
        // The first header's launches and merge serve all rows.
        merge_count: 0,
        ..*header
    };
    behind[..size_of::<PlanHeader>()].copy_from_slice(bytemuck::bytes_of(&of_runs));
}

/// A count that fits a plan record.
pub(super) fn checked_count(what: &str, n: u64) -> Result<u32> {
    u32::try_from(n)
        .ok()
        .filter(|&n| n < 1 << 31)
        .ok_or_else(|| Error::invalid(format!("plan {what}"), n, "fewer than 2^31"))
}

impl Plan {
    /// A plan that nothing has been written to.
    pub(super) fn empty(problem: Problem, profile: Arc<DeviceProfile>) -> Self {
        Self {
            generation: PlanGeneration::next(),
            words: Vec::new(),
            problem,
            profile,
            num_pages: 0,
            logical_tokens: 0,
            unique_kv_bytes: 0,
            prediction: Prediction::default(),
        }
    }

    /// Makes this the plan of `records`. Allocates only where it grows.
    ///
    /// # Errors
    /// An offset or count does not fit its record; the plan is as before.
    pub(super) fn write(
        &mut self,
        problem: Problem,
        profile: &Arc<DeviceProfile>,
        (batch, hidden): (&DecodeBatch<'_>, Hidden<'_>),
        records: &Records,
        tokens: TokenCounts,
        prediction: Prediction,
    ) -> Result<()> {
        let count = |what: &str, n: usize| checked_count(what, n as u64);
        let item_count = count("items", records.items.len())?;
        // Work is counted so on the device and by the CPU executor.
        checked_count("items times KV heads", u64::from(item_count) * u64::from(problem.shape().kv_heads()))?;
        let align = |bytes: usize| bytes.next_multiple_of(16);
        let items_offset = items_offset(batch.page_size());
        let items_end = items_offset + item_count as usize * size_of::<WorkItem>();
        let queries_offset = align(items_end);
        let pages_offset = align(queries_offset + size_of_val(records.queries.as_slice()));
        let pages_end = pages_offset + records.page_count as usize * size_of::<u32>();
        let merges_offset = align(pages_end);
        let masks_offset = align(merges_offset + size_of_val(records.merges.as_slice()));
        let masks_end = masks_offset + records.mask_count as usize * size_of::<PageMask>();
        let words_offset = align(masks_end);
        let total_bytes = align(words_offset + size_of_val(records.words.as_slice()));
        count("bytes", total_bytes)?;
        let mut header = PlanHeader {
            magic: PLAN_MAGIC,
            total_bytes: total_bytes as u32,
            sequence_count: count("sequences", batch.sequence_count())?,
            item_count,
            query_count: count("queries", records.queries.len())?,
            page_count: records.page_count,
            merge_count: count("merge rows", records.merges.len())?,
            slot_count: records.slot_count,
            queries_offset_bytes: queries_offset as u32,
            pages_offset_bytes: pages_offset as u32,
            merges_offset_bytes: merges_offset as u32,
            page_size: batch.page_size(),
            masks_offset_bytes: masks_offset as u32,
            mask_count: records.mask_count,
            words_offset_bytes: words_offset as u32,
            word_count: count("first tokens", records.words.len())?,
            variants: [VariantItems::default(); MAX_TILE_VARIANTS],
        };
        for &(key, _) in &records.order {
            header.variants[key.variant_index()].count += 1;
        }
        let mut begin = first_item(batch.page_size());
        for variant in &mut header.variants {
            variant.begin = begin;
            begin += variant.count;
        }
        self.resize(total_bytes);
        let bytes = self.bytes_mut();
        write_headers(bytes, &header, [VariantItems::default(); MAX_TILE_VARIANTS]);
        let items: &mut [WorkItem] = bytemuck::cast_slice_mut(&mut bytes[items_offset..items_end]);
        for (item, &(_, index)) in items.iter_mut().zip(&records.order) {
            *item = records.items[index as usize].item;
        }
        for (offset, end, source) in [
            (queries_offset, pages_offset, bytemuck::cast_slice::<_, u8>(&records.queries)),
            (merges_offset, masks_offset, bytemuck::cast_slice(&records.merges)),
            (words_offset, total_bytes, bytemuck::cast_slice(&records.words)),
        ] {
            let (data, padding) = bytes[offset..end].split_at_mut(source.len());
            data.copy_from_slice(source);
            padding.fill(0);
        }
        let (front, back) = bytes.split_at_mut(masks_offset);
        front[pages_end..merges_offset].fill(0);
        back[masks_end - masks_offset..words_offset - masks_offset].fill(0);
        records.write_streams(
            (batch, hidden),
            bytemuck::cast_slice_mut(&mut front[pages_offset..pages_end]),
            bytemuck::cast_slice_mut(&mut back[..masks_end - masks_offset]),
        );
        self.generation = PlanGeneration::next();
        self.problem = problem;
        self.profile.clone_from(profile);
        self.num_pages = batch.num_pages();
        self.logical_tokens = tokens.logical;
        self.unique_kv_bytes = (tokens.logical - tokens.repeated) * self.shape().kv_bytes_per_token();
        self.prediction = prediction;
        Ok(())
    }

    /// Makes room for so many bytes, a multiple of 16.
    pub(super) fn resize(&mut self, total_bytes: usize) {
        if self.words.capacity() == 0 {
            // Fresh memory is zero already.
            self.words = vec![[0; 2]; total_bytes / 16];
        } else {
            self.words.resize(total_bytes / 16, [0; 2]);
        }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// Settles what it is a plan of, where its records are written: of the batches of `parts` together.
    pub(super) fn take_over(
        &mut self,
        (problem, profile): (Problem, &Arc<DeviceProfile>),
        num_pages: u32,
        parts: [&Self; 2],
        prediction: Prediction,
    ) {
        self.generation = PlanGeneration::next();
        self.problem = problem;
        self.profile.clone_from(profile);
        self.num_pages = num_pages;
        self.logical_tokens = parts.iter().map(|part| part.logical_tokens).sum();
        self.unique_kv_bytes = parts.iter().map(|part| part.unique_kv_bytes).sum();
        self.prediction = prediction;
    }

    /// Lets sequences grow at their ends, or shrink within their last pages. There is room for the pages
    /// ([`Records::take_room`]), in the plan that `tails`, which are kept up to date, are about. `grown` is told the tile of each
    /// sequence with more pages, how many, and what its last item has now.
    pub(super) fn grow<'a>(
        &mut self,
        growths: impl Iterator<Item = Growth<'a>>,
        tails: &mut [Tail],
        mut grown: impl FnMut(u32, u32, u32),
    ) {
        let header = *self.header();
        let page_size = header.page_size;
        let mut all_tokens = 0i64;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        let items_begin = items_offset(page_size);
        let (front, masks) = bytes.split_at_mut(header.masks_offset_bytes as usize);
        let (front, pages) = front.split_at_mut(header.pages_offset_bytes as usize);
        let items_end = items_begin + header.item_count as usize * size_of::<WorkItem>();
        let items: &mut [WorkItem] = bytemuck::cast_slice_mut(&mut front[items_begin..items_end]);
        let pages: &mut [u32] = bytemuck::cast_slice_mut(&mut pages[..header.page_count as usize * size_of::<u32>()]);
        let masks: &mut [PageMask] =
            bytemuck::cast_slice_mut(&mut masks[..header.mask_count as usize * size_of::<PageMask>()]);
        for Growth { row, tokens, last_page_tokens, pages: new_pages } in growths {
            all_tokens += i64::from(tokens);
            let tail = &mut tails[row as usize];
            let item = &mut items[tail.item as usize];
            let (old_pages, more_pages) = (item.token_count.div_ceil(page_size), new_pages.len() as u32);
            let new_begin = (item.page_begin + old_pages) as usize;
            pages[new_begin..][..new_pages.len()].copy_from_slice(new_pages);
            if tail.mask == NO_MASKS {
                item.token_count = item.token_count.wrapping_add_signed(tokens);
            } else {
                // The stream is in any order: what is new stands at its end.
                let mask = masks[tail.mask as usize];
                let rows = (mask.row_begin(), mask.row_end());
                if more_pages > 0 {
                    let full = PageMask::new(rows, page_size);
                    masks[tail.mask as usize] = full;
                    masks[(item.mask_begin + old_pages) as usize..][..new_pages.len()].fill(full);
                    tail.mask = item.mask_begin + old_pages + more_pages - 1;
                    item.token_count += more_pages * page_size;
                }
                masks[tail.mask as usize] = PageMask::new(rows, last_page_tokens);
            }
            if more_pages > 0 {
                grown(tail.tile, more_pages, old_pages + more_pages);
            }
        }
        self.generation = PlanGeneration::next();
        self.logical_tokens = self.logical_tokens.wrapping_add_signed(all_tokens);
        let grown_bytes = all_tokens * self.shape().kv_bytes_per_token() as i64;
        self.unique_kv_bytes = self.unique_kv_bytes.wrapping_add_signed(grown_bytes);
    }

    /// Changes what is predicted.
    pub(super) fn predict(&mut self, prediction: Prediction) {
        self.prediction = prediction;
    }

    /// Tells this plan from every other one of the process.
    pub fn generation(&self) -> PlanGeneration {
        self.generation
    }

    /// What the cost model predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// KV bytes (K and V, all KV heads) of the batch's distinct pages.
    pub fn unique_kv_bytes(&self) -> u64 {
        self.unique_kv_bytes
    }

    /// Tokens of all sequences together.
    pub fn logical_tokens(&self) -> u64 {
        self.logical_tokens
    }

    /// The whole buffer, as it is uploaded.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// The header.
    pub fn header(&self) -> &PlanHeader {
        bytemuck::from_bytes(&self.bytes()[..size_of::<PlanHeader>()])
    }

    /// All items, grouped by variant, in launch order.
    pub fn items(&self) -> &[WorkItem] {
        self.records(items_offset(self.page_size()) as u32, self.header().item_count)
    }

    /// The items of one tile variant, in launch order: those in runs of pages behind the others.
    pub fn variant_items(&self, variant: TileVariant) -> &[WorkItem] {
        let VariantItems { begin, count } = self.header().variants[variant.index()];
        let in_runs = self.runs_header().map_or(0, |header| header.variants[variant.index()].count);
        &self.items()[(begin - first_item(self.page_size())) as usize..][..(count + in_runs) as usize]
    }

    /// The second header, of the items in runs of pages, at [`PlanHeader::RUNS_OFFSET_BYTES`]: plans for pages of one token
    /// have one.
    pub fn runs_header(&self) -> Option<&PlanHeader> {
        let bytes = self.bytes().get(PlanHeader::RUNS_OFFSET_BYTES as usize..)?.get(..size_of::<PlanHeader>())?;
        (self.page_size() == 1).then(|| bytemuck::from_bytes(bytes))
    }

    /// Tokens of an entry of an item's stream: of a page, or of a run of pages.
    pub fn entry_tokens(&self, item: &WorkItem) -> u32 {
        self.page_size() * u32::from(item.run_pages).max(1)
    }

    /// The queries of the items.
    pub fn queries(&self) -> &[ItemQuery] {
        self.records(self.header().queries_offset_bytes, self.header().query_count)
    }

    /// The page ids of the items' streams: of an item in runs of pages, those of the first of each.
    pub fn pages(&self) -> &[u32] {
        self.records(self.header().pages_offset_bytes, self.header().page_count)
    }

    /// The masks of an item's entries, one each; empty where every row attends to every token.
    pub fn masks(&self, item: &WorkItem) -> &[PageMask] {
        if item.mask_begin == NO_MASKS {
            return &[];
        }
        &self.all_masks()[item.mask_begin as usize..][..(item.token_count / self.entry_tokens(item)) as usize]
    }

    /// The masks of all items that have some.
    pub(super) fn all_masks(&self) -> &[PageMask] {
        self.records(self.header().masks_offset_bytes, self.header().mask_count)
    }

    /// The first tokens that count of an item's pages, one per page; empty where all tokens count from a page's first on.
    pub fn first_tokens(&self, item: &WorkItem) -> &[u32] {
        if item.first_token_begin == NONE {
            return &[];
        }
        let all: &[u32] = self.records(self.header().words_offset_bytes, self.header().word_count);
        &all[item.first_token_begin as usize..][..item.token_count.div_ceil(self.page_size()) as usize]
    }

    /// KV tokens that an item reads, the first ones of pages among them that none of its rows attends to.
    pub fn stream_tokens(&self, item: &WorkItem) -> u64 {
        match self.masks(item) {
            [] => u64::from(item.token_count),
            masks => masks.iter().map(|mask| u64::from(mask.token_end())).sum(),
        }
    }

    /// The sequences the merge writes.
    pub fn merges(&self) -> &[MergeRow] {
        self.records(self.header().merges_offset_bytes, self.header().merge_count)
    }

    /// What the plan was made for.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// The shape the plan was made for.
    pub fn shape(&self) -> AttentionShape {
        self.problem.shape()
    }

    /// The device the plan was made for, as its cost model saw it.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// Pages of the pool the plan was made for.
    pub fn num_pages(&self) -> u32 {
        self.num_pages
    }

    /// Tokens per page.
    pub fn page_size(&self) -> u32 {
        self.problem.page_size()
    }

    /// Rows of the batch, empty ones included.
    pub fn sequence_count(&self) -> u32 {
        self.header().sequence_count
    }

    /// Bytes of partial outputs and partial LSEs that executing the plan needs.
    pub fn partial_bytes(&self) -> u64 {
        u64::from(self.header().slot_count) * self.shape().partial_bytes()
    }

    /// Gives the first item first tokens of its pages and KV limits of its queries, which no planner does without a window.
    #[cfg(test)]
    pub(crate) fn limit_first_item(&mut self, first_tokens: &[u32], kv_limits: &[u32]) {
        let words_offset = self.bytes().len();
        let mut words = [first_tokens, kv_limits].concat();
        words.resize(words.len().next_multiple_of(4), 0);
        self.words.extend_from_slice(bytemuck::cast_slice(&words));
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words);
        let (header, rest) = bytes.split_at_mut(size_of::<PlanHeader>());
        let header: &mut PlanHeader = bytemuck::from_bytes_mut(header);
        (header.words_offset_bytes, header.word_count) = (words_offset as u32, words.len() as u32);
        let item: &mut WorkItem = bytemuck::from_bytes_mut(&mut rest[..size_of::<WorkItem>()]);
        (item.first_token_begin, item.kv_limit_begin) = (0, first_tokens.len() as u32);
    }

    fn records<T: bytemuck::Pod>(&self, offset_bytes: u32, count: u32) -> &[T] {
        let bytes = &self.bytes()[offset_bytes as usize..][..count as usize * size_of::<T>()];
        bytemuck::cast_slice(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_below_2_to_the_31() {
        let most = (1 << 31) - 1;
        assert_eq!(checked_count("items", u64::from(most)).unwrap(), most);
        for more in [1 << 31, 1 << 32] {
            let message = checked_count("items", more).unwrap_err().to_string();
            assert_eq!(message, format!("plan items: got {more}, expected fewer than 2^31"));
        }
    }
}
