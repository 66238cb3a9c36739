//! Batches of pages of one token as serving engines make them: prompts of consecutive pages, generated tokens anywhere.

use pat_workloads::OwnedBatch;
use rand::Rng;
use rand::seq::IndexedRandom;

/// A pool whose pages are handed out in order, to sequences that share prefixes token by token.
#[derive(Clone, Debug)]
pub struct Serving {
    /// As it is now.
    pub batch: OwnedBatch,
    next: u32,
}

impl Serving {
    /// Up to `sequences` sequences. Each continues some tokens of an earlier one, or of none, by a prompt, and most then
    /// generate; some have had several turns. The last sequence may end with the pool.
    pub fn draw(rng: &mut impl Rng, sequences: usize, most_tokens: u32) -> Self {
        let batch = OwnedBatch { page_size: 1, num_pages: 0, lengths: Vec::new(), block_tables: Vec::new() };
        let mut serving = Self { batch, next: rng.random_range(0..3) };
        for _ in 0..rng.random_range(1..=sequences) {
            serving.join(rng, most_tokens);
        }
        // A turn more for some.
        for row in 0..serving.batch.lengths.len() {
            if rng.random_bool(0.3) {
                serving.prompt(row, rng.random_range(0..=most_tokens / 4));
            }
        }
        (0..rng.random_range(0..=most_tokens / 4)).for_each(|_| serving.step());
        if rng.random_bool(0.5) {
            serving.prompt(serving.batch.lengths.len() - 1, rng.random_range(0..=most_tokens / 4));
        }
        serving.batch.num_pages = serving.next + *[0, 1, 15, 40].choose(rng).expect("not empty");
        serving.batch.num_pages = serving.batch.num_pages.max(1);
        serving
    }

    /// Lets a sequence join; returns its row.
    pub fn join(&mut self, rng: &mut impl Rng, most_tokens: u32) -> usize {
        let parent = self.batch.block_tables.choose(rng).filter(|_| rng.random_bool(0.7)).cloned().unwrap_or_default();
        let kept = match rng.random_range(0..4) {
            0 => parent.len(),
            _ => rng.random_range(0..=parent.len()),
        };
        self.batch.block_tables.push(parent[..kept].to_vec());
        self.batch.lengths.push(kept as u32);
        let row = self.batch.lengths.len() - 1;
        let most = most_tokens.saturating_sub(kept as u32);
        let prompt = *[0, 1, 16, 33, most].choose(rng).expect("not empty");
        self.prompt(row, if prompt == most { rng.random_range(0..=most) } else { prompt.min(most) });
        row
    }

    /// Appends consecutive pages to a sequence.
    pub fn prompt(&mut self, row: usize, tokens: u32) {
        self.batch.block_tables[row].extend(self.next..self.next + tokens);
        self.batch.lengths[row] += tokens;
        self.next += tokens;
        self.batch.num_pages = self.batch.num_pages.max(self.next);
    }

    /// Lets every sequence that is not empty generate a token.
    pub fn step(&mut self) {
        for row in 0..self.batch.lengths.len() {
            if self.batch.lengths[row] > 0 {
                self.prompt(row, 1);
            }
        }
    }

    /// Lets a sequence leave.
    pub fn leave(&mut self, row: usize) {
        self.batch.block_tables.remove(row);
        self.batch.lengths.remove(row);
    }
}
