//! A decode batch that owns its block tables.

use pat_rs::{AttentionShape, DecodeBatch, Problem, QueryTokens};

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

    /// The last `tokens` tokens of each sequence as query tokens ([`QueryTokens`]): a row for each, sequence by sequence.
    ///
    /// # Errors
    /// The batch is not valid, or as [`QueryTokens::uniform`].
    pub fn query_rows(&self, tokens: u32) -> pat_rs::Result<Self> {
        let rows = self.rows();
        let sequences = self.view(&rows)?;
        let queries = QueryTokens::uniform(&sequences, tokens)?;
        let batch = queries.batch();
        let rows = 0..batch.sequence_count();
        Ok(Self {
            lengths: rows.clone().map(|row| batch.length(row)).collect(),
            block_tables: rows.map(|row| batch.pages(row).to_vec()).collect(),
            ..*self
        })
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

    fn long() -> OwnedBatch {
        OwnedBatch {
            page_size: 4,
            num_pages: 9,
            lengths: vec![17, 16, 0, 3],
            block_tables: vec![vec![0, 1, 2, 3, 4], vec![0, 1, 2, 5], vec![], vec![6, 8]],
        }
    }

    #[test]
    fn query_tokens_are_rows() {
        let rows = long().query_rows(2).expect("two tokens each");
        assert_eq!(rows.lengths, [16, 17, 15, 16, 0, 0, 2, 3]);
        assert_eq!(rows.block_tables[0], [0, 1, 2, 3]);
        assert_eq!(rows.block_tables[7], [6]);
        assert_eq!(long().query_rows(1).expect("one each").lengths, long().lengths);
        let message = long().query_rows(4).unwrap_err().to_string();
        assert_eq!(message, "query_tokens: got 4, expected at most lengths[3] = 3");
    }
}
