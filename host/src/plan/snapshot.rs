//! What the batch of the former step looked like, and how much of the plan a new step leaves valid.

use super::buffer::Growth;
use super::forest::Forest;
use super::tiling::Extent;
use crate::DecodeBatch;

/// What a decode step has changed, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PlanChange {
    /// Nothing: the plan, its generation included, is as before, and need not be uploaded again.
    Nothing,
    /// Lengths, within the last pages.
    Lengths,
    /// Private pages: more, fewer or other ones. Who shares what with whom is as before.
    Pages,
    /// Anything else: rows, sharing, the pool.
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
    /// Entries of `ids` when all rows were taken.
    taken: usize,
    /// Memory for rows.
    spare: Vec<Row>,
    /// What the last update has found, while it could tell.
    found: Found,
}

/// What an update has found.
#[derive(Clone, Debug, Default)]
struct Found {
    /// Rows of another length that were planned before.
    grown: Vec<Grown>,
    /// Whether entries were replaced or dropped.
    has_lost_entries: bool,
    /// Rows, as they were numbered before, whose sequences have ended or moved to another place in the forest.
    left: Vec<u32>,
    /// Rows with new sequences, or with those that have moved.
    joined: Vec<u32>,
    /// By row as it was numbered before, its number now; nothing where no row was passed over.
    moved: Vec<u32>,
    /// By row, the number that it had; likewise.
    origins: Vec<u32>,
}

/// How a row differs from what it was.
#[derive(Clone, Copy, Debug)]
struct Grown {
    row: u32,
    /// Tokens more, or fewer.
    tokens: i32,
    /// Pages more.
    pages: u32,
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

    /// How the rows have grown, where the last update found nothing else.
    pub(super) fn growths(&self) -> Option<impl Iterator<Item = Growth<'_>>> {
        let growth = |grown: &Grown| {
            let row = &self.rows[grown.row as usize];
            Growth {
                row: grown.row,
                tokens: grown.tokens,
                last_page_tokens: row.length - row.pages.saturating_sub(1) * self.page_size,
                pages: &self.ids[row.begin..][(row.pages - grown.pages) as usize..row.pages as usize],
            }
        };
        (!self.found.has_lost_entries).then(|| self.found.grown.iter().map(growth))
    }

    /// Rows whose sequences have ended or moved, as they were numbered before the last update.
    pub(super) fn left(&self) -> &[u32] {
        &self.found.left
    }

    /// Rows with new sequences, or with those that have moved.
    pub(super) fn joined(&self) -> &[u32] {
        &self.found.joined
    }

    /// What number a row has now, of which the last update has said that it has not left.
    pub(super) fn row_now(&self, row: u32) -> u32 {
        self.found.moved.get(row as usize).copied().unwrap_or(row)
    }

    /// Takes note that a row shares so many pages with another, at least.
    pub(super) fn raise_shared(&mut self, row: u32, pages: u32) {
        let shared = &mut self.rows[row as usize].shared_pages;
        *shared = pages.max(*shared);
    }

    /// Brings the page counts of `forest`'s sequences up to date.
    pub(super) fn measure(&self, forest: &Forest, extents: &mut [Extent]) {
        for (extent, &row) in extents.iter_mut().zip(forest.order()) {
            extent.pages = self.rows[row as usize].pages;
        }
    }

    /// Keeps `batch`, whose forest is `forest`.
    pub(super) fn take(&mut self, batch: &DecodeBatch<'_>, forest: &Forest) {
        self.page_size = batch.page_size();
        self.num_pages = batch.num_pages();
        self.rows.clear();
        let sequences = batch.sequence_count();
        let Found { grown, has_lost_entries: _, left, joined, moved, origins } = &mut self.found;
        grown.clear();
        grown.reserve(sequences);
        left.clear();
        left.reserve(sequences);
        joined.clear();
        joined.reserve(sequences);
        moved.clear();
        moved.reserve(sequences);
        origins.clear();
        origins.reserve(sequences);
        let mut end = 0;
        for sequence in 0..sequences {
            let length = batch.length(sequence);
            let pages = length.div_ceil(batch.page_size());
            let capacity = pages + Self::SLACK;
            let shared_pages = forest.shared_pages(sequence as u32);
            self.rows.push(Row { begin: end, capacity, pages, length, shared_pages });
            end += capacity as usize;
        }
        // What stands behind a row's own entries is never read.
        self.ids.resize(end, 0);
        self.taken = end;
        for (sequence, row) in self.rows.iter().enumerate() {
            let pages = row.pages as usize;
            self.ids[row.begin..][..pages].copy_from_slice(batch.first_pages(sequence, pages));
        }
    }

    /// Says what `batch` changes, and makes the snapshot that of `batch`, but for what rows share with [`Self::joined`] ones. It
    /// gives none where too much has changed: then the snapshot must be taken anew. `changed_rows` are the rows whose entries in
    /// use may have changed, rows of the batch, `None` for all; `follows_rows` says whether rows that leave and join are of use.
    pub(super) fn update(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        follows_rows: bool,
    ) -> Option<PlanChange> {
        let same_pool = self.page_size == batch.page_size() && self.num_pages == batch.num_pages();
        let (rows, new_rows) = (self.rows.len(), batch.sequence_count());
        if !same_pool || (rows != new_rows && !follows_rows) {
            return None;
        }
        let Found { grown, has_lost_entries, left, joined, moved, origins } = &mut self.found;
        grown.clear();
        left.clear();
        joined.clear();
        moved.clear();
        origins.clear();
        *has_lost_entries = false;
        let mut change = if rows == new_rows { PlanChange::Nothing } else { PlanChange::Forest };
        // More changes than this take longer one by one.
        let most_moves = rows / 8 + 2;
        // The first row from which on rows have moved up.
        let mut moved_from = None;
        let common = rows.min(new_rows);
        let named =
            changed_rows.map_or(0..common, |_| 0..0).chain(changed_rows.into_iter().flatten().map(|row| *row as usize));
        for row in named.filter(|row| *row < common) {
            if moved_from.is_some_and(|from| row >= from) {
                continue;
            }
            let of_row = self.compare_entries(batch, row);
            self.note(of_row, &mut change);
            if of_row < PlanChange::Forest {
                continue;
            }
            if !follows_rows || self.found.joined.len() > most_moves {
                return None;
            }
            // Where rows behind it have been replaced already, they are no longer what they were.
            let is_first = moved_from.is_none() && self.found.joined.iter().all(|joined| (*joined as usize) < row);
            if is_first && self.moves_up(batch, row) {
                moved_from = Some(row);
            } else {
                self.replace(batch, row);
            }
        }
        for row in moved_from.unwrap_or(new_rows)..self.rows.len().min(new_rows) {
            let of_row = self.compare_entries(batch, row);
            self.note(of_row, &mut change);
            if of_row == PlanChange::Forest {
                self.replace(batch, row);
            }
        }
        for row in new_rows..self.rows.len() {
            if self.rows[row].length > 0 {
                self.found.left.push(row as u32);
            }
        }
        self.rows.truncate(new_rows);
        for row in self.rows.len()..new_rows {
            self.rows.push(Row { begin: 0, capacity: 0, pages: 0, length: 0, shared_pages: 0 });
            self.replace(batch, row);
        }
        let of_lengths = self.compare_lengths(batch, follows_rows);
        // In whatever order the caller has named them.
        self.found.joined.sort_unstable();
        let moves = self.found.left.len().max(self.found.joined.len());
        if of_lengths == PlanChange::Forest && !follows_rows
            || moves > most_moves
            || self.ids.len() > 2 * self.taken + 4096
        {
            return None;
        }
        Some(change.max(of_lengths))
    }

    fn note(&mut self, of_row: PlanChange, change: &mut PlanChange) {
        *change = of_row.max(*change);
        self.found.has_lost_entries |= of_row != PlanChange::Nothing;
    }

    /// Whether row `from` has what a row shortly behind it had, as where the ones between have left and those behind moved up. If so,
    /// every row from there on is taken for the next one whose first own page it has, and what is passed over has left. What they
    /// are exactly is yet to be compared.
    fn moves_up(&mut self, batch: &DecodeBatch<'_>, from: usize) -> bool {
        /// Rows that may leave next to each other.
        const MOST_LEAVING: usize = 4;
        let (rows, ids) = (&self.rows, &self.ids);
        // By its first own page: a row without one is like none.
        let is_like = |row: usize, former: usize| {
            let (new, Row { begin, pages, shared_pages, .. }) = (batch.pages(row), rows[former]);
            let own = (shared_pages < pages).then(|| ids[begin + shared_pages as usize]);
            if pages == 0 { new.is_empty() } else { own.is_some() && new.get(shared_pages as usize).copied() == own }
        };
        // What stood there has been overwritten in the comparison.
        let last = (from + MOST_LEAVING).min(rows.len().saturating_sub(1));
        if !(from + 1..=last).any(|former| is_like(from, former)) {
            return false;
        }
        let Found { left, moved, origins, .. } = &mut self.found;
        moved.extend(0..from as u32);
        origins.extend(0..from as u32);
        self.spare.clear();
        self.spare.extend_from_slice(&rows[..from]);
        for (former, of_row) in rows.iter().enumerate().skip(from) {
            let row = self.spare.len();
            let is_there = row < batch.sequence_count();
            let is = |former: usize| former > from && former < rows.len() && is_there && is_like(row, former);
            // One that is like none of them was replaced where it stood.
            let has_left = former == from || (!is(former) && (former + 1..=former + MOST_LEAVING).any(is));
            if is_there && !has_left {
                moved.push(row as u32);
                origins.push(former as u32);
                self.spare.push(*of_row);
            } else {
                moved.push(u32::MAX);
                if of_row.length > 0 {
                    left.push(former as u32);
                }
            }
        }
        std::mem::swap(&mut self.rows, &mut self.spare);
        true
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
    fn compare_lengths(&mut self, batch: &DecodeBatch<'_>, follows_rows: bool) -> PlanChange {
        let page_size = self.page_size;
        let mut change = PlanChange::Nothing;
        // Rows that end at a node stand in the order of their lengths: it stays if they grow alike.
        let mut growth_at_nodes = None;
        for index in 0..self.rows.len() {
            let row = self.rows[index];
            let length = batch.length(index);
            // Lengths are below 2^31.
            let growth = length as i32 - row.length as i32;
            if !follows_rows && row.length > 0 && row.ends_at_node(row.length, page_size) {
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
            let of_row = row.change(length, pages, row.pages.min(pages), page_size);
            change = change.max(of_row);
            if of_row == PlanChange::Forest {
                if !follows_rows {
                    return change;
                }
                self.replace(batch, index);
                continue;
            }
            if pages > row.capacity {
                self.move_row(index, pages);
            }
            let row = &mut self.rows[index];
            let appended = pages.saturating_sub(row.pages);
            if appended > 0 {
                let range = row.pages as usize..pages as usize;
                self.ids[row.begin..][range.clone()].copy_from_slice(&new[range]);
            }
            self.found.has_lost_entries |= pages < row.pages;
            (row.length, row.pages) = (length, pages);
            self.found.grown.push(Grown { row: index as u32, tokens: growth, pages: appended });
        }
        change
    }

    /// Takes a row for another sequence, whose place in the forest is to be found.
    fn replace(&mut self, batch: &DecodeBatch<'_>, index: usize) {
        let (length, new) = (batch.length(index), batch.pages(index));
        let pages = new.len() as u32;
        if self.rows[index].length > 0 {
            let former = self.found.origins.get(index).copied().unwrap_or(index as u32);
            self.found.left.push(former);
        }
        if length > 0 {
            self.found.joined.push(index as u32);
        }
        if pages > self.rows[index].capacity {
            self.move_row(index, pages);
        }
        let row = &mut self.rows[index];
        self.ids[row.begin..][..new.len()].copy_from_slice(new);
        (row.length, row.pages, row.shared_pages) = (length, pages, 0);
    }

    /// Gives a row room for `pages` entries and more.
    fn move_row(&mut self, index: usize, pages: u32) {
        let row = &mut self.rows[index];
        let former = row.begin..row.begin + row.pages as usize;
        (row.begin, row.capacity) = (self.ids.len(), pages + Self::SLACK);
        self.ids.resize(row.begin + row.capacity as usize, 0);
        self.ids.copy_within(former, row.begin);
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
        snapshot.update(&batch(after), None, false).unwrap_or(PlanChange::Forest)
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
        assert_eq!(snapshot.clone().update(&after, Some(&[]), false), Some(PlanChange::Lengths));
        assert_eq!(snapshot.update(&after, Some(&[1]), false), Some(PlanChange::Pages));
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
            let change = snapshot.update(&at(length), None, false).unwrap_or(PlanChange::Forest);
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

    #[test]
    fn rows_that_move_up_are_followed() {
        let tables: Vec<Vec<u32>> = (0..40).map(|row| vec![99, row, 40 + row]).collect();
        let lengths = [45; 41];
        let all: Vec<&[u32]> = tables.iter().map(|table| &**table).collect();
        let before = DecodeBatch::from_block_tables(&all, &lengths[..40], PAGE, 100).unwrap();
        let mut forest = Forest::default();
        forest.build(&before);
        let mut snapshot = Snapshot::default();
        snapshot.take(&before, &forest);
        for leaving in [&[0][..], &[39], &[17], &[3, 4, 5], &[2, 20, 38], &[4, 5, 6, 7]] {
            let left: Vec<u32> = leaving.iter().map(|row| *row as u32).collect();
            let rows: Vec<usize> = (0..40).filter(|row| !leaving.contains(row)).collect();
            for joining in [None, Some(&[99, 80, 81][..])] {
                let mut after: Vec<&[u32]> = rows.iter().map(|row| all[*row]).collect();
                after.extend(joining);
                let after = DecodeBatch::from_block_tables(&after, &lengths[..after.len()], PAGE, 100).unwrap();
                let mut snapshot = snapshot.clone();
                let change = snapshot.update(&after, None, true);
                assert_eq!(change, Some(PlanChange::Forest));
                assert_eq!(snapshot.left(), left);
                let joined: Vec<u32> = joining.iter().map(|_| rows.len() as u32).collect();
                assert_eq!(snapshot.joined(), joined, "{leaving:?}");
                for (row, former) in rows.iter().enumerate() {
                    assert_eq!(snapshot.row_now(*former as u32), row as u32);
                }
            }
        }
    }
}
