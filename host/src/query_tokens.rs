//! Several query tokens per sequence: each becomes a row of the batch.

use crate::tree::Trees;
use crate::{DecodeBatch, Error, Result};

/// The query tokens of a decode step in which sequences have more than one (drafts that are verified, multi-token prediction).
///
/// Query tokens are the last tokens of their sequence; their K and V are in the pool. Each sees the tokens up to itself. So token
/// `i` of the `n` query tokens of a sequence with `length` tokens is a row with that sequence's block table and
/// `length - n + 1 + i` tokens, and the batch of these rows ([`Self::batch`]) is planned and run as any other. Query tokens may
/// also form a tree ([`Self::tree`]). Q, O and LSE have a row per query token: those of sequence 0 first, in order, then those of
/// sequence 1.
///
/// ```
/// use pat_rs::{DecodeBatch, QueryTokens};
///
/// # fn main() -> pat_rs::Result<()> {
/// let tables: [&[u32]; 2] = [&[0, 1, 2], &[0, 3]];
/// let sequences = DecodeBatch::from_block_tables(&tables, &[40, 20], 16, 8)?;
/// // Three draft tokens behind the last one of the first sequence, none behind that of the second.
/// let queries = QueryTokens::ragged(&sequences, &[4, 1])?;
/// let rows = queries.batch();
/// assert_eq!(rows.sequence_count(), 5);
/// assert_eq!([rows.length(0), rows.length(3), rows.length(4)], [37, 40, 20]);
/// assert_eq!(queries.rows(1), 4..5);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct QueryTokens<'a> {
    /// Of every query token.
    tables: Vec<&'a [u32]>,
    lengths: Vec<u32>,
    /// Where each sequence's query tokens end.
    ends: Vec<usize>,
    /// Of every query token, where they form trees.
    parents: Option<Vec<Option<u32>>>,
    page_size: u32,
    num_pages: u32,
}

impl<'a> QueryTokens<'a> {
    /// Most query tokens of a sequence of length 0: they are padding, and no length bounds them.
    pub const MAX_OF_EMPTY: u32 = 1 << 16;
    /// Pages that all rows see, each row counted: planning takes memory for each.
    pub const MAX_PAGES_OF_ROWS: u64 = 1 << 29;

    /// Most query tokens of a tree.
    pub const MAX_OF_TREE: usize = 256;

    /// `tokens` query tokens in every sequence. A sequence of length 0, a padding row, has as many rows of length 0.
    ///
    /// # Errors
    /// `tokens` is 0, or a sequence that is not empty has fewer tokens, or there is an empty one and `tokens` exceeds
    /// [`Self::MAX_OF_EMPTY`]; there are more than [`DecodeBatch::MAX_TOKENS`] rows, or they see more
    /// than [`Self::MAX_PAGES_OF_ROWS`] pages in all.
    pub fn uniform(batch: &DecodeBatch<'a>, tokens: u32) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::invalid("query_tokens", tokens, "at least 1"));
        }
        Self::new(batch, |_| tokens, |_| "query_tokens".into())
    }

    /// `counts[b]` query tokens in sequence `b`; with 0 it has no row.
    ///
    /// # Errors
    /// There is not one count per sequence, a sequence that is not empty has fewer tokens than its count, an empty one has more
    /// than [`Self::MAX_OF_EMPTY`], or there are more than [`DecodeBatch::MAX_TOKENS`] rows, or they see more
    /// than [`Self::MAX_PAGES_OF_ROWS`] pages in all.
    pub fn ragged(batch: &DecodeBatch<'a>, counts: &[u32]) -> Result<Self> {
        if counts.len() != batch.sequence_count() {
            let expected = format!("one per sequence ({})", batch.sequence_count());
            return Err(Error::invalid("query_tokens", format!("{} counts", counts.len()), expected));
        }
        Self::new(batch, |sequence| counts[sequence], |sequence| format!("query_tokens[{sequence}]"))
    }

    /// Query tokens that form the same tree in every sequence, as the drafts of tree speculation do. `parents[i]` is the
    /// parent of query token `i` among the query tokens of its sequence, or `None` if it comes right behind the context: the
    /// tokens in front of the query tokens. A query token sees the context, its ancestors and itself.
    ///
    /// Parents stand before their children. Positions, which windows and chunks count by, are those along the path: those of
    /// siblings are equal. What is planned must be a problem with a query tree ([`crate::Problem::with_query_tree`]).
    ///
    /// ```
    /// use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, PlanOptions, Planner, Problem, QueryTokens};
    ///
    /// # fn main() -> pat_rs::Result<()> {
    /// let tables: [&[u32]; 2] = [&[0, 1, 2], &[0, 3]];
    /// let sequences = DecodeBatch::from_block_tables(&tables, &[40, 20], 16, 8)?;
    /// // The last token, two drafts behind it, and one behind the first of these.
    /// let queries = QueryTokens::tree(&sequences, &[None, Some(0), Some(0), Some(1)])?;
    /// let problem = Problem::new(AttentionShape::new(32, 8, 128, Dtype::F16)?, 16).with_query_tree(4);
    /// let plan = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default())?.plan(&queries.batch())?;
    /// // The rows of the first sequence see 37, 38, 38 and 39 of its 40 tokens.
    /// assert_eq!(plan.logical_tokens(), (37 + 38 + 38 + 39) + (17 + 18 + 18 + 19));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A parent does not stand before its child; there are no parents, or more than [`Self::MAX_OF_TREE`]; or as
    /// [`Self::uniform`].
    pub fn tree(batch: &DecodeBatch<'a>, parents: &[Option<u32>]) -> Result<Self> {
        if parents.is_empty() {
            return Err(Error::invalid("parents", "0 query tokens", "at least 1"));
        }
        Self::of_trees(batch, |_| parents, |_| "parents".into())
    }

    /// As [`Self::tree`], with a tree of its own in each sequence: sequence `b` has `parents[b].len()` query tokens; with 0 it
    /// has no row.
    ///
    /// # Errors
    /// There is not one tree per sequence; or as [`Self::tree`].
    pub fn trees(batch: &DecodeBatch<'a>, parents: &[&[Option<u32>]]) -> Result<Self> {
        if parents.len() != batch.sequence_count() {
            let expected = format!("one per sequence ({})", batch.sequence_count());
            return Err(Error::invalid("parents", format!("{} trees", parents.len()), expected));
        }
        Self::of_trees(batch, |sequence| parents[sequence], |sequence| format!("parents[{sequence}]"))
    }

    fn of_trees<'p>(
        batch: &DecodeBatch<'a>,
        parents: impl Fn(usize) -> &'p [Option<u32>],
        argument: impl Fn(usize) -> String,
    ) -> Result<Self> {
        for sequence in 0..batch.sequence_count() {
            let (parents, length) = (parents(sequence), batch.length(sequence));
            let refused =
                |expected| Error::invalid(argument(sequence), format!("{} query tokens", parents.len()), expected);
            if parents.len() > Self::MAX_OF_TREE {
                return Err(refused(format!("at most {} in a tree", Self::MAX_OF_TREE)));
            }
            if length > 0 && parents.len() > length as usize {
                return Err(refused(format!("at most lengths[{sequence}] = {length}")));
            }
            for (token, parent) in (0u32..).zip(parents) {
                if let Some(parent) = parent.filter(|&parent| parent >= token) {
                    let expected = match token.checked_sub(1) {
                        None => "none: no query token stands before it".into(),
                        Some(last) => format!("none, or at most {last}: a query token before it"),
                    };
                    return Err(Error::invalid(format!("{}[{token}]", argument(sequence)), parent, expected));
                }
            }
        }
        let queries = Self::new(batch, |sequence| parents(sequence).len() as u32, |_| "parents".into())?;
        let of_rows = (0..batch.sequence_count()).flat_map(parents).copied().collect();
        Ok(Self { parents: Some(of_rows), ..queries })
    }

    fn new(batch: &DecodeBatch<'a>, count: impl Fn(usize) -> u32, argument: impl Fn(usize) -> String) -> Result<Self> {
        if !batch.is_of_sequences() {
            return Err(Error::invalid("batch", "rows that form query trees", "a batch of sequences"));
        }
        // All counts before any row: a count may be any number.
        let (mut rows, mut pages_of_rows) = (0u64, 0u64);
        for sequence in 0..batch.sequence_count() {
            let (count, length) = (count(sequence), batch.length(sequence));
            let (most, what) = match length {
                0 => (Self::MAX_OF_EMPTY, format!("of an empty sequence at most {}", Self::MAX_OF_EMPTY)),
                _ => (length, format!("at most lengths[{sequence}] = {length}")),
            };
            if count > most {
                return Err(Error::invalid(argument(sequence), count, what));
            }
            rows += u64::from(count);
            pages_of_rows += u64::from(count) * batch.pages(sequence).len() as u64;
        }
        if rows > u64::from(DecodeBatch::MAX_TOKENS) {
            let expected = format!("at most {}", DecodeBatch::MAX_TOKENS);
            return Err(Error::invalid("query_tokens", format!("{rows} in all"), expected));
        }
        if pages_of_rows > Self::MAX_PAGES_OF_ROWS {
            let expected = format!("rows with at most {} in all", Self::MAX_PAGES_OF_ROWS);
            return Err(Error::invalid(
                "query_tokens",
                format!("{rows} rows with {pages_of_rows} pages in all"),
                expected,
            ));
        }
        let rows = rows as usize;
        let mut queries = Self {
            tables: Vec::with_capacity(rows),
            lengths: Vec::with_capacity(rows),
            ends: Vec::with_capacity(batch.sequence_count()),
            parents: None,
            page_size: batch.page_size(),
            num_pages: batch.num_pages(),
        };
        for sequence in 0..batch.sequence_count() {
            let (count, length, table) = (count(sequence), batch.length(sequence), batch.pages(sequence));
            // Ascending lengths that end with the sequence's own; all 0 in an empty one.
            queries.lengths.extend((0..count).rev().map(|behind| length.saturating_sub(behind)));
            queries.tables.extend(std::iter::repeat_n(table, count as usize));
            queries.ends.push(queries.lengths.len());
        }
        Ok(queries)
    }

    /// The batch of all query tokens, to be planned.
    pub fn batch(&self) -> DecodeBatch<'_> {
        let trees = self.parents.as_ref().map(|parents| Trees { ends: &self.ends, parents });
        DecodeBatch::of_rows(&self.tables, &self.lengths, self.page_size, self.num_pages).with_trees(trees)
    }

    /// The rows of sequence `sequence`.
    ///
    /// # Panics
    /// There is no such sequence.
    pub fn rows(&self, sequence: usize) -> std::ops::Range<usize> {
        let begin = sequence.checked_sub(1).map_or(0, |before| self.ends[before]);
        begin..self.ends[sequence]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: [&[u32]; 3] = [&[4, 5, 6], &[], &[4, 7]];

    fn sequences() -> DecodeBatch<'static> {
        DecodeBatch::from_block_tables(&TABLES, &[17, 0, 9], 8, 8).unwrap()
    }

    fn rows(queries: &QueryTokens<'_>) -> Vec<(u32, Vec<u32>)> {
        let batch = queries.batch();
        (0..batch.sequence_count()).map(|row| (batch.length(row), batch.pages(row).to_vec())).collect()
    }

    #[test]
    fn a_query_token_sees_the_tokens_up_to_itself() {
        let uniform = QueryTokens::uniform(&sequences(), 2).unwrap();
        let expected = [(16, vec![4, 5]), (17, vec![4, 5, 6]), (0, vec![]), (0, vec![]), (8, vec![4]), (9, vec![4, 7])];
        assert_eq!(rows(&uniform), expected);
        let ragged = QueryTokens::ragged(&sequences(), &[0, 1, 9]).unwrap();
        assert_eq!(ragged.batch().sequence_count(), 10);
        assert_eq!((ragged.rows(0), ragged.rows(1), ragged.rows(2)), (0..0, 0..1, 1..10));
        assert_eq!(rows(&ragged)[1], (1, vec![4]));
        let one = QueryTokens::uniform(&sequences(), 1).unwrap();
        assert_eq!(rows(&one), [(17, vec![4, 5, 6]), (0, vec![]), (9, vec![4, 7])]);
    }

    #[test]
    fn counts_that_no_sequence_has_are_refused() {
        let refusal = |queries: Result<QueryTokens<'_>>| queries.unwrap_err().to_string();
        assert_eq!(refusal(QueryTokens::uniform(&sequences(), 0)), "query_tokens: got 0, expected at least 1");
        let message = refusal(QueryTokens::uniform(&sequences(), 10));
        assert_eq!(message, "query_tokens: got 10, expected at most lengths[2] = 9");
        let message = refusal(QueryTokens::ragged(&sequences(), &[1, QueryTokens::MAX_OF_EMPTY, 10]));
        assert_eq!(message, "query_tokens[2]: got 10, expected at most lengths[2] = 9");
        let message = refusal(QueryTokens::ragged(&sequences(), &[1, 65_537, 9]));
        assert_eq!(message, "query_tokens[1]: got 65537, expected of an empty sequence at most 65536");
        let (tables, lengths) = (vec![&[][..]; 1 << 15], vec![0; 1 << 15]);
        let empty = DecodeBatch::from_block_tables(&tables, &lengths, 16, 1).unwrap();
        let message = refusal(QueryTokens::uniform(&empty, QueryTokens::MAX_OF_EMPTY));
        assert_eq!(message, "query_tokens: got 2147483648 in all, expected at most 2147483647");
        let long = vec![0; 1 << 20];
        let tables = [&long[..]];
        let batch = DecodeBatch::from_block_tables(&tables, &[1 << 20], 1, 1).unwrap();
        let message = refusal(QueryTokens::uniform(&batch, 513));
        assert_eq!(
            message,
            "query_tokens: got 513 rows with 537919488 pages in all, expected rows with at most 536870912 in all"
        );
        let message = refusal(QueryTokens::ragged(&sequences(), &[1, 1]));
        assert_eq!(message, "query_tokens: got 2 counts, expected one per sequence (3)");
    }
}
