//! What the test suites of other attention libraries cover, as random forests: a table of their parameters ([`ROWS`]), forests
//! whose lengths are a row's ([`forest`]), and their check by the numerics rule and by the row's own tolerance ([`run`]).
//!
//! Left out is what no kernel here does: rotary embeddings and ALiBi inside the kernel, K and V of 4 bits, queries that see what
//! comes after them, scores by soft caps in a prefill. `docs/peers-tests.md` names the test for what is not a grid.

pub mod forest;
pub mod merges;
mod rows;
pub mod run;

pub use rows::ROWS;

use pat_rs::Dtype;
use pat_workloads::PoolLayout;
use rand::Rng;
use rand::seq::SliceRandom;

/// Parameters that the tests of a library take together: every combination, or where there are more than wanted a draw in which
/// every value of every list occurs.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What it covers.
    pub name: &'static str,
    /// Lengths of contexts.
    pub contexts: Contexts,
    /// Sequences; of [`Contexts`] that do not say.
    pub sequences: &'static [u32],
    /// Query tokens of each sequence; of [`Contexts`] that do not say.
    pub query_tokens: &'static [u32],
    /// Tokens per page.
    pub page_sizes: &'static [u32],
    /// Query heads and KV heads.
    pub heads: &'static [(u32, u32)],
    /// Elements per head; of values 128 beside keys of 192.
    pub head_dims: &'static [u32],
    /// Elements of Q and O, and of K and V.
    pub dtypes: &'static [(Dtype, Dtype)],
    /// How K and V lie in memory.
    pub layouts: &'static [PoolLayout],
    /// Caps of scores.
    pub soft_caps: &'static [Option<f32>],
    /// Tokens that a row sees of its sequence, itself the last.
    pub windows: &'static [Option<u32>],
    /// Whether there are attention sinks.
    pub sinks: &'static [bool],
    /// What the tensors hold.
    pub values: Values,
    /// What is compared beside the oracle.
    pub also: Also,
    /// Of outputs and log-sum-exps, with Q in f16.
    pub f16: Tolerance,
    /// The same with Q in bf16.
    pub bf16: Tolerance,
}

/// Lengths of the sequences of a batch, and how far they may share.
#[derive(Clone, Copy, Debug)]
pub enum Contexts {
    /// All as long, whatever they share.
    Uniform(&'static [u32]),
    /// One of the first list is what sequences may share, one of the second what each has behind it.
    Behind(&'static [u32], &'static [u32]),
    /// From the first to the second number, each sequence another, whatever they share.
    Between(&'static [(u32, u32)]),
    /// Each of these batches.
    Mixes(&'static [Mix]),
    /// Trees by the lengths of their nodes, level by level; a level has the same number of nodes below each of those above.
    Levels(&'static [&'static [&'static [u32]]]),
    /// Trees in PAT's notation.
    Trees(&'static [&'static str]),
}

/// A batch: sequences, tokens, query tokens; and the tokens that all share, where the sharing is not drawn anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    /// Sequences, tokens of each, query tokens of each.
    pub parts: &'static [(u32, u32, u32)],
    /// How often the parts stand there.
    pub repeated: u32,
    /// What sequences may share.
    pub shared: Option<u32>,
}

/// What tensors hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Standard ones.
    Drawn,
    /// 8-bit K and V with factors, for the tensor or for each head.
    Scaled,
    /// Such as make every score a large negative number.
    FarBelowZero,
}

/// What else a row compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Also {
    /// Nothing.
    Nothing,
    /// In fixed chunks of one of these numbers of tokens, the first so many sequences alone have the bits they have in the batch.
    FirstAlone(usize, &'static [u32]),
    /// In fixed chunks, the bits do not depend on whether equal pages are one page or copies.
    Copies,
    /// Rows of Q, O and LSE with gaps between them have the same bits.
    Gaps,
}

/// An error that a library's tests allow: `absolute + relative * |expected|`.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Of the expected value.
    pub relative: f64,
    /// Whatever is expected.
    pub absolute: f64,
}

/// Where a combination stands in the lists of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Combination {
    /// In the order of [`Row::extents`].
    pub at: [usize; Row::DIMENSIONS],
}

impl Row {
    /// Lists of a row.
    pub const DIMENSIONS: usize = 11;

    /// The lengths of its lists.
    pub fn extents(&self) -> [usize; Self::DIMENSIONS] {
        let contexts = match self.contexts {
            Contexts::Uniform(tokens) => tokens.len(),
            Contexts::Behind(shared, own) => shared.len() * own.len(),
            Contexts::Between(ranges) => ranges.len(),
            Contexts::Mixes(mixes) => mixes.len(),
            Contexts::Levels(trees) => trees.len(),
            Contexts::Trees(trees) => trees.len(),
        };
        [
            contexts,
            self.sequences.len(),
            self.query_tokens.len(),
            self.page_sizes.len(),
            self.heads.len(),
            self.head_dims.len(),
            self.dtypes.len(),
            self.layouts.len(),
            self.soft_caps.len(),
            self.windows.len(),
            self.sinks.len(),
        ]
    }

    /// How many combinations there are.
    pub fn combinations(&self) -> usize {
        self.extents().iter().product()
    }

    /// All combinations if they are at most `count`; else `count`, in which every value of a list of at most `count` occurs.
    pub fn draw(&self, count: usize, rng: &mut impl Rng) -> Vec<Combination> {
        let extents = self.extents();
        let all = self.combinations();
        if all <= count {
            let of_index = |mut index: usize| {
                let at = extents.map(|extent| {
                    let at = index % extent;
                    index /= extent;
                    at
                });
                Combination { at }
            };
            return (0..all).map(of_index).collect();
        }
        // Each list is dealt out whole, shuffled, until there are enough.
        let dealt = extents.map(|extent| {
            let mut values = Vec::new();
            while values.len() < count {
                let mut round: Vec<usize> = (0..extent).collect();
                round.shuffle(rng);
                values.extend(round);
            }
            values
        });
        (0..count).map(|index| Combination { at: std::array::from_fn(|list| dealt[list][index]) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;
    use std::collections::HashSet;

    #[test]
    fn draws_hold_every_value_or_every_combination() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for row in ROWS {
            let extents = row.extents();
            let longest = *extents.iter().max().expect("some lists");
            for count in [longest, 40, row.combinations()] {
                let drawn = row.draw(count, &mut rng);
                assert_eq!(drawn.len(), count.min(row.combinations()), "{}", row.name);
                if count < longest {
                    continue;
                }
                for (list, &extent) in extents.iter().enumerate() {
                    let seen: HashSet<usize> = drawn.iter().map(|combination| combination.at[list]).collect();
                    assert_eq!(seen, (0..extent).collect(), "{}, list {list}", row.name);
                }
            }
            let all: HashSet<Combination> = row.draw(row.combinations(), &mut rng).into_iter().collect();
            assert_eq!(all.len(), row.combinations(), "{}", row.name);
        }
    }

    #[test]
    fn names_are_different() {
        let names: HashSet<&str> = ROWS.iter().map(|row| row.name).collect();
        assert_eq!(names.len(), ROWS.len());
    }
}
