//! What rows see of a batch: windows, chunks and query trees.

use crate::tree::{Entries, PagePart};
use crate::{DecodeBatch, Error, Reach, Result};

/// The part of a batch that its rows attend to where they do not see all of their sequences.
///
/// Pages in front of what a row sees are not in it: nobody plans or reads them, whatever stands there in the block table, as long
/// as it is a page id of the pool. Of the first page that is left, the row may attend to the later tokens only.
///
/// ```
/// use pat_rs::{DecodeBatch, Reach, VisibleBatch};
///
/// # fn main() -> pat_rs::Result<()> {
/// let tables: [&[u32]; 2] = [&[0, 1, 2], &[0, 3]];
/// let batch = DecodeBatch::from_block_tables(&tables, &[40, 20], 16, 8)?;
/// let visible = VisibleBatch::new(&batch, Reach::Window(20))?;
/// // Tokens 20 to 39: the first 4 tokens of page 1 are hidden.
/// assert_eq!((visible.batch().pages(0), visible.batch().length(0)), (&[1, 2][..], 24));
/// assert_eq!(visible.hidden_tokens(), [4, 0]);
/// let visible = VisibleBatch::new(&batch, Reach::Chunk(16))?;
/// assert_eq!((visible.batch().pages(0), visible.batch().pages(1)), (&[2][..], &[3][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VisibleBatch<'a> {
    rows: Rows<'a>,
    lengths: Vec<u32>,
    hidden_tokens: Vec<u32>,
    page_size: u32,
    num_pages: u32,
}

#[derive(Clone, Debug)]
enum Rows<'a> {
    Tables(Vec<&'a [u32]>),
    Entries(Entries),
}

/// What rows do not see of the pages of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Hidden<'a> {
    /// By row, tokens at the front of its first page; nothing where all rows see theirs.
    pub(crate) first_tokens: &'a [u32],
    /// What page ids from the pool's number of pages on stand for.
    pub(crate) parts: &'a [PagePart],
}

impl Hidden<'_> {
    /// What page id `id` stands for, in a pool of `num_pages` pages, if that is part of a page.
    pub(crate) fn part(self, num_pages: u32, id: u32) -> Option<PagePart> {
        self.parts.get(id.checked_sub(num_pages)? as usize).copied()
    }
}

impl<'a> VisibleBatch<'a> {
    /// What `reach` leaves of `batch`; of 0 tokens, as of 1, the last token of each sequence. Of rows that form query trees, what
    /// they see of these, too.
    ///
    /// # Errors
    /// Rows of query trees see more than a plan can express: 2^31 pages in all, or one row 2^31 tokens where each draft is
    /// counted as a page. Or `batch` is itself what is left of query trees.
    pub fn new(batch: &DecodeBatch<'a>, reach: Reach) -> Result<Self> {
        if batch.is_of_entries() {
            return Err(Error::invalid("batch", "what is left of query trees", "the batch that it was made from"));
        }
        let (page_size, num_pages) = (batch.page_size(), batch.num_pages());
        let rows = batch.sequence_count();
        if let Some(trees) = batch.trees() {
            let entries = Entries::of_trees(batch, trees, reach)?;
            let lengths = entries.indptr.windows(2).map(|row| (row[1] - row[0]) * page_size).collect();
            let rows = Rows::Entries(entries);
            return Ok(Self { rows, lengths, hidden_tokens: vec![0; batch.sequence_count()], page_size, num_pages });
        }
        let mut tables = Vec::with_capacity(rows);
        let mut lengths = Vec::with_capacity(rows);
        let mut hidden_tokens = Vec::with_capacity(rows);
        for row in 0..rows {
            let length = batch.length(row);
            let first_token = reach.first_token(length.saturating_sub(1));
            let first_page = first_token / page_size;
            tables.push(&batch.pages(row)[first_page as usize..]);
            lengths.push(length - first_page * page_size);
            hidden_tokens.push(first_token % page_size);
        }
        Ok(Self { rows: Rows::Tables(tables), lengths, hidden_tokens, page_size, num_pages })
    }

    /// The pages that are left, of which all tokens count but [`Self::hidden_tokens`]. Of rows that form query trees, each draft
    /// is counted as a page of its own, and a page id from the pool's number of pages on stands for part of a page. That is for
    /// reports; planners take the batch that this was made from.
    pub fn batch(&self) -> DecodeBatch<'_> {
        match &self.rows {
            Rows::Tables(tables) => DecodeBatch::of_rows(tables, &self.lengths, self.page_size, self.num_pages),
            Rows::Entries(entries) => DecodeBatch::of_entries(entries, &self.lengths, self.page_size, self.num_pages),
        }
    }

    /// By row, tokens at the front of its first page that it does not attend to: fewer than a page has.
    pub fn hidden_tokens(&self) -> &[u32] {
        &self.hidden_tokens
    }

    /// What rows do not see of [`Self::batch`].
    pub(crate) fn hidden(&self) -> Hidden<'_> {
        let parts: &[PagePart] = match &self.rows {
            Rows::Tables(_) => &[],
            Rows::Entries(entries) => &entries.parts,
        };
        Hidden { first_tokens: &self.hidden_tokens, parts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_the_pages_that_they_see() {
        let tables: [&[u32]; 4] = [&[4, 5, 6], &[], &[4, 7], &[1, 2]];
        let batch = DecodeBatch::from_block_tables(&tables, &[17, 0, 9, 16], 8, 8).unwrap();
        let left = |reach| {
            let visible = VisibleBatch::new(&batch, reach).unwrap();
            let batch = visible.batch();
            let rows: Vec<_> = (0..4).map(|row| (batch.pages(row).to_vec(), batch.length(row))).collect();
            (rows, visible.hidden_tokens().to_vec())
        };
        let (rows, hidden) = left(Reach::Window(1));
        assert_eq!(rows, [(vec![6], 1), (vec![], 0), (vec![7], 1), (vec![2], 8)]);
        assert_eq!(hidden, [0, 0, 0, 7]);
        let (rows, hidden) = left(Reach::Window(9));
        assert_eq!(rows, [(vec![5, 6], 9), (vec![], 0), (vec![4, 7], 9), (vec![1, 2], 16)]);
        assert_eq!(hidden, [0, 0, 0, 7]);
        let (rows, hidden) = left(Reach::Window(10));
        assert_eq!((&rows[0], hidden[0]), (&(vec![4, 5, 6], 17), 7));
        assert_eq!(left(Reach::Window(u32::MAX)).0, left(Reach::Window(17)).0);
        assert_eq!(left(Reach::Window(0)), left(Reach::Window(1)));
        assert_eq!(left(Reach::Full), left(Reach::Window(17)));
        let (rows, hidden) = left(Reach::Chunk(8));
        assert_eq!(rows, [(vec![6], 1), (vec![], 0), (vec![7], 1), (vec![2], 8)]);
        assert_eq!(hidden, [0; 4]);
        let (rows, hidden) = left(Reach::Chunk(12));
        assert_eq!(rows, [(vec![5, 6], 9), (vec![], 0), (vec![4, 7], 9), (vec![2], 8)]);
        assert_eq!(hidden, [4, 0, 0, 4]);
        assert_eq!(left(Reach::Chunk(0)), left(Reach::Window(1)));
    }
}
