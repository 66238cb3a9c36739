//! Query trees: what the rows of speculative trees see, as pages and parts of pages.
//!
//! A draft is seen by itself and by what comes behind it in its tree. With an entry for each draft, the rows of a tree are
//! paths of a prefix tree, as sequences are, and the planner shares drafts as it shares pages.

use crate::{DecodeBatch, Error, Reach, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// The trees of a batch whose rows are query tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trees<'a> {
    /// Where the rows of each sequence end.
    pub(crate) ends: &'a [usize],
    /// By row, its parent among the rows of its sequence.
    pub(crate) parents: &'a [Option<u32>],
}

/// Tokens of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PagePart {
    pub(crate) page: u32,
    pub(crate) first_token: u32,
    pub(crate) token_end: u32,
}

/// What each row sees: ids of pages that it sees in full; those from the pool's number of pages on stand for parts of pages.
#[derive(Clone, Debug)]
pub(crate) struct Entries {
    pub(crate) ids: Vec<u32>,
    /// Where the ids of each row begin, and where those of the last one end.
    pub(crate) indptr: Vec<u32>,
    /// Of the ids from the pool's number of pages on.
    pub(crate) parts: Vec<PagePart>,
}

impl Entries {
    /// What the rows of `trees`, the query tokens of `batch`, see within `reach`. Positions count along a path: those of
    /// siblings are equal.
    ///
    /// # Errors
    /// The entries of a row, or of all, are more than a plan can express.
    pub(crate) fn of_trees(batch: &DecodeBatch<'_>, trees: Trees<'_>, reach: Reach) -> Result<Self> {
        let mut entries = Self { ids: Vec::new(), indptr: vec![0], parts: Vec::new() };
        let mut begin = 0;
        for (sequence, &end) in trees.ends.iter().enumerate() {
            entries.add_tree(batch, begin..end, &trees.parents[begin..end], reach)?;
            let most = DecodeBatch::MAX_TOKENS as usize;
            let longest = entries.indptr[begin..].windows(2).map(|row| (row[1] - row[0]) as usize).max().unwrap_or(0);
            if longest * batch.page_size() as usize > most {
                let expected = format!("pages and drafts that a row sees of at most {most} tokens, as pages");
                return Err(Error::invalid(format!("query tree of sequence {sequence}"), longest, expected));
            }
            begin = end;
        }
        Ok(entries)
    }

    fn add_tree(
        &mut self,
        batch: &DecodeBatch<'_>,
        rows: Range<usize>,
        parents: &[Option<u32>],
        reach: Reach,
    ) -> Result<()> {
        let Some(last) = rows.clone().last() else { return Ok(()) };
        let (length, table) = (batch.length(last), batch.pages(last));
        if length == 0 {
            self.indptr.extend(rows.map(|_| self.ids.len() as u32));
            return Ok(());
        }
        let context = length - parents.len() as u32;
        // A first token that all others come behind is one more token of their context.
        let roots = u32::from(parents[1..].iter().all(Option::is_some));
        let context_end = context + roots;
        let drafts: Vec<u32> = (context_end..length).map(|token| self.entry(batch, table, token..token + 1)).collect();
        let mut depths: Vec<u32> = Vec::with_capacity(parents.len());
        // By the first token that is seen, the entries of the context.
        let mut contexts: BTreeMap<u32, Range<usize>> = BTreeMap::new();
        let mut path = Vec::new();
        for (token, parent) in (0u32..).zip(parents) {
            let depth = parent.map_or(0, |parent| depths[parent as usize] + 1);
            depths.push(depth);
            let first_token = reach.first_token(context + depth);
            let begin = self.ids.len();
            match contexts.get(&first_token) {
                Some(entries) => self.ids.extend_from_within(entries.clone()),
                None => {
                    self.add_context(batch, table, first_token..context_end);
                    contexts.insert(first_token, begin..self.ids.len());
                }
            }
            path.clear();
            let is_seen = |&at: &u32| at >= roots && context + depths[at as usize] >= first_token;
            let mut next = Some(token).filter(is_seen);
            while let Some(at) = next {
                path.push(drafts[(at - roots) as usize]);
                next = parents[at as usize].filter(is_seen);
            }
            self.ids.extend(path.iter().rev());
            let end = u32::try_from(self.ids.len()).ok().filter(|&end| end <= DecodeBatch::MAX_TOKENS);
            self.indptr.push(end.ok_or_else(|| {
                Error::invalid(
                    "pages that query trees see",
                    self.ids.len(),
                    format!("at most {}", DecodeBatch::MAX_TOKENS),
                )
            })?);
        }
        Ok(())
    }

    /// Adds the pages of these tokens to the last row.
    fn add_context(&mut self, batch: &DecodeBatch<'_>, table: &[u32], tokens: Range<u32>) {
        let page_size = batch.page_size();
        let mut first = tokens.start;
        while first < tokens.end {
            let end = tokens.end.min((first - first % page_size).saturating_add(page_size));
            let id = self.entry(batch, table, first..end);
            self.ids.push(id);
            first = end;
        }
    }

    /// The id of tokens that lie in one page.
    fn entry(&mut self, batch: &DecodeBatch<'_>, table: &[u32], tokens: Range<u32>) -> u32 {
        let page = table[(tokens.start / batch.page_size()) as usize];
        let token_count = tokens.end - tokens.start;
        if token_count == batch.page_size() {
            return page;
        }
        let first_token = tokens.start % batch.page_size();
        self.parts.push(PagePart { page, first_token, token_end: first_token + token_count });
        // Fewer than 2^31 pages, and no more parts than ids.
        batch.num_pages() + (self.parts.len() as u32 - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QueryTokens;

    /// By row, the tokens that are seen, as (page, tokens).
    fn seen(queries: &QueryTokens<'_>, reach: Reach) -> Vec<Vec<(u32, Range<u32>)>> {
        let batch = queries.batch();
        let entries = Entries::of_trees(&batch, batch.trees().unwrap(), reach).unwrap();
        let resolve = |&id: &u32| match id.checked_sub(batch.num_pages()) {
            None => (id, 0..batch.page_size()),
            Some(part) => {
                let PagePart { page, first_token, token_end } = entries.parts[part as usize];
                (page, first_token..token_end)
            }
        };
        let rows = entries.indptr.windows(2).map(|row| &entries.ids[row[0] as usize..row[1] as usize]);
        rows.map(|ids| ids.iter().map(resolve).collect()).collect()
    }

    #[test]
    fn a_row_sees_the_context_its_ancestors_and_itself() {
        // 5 tokens of context, then drafts at 5 to 8; the last two come behind the first.
        let tables: [&[u32]; 2] = [&[7, 3, 9], &[]];
        let batch = DecodeBatch::from_block_tables(&tables, &[9, 0], 4, 10).unwrap();
        let queries = QueryTokens::tree(&batch, &[None, None, Some(0), Some(2)]).unwrap();
        let mut expected = vec![
            vec![(7, 0..4), (3, 0..1), (3, 1..2)],
            vec![(7, 0..4), (3, 0..1), (3, 2..3)],
            vec![(7, 0..4), (3, 0..1), (3, 1..2), (3, 3..4)],
            vec![(7, 0..4), (3, 0..1), (3, 1..2), (3, 3..4), (9, 0..1)],
        ];
        expected.extend([vec![], vec![], vec![], vec![]]);
        assert_eq!(seen(&queries, Reach::Full), expected);
        // Positions: 5, 5, 6, 7.
        let windowed = seen(&queries, Reach::Window(3));
        assert_eq!(windowed[0], [(7, 3..4), (3, 0..1), (3, 1..2)]);
        assert_eq!(windowed[2], [(3, 0..1), (3, 1..2), (3, 3..4)]);
        assert_eq!(windowed[3], [(3, 1..2), (3, 3..4), (9, 0..1)]);
        let chunked = seen(&queries, Reach::Chunk(6));
        assert_eq!((&chunked[1], &chunked[2]), (&expected[1], &vec![(3, 3..4)]));
    }

    #[test]
    fn a_root_of_all_drafts_is_context() {
        let tables: [&[u32]; 1] = [&[7, 3]];
        let batch = DecodeBatch::from_block_tables(&tables, &[5], 4, 10).unwrap();
        let queries = QueryTokens::tree(&batch, &[None, Some(0)]).unwrap();
        assert_eq!(seen(&queries, Reach::Full), [vec![(7, 0..4)], vec![(7, 0..4), (3, 0..1)]]);
        assert_eq!(seen(&queries, Reach::Window(1)), [vec![(7, 3..4)], vec![(3, 0..1)]]);
        let queries = QueryTokens::tree(&batch, &[None]).unwrap();
        assert_eq!(seen(&queries, Reach::Full), [vec![(7, 0..4), (3, 0..1)]]);
    }
}
