//! What models add to attention: soft caps, attention sinks and sliding windows, on the CPU, in interpreted PTX and on a device,
//! every variant against the f64 oracle. `PAT_GPU_FORESTS` sets how many forests a device gets (default 400), `PAT_GPU_SEED`
//! which.

use half::{bf16, f16};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, DeviceProfile, Dtype, Element, Engine, PlanOptions, Planner, Problem, Reach, TileVariant,
};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::forests::Forests;
use pat_tests::{Case, device_test, softmax_scale};
use pat_workloads::{Oracle, RowSample, Tensors, check};
use rand::Rng;
use rand::seq::IndexedRandom;
use std::collections::BTreeMap;
use std::process::ExitCode;

const SEED: u32 = 17;

/// A problem with a cap, with sinks or both, or with a window and any of them. Scores are of the usual size, or large, so that
/// caps cut and references move.
fn draw_problem(rng: &mut impl Rng, case: &Case) -> (Problem, Option<Vec<f32>>) {
    let scale = softmax_scale(case.shape) * *[1.0, 16.0].choose(rng).unwrap();
    let mut problem = Problem::new(case.shape, case.batch.page_size).with_scale(scale);
    if rng.random_bool(0.3) {
        problem = problem.with_window(*[1, 5, 16, 33, 128, 100_000].choose(rng).unwrap());
    }
    let kind = rng.random_range(0..3);
    if kind > 0 {
        problem = problem.with_soft_cap(*[1.5, 30.0, 50.0].choose(rng).unwrap());
    }
    if kind == 1 {
        return (problem, None);
    }
    // From sinks that hardly count to such that take all of the weight.
    let sinks = (0..case.shape.q_heads()).map(|_| rng.random_range(-20.0..20.0) * scale / softmax_scale(case.shape));
    (problem.with_sinks(), Some(sinks.collect()))
}

/// Runs by variant and whether the problem has a cap and a window.
type Runs = BTreeMap<(TileVariant, (bool, bool)), u64>;

fn features(problem: Problem) -> (bool, bool) {
    (problem.score().soft_cap.is_some(), problem.visibility().reach != Reach::Full)
}

/// Runs one forest through every variant that can; counts the runs.
fn run_forest<T: Element>(
    engine: &impl Executor,
    profile: &DeviceProfile,
    rng: &mut impl Rng,
    case: &Case,
    index: u64,
    runs: &mut Runs,
) {
    let (problem, sinks) = draw_problem(rng, case);
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let everything = RowSample::for_batch(&case.batch, case.shape);
    let oracle = Oracle::compute_problem::<T>(&case.batch, problem, sinks.as_deref(), SEED, everything).unwrap();
    let rows = case.batch.rows();
    let view = case.batch.view(&rows).unwrap();
    let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
    let mode = [PlanMode::Packed, PlanMode::Flat, chunk, PlanMode::Auto][index as usize % 4];
    for variant in profile.variants(&problem) {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let plan = Planner::new(problem, profile.clone(), options).unwrap().plan(&view).unwrap();
        let host = tensors.host_of(problem, sinks.as_deref());
        let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
        let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
        engine.run_host(&plan, &host, &mut out, Some(&mut lse)).unwrap();
        let report = check(&oracle, case.shape.q_heads(), &out, Some(&lse));
        assert!(report.passed, "forest {index}, {variant:?}, {mode:?}, {problem:?}: {report:?}\n{sinks:?}\n{case:?}");
        *runs.entry((variant, features(problem))).or_default() += 1;
    }
}

fn check_scores(engine: &impl Executor, profile: &DeviceProfile, forests: Forests) {
    let mut runs = Runs::new();
    forests.for_each(|rng, index, case| match case.shape.dtype() {
        Dtype::F16 => run_forest::<f16>(engine, profile, rng, case, index, &mut runs),
        _ => run_forest::<bf16>(engine, profile, rng, case, index, &mut runs),
    });
    let forests = forests.count;
    println!("{forests} forests on {}, runs by variant and (cap, window): {runs:?}", engine.name());
    // Every variant of the device had its share of every kind of problem that it serves, and none of others.
    let plain = Problem::new(AttentionShape::new(8, 2, 128, Dtype::F16).unwrap(), 16);
    for variant in profile.variants(&plain) {
        for (has_cap, has_window) in [(false, false), (true, false), (false, true), (true, true)] {
            let problem = if has_cap { plain.with_soft_cap(30.0) } else { plain };
            let problem = if has_window { problem.with_window(128) } else { problem };
            let serves = profile.variants(&problem).contains(&variant);
            let count = runs.get(&(variant, (has_cap, has_window))).copied().unwrap_or(0);
            assert_eq!(count * 30 > forests, serves, "{variant:?}, cap {has_cap}, window {has_window}: {runs:?}");
        }
    }
}

fn on_the_cpu(engine: &Engine) {
    check_scores(engine, &DeviceProfile::h200(), Forests { count: 100, seed: 1 });
}

fn in_interpreted_ptx(_: &Engine) {
    check_scores(&Interpreter, &DeviceProfile::h200(), Forests { count: 40, seed: 1 });
}

fn on_a_device(engine: &Engine) {
    check_scores(engine, &engine.profile().unwrap(), Forests::of_a_device(400));
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(on_the_cpu).on_the_cpu(),
        device_test!(in_interpreted_ptx).on_the_cpu(),
        device_test!(on_a_device),
    ])
}
