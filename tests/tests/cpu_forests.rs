//! The CPU executor against the f64 oracle on small ragged forests, and properties that need no oracle.

use half::{bf16, f16};
use pat_rs::plan::PlanMode;
use pat_rs::{Dtype, Element, PlanOptions};
use pat_tests::{Case, judge, random_case, run_cpu};
use pat_workloads::PoolLayout;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

fn forests() -> u64 {
    if std::env::var_os("PAT_LONG").is_some() { 20_000 } else { 200 }
}

fn modes(page_size: u32) -> [PlanMode; 5] {
    [
        PlanMode::Auto,
        PlanMode::Flat,
        PlanMode::PerNode,
        PlanMode::Packed,
        PlanMode::FixedChunk { tokens: 2 * page_size },
    ]
}

fn options(mode: PlanMode) -> PlanOptions {
    PlanOptions::from(mode)
}

fn case(seed: u64, dtype: Dtype) -> Case {
    random_case(&mut ChaCha8Rng::seed_from_u64(seed), dtype)
}

fn verify<T: Element>(seed: u64) -> f64 {
    let case = case(seed, T::DTYPE);
    modes(case.batch.page_size)
        .into_iter()
        .map(|mode| {
            let output = run_cpu::<T>(&case, options(mode), seed as u32).expect("a valid case");
            let report = judge(&case, &output, seed as u32).expect("a valid case");
            assert!(report.passed, "forest {seed}, {mode:?}: {report:?}\n{case:?}");
            report.worst_row_ratio
        })
        .fold(0.0, f64::max)
}

#[test]
fn forests_agree_with_the_oracle() {
    let forests = forests();
    let worst = (0..forests)
        .into_par_iter()
        .map(|seed| if seed % 2 == 0 { verify::<f16>(seed) } else { verify::<bf16>(seed) })
        .reduce(|| 0.0, f64::max);
    println!("cpu forests: {forests} forests x 5 plan modes passed; worst row at {worst:.2} of its allowance");
}

#[test]
fn bits_do_not_depend_on_threads_or_runs() {
    for seed in 0..8 {
        let case = case(seed, Dtype::F16);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
            pool.install(|| run_cpu::<f16>(&case, PlanOptions::default(), 5).expect("a valid case"))
        };
        assert_eq!(run(1), run(3), "forest {seed}");
        assert_eq!(run(3), run(3), "forest {seed}");
    }
}

/// What mode `fixed-chunk` is for.
#[test]
fn fixed_chunks_give_a_sequence_the_same_bits_in_any_batch() {
    for seed in 0..64 {
        let all = case(seed, Dtype::F16);
        let mode = PlanMode::FixedChunk { tokens: 2 * all.batch.page_size };
        let run = |case: &Case| run_cpu::<f16>(case, options(mode), 5).expect("a valid case");
        let expected = run(&all);
        for rows in 1..all.batch.lengths.len() {
            let mut fewer = all.clone();
            fewer.batch.lengths.truncate(rows);
            fewer.batch.block_tables.truncate(rows);
            let output = run(&fewer);
            assert_eq!(output.out, expected.out[..output.out.len()], "forest {seed}, {rows} rows");
            assert_eq!(output.lse, expected.lse[..output.lse.len()], "forest {seed}, {rows} rows");
        }
    }
}

#[test]
fn bits_do_not_depend_on_the_layout_of_the_pools() {
    for seed in 0..16 {
        let case = case(seed, Dtype::Bf16);
        let outputs = PoolLayout::ALL.map(|layout| {
            run_cpu::<bf16>(&Case { layout, ..case.clone() }, PlanOptions::default(), 5).expect("a valid case")
        });
        assert_eq!(outputs[0], outputs[1], "forest {seed}");
        assert_eq!(outputs[0], outputs[2], "forest {seed}");
    }
}

#[test]
fn the_rule_refuses_wrong_results() {
    let case = (0..)
        .map(|seed| case(seed, Dtype::F16))
        .find(|case| case.batch.lengths[0] > 40)
        .expect("some forest starts with a sequence of more than 40 tokens");
    let good = run_cpu::<f16>(&case, PlanOptions::default(), 5).expect("a valid case");
    assert!(judge(&case, &good, 5).expect("a valid case").passed);

    let mut off = good.clone();
    off.out[3] = f16::from_f32(off.out[3].to_f32() + 0.02);
    let mut nan = good.clone();
    nan.out[3] = f16::NAN;
    let mut base_2 = good.clone();
    base_2.lse[0] *= std::f32::consts::LOG2_E;
    let mut one_token_less = case.clone();
    one_token_less.batch.lengths[0] -= 1;
    let one_token_less = run_cpu::<f16>(&one_token_less, PlanOptions::default(), 5).expect("a valid case");
    for (what, output) in [("off", off), ("NaN", nan), ("base 2", base_2), ("one token less", one_token_less)] {
        let report = judge(&case, &output, 5).expect("a valid case");
        assert!(!report.passed && report.failed_rows > 0, "{what}: {report:?}");
    }
}

#[test]
fn reversed_batches_agree_with_the_oracle() {
    for seed in 0..32 {
        let case = case(seed, Dtype::F16);
        let mut reversed = case.clone();
        reversed.batch.lengths.reverse();
        reversed.batch.block_tables.reverse();
        let output = run_cpu::<f16>(&reversed, PlanOptions::default(), 5).expect("a valid case");
        assert!(judge(&reversed, &output, 5).expect("a valid case").passed, "forest {seed}");
    }
}
