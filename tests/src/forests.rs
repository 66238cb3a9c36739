//! Random forests of both element types, one after the other; and a small one for pages and pools of any size.

use crate::{Case, random_case};
use pat_rs::Dtype;
use pat_workloads::OwnedBatch;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Some random forests.
#[derive(Clone, Copy, Debug)]
pub struct Forests {
    /// How many.
    pub count: u64,
    /// Which.
    pub seed: u64,
}

impl Forests {
    /// Those that a device gets: `PAT_GPU_FORESTS`, `count` by default, of `PAT_GPU_SEED`.
    ///
    /// # Panics
    /// A variable is there and no number.
    pub fn of_a_device(count: u64) -> Self {
        let from_env = |name: &str, default| {
            std::env::var(name)
                .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}: got {value:?}")))
        };
        Self { count: from_env("PAT_GPU_FORESTS", count), seed: from_env("PAT_GPU_SEED", 1) }
    }

    /// Hands each to `use_it`, with its number and the generator that drew it.
    pub fn for_each(self, mut use_it: impl FnMut(&mut ChaCha8Rng, u64, &Case)) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        for index in 0..self.count {
            let case = random_case(&mut rng, if index.is_multiple_of(2) { Dtype::F16 } else { Dtype::Bf16 });
            use_it(&mut rng, index, &case);
        }
    }
}

/// Sequences that share, with lengths before, on and behind the ends of pages, and one without tokens. Page ids are far apart: of
/// `num_pages`, 8 at least, eight are used, the last one among them.
pub fn far_apart(page_size: u32, num_pages: u32) -> OwnedBatch {
    let lengths = vec![
        3 * page_size + 1,
        3 * page_size,
        2 * page_size + page_size.div_ceil(2),
        2 * page_size,
        0,
        page_size,
        1,
        4 * page_size - page_size / 3,
    ];
    // Five sequences begin with two pages, one of them and another with the third; the rest is their own.
    let tables: [&[u32]; 8] = [&[0, 1, 2, 3], &[0, 1, 2], &[0, 1, 4], &[0, 1], &[], &[0], &[5], &[0, 1, 6, 7]];
    let spread = (num_pages - 1) / 7;
    let table = |(table, &length): (&&[u32], &u32)| {
        let needed = length.div_ceil(page_size) as usize;
        table[..needed].iter().map(|page| (7 - page) * spread).collect()
    };
    let block_tables = tables.iter().zip(&lengths).map(table).collect();
    OwnedBatch { page_size, num_pages, lengths, block_tables }
}
