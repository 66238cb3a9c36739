//! Tables of pages of one token, split into runs: whole runs of consecutive pages, and the pages that are in none.
//!
//! A row is split from its first token on: 16 consecutive page ids are a run, wherever they begin, and what stands before the
//! next run is in none. Consecutive ids at the row's very end that go on where its last run has ended are a partial run. So a
//! row's split depends on its ids alone, rows with equal beginnings are split alike (up to a run in which they part), and a
//! row that grows changes at its end only.

use crate::DecodeBatch;
use crate::batch::PlacedRow;
use pat_abi::RUN_PAGES;

/// Consecutive ids of a run.
const RUN: usize = RUN_PAGES as usize;

/// The rows of a batch, split.
#[derive(Clone, Debug, Default)]
pub(super) struct RunTables {
    num_pages: u32,
    rows: Vec<SplitRow>,
    /// The first ids of runs; lengths are tokens.
    runs: Store,
    /// Ids that are in no run.
    singles: Store,
    /// Rows whose runs or singles may have changed before their ends.
    changed: Vec<u32>,
    /// Memory for a row.
    spare: [Vec<u32>; 2],
}

/// How far a row has been split.
#[derive(Clone, Copy, Debug, Default)]
struct SplitRow {
    /// Tokens of the row.
    length: u32,
    /// Of these, consecutive ones at its end that are not a run yet.
    open: u32,
    /// The first of these.
    open_begin: u32,
    /// Whether they are the partial run, not singles.
    is_partial_run: bool,
}

impl SplitRow {
    /// The tokens at a row's end that are no run: consecutive ones behind `last_run`, if that ends right before them.
    fn new(length: u32, open: &[u32], last_run: Option<u32>, num_pages: u32) -> Self {
        let Some(&open_begin) = open.first() else { return Self { length, ..Self::default() } };
        Self {
            length,
            open: open.len() as u32,
            open_begin,
            is_partial_run: last_run.is_some_and(|run| goes_on(run, open_begin, num_pages)),
        }
    }
}

/// Whether `id` may begin a partial run behind `run`. A kernel may copy all of it: it ends in the pool.
fn goes_on(run: u32, id: u32, num_pages: u32) -> bool {
    id == run + RUN_PAGES && id + RUN_PAGES <= num_pages
}

/// Whether all of the ids are consecutive.
fn are_consecutive(ids: &[u32; RUN]) -> bool {
    let first = ids[0];
    ids.iter().zip(0u32..).fold(0, |different, (id, i)| different | (id ^ first.wrapping_add(i))) == 0
}

/// Whether some id of `ids` is followed by the next one in `behind`.
fn has_neighbours(ids: &[u32; RUN], behind: &[u32; RUN]) -> bool {
    ids.iter().zip(behind).fold(false, |any, (id, next)| any | (id.wrapping_add(1) == *next))
}

/// Where the consecutive ids from the first on end, at the latest with a run.
fn consecutive_end(ids: &[u32]) -> usize {
    let ids = &ids[..ids.len().min(RUN)];
    ids.windows(2).position(|pair| pair[0].wrapping_add(1) != pair[1]).map_or(ids.len(), |last| last + 1)
}

/// Splits the ids of a row.
fn split(ids: &[u32], num_pages: u32, runs: &mut Vec<u32>, singles: &mut Vec<u32>) -> SplitRow {
    runs.clear();
    singles.clear();
    let mut rest = ids;
    let mut is_behind_run = false;
    loop {
        while let Some((run, behind)) = rest.split_first_chunk::<RUN>()
            && are_consecutive(run)
        {
            runs.push(run[0]);
            (rest, is_behind_run) = (behind, true);
        }
        // Up to the next run, or to the tokens at the end that may become one.
        let mut end = 0;
        loop {
            // Far from a run, many at a time.
            while let Some(next) = rest.get(end + 1..).and_then(<[u32]>::first_chunk::<RUN>)
                && let Some(here) = rest[end..].first_chunk::<RUN>()
                && !has_neighbours(here, next)
            {
                end += RUN;
            }
            let consecutive = consecutive_end(&rest[end..]);
            if consecutive == RUN || end + consecutive == rest.len() {
                break;
            }
            end += consecutive;
        }
        let (outside, behind) = rest.split_at(end);
        singles.extend_from_slice(outside);
        (rest, is_behind_run) = (behind, is_behind_run && outside.is_empty());
        if rest.len() < RUN || !rest.first_chunk::<RUN>().is_some_and(are_consecutive) {
            let last_run = runs.last().copied().filter(|_| is_behind_run);
            let row = SplitRow::new(ids.len() as u32, rest, last_run, num_pages);
            if row.is_partial_run {
                runs.push(row.open_begin);
            } else {
                singles.extend_from_slice(rest);
            }
            return row;
        }
    }
}

/// What a batch looks like, in a fraction of the time that splitting takes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Look {
    pub(super) tokens: u64,
    /// Of each row's ids, 16 at a time, every fourth of these.
    looked_at: u64,
    /// Those of them whose last id stands 15 behind their first.
    runs: u64,
}

impl Look {
    pub(super) fn at(batch: &DecodeBatch<'_>) -> Self {
        let mut look = Self::default();
        for row in 0..batch.sequence_count() {
            let ids = batch.pages(row);
            let blocks = ids.as_chunks::<RUN>().0.iter().step_by(4);
            look.tokens += ids.len() as u64;
            look.looked_at += blocks.len() as u64;
            look.runs += blocks.filter(|ids| ids[0].wrapping_add(RUN_PAGES - 1) == ids[RUN - 1]).count() as u64;
        }
        look
    }

    pub(super) fn are_most_in_runs(self) -> bool {
        is_most(self.runs, self.looked_at)
    }

    /// Whether some are in no run. There may be some where it does not look so.
    pub(super) fn has_singles(self) -> bool {
        self.runs < self.looked_at
    }
}

impl RunTables {
    /// Whether at least half of the tokens are in runs.
    pub(super) fn are_most_in_runs(&self) -> bool {
        let run_tokens = self.runs.tokens();
        is_most(run_tokens, run_tokens + self.single_tokens())
    }

    /// Tokens in no run.
    pub(super) fn single_tokens(&self) -> u64 {
        self.singles.tokens()
    }

    /// Splits a batch.
    pub(super) fn take(&mut self, batch: &DecodeBatch<'_>) {
        self.num_pages = batch.num_pages();
        self.rows.clear();
        self.runs.clear();
        self.singles.clear();
        self.changed.clear();
        for row in 0..batch.sequence_count() {
            self.push_row(batch, row);
        }
        self.runs.settle();
        self.singles.settle();
    }

    /// Brings the split up to date: it is that of `batch` then. `changed_rows` are the rows whose entries in use may have
    /// changed, rows of the batch, `None` for all. Returns whether [`Self::changed`] says which rows have changed: otherwise all
    /// may have.
    pub(super) fn update(&mut self, batch: &DecodeBatch<'_>, changed_rows: Option<&[u32]>) -> bool {
        let new_rows = batch.sequence_count();
        let Some(named) = changed_rows else {
            self.take(batch);
            return false;
        };
        if self.num_pages != batch.num_pages() || self.runs.is_sparse() || self.singles.is_sparse() {
            self.take(batch);
            return false;
        }
        self.changed.clear();
        self.changed.extend_from_slice(named);
        self.rows.truncate(new_rows);
        self.runs.truncate(new_rows);
        self.singles.truncate(new_rows);
        let known_rows = self.rows.len();
        for &row in named.iter().filter(|row| (**row as usize) < known_rows) {
            self.replace_row(batch, row as usize);
        }
        for row in 0..known_rows {
            let (old, new) = (self.rows[row].length, batch.length(row));
            if new < old {
                self.replace_row(batch, row);
                self.changed.push(row as u32);
            } else if new > old {
                let appended = &batch.pages(row)[old as usize..];
                if self.grow_row(row, appended) {
                    self.changed.push(row as u32);
                }
            }
        }
        for row in known_rows..new_rows {
            self.push_row(batch, row);
        }
        true
    }

    /// The rows that the last update had named or that have changed otherwise than at their ends.
    pub(super) fn changed(&self) -> &[u32] {
        &self.changed
    }

    /// The runs, as pages of 16 tokens of which each begins at every token.
    pub(super) fn runs(&self) -> DecodeBatch<'_> {
        self.runs.batch(RUN_PAGES, self.num_pages.saturating_sub(RUN_PAGES - 1))
    }

    /// What is in no run.
    pub(super) fn singles(&self) -> DecodeBatch<'_> {
        self.singles.batch(1, self.num_pages)
    }

    /// Rows with tokens in runs and others: their results are merged.
    pub(super) fn divided_rows(&self) -> usize {
        self.runs
            .lengths
            .iter()
            .zip(&self.singles.lengths)
            .filter(|(runs, singles)| **runs > 0 && **singles > 0)
            .count()
    }

    fn split_row(&mut self, batch: &DecodeBatch<'_>, row: usize) -> (SplitRow, u32) {
        let [runs, singles] = &mut self.spare;
        let split = split(batch.pages(row), self.num_pages, runs, singles);
        (split, split.length - singles.len() as u32)
    }

    fn push_row(&mut self, batch: &DecodeBatch<'_>, row: usize) {
        let (split, in_runs) = self.split_row(batch, row);
        let [runs, singles] = &self.spare;
        self.rows.push(split);
        self.runs.push(runs, in_runs);
        self.singles.push(singles, singles.len() as u32);
    }

    fn replace_row(&mut self, batch: &DecodeBatch<'_>, row: usize) {
        let (split, in_runs) = self.split_row(batch, row);
        let [runs, singles] = &self.spare;
        self.rows[row] = split;
        self.runs.replace(row, runs, in_runs);
        self.singles.replace(row, singles, singles.len() as u32);
    }

    /// Appends tokens to a row; returns whether anything before its ends has changed.
    fn grow_row(&mut self, row: usize, ids: &[u32]) -> bool {
        let mut has_changed = false;
        for &id in ids {
            let mut split = self.rows[row];
            split.length += 1;
            if split.open > 0 && id == split.open_begin + split.open {
                split.open += 1;
                if split.is_partial_run {
                    self.runs.lengths[row] += 1;
                } else {
                    self.singles.append(row, id, 1);
                }
                if split.open == RUN_PAGES {
                    if !split.is_partial_run {
                        self.singles.shorten(row, RUN_PAGES);
                        self.runs.append(row, split.open_begin, RUN_PAGES);
                        has_changed = true;
                    }
                    split = SplitRow { length: split.length, ..SplitRow::default() };
                }
            } else {
                if split.is_partial_run {
                    // It ends in the middle of the row now.
                    self.runs.shorten(row, 1);
                    self.runs.lengths[row] = self.runs.rows[row].ids * RUN_PAGES;
                    (0..split.open).for_each(|i| self.singles.append(row, split.open_begin + i, 1));
                    has_changed = true;
                }
                let last_run = self.runs.last(row).filter(|_| split.open == 0);
                split = SplitRow::new(split.length, &[id], last_run, self.num_pages);
                if split.is_partial_run {
                    self.runs.append(row, id, 1);
                } else {
                    self.singles.append(row, id, 1);
                }
            }
            self.rows[row] = split;
        }
        has_changed
    }
}

/// Whether `part` is at least half of `all`, and something.
fn is_most(part: u64, all: u64) -> bool {
    part > 0 && 2 * part >= all
}

/// Ids by row; each row has room to grow behind its own.
#[derive(Clone, Debug, Default)]
struct Store {
    rows: Vec<PlacedRow>,
    /// By row, how many ids it has room for.
    capacities: Vec<u32>,
    /// By row, its tokens.
    lengths: Vec<u32>,
    ids: Vec<u32>,
    /// Ids and room when all rows were placed.
    settled: usize,
}

impl Store {
    /// Room of a row with so many ids.
    fn capacity(ids: usize) -> usize {
        ids + ids / 8 + RUN
    }

    fn clear(&mut self) {
        let Self { rows, capacities, lengths, ids, settled: _ } = self;
        rows.clear();
        capacities.clear();
        lengths.clear();
        ids.clear();
    }

    fn settle(&mut self) {
        self.settled = self.ids.len();
    }

    /// Whether rows that have moved have left much behind.
    fn is_sparse(&self) -> bool {
        self.ids.len() > 2 * self.settled + 4096
    }

    fn tokens(&self) -> u64 {
        self.lengths.iter().map(|length| u64::from(*length)).sum()
    }

    fn truncate(&mut self, rows: usize) {
        self.rows.truncate(rows);
        self.capacities.truncate(rows);
        self.lengths.truncate(rows);
    }

    fn push(&mut self, ids: &[u32], length: u32) {
        self.rows.push(PlacedRow::default());
        self.capacities.push(0);
        self.lengths.push(0);
        self.replace(self.rows.len() - 1, ids, length);
    }

    fn replace(&mut self, row: usize, ids: &[u32], length: u32) {
        self.rows[row].ids = 0;
        self.reserve(row, ids.len());
        let placed = &mut self.rows[row];
        placed.ids = ids.len() as u32;
        self.ids[placed.begin..][..ids.len()].copy_from_slice(ids);
        self.lengths[row] = length;
    }

    /// Gives a row room for `ids` ids.
    fn reserve(&mut self, row: usize, ids: usize) {
        if ids <= self.capacities[row] as usize {
            return;
        }
        let placed = &mut self.rows[row];
        let former = placed.begin..placed.begin + placed.ids as usize;
        placed.begin = self.ids.len();
        let capacity = Self::capacity(ids);
        self.capacities[row] = capacity as u32;
        self.ids.resize(placed.begin + capacity, 0);
        self.ids.copy_within(former, placed.begin);
    }

    fn append(&mut self, row: usize, id: u32, tokens: u32) {
        self.reserve(row, self.rows[row].ids as usize + 1);
        let placed = &mut self.rows[row];
        self.ids[placed.begin + placed.ids as usize] = id;
        placed.ids += 1;
        self.lengths[row] += tokens;
    }

    /// Takes the last `ids` ids off a row, each of them a token.
    fn shorten(&mut self, row: usize, ids: u32) {
        self.rows[row].ids -= ids;
        self.lengths[row] -= ids;
    }

    fn last(&self, row: usize) -> Option<u32> {
        let PlacedRow { begin, ids } = self.rows[row];
        self.ids[begin..][..ids as usize].last().copied()
    }

    fn batch(&self, page_size: u32, num_pages: u32) -> DecodeBatch<'_> {
        DecodeBatch::of_placed((&self.rows, &self.ids), &self.lengths, page_size, num_pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NUM_PAGES: u32 = 400;

    /// The tokens in runs and the others, by the rule, a token at a time.
    fn expected(ids: &[u32]) -> (Vec<(u32, u32)>, Vec<u32>) {
        let (mut runs, mut singles) = (Vec::new(), Vec::new());
        let mut begin = 0;
        let mut run_end = None;
        while begin < ids.len() {
            let follows = |at: usize| ids[at] == ids[begin] + (at - begin) as u32;
            let end =
                (begin..ids.len().min(begin + RUN)).take_while(|at| follows(*at)).last().map_or(begin, |at| at + 1);
            let goes_on = run_end == Some((begin, ids[begin])) && ids[begin] + RUN_PAGES <= NUM_PAGES;
            if end - begin == RUN {
                runs.push((ids[begin], RUN_PAGES));
                run_end = Some((end, ids[begin] + RUN_PAGES));
            } else if end == ids.len() && goes_on {
                runs.push((ids[begin], (end - begin) as u32));
            } else {
                singles.extend_from_slice(&ids[begin..end]);
            }
            begin = end;
        }
        (runs, singles)
    }

    fn of_row(tables: &RunTables, row: usize) -> (Vec<(u32, u32)>, Vec<u32>) {
        let (runs, singles) = (tables.runs(), tables.singles());
        let length = runs.length(row);
        let tokens = (0u32..).map(|run| RUN_PAGES.min(length - run * RUN_PAGES));
        assert!(runs.pages(row).iter().all(|run| *run < runs.num_pages()));
        (runs.pages(row).iter().copied().zip(tokens).collect(), singles.pages(row).to_vec())
    }

    /// Ids in stretches of consecutive ones.
    fn ids() -> impl Strategy<Value = Vec<u32>> {
        let stretch = prop_oneof![Just(1u32), 1..20u32, Just(RUN_PAGES), 16..70u32];
        prop::collection::vec((0..NUM_PAGES, stretch, any::<bool>()), 0..8).prop_map(|stretches| {
            let mut ids: Vec<u32> = Vec::new();
            for (begin, length, goes_on) in stretches {
                let begin = ids.last().filter(|_| goes_on).map_or(begin, |last| last + 1);
                ids.extend((begin..NUM_PAGES).take(length as usize));
            }
            ids
        })
    }

    proptest! {
        #[test]
        fn rows_are_split_by_the_rule_however_they_grow(rows in prop::collection::vec(ids(), 1..5), steps in prop::collection::vec(0..9usize, 0..60)) {
            let batch = |rows: &[&[u32]], lengths: &[u32], tables: &mut RunTables, hint: Option<&[u32]>| {
                let batch = DecodeBatch::from_block_tables(rows, lengths, 1, NUM_PAGES).unwrap();
                if tables.rows.is_empty() {
                    tables.take(&batch);
                } else {
                    tables.update(&batch, hint);
                }
                for (row, ids) in rows.iter().enumerate() {
                    assert_eq!(of_row(tables, row), expected(&ids[..lengths[row] as usize]), "{ids:?}");
                }
            };
            let slices: Vec<&[u32]> = rows.iter().map(|ids| &**ids).collect();
            let mut tables = RunTables::default();
            let mut lengths = vec![0; rows.len()];
            batch(&slices, &lengths, &mut tables, None);
            for step in steps {
                let row = step % rows.len();
                let ids = rows[row].len() as u32;
                // By a token, by some, and at times back.
                lengths[row] = [lengths[row] + 1, lengths[row] + step as u32, lengths[row].saturating_sub(3)][step % 3].min(ids);
                batch(&slices, &lengths, &mut tables, Some(&[]));
            }
            // Other ids in a row that is named; rows come and go.
            let mut others = slices.clone();
            others.reverse();
            lengths.reverse();
            let all: Vec<u32> = (0..rows.len() as u32).collect();
            batch(&others, &lengths, &mut tables, Some(&all));
            batch(&others[..1], &lengths[..1], &mut tables, Some(&[]));
            batch(&others, &lengths, &mut tables, Some(&[]));
            batch(&slices, &vec![0; rows.len()], &mut tables, None);
        }
    }

    #[test]
    fn what_ends_in_the_pool_alone_is_a_partial_run() {
        let ids: Vec<u32> = (0..60).collect();
        let rows: &[&[u32]] = &[&ids[..], &ids[8..]];
        let mut tables = RunTables::default();
        for (num_pages, partial) in [(64, true), (63, false)] {
            tables.take(&DecodeBatch::from_block_tables(rows, &[60, 40], 1, num_pages).unwrap());
            let (runs, singles) = (tables.runs(), tables.singles());
            assert_eq!((runs.length(0), singles.length(0)), if partial { (60, 0) } else { (48, 12) });
            assert_eq!((runs.pages(1), runs.length(1)), (&[8, 24, 40][..], 40));
            assert_eq!(tables.divided_rows(), usize::from(!partial));
            assert!(tables.are_most_in_runs());
            assert_eq!(tables.single_tokens(), if partial { 0 } else { 12 });
        }
    }

    #[test]
    fn a_look_tells_rows_in_runs_from_others() {
        let consecutive: Vec<u32> = (100..170).collect();
        let scattered: Vec<u32> = (0..64).map(|i| 5 * i).collect();
        let look = |rows: &[&[u32]]| {
            let lengths: Vec<u32> = rows.iter().map(|row| row.len() as u32).collect();
            let look = Look::at(&DecodeBatch::from_block_tables(rows, &lengths, 1, NUM_PAGES).unwrap());
            (look.are_most_in_runs(), look.has_singles(), look.tokens)
        };
        assert_eq!(look(&[&consecutive]), (true, false, 70));
        assert_eq!(look(&[&consecutive, &consecutive, &scattered]), (true, true, 204));
        assert_eq!(look(&[&scattered]), (false, true, 64));
        assert_eq!(look(&[&scattered, &consecutive, &scattered]), (false, true, 198));
        assert_eq!(look(&[]), (false, false, 0));
    }
}
