//! A decode batch that owns its block tables.

use pat_rs::{AttentionShape, DecodeBatch, Problem};
use serde::{Deserialize, Serialize};

/// Block tables and lengths of a decode step. Also the batch-file format, see [`crate::batch_file`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnedBatch {
    /// Tokens per page.
    pub page_size: u32,
    /// Pages in the pool.
    pub num_pages: u32,
    /// Tokens of each sequence.
    pub lengths: Vec<u32>,
    /// Physical page ids of each sequence, at least `ceil(length / page_size)` of them.
    pub block_tables: Vec<Vec<u32>>,
}

impl OwnedBatch {
    /// Plain decode attention of a model over the batch's pages.
    pub fn problem(&self, shape: AttentionShape) -> Problem {
        Problem::new(shape, self.page_size)
    }

    /// The tables as slices: what [`Self::view`] borrows.
    pub fn rows(&self) -> Vec<&[u32]> {
        self.block_tables.iter().map(Vec::as_slice).collect()
    }

    /// The batch as the planner takes it; `rows` is [`Self::rows`].
    ///
    /// # Errors
    /// As [`DecodeBatch::from_block_tables`].
    pub fn view<'a>(&'a self, rows: &'a [&'a [u32]]) -> pat_rs::Result<DecodeBatch<'a>> {
        DecodeBatch::from_block_tables(rows, &self.lengths, self.page_size, self.num_pages)
    }

    /// Pages that some sequence reads.
    pub fn unique_pages(&self) -> usize {
        let mut pages: Vec<u32> = self
            .block_tables
            .iter()
            .zip(&self.lengths)
            .flat_map(|(table, length)| table.iter().take(length.div_ceil(self.page_size) as usize).copied())
            .collect();
        pages.sort_unstable();
        pages.dedup();
        pages.len()
    }
}
