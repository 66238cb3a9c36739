//! Windows and chunks: what they leave of a batch.

use crate::{DecodeBatch, Reach};

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
/// let visible = VisibleBatch::new(&batch, Reach::Window(20));
/// // Tokens 20 to 39: the first 4 tokens of page 1 are hidden.
/// assert_eq!((visible.batch().pages(0), visible.batch().length(0)), (&[1, 2][..], 24));
/// assert_eq!(visible.hidden_tokens(), [4, 0]);
/// let visible = VisibleBatch::new(&batch, Reach::Chunk(16));
/// assert_eq!((visible.batch().pages(0), visible.batch().pages(1)), (&[2][..], &[3][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct VisibleBatch<'a> {
    tables: Vec<&'a [u32]>,
    lengths: Vec<u32>,
    hidden_tokens: Vec<u32>,
    page_size: u32,
    num_pages: u32,
}

impl<'a> VisibleBatch<'a> {
    /// What `reach` leaves of `batch`; of 0 tokens, as of 1, the last token of each sequence.
    pub fn new(batch: &DecodeBatch<'a>, reach: Reach) -> Self {
        let page_size = batch.page_size();
        let rows = batch.sequence_count();
        let mut visible = Self {
            tables: Vec::with_capacity(rows),
            lengths: Vec::with_capacity(rows),
            hidden_tokens: Vec::with_capacity(rows),
            page_size,
            num_pages: batch.num_pages(),
        };
        for row in 0..rows {
            let length = batch.length(row);
            let first_token = reach.first_token(length.saturating_sub(1));
            let first_page = first_token / page_size;
            visible.tables.push(&batch.pages(row)[first_page as usize..]);
            visible.lengths.push(length - first_page * page_size);
            visible.hidden_tokens.push(first_token % page_size);
        }
        visible
    }

    /// The pages that are left, of which all tokens count but [`Self::hidden_tokens`].
    pub fn batch(&self) -> DecodeBatch<'_> {
        DecodeBatch::of_rows(&self.tables, &self.lengths, self.page_size, self.num_pages)
    }

    /// By row, tokens at the front of its first page that it does not attend to: fewer than a page has.
    pub fn hidden_tokens(&self) -> &[u32] {
        &self.hidden_tokens
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
            let visible = VisibleBatch::new(&batch, reach);
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
