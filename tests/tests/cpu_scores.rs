//! The CPU executor where scores are not what N(0, 1) tensors and the usual scale give: other scales, large scores, scores that
//! grow along the sequence.

use half::{bf16, f16};
use pat_abi::generator::Tensor;
use pat_rs::Element;
use pat_rs::plan::PlanMode;
use pat_tests::{Case, random_case, run_tensors, softmax_scale};
use pat_workloads::{Oracle, RowSample, Tensors, check};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

fn modes(page_size: u32) -> [PlanMode; 4] {
    [PlanMode::Auto, PlanMode::Flat, PlanMode::Packed, PlanMode::FixedChunk { tokens: 2 * page_size }]
}

/// Runs a case in every mode and holds it against the oracle of the same tensors.
fn verify<T: Element>(case: &Case, tensors: &Tensors<T>, scale: f32, what: &str) {
    let sample = RowSample::for_batch(&case.batch, case.shape);
    let oracle = Oracle::of_tensors(&case.batch, tensors, scale, sample).expect("a valid case");
    for mode in modes(case.batch.page_size) {
        let output = run_tensors(case, mode.into(), tensors, scale).expect("a valid case");
        let report = check(&oracle, case.shape.q_heads(), &output.out, Some(&output.lse));
        assert!(report.passed, "{what}, {mode:?}: {report:?}\n{case:?}");
    }
}

fn drawn<T: Element>(seed: u64) -> (Case, Tensors<T>) {
    let case = random_case(&mut ChaCha8Rng::seed_from_u64(seed), T::DTYPE);
    let tensors = Tensors::draw(&case.batch, case.shape, case.layout, seed as u32).expect("a valid case");
    (case, tensors)
}

fn at_scale<T: Element>(seed: u64) {
    let (case, tensors) = drawn::<T>(seed);
    let factor = [1.0 / 64.0, 0.37, 1.0, 4.0, 16.0, 64.0][seed as usize % 6];
    verify(&case, &tensors, factor * softmax_scale(case.shape), &format!("forest {seed}, {factor} x the usual scale"));
}

#[test]
fn scores_of_any_scale() {
    (0..60).into_par_iter().for_each(|seed| if seed % 4 < 2 { at_scale::<f16>(seed) } else { at_scale::<bf16>(seed) });
}

/// Adds `step` per token to the products of Q and K: up or down along the sequence.
fn drifting<T: Element>(seed: u64, step: f32) {
    const DIMS: usize = 8;
    let (case, mut tensors) = drawn::<T>(seed);
    let scale = softmax_scale(case.shape);
    for sequence in 0..case.batch.lengths.len() as u32 {
        for head in 0..case.shape.q_heads() {
            tensors.row_mut(Tensor::Q, sequence, 0, head)[..DIMS].fill(T::from_f32(1.0));
        }
    }
    // Where several tables have a page at different places, the last one counts.
    for (table, &length) in case.batch.block_tables.iter().zip(&case.batch.lengths) {
        for position in 0..length {
            let (page, token) = (table[(position / case.batch.page_size) as usize], position % case.batch.page_size);
            let value = step * position as f32 / (DIMS as f32 * scale);
            for head in 0..case.shape.kv_heads() {
                tensors.row_mut(Tensor::K, page, token, head)[..DIMS].fill(T::from_f32(value));
            }
        }
    }
    verify(&case, &tensors, scale, &format!("forest {seed}, scores that change by {step} per token"));
}

#[test]
fn scores_that_drift_along_the_sequence() {
    (0..48).into_par_iter().for_each(|seed| {
        let step = [0.02, 0.3, 2.0, -0.3][seed as usize % 4];
        if seed % 8 < 4 { drifting::<f16>(seed, step) } else { drifting::<bf16>(seed, step) }
    });
}
