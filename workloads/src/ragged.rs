//! Ragged batches of any size: groups of sequences behind a common prefix, with private runs of random length.

use crate::OwnedBatch;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A batch whose sequences share prefixes by group, as requests behind a few system prompts do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaggedGroups {
    /// Sequences in all.
    pub sequences: u32,
    /// Groups; sequences are dealt out evenly.
    pub groups: u32,
    /// Pages that all of a group share.
    pub shared_pages: u32,
    /// Mean number of pages that are a sequence's own; drawn uniformly from 1 to twice the mean less 1.
    pub private_pages: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Seed of lengths, batch order and page ids.
    pub seed: u64,
}

impl RaggedGroups {
    /// Lays the batch out, in shuffled pages and shuffled batch rows.
    ///
    /// # Panics
    /// A field other than `shared_pages` or `seed` is 0, or the pool would have 2^31 pages or more.
    pub fn batch(&self) -> OwnedBatch {
        assert!(self.groups > 0 && self.private_pages > 0 && self.page_size > 0, "{self:?}");
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let own: Vec<u32> = (0..self.sequences).map(|_| rng.random_range(1..2 * self.private_pages)).collect();
        let num_pages =
            u64::from(self.groups) * u64::from(self.shared_pages) + own.iter().copied().map(u64::from).sum::<u64>();
        let num_pages = u32::try_from(num_pages).ok().filter(|&n| n < 1 << 31).expect("a pool below 2^31 pages");
        let mut ids: Vec<u32> = (0..num_pages).collect();
        ids.shuffle(&mut rng);
        let (shared, mut private) = ids.split_at((self.groups * self.shared_pages) as usize);
        let mut rows: Vec<(Vec<u32>, u32)> = own
            .iter()
            .enumerate()
            .map(|(sequence, &own)| {
                let begin = (sequence as u32 % self.groups * self.shared_pages) as usize;
                let mut table = shared[begin..begin + self.shared_pages as usize].to_vec();
                let (pages, rest) = private.split_at(own as usize);
                table.extend_from_slice(pages);
                private = rest;
                let length = (self.shared_pages + own) * self.page_size - rng.random_range(0..self.page_size);
                (table, length)
            })
            .collect();
        rows.shuffle(&mut rng);
        let (block_tables, lengths) = rows.into_iter().unzip();
        OwnedBatch { page_size: self.page_size, num_pages, lengths, block_tables }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_exactly_their_prefix() {
        let spec = RaggedGroups { sequences: 12, groups: 3, shared_pages: 4, private_pages: 5, page_size: 16, seed: 1 };
        let batch = spec.batch();
        assert_eq!(batch, spec.batch());
        assert_eq!(batch.lengths.len(), 12);
        assert_eq!(batch.unique_pages() as u32, batch.num_pages);
        batch.view(&batch.rows()).expect("a valid batch");
        let logical: usize = batch.block_tables.iter().map(Vec::len).sum();
        assert_eq!(logical - batch.unique_pages(), (12 - 3) * 4);
    }
}
