//! Small random ragged forests on a device: every tile variant against the f64 oracle, NaN in every KV row that no
//! sequence owns, bits equal from run to run whatever ran in between. Half of the forests have logits of 16 or 64 times the
//! usual scale, so that running maxima grow by more than the kernels let pass, and outputs are corrected. `PAT_GPU_FORESTS` sets
//! how many forests (default 2,000), `PAT_GPU_SEED` which.

use half::{bf16, f16};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, Dtype, Element, Engine, PlanOptions, Planner, Problem, TileVariant};
use pat_tests::forests::Forests;
use pat_tests::{Case, device_test, softmax_scale};
use pat_workloads::{Oracle, RowSample, Tensors, check};
use std::collections::BTreeMap;
use std::process::ExitCode;

const SEED: u32 = 11;

/// Factors on the usual scale of the logits, taken in turn.
const LOUDNESS: [f32; 4] = [1.0, 16.0, 1.0, 64.0];

/// Runs one forest through every variant; returns the variants that ran.
fn run_forest<T: Element>(engine: &Engine, case: &Case, index: u64) -> Vec<TileVariant> {
    // Each element type sees each of them.
    let scale = softmax_scale(case.shape) * LOUDNESS[(index / 2) as usize % LOUDNESS.len()];
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let compute = |scale| {
        let everything = RowSample::for_batch(&case.batch, case.shape);
        Oracle::compute::<T>(&case.batch, case.shape, SEED, scale, everything).unwrap()
    };
    let oracle = compute(scale);
    let louder = index.is_multiple_of(16).then(|| compute(-32.0 * scale));
    let profile = engine.profile().unwrap();
    let rows = case.batch.rows();
    let view = case.batch.view(&rows).unwrap();
    let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
    let modes = [PlanMode::Auto, PlanMode::Packed, PlanMode::PerNode, PlanMode::Flat, chunk];
    let mode = modes[index as usize % modes.len()];
    let variants = profile.variants(&case.batch.problem(case.shape));
    for &variant in &variants {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let plan = Planner::new(case.batch.problem(case.shape), profile.clone(), options).unwrap().plan(&view).unwrap();
        let run = |q: &[T]| {
            let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
            let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
            let mut tensors = tensors.host(scale);
            tensors.q = q;
            engine.run_host(&plan, &tensors, &mut out, Some(&mut lse)).unwrap();
            (out, lse)
        };
        let verify = |oracle: &Oracle, out: &[T], lse: &[f32]| {
            let report = check(oracle, case.shape.q_heads(), out, Some(lse));
            assert!(report.passed, "forest {index}, {variant:?}, {mode:?}, scale {scale}: {report:?}\n{case:?}");
        };
        let (out, lse) = run(&tensors.q);
        verify(&oracle, &out, &lse);
        if let Some(louder) = &louder {
            // In between, larger queries: what they leave in shared memory must not matter.
            let loud: Vec<T> = tensors.q.iter().map(|q| T::from_f32(-32.0 * q.to_f32())).collect();
            let (out_loud, lse_loud) = run(&loud);
            verify(louder, &out_loud, &lse_loud);
            let (again, lse_again) = run(&tensors.q);
            assert!(
                bytemuck::cast_slice::<T, u16>(&out) == bytemuck::cast_slice::<T, u16>(&again)
                    && bytemuck::cast_slice::<f32, u32>(&lse) == bytemuck::cast_slice::<f32, u32>(&lse_again),
                "forest {index}, {variant:?}, {mode:?}: bits differ from run to run"
            );
        }
    }
    variants
}

fn every_variant_agrees_with_the_oracle_on_random_forests(engine: &Engine) {
    let forests = Forests::of_a_device(2_000);
    let mut runs: BTreeMap<TileVariant, u64> = BTreeMap::new();
    forests.for_each(|_, index, case| {
        let variants = match case.shape.dtype() {
            Dtype::F16 => run_forest::<f16>(engine, case, index),
            _ => run_forest::<bf16>(engine, case, index),
        };
        for variant in variants {
            *runs.entry(variant).or_default() += 1;
        }
    });
    let forests = forests.count;
    eprintln!("{forests} forests on {}, runs by variant: {runs:?}", engine.name());
    // Every variant of the device had its share: those of any page size and head dimension all forests, the others about half: those
    // that suit them.
    let problem =
        |head_dim, page_size| Problem::new(AttentionShape::new(8, 2, head_dim, Dtype::F16).unwrap(), page_size);
    let profile = engine.profile().unwrap();
    let general = profile.variants(&problem(256, 1));
    for variant in profile.variants(&problem(128, 64)) {
        let expected = if general.contains(&variant) { forests } else { forests * 2 / 5 };
        let count = runs.get(&variant).copied().unwrap_or(0);
        assert!(count >= expected, "{variant:?} ran {count} of {forests} forests");
    }
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([device_test!(every_variant_agrees_with_the_oracle_on_random_forests)])
}
