//! The plan buffer: assembly of the records into one contiguous allocation, and read access to them.

use super::PlanGeneration;
use super::cost::Prediction;
use crate::{AttentionShape, DecodeBatch, Error, Result};
use pat_abi::{
    MAX_TILE_VARIANTS, MergeRow, NO_MASKS, PLAN_MAGIC, PackQuery, PageMask, PlanHeader, TileVariant, WorkItem,
};

/// The records of a plan before assembly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanParts {
    /// Items by tile variant, in launch order.
    pub items: [Vec<WorkItem>; MAX_TILE_VARIANTS],
    /// Queries of the items.
    pub queries: Vec<PackQuery>,
    /// Page ids of the items' streams.
    pub pages: Vec<u32>,
    /// Sequences the merge kernel writes.
    pub merges: Vec<MergeRow>,
    /// Page masks of the items that have any.
    pub masks: Vec<PageMask>,
    /// Partial slots in all.
    pub slot_count: u32,
}

impl PlanParts {
    /// Drops the records, keeps the memory.
    pub(super) fn clear(&mut self) {
        self.items.iter_mut().for_each(Vec::clear);
        self.queries.clear();
        self.pages.clear();
        self.merges.clear();
        self.masks.clear();
        self.slot_count = 0;
    }
}

/// A plan: one POD buffer (uploaded with one copy) and what it was made for. Plans are equal when all of that is; their
/// generations are not compared.
#[derive(Clone, Debug)]
pub struct Plan {
    generation: PlanGeneration,
    /// 16-byte units, so that the records are aligned.
    words: Vec<[u64; 2]>,
    shape: AttentionShape,
    num_pages: u32,
    logical_tokens: u64,
    unique_kv_bytes: u64,
    prediction: Prediction,
}

impl PartialEq for Plan {
    fn eq(&self, other: &Self) -> bool {
        let Self { generation: _, words, shape, num_pages, logical_tokens, unique_kv_bytes, prediction } = self;
        *words == other.words
            && *shape == other.shape
            && *num_pages == other.num_pages
            && *logical_tokens == other.logical_tokens
            && *unique_kv_bytes == other.unique_kv_bytes
            && *prediction == other.prediction
    }
}

/// A count that fits a plan record.
pub(super) fn checked_count(what: &str, n: u64) -> Result<u32> {
    u32::try_from(n)
        .ok()
        .filter(|&n| n < 1 << 31)
        .ok_or_else(|| Error::invalid(format!("plan {what}"), n, "fewer than 2^31"))
}

impl Plan {
    /// Lays the parts out in one buffer.
    ///
    /// # Errors
    /// An offset or count does not fit its record.
    pub fn assemble(shape: AttentionShape, batch: &DecodeBatch<'_>, parts: &PlanParts) -> Result<Self> {
        let count = |what: &str, n: usize| checked_count(what, n as u64);
        let item_count = count("items", parts.items.iter().map(Vec::len).sum())?;
        let align = |bytes: usize| bytes.next_multiple_of(16);
        let queries_offset = align(size_of::<PlanHeader>() + item_count as usize * size_of::<WorkItem>());
        let pages_offset = align(queries_offset + size_of_val(parts.queries.as_slice()));
        let merges_offset = align(pages_offset + size_of_val(parts.pages.as_slice()));
        let masks_offset = align(merges_offset + size_of_val(parts.merges.as_slice()));
        let total_bytes = align(masks_offset + size_of_val(parts.masks.as_slice()));
        count("bytes", total_bytes)?;
        let mut header = PlanHeader {
            magic: PLAN_MAGIC,
            total_bytes: total_bytes as u32,
            sequence_count: count("sequences", batch.sequence_count())?,
            item_count,
            query_count: count("queries", parts.queries.len())?,
            page_count: count("pages", parts.pages.len())?,
            merge_count: count("merge rows", parts.merges.len())?,
            slot_count: parts.slot_count,
            queries_offset_bytes: queries_offset as u32,
            pages_offset_bytes: pages_offset as u32,
            merges_offset_bytes: merges_offset as u32,
            page_size: batch.page_size(),
            variant_begin: [0; MAX_TILE_VARIANTS],
            variant_count: [0; MAX_TILE_VARIANTS],
            masks_offset_bytes: masks_offset as u32,
            mask_count: count("masks", parts.masks.len())?,
            reserved: [0; 2],
        };
        let mut begin = 0;
        for (index, items) in parts.items.iter().enumerate() {
            header.variant_begin[index] = begin;
            header.variant_count[index] = items.len() as u32;
            begin += items.len() as u32;
        }
        let mut words = vec![[0u64; 2]; total_bytes / 16];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        bytes[..size_of::<PlanHeader>()].copy_from_slice(bytemuck::bytes_of(&header));
        let mut cursor = PlanHeader::ITEMS_OFFSET_BYTES as usize;
        for items in &parts.items {
            let source: &[u8] = bytemuck::cast_slice(items);
            bytes[cursor..][..source.len()].copy_from_slice(source);
            cursor += source.len();
        }
        for (offset, source) in [
            (queries_offset, bytemuck::cast_slice::<_, u8>(&parts.queries)),
            (pages_offset, bytemuck::cast_slice(&parts.pages)),
            (merges_offset, bytemuck::cast_slice(&parts.merges)),
            (masks_offset, bytemuck::cast_slice(&parts.masks)),
        ] {
            bytes[offset..][..source.len()].copy_from_slice(source);
        }
        let logical_tokens = (0..batch.sequence_count()).map(|s| u64::from(batch.length(s))).sum();
        let prediction = Prediction::default();
        let generation = PlanGeneration::next();
        Ok(Self {
            generation,
            words,
            shape,
            num_pages: batch.num_pages(),
            logical_tokens,
            unique_kv_bytes: 0,
            prediction,
        })
    }

    pub(super) fn set_prediction(&mut self, prediction: Prediction, unique_kv_bytes: u64) {
        self.prediction = prediction;
        self.unique_kv_bytes = unique_kv_bytes;
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
        self.records(PlanHeader::ITEMS_OFFSET_BYTES, self.header().item_count)
    }

    /// The items of one tile variant, in launch order.
    pub fn variant_items(&self, variant: TileVariant) -> &[WorkItem] {
        let header = self.header();
        let begin = header.variant_begin[variant.index()] as usize;
        &self.items()[begin..][..header.variant_count[variant.index()] as usize]
    }

    /// The queries of the items.
    pub fn queries(&self) -> &[PackQuery] {
        self.records(self.header().queries_offset_bytes, self.header().query_count)
    }

    /// The page ids of the items' streams.
    pub fn pages(&self) -> &[u32] {
        self.records(self.header().pages_offset_bytes, self.header().page_count)
    }

    /// The masks of an item's pages, one per page; empty where every row attends to every token.
    pub fn masks(&self, item: &WorkItem) -> &[PageMask] {
        if item.mask_begin == NO_MASKS {
            return &[];
        }
        let all: &[PageMask] = self.records(self.header().masks_offset_bytes, self.header().mask_count);
        &all[item.mask_begin as usize..][..(item.token_count / self.page_size()) as usize]
    }

    /// KV tokens that an item reads.
    pub fn stream_tokens(&self, item: &WorkItem) -> u64 {
        match self.masks(item) {
            [] => u64::from(item.token_count),
            masks => masks.iter().map(|mask| u64::from(mask.tokens())).sum(),
        }
    }

    /// The sequences the merge writes.
    pub fn merges(&self) -> &[MergeRow] {
        self.records(self.header().merges_offset_bytes, self.header().merge_count)
    }

    /// The shape the plan was made for.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Pages of the pool the plan was made for.
    pub fn num_pages(&self) -> u32 {
        self.num_pages
    }

    /// Tokens per page.
    pub fn page_size(&self) -> u32 {
        self.header().page_size
    }

    /// Rows of the batch, empty ones included.
    pub fn sequence_count(&self) -> u32 {
        self.header().sequence_count
    }

    /// Bytes of partial outputs and partial LSEs that executing the plan needs.
    pub fn partial_bytes(&self) -> u64 {
        let rows = u64::from(self.header().slot_count) * u64::from(self.shape.q_heads());
        rows * u64::from(self.shape.head_dim()) * 4 + rows * 4
    }

    fn records<T: bytemuck::Pod>(&self, offset_bytes: u32, count: u32) -> &[T] {
        let bytes = &self.bytes()[offset_bytes as usize..][..count as usize * size_of::<T>()];
        bytemuck::cast_slice(bytes)
    }
}
