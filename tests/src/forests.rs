//! Random forests of both element types, one after the other.

use crate::{Case, random_case};
use pat_rs::Dtype;
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
