//! What the batch of the former step looked like, and how much of the plan a new step leaves valid.

use super::forest::Forest;
use crate::{DecodeBatch, Error, Result};

/// What a decode step has changed, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlanChange {
    /// Nothing: the plan, its generation included, is as before, and need not be uploaded again.
    Nothing,
    /// Lengths, within the last pages.
    Lengths,
    /// Private pages: more, fewer or other ones. Who shares what with whom is as before.
    Pages,
    /// Anything else (rows, sharing, the pool), and what cannot be told from it: planned from scratch.
    Forest,
}

/// Block tables and lengths as they were planned last.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshot {
    page_size: u32,
    num_pages: u32,
    rows: Vec<Row>,
    /// Page ids; each row has room to grow behind its own.
    ids: Vec<u32>,
    /// Rows of another length since the last update, and by how many tokens.
    grown: Vec<(u32, i32)>,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    /// First of its entries in `ids`.
    begin: usize,
    /// Entries there.
    capacity: u32,
    /// Pages in use.
    pages: u32,
    length: u32,
    /// Pages it shares with other sequences.
    shared_pages: u32,
}

impl Row {
    /// Whether it has no full page of its own: it ends at its innermost node.
    fn ends_at_node(self, length: u32, page_size: u32) -> bool {
        u64::from(length) < (u64::from(self.shared_pages) + 1) * u64::from(page_size)
    }

    /// What becoming `length` tokens in `pages` pages changes if the entries up to `agreeing` stay what they were.
    fn change(self, length: u32, pages: u32, agreeing: u32, page_size: u32) -> PlanChange {
        let ends_here = self.ends_at_node(self.length, page_size);
        // The first private page, if full, is what tells the row from those it shares the pages before with.
        let deciding = if ends_here { self.shared_pages } else { self.shared_pages + 1 };
        if (self.length == 0) != (length == 0)
            || u64::from(length) < u64::from(self.shared_pages) * u64::from(page_size)
            || ends_here != self.ends_at_node(length, page_size)
            || agreeing < deciding
        {
            PlanChange::Forest
        } else if pages != self.pages || agreeing < pages {
            PlanChange::Pages
        } else if length != self.length {
            PlanChange::Lengths
        } else {
            PlanChange::Nothing
        }
    }
}

impl Snapshot {
    /// Room for more pages of each row, in entries: rows move when one has outgrown its own.
    const SLACK: u32 = 8;

    /// Rows whose lengths the last update has changed, and by how many tokens.
    pub(super) fn grown_rows(&self) -> impl Iterator<Item = (u32, i32)> {
        self.grown.iter().copied()
    }

    /// Keeps `batch`, whose forest is `forest`.
    pub(super) fn take(&mut self, batch: &DecodeBatch<'_>, forest: &Forest) {
        self.page_size = batch.page_size();
        self.num_pages = batch.num_pages();
        self.rows.clear();
        self.grown.clear();
        self.grown.reserve(batch.sequence_count());
        let mut end = 0;
        for sequence in 0..batch.sequence_count() {
            let length = batch.length(sequence);
            let pages = length.div_ceil(batch.page_size());
            let capacity = pages + Self::SLACK;
            let shared_pages = forest.shared_pages(sequence as u32);
            self.rows.push(Row { begin: end, capacity, pages, length, shared_pages });
            end += capacity as usize;
        }
        // What stands behind a row's own entries is never read.
        self.ids.resize(end, 0);
        for (sequence, row) in self.rows.iter().enumerate() {
            let pages = row.pages as usize;
            self.ids[row.begin..][..pages].copy_from_slice(batch.first_pages(sequence, pages));
        }
    }

    /// Says what `batch` changes. `changed_rows` are the rows whose entries in use may have changed, `None` for all. Unless
    /// the answer is [`PlanChange::Forest`], the snapshot is that of `batch` on return; else it must be taken anew.
    ///
    /// # Errors
    /// A changed row is not in the batch; the snapshot is as before.
    pub(super) fn update(&mut self, batch: &DecodeBatch<'_>, changed_rows: Option<&[u32]>) -> Result<PlanChange> {
        if let Some(&row) = changed_rows.into_iter().flatten().find(|&&row| row as usize >= batch.sequence_count()) {
            let expected = format!("rows of the batch, below {}", batch.sequence_count());
            return Err(Error::invalid("changed_rows", row, expected));
        }
        let same_pool = self.page_size == batch.page_size() && self.num_pages == batch.num_pages();
        if !same_pool || self.rows.len() != batch.sequence_count() {
            return Ok(PlanChange::Forest);
        }
        let mut change = PlanChange::Nothing;
        match changed_rows {
            None => (0..self.rows.len()).for_each(|row| change = change.max(self.compare_entries(batch, row))),
            Some(rows) => rows.iter().for_each(|&row| change = change.max(self.compare_entries(batch, row as usize))),
        }
        if change < PlanChange::Forest {
            change = change.max(self.compare_lengths(batch));
        }
        Ok(change)
    }

    /// Compares the entries that were in use and still are, and takes over those that differ.
    fn compare_entries(&mut self, batch: &DecodeBatch<'_>, index: usize) -> PlanChange {
        let row = self.rows[index];
        let new = batch.pages(index);
        let common = new.len().min(row.pages as usize);
        let old = &mut self.ids[row.begin..][..common];
        if old == &new[..common] {
            return PlanChange::Nothing;
        }
        let agreeing = old.iter().zip(new).take_while(|(old, new)| old == new).count();
        old.copy_from_slice(&new[..common]);
        row.change(batch.length(index), new.len() as u32, agreeing as u32, self.page_size)
    }

    /// Compares lengths, and takes over what rows have grown or shrunk by.
    fn compare_lengths(&mut self, batch: &DecodeBatch<'_>) -> PlanChange {
        let page_size = self.page_size;
        let mut change = PlanChange::Nothing;
        // Rows that end at a node stand in the order of their lengths: it stays if they grow alike.
        let mut growth_at_nodes = None;
        self.grown.clear();
        for (index, row) in self.rows.iter_mut().enumerate() {
            let length = batch.length(index);
            // Lengths are below 2^31.
            let growth = length as i32 - row.length as i32;
            if row.length > 0 && row.ends_at_node(row.length, page_size) {
                if growth_at_nodes.is_some_and(|others| others != growth) {
                    return PlanChange::Forest;
                }
                growth_at_nodes = Some(growth);
            }
            if growth == 0 {
                continue;
            }
            let new = batch.pages(index);
            let pages = new.len() as u32;
            // Entries that were not in use before are other pages, not other contents.
            change = change.max(row.change(length, pages, row.pages.min(pages), page_size));
            if change == PlanChange::Forest || pages > row.capacity {
                return PlanChange::Forest;
            }
            if pages > row.pages {
                let appended = row.pages as usize..pages as usize;
                self.ids[row.begin..][appended.clone()].copy_from_slice(&new[appended]);
            }
            (row.length, row.pages) = (length, pages);
            self.grown.push((index as u32, growth));
        }
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u32 = 16;

    /// What a step from one batch to another changes, without a hint.
    fn change(before: (&[&[u32]], &[u32]), after: (&[&[u32]], &[u32])) -> PlanChange {
        let batch = |(tables, lengths)| DecodeBatch::from_block_tables(tables, lengths, PAGE, 100).unwrap();
        let before = batch(before);
        let mut forest = Forest::default();
        forest.build(&before);
        let mut snapshot = Snapshot::default();
        snapshot.take(&before, &forest);
        snapshot.update(&batch(after), None).unwrap()
    }

    #[test]
    fn steps_are_told_apart() {
        // Two rows share pages 1 and 2; the first then has two pages of its own, the second a partial one.
        let tables: &[&[u32]] = &[&[1, 2, 3, 4], &[1, 2, 5]];
        let from = |after: (&[&[u32]], &[u32])| change((tables, &[63, 40]), after);
        assert_eq!(from((tables, &[63, 40])), PlanChange::Nothing);
        assert_eq!(from((tables, &[63, 41])), PlanChange::Lengths);
        // The last page fills up; it is not the first private one.
        assert_eq!(from((tables, &[64, 40])), PlanChange::Lengths);
        assert_eq!(from((&[&[1, 2, 3, 4, 6], &[1, 2, 5]], &[65, 40])), PlanChange::Pages);
        assert_eq!(from((tables, &[48, 40])), PlanChange::Pages);
        assert_eq!(from((&[&[1, 2, 3, 7], &[1, 2, 5]], &[63, 40])), PlanChange::Pages);
        assert_eq!(from((&[&[1, 2, 3, 4], &[1, 2, 8]], &[63, 40])), PlanChange::Pages);
        // The first private page becomes full, or another one: it could now be shared.
        assert_eq!(from((tables, &[63, 48])), PlanChange::Forest);
        assert_eq!(from((&[&[1, 2, 7, 4], &[1, 2, 5]], &[63, 40])), PlanChange::Forest);
        // A shared page is replaced, is no longer full, the row ends, is permuted, leaves, joins.
        assert_eq!(from((&[&[1, 9, 3, 4], &[1, 2, 5]], &[63, 40])), PlanChange::Forest);
        assert_eq!(from((tables, &[63, 31])), PlanChange::Forest);
        assert_eq!(from((tables, &[63, 0])), PlanChange::Forest);
        assert_eq!(from((&[&[1, 2, 5], &[1, 2, 3, 4]], &[40, 63])), PlanChange::Forest);
        assert_eq!(from((&[&[1, 2, 3, 4]], &[63])), PlanChange::Forest);
        assert_eq!(from((&[&[1, 2, 3, 4], &[1, 2, 5], &[]], &[63, 40, 0])), PlanChange::Forest);
    }

    #[test]
    fn only_hinted_rows_are_compared_but_all_lengths() {
        let before: &[&[u32]] = &[&[1], &[2]];
        let before = DecodeBatch::from_block_tables(before, &[3, 3], PAGE, 100).unwrap();
        let mut forest = Forest::default();
        forest.build(&before);
        let mut snapshot = Snapshot::default();
        snapshot.take(&before, &forest);
        let after: &[&[u32]] = &[&[1], &[4]];
        let after = DecodeBatch::from_block_tables(after, &[4, 4], PAGE, 100).unwrap();
        assert_eq!(snapshot.clone().update(&after, Some(&[])).unwrap(), PlanChange::Lengths);
        assert_eq!(snapshot.clone().update(&after, Some(&[1])).unwrap(), PlanChange::Pages);
        let error = snapshot.update(&after, Some(&[0, 2])).unwrap_err().to_string();
        assert!(error.contains("changed_rows") && error.contains("got 2"), "{error}");
    }

    #[test]
    fn rows_grow_beyond_their_room() {
        let ids: Vec<u32> = (0..90).collect();
        let lengths: Vec<u32> = (0..90 * PAGE).collect();
        let tables: &[&[u32]] = &[&ids];
        let at = |length: usize| DecodeBatch::from_block_tables(tables, &lengths[length..=length], PAGE, 100).unwrap();
        let (mut forest, mut snapshot) = (Forest::default(), Snapshot::default());
        forest.build(&at(1));
        snapshot.take(&at(1), &forest);
        let mut taken = 0;
        for length in 2..lengths.len() {
            let change = snapshot.update(&at(length), None).unwrap();
            if change == PlanChange::Forest {
                forest.build(&at(length));
                snapshot.take(&at(length), &forest);
                taken += 1;
            } else {
                assert_eq!(change == PlanChange::Pages, length as u32 % PAGE == 1, "{length}");
            }
        }
        assert!(taken <= 2 + 90 / Snapshot::SLACK, "{taken}");
    }
}
