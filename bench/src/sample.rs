//! Which rows a measurement checks: a run on a GPU must not wait for the oracle.

use crate::device::SEED;
use pat_rs::{AttentionShape, Element, KvElement, Problem};
use pat_workloads::tensors::sinks;
use pat_workloads::{Oracle, OwnedBatch, RowSample};

/// Most work the oracle does for one configuration, as FLOP of the exact result.
const ORACLE_FLOP: f64 = 2e9;

/// The rows a measurement checks: 16 (sequence, KV head) pairs, evenly spread; fewer, but no less than two, where the oracle
/// would take longer than about a second on two cores.
pub fn sample(batch: &OwnedBatch, shape: AttentionShape) -> RowSample {
    let all = RowSample::for_batch(batch, shape);
    let total = batch.lengths.len() * shape.kv_heads() as usize;
    let mut pairs = all.pairs.clone();
    for count in [16, 8, 4, 2] {
        pairs = evenly_spread(&all.pairs, count);
        let tokens: f64 = pairs.iter().map(|&(sequence, _)| f64::from(batch.lengths[sequence as usize])).sum();
        if 4.0 * tokens * f64::from(shape.group()) * f64::from(shape.head_dim()) <= ORACLE_FLOP {
            break;
        }
    }
    let name = match pairs.len() {
        count if count == total => all.name,
        count => format!("{count} of {total} (sequence, KV head) pairs, evenly spread"),
    };
    RowSample { name, pairs }
}

/// The exact rows that a measurement of `batch` is checked against.
///
/// # Errors
/// The batch's, where it is not valid.
pub fn oracle<T: Element, C: KvElement>(batch: &OwnedBatch, problem: Problem) -> pat_rs::Result<Oracle> {
    exact_rows::<T, C>(batch, problem, SEED, sample(batch, problem.shape()))
}

/// The exact rows of a sample of tensors of that seed, with [`sinks`] where the problem has some.
///
/// # Errors
/// The batch's, where it is not valid.
pub fn exact_rows<T: Element, C: KvElement>(
    batch: &OwnedBatch,
    problem: Problem,
    seed: u32,
    sample: RowSample,
) -> pat_rs::Result<Oracle> {
    Oracle::compute_stored::<T, C>(batch, (problem, sinks(&problem).as_deref()), seed, sample)
}

fn evenly_spread(pairs: &[(u32, u32)], count: usize) -> Vec<(u32, u32)> {
    if pairs.len() <= count {
        return pairs.to_vec();
    }
    (0..count).map(|i| pairs[i * (pairs.len() - 1) / (count - 1)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pat_rs::Dtype;

    fn sampled(sequences: u32, tokens: u32, q_heads: u32) -> RowSample {
        let batch = OwnedBatch {
            page_size: 1 << 17,
            num_pages: sequences,
            lengths: vec![tokens; sequences as usize],
            block_tables: (0..sequences).map(|page| vec![page]).collect(),
        };
        sample(&batch, AttentionShape::new(q_heads, 8, 128, Dtype::F16).expect("a valid shape"))
    }

    #[test]
    fn samples_are_spread_and_bounded_by_the_oracles_work() {
        let small = sampled(1, 100, 32);
        assert_eq!((small.name.as_str(), small.pairs.len()), ("all rows", 8));
        let usual = sampled(256, 1024, 32);
        assert_eq!(usual.name, "16 of 2048 (sequence, KV head) pairs, evenly spread");
        assert_eq!((usual.pairs[0], usual.pairs[15]), ((0, 0), (255, 7)));
        let long = sampled(16, 131_072, 64);
        assert_eq!((long.pairs.len(), long.pairs[0], long.pairs[1]), (2, (0, 0), (15, 7)));
        assert_eq!(sampled(0, 0, 32).pairs, []);
    }
}
