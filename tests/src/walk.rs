//! A batch that lives: every step most sequences grow by a token, and now and then something else happens.

use pat_workloads::OwnedBatch;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a walk stays within.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Pages in the pool; every id is drawn from all of it.
    pub num_pages: u32,
    /// Sequences: where there are as many, none joins.
    pub sequences: usize,
    /// Tokens of a sequence: one that has as many leaves.
    pub tokens: u32,
}

impl Limits {
    /// None but the pool's.
    pub fn of_pool(num_pages: u32) -> Self {
        Self { num_pages, sequences: usize::MAX, tokens: u32::MAX }
    }
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Sequences that joined.
    pub joined: u64,
    /// Sequences that left.
    pub left: u64,
    /// Sequences that lost their tokens and kept their row.
    pub evicted: u64,
    /// Pages that became other pages: copies, or those of another sequence.
    pub pages_replaced: u64,
}

/// The batch and its random numbers.
#[derive(Clone, Debug)]
pub struct Walk {
    /// As it is now.
    pub batch: OwnedBatch,
    /// Since the beginning.
    pub events: Events,
    limits: Limits,
    rng: ChaCha8Rng,
}

impl Walk {
    /// A few sequences over pages of one of `page_sizes` tokens.
    ///
    /// # Panics
    /// There is no page size.
    pub fn new(seed: u64, page_sizes: &[u32], limits: Limits) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_size = *page_sizes.choose(&mut rng).expect("a page size");
        let batch =
            OwnedBatch { page_size, num_pages: limits.num_pages, lengths: Vec::new(), block_tables: Vec::new() };
        let mut walk = Self { batch, events: Events::default(), limits, rng };
        for _ in 0..walk.rng.random_range(1..24) {
            walk.join();
        }
        walk
    }

    fn any_row(&mut self) -> Option<usize> {
        let rows = self.batch.lengths.len();
        (rows > 0).then(|| self.rng.random_range(0..rows))
    }

    fn page(&mut self) -> u32 {
        self.rng.random_range(0..self.limits.num_pages)
    }

    /// Makes a table long enough for its length, sometimes by the page that another row has there: two sequences that
    /// generate the same tokens come to share the page once it is full.
    fn extend(&mut self, row: usize) {
        while (self.batch.block_tables[row].len() as u32) < self.batch.lengths[row].div_ceil(self.batch.page_size) {
            let at = self.batch.block_tables[row].len();
            let other = self.rng.random_range(0..self.batch.lengths.len());
            let twin = self.batch.block_tables[other].get(at).copied();
            let page = twin.filter(|_| self.rng.random_bool(0.3)).unwrap_or_else(|| self.page());
            self.batch.block_tables[row].push(page);
        }
    }

    fn join(&mut self) {
        if self.batch.lengths.len() >= self.limits.sequences {
            return;
        }
        let parent = self.any_row();
        let (table, length) = match parent {
            Some(row) if self.rng.random_bool(0.7) => {
                let (table, length) = (self.batch.block_tables[row].clone(), self.batch.lengths[row]);
                (table, if self.rng.random_bool(0.3) { length } else { self.rng.random_range(0..=length) })
            }
            _ => (Vec::new(), 0),
        };
        let more = [0, 1, 3, 40, 200][self.rng.random_range(0..5)];
        self.batch.lengths.push((length + more).min(self.limits.tokens));
        self.batch.block_tables.push(table);
        self.extend(self.batch.lengths.len() - 1);
        self.events.joined += 1;
    }

    fn leave(&mut self, row: usize) {
        self.batch.lengths.remove(row);
        self.batch.block_tables.remove(row);
        self.events.left += 1;
    }

    fn permute(&mut self) {
        let mut order: Vec<usize> = (0..self.batch.lengths.len()).collect();
        order.shuffle(&mut self.rng);
        self.batch.lengths = order.iter().map(|&row| self.batch.lengths[row]).collect();
        self.batch.block_tables = order.iter().map(|&row| self.batch.block_tables[row].clone()).collect();
    }

    /// One decode step.
    pub fn step(&mut self) {
        if self.rng.random_bool(0.95) {
            for row in 0..self.batch.lengths.len() {
                // Empty rows are padding; now and then one stalls.
                if self.batch.lengths[row] > 0 && self.rng.random_bool(0.995) {
                    self.batch.lengths[row] = self.batch.lengths[row].saturating_add(1);
                    if self.batch.lengths[row] <= self.limits.tokens {
                        self.extend(row);
                    }
                }
            }
            while let Some(row) = self.batch.lengths.iter().position(|&length| length > self.limits.tokens) {
                self.leave(row);
            }
        }
        match (self.rng.random_range(0..24), self.any_row()) {
            (0, _) | (_, None) => self.join(),
            (1, Some(row)) => self.leave(row),
            (2, _) => self.permute(),
            // A page in the middle is replaced: by a copy, or by that of another row.
            (3 | 4, Some(row)) if !self.batch.block_tables[row].is_empty() => {
                let at = self.rng.random_range(0..self.batch.block_tables[row].len());
                let other = self.rng.random_range(0..self.batch.lengths.len());
                let page = self.batch.block_tables[other].get(at).copied().unwrap_or(0);
                self.batch.block_tables[row][at] = if self.rng.random_bool(0.5) { page } else { self.page() };
                self.events.pages_replaced += 1;
            }
            // A whole prefix is replaced by another row's: engines de-duplicate after the fact.
            (5, Some(row)) => {
                let other = self.rng.random_range(0..self.batch.lengths.len());
                let common = self.batch.block_tables[row].len().min(self.batch.block_tables[other].len());
                let prefix = self.batch.block_tables[other][..common].to_vec();
                self.batch.block_tables[row][..common].copy_from_slice(&prefix);
                self.events.pages_replaced += common as u64;
            }
            // Rejected tokens are taken back.
            (6, Some(row)) => {
                self.batch.lengths[row] = self.batch.lengths[row].saturating_sub(self.rng.random_range(0..6));
            }
            (7, Some(row)) => {
                let other = self.rng.random_range(0..self.batch.lengths.len());
                self.batch.lengths.swap(row, other);
                self.batch.block_tables.swap(row, other);
            }
            // Evicted: its row stays for the time being.
            (8, Some(row)) => {
                self.batch.lengths[row] = 0;
                self.events.evicted += 1;
            }
            _ => {}
        }
    }
}

/// Rows whose entries in use have changed: what [`pat_rs::Planner::advance`] takes as a hint.
pub fn changed_rows(before: &OwnedBatch, after: &OwnedBatch) -> Vec<u32> {
    let pages = |batch: &OwnedBatch, row: usize| batch.lengths[row].div_ceil(batch.page_size) as usize;
    (0..before.lengths.len().min(after.lengths.len()))
        .filter(|&row| {
            let common = pages(before, row).min(pages(after, row));
            before.block_tables[row][..common] != after.block_tables[row][..common]
        })
        .map(|row| row as u32)
        .collect()
}
