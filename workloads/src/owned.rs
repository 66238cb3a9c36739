//! A decode batch that owns its block tables.

use pat_rs::{AttentionShape, DecodeBatch, Problem};

/// Block tables and lengths of a decode step. [`crate::batch_file`] reads and writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
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
        self.pages_read().len()
    }

    /// The same batch over a pool that holds nothing but the pages that are read, in the order of their ids: what is drawn
    /// and computed. An engine's pool may be far larger than what one batch names of it.
    pub fn compacted(&self) -> Self {
        let pages = self.pages_read();
        let number = |page: &u32| pages.partition_point(|other| other < page) as u32;
        Self {
            page_size: self.page_size,
            num_pages: pages.len() as u32,
            lengths: self.lengths.clone(),
            block_tables: self.needed_rows().map(|row| row.iter().map(number).collect()).collect(),
        }
    }

    /// Ids of the pages that some sequence reads, ascending.
    fn pages_read(&self) -> Vec<u32> {
        let mut pages: Vec<u32> = self.needed_rows().flatten().copied().collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// Of each row, what its length needs.
    fn needed_rows(&self) -> impl Iterator<Item = &[u32]> {
        self.block_tables.iter().zip(&self.lengths).map(|(table, length)| {
            let needed = length.div_ceil(self.page_size) as usize;
            &table[..needed.min(table.len())]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_pool_has_the_pages_that_are_read() {
        let sparse = OwnedBatch {
            page_size: 480,
            num_pages: 160_000,
            lengths: vec![700, 1, 0, 481],
            block_tables: vec![vec![12, 159_998], vec![3, 77], vec![5], vec![12, 4]],
        };
        assert_eq!(sparse.unique_pages(), 4);
        let compact = OwnedBatch {
            page_size: 480,
            num_pages: 4,
            lengths: vec![700, 1, 0, 481],
            block_tables: vec![vec![2, 3], vec![0], vec![], vec![2, 1]],
        };
        assert_eq!(sparse.compacted(), compact);
        assert_eq!(compact.compacted(), compact);
        compact.view(&compact.rows()).expect("valid");
    }
}
