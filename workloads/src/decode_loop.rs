//! Decode steps as a serving engine makes them: every sequence grows by a token, those that are done leave, others join.

use crate::OwnedBatch;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What the steps are of: always as many sequences, of requests behind a few system prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeLoopSpec {
    /// Sequences of every step.
    pub sequences: u32,
    /// System prompts; each request has one of them, drawn uniformly.
    pub groups: u32,
    /// Full pages of a system prompt.
    pub shared_pages: u32,
    /// Most tokens of a prompt behind its system prompt; drawn uniformly from 1 on.
    pub prompt_tokens: u32,
    /// Most tokens that a request generates; drawn uniformly from 1 on.
    pub output_tokens: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Whether a new request takes the row of one that is done. Else the rows behind that one move up, and new ones come last.
    pub reuses_rows: bool,
    /// Seed of lengths and page ids.
    pub seed: u64,
}

/// The steps of a [`DecodeLoopSpec`].
#[derive(Clone, Debug)]
pub struct DecodeLoop {
    /// The batch of the newest step.
    pub batch: OwnedBatch,
    spec: DecodeLoopSpec,
    /// By row, tokens to be generated.
    left: Vec<u32>,
    free_pages: Vec<u32>,
    rng: ChaCha8Rng,
}

impl DecodeLoop {
    /// The first step: requests that have come some of their way.
    ///
    /// # Panics
    /// A field other than `shared_pages` or `seed` is 0, or the pool would have 2^31 pages or more.
    pub fn new(spec: DecodeLoopSpec) -> Self {
        let DecodeLoopSpec { sequences, groups, shared_pages, prompt_tokens, output_tokens, page_size, .. } = spec;
        assert!(sequences > 0 && groups > 0 && prompt_tokens > 0 && output_tokens > 0 && page_size > 0, "{spec:?}");
        let most_pages = u64::from(prompt_tokens) + u64::from(output_tokens);
        let most_pages = u64::from(sequences) * most_pages.div_ceil(u64::from(page_size));
        let num_pages = u64::from(groups) * u64::from(shared_pages) + most_pages;
        let num_pages = u32::try_from(num_pages).ok().filter(|&n| n < 1 << 31).expect("a pool below 2^31 pages");
        let batch = OwnedBatch { page_size, num_pages, lengths: Vec::new(), block_tables: Vec::new() };
        let free_pages = (groups * shared_pages..num_pages).rev().collect();
        let rng = ChaCha8Rng::seed_from_u64(spec.seed);
        let mut steps = Self { batch, spec, left: Vec::new(), free_pages, rng };
        for row in 0..sequences as usize {
            steps.join(row);
            let done = steps.rng.random_range(0..steps.left[row]);
            steps.grow(row, done);
        }
        steps
    }

    /// The next step. Returns the rows that other sequences have now.
    pub fn step(&mut self) -> Vec<u32> {
        let mut changed = Vec::new();
        for row in (0..self.left.len()).rev() {
            if self.left[row] > 0 {
                self.grow(row, 1);
                continue;
            }
            changed.push(row as u32);
            let pages = self.batch.block_tables.remove(row);
            self.free_pages.extend(pages.into_iter().skip(self.spec.shared_pages as usize));
            self.batch.lengths.remove(row);
            self.left.remove(row);
            if self.spec.reuses_rows {
                self.join(row);
            }
        }
        while self.left.len() < self.spec.sequences as usize {
            self.join(self.left.len());
        }
        if !self.spec.reuses_rows
            && let Some(&first) = changed.last()
        {
            changed = (first..self.spec.sequences).collect();
        }
        changed
    }

    fn join(&mut self, row: usize) {
        let DecodeLoopSpec { groups, shared_pages, prompt_tokens, output_tokens, page_size, .. } = self.spec;
        let first = self.rng.random_range(0..groups) * shared_pages;
        self.batch.block_tables.insert(row, (first..first + shared_pages).collect());
        self.batch.lengths.insert(row, shared_pages * page_size);
        self.left.insert(row, self.rng.random_range(1..=output_tokens));
        let prompt = self.rng.random_range(1..=prompt_tokens);
        self.batch.lengths[row] += prompt;
        self.extend(row);
    }

    fn grow(&mut self, row: usize, tokens: u32) {
        self.batch.lengths[row] += tokens;
        self.left[row] -= tokens;
        self.extend(row);
    }

    fn extend(&mut self, row: usize) {
        let pages = self.batch.lengths[row].div_ceil(self.spec.page_size) as usize;
        while self.batch.block_tables[row].len() < pages {
            self.batch.block_tables[row].push(self.free_pages.pop().expect("the pool has all that the sequences need"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_append_a_token_and_replace_who_is_done() {
        for reuses_rows in [false, true] {
            let spec = DecodeLoopSpec {
                sequences: 20,
                groups: 2,
                shared_pages: 3,
                prompt_tokens: 40,
                output_tokens: 40,
                page_size: 16,
                reuses_rows,
                seed: 1,
            };
            let (mut steps, mut again) = (DecodeLoop::new(spec), DecodeLoop::new(spec));
            let mut steps_with_changes = 0;
            for _ in 0..50 {
                let before = steps.batch.lengths.clone();
                let changed = steps.step();
                assert_eq!(again.step(), changed);
                assert_eq!(steps.batch, again.batch);
                steps.batch.view(&steps.batch.rows()).expect("a valid batch");
                assert_eq!(steps.batch.lengths.len(), 20);
                let private: usize = steps.batch.block_tables.iter().map(|table| table.len() - 3).sum();
                let shared =
                    steps.batch.block_tables.iter().map(|table| table[0]).collect::<std::collections::HashSet<_>>();
                assert_eq!(steps.batch.unique_pages(), private + 3 * shared.len());
                for row in (0..20).filter(|row| !changed.contains(&(*row as u32))) {
                    assert_eq!(steps.batch.lengths[row], before[row] + 1);
                }
                steps_with_changes += usize::from(!changed.is_empty());
            }
            assert!((10..50).contains(&steps_with_changes), "{steps_with_changes}");
        }
    }
}
