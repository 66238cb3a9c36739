//! NaN and Inf in K and V of one sequence, on the CPU, in interpreted PTX and on a device: every variant gives all other
//! sequences what the f64 oracle gives, and the sequence itself what its own keys say. `PAT_GPU_FORESTS` sets how many forests
//! a device gets (default 400), `PAT_GPU_SEED` which.

use half::{bf16, f16};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Element, Engine, Plan, PlanOptions, Planner, Problem, TileVariant};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::forests::Forests;
use pat_tests::{Case, device_test, draw_sinks, softmax_scale};
use pat_workloads::{Oracle, RowSample, Tensors, check};
use rand::Rng;
use rand::seq::IndexedRandom;
use std::collections::BTreeMap;
use std::process::ExitCode;

const SEED: u32 = 13;

/// An element of K or V that only one sequence attends to.
#[derive(Clone, Copy, Debug)]
struct Place {
    sequence: usize,
    page: u32,
    token: u32,
    kv_head: u32,
    column: usize,
    in_values: bool,
}

impl Place {
    /// Draws a place in a page that is in one table alone, if there is one.
    fn draw(rng: &mut impl Rng, case: &Case) -> Option<Self> {
        let batch = &case.batch;
        let tables: Vec<&[u32]> = batch
            .block_tables
            .iter()
            .zip(&batch.lengths)
            .map(|(table, length)| &table[..length.div_ceil(batch.page_size) as usize])
            .collect();
        let alone = |sequence: usize, page: u32| {
            tables.iter().enumerate().all(|(other, table)| other == sequence || !table.contains(&page))
        };
        let own_pages: Vec<(usize, usize)> = (0..tables.len())
            .flat_map(|sequence| (0..tables[sequence].len()).map(move |index| (sequence, index)))
            .filter(|&(sequence, index)| alone(sequence, tables[sequence][index]))
            .collect();
        let &(sequence, index) = own_pages.choose(rng)?;
        let tokens = (batch.lengths[sequence] - index as u32 * batch.page_size).min(batch.page_size);
        Some(Self {
            sequence,
            page: tables[sequence][index],
            token: rng.random_range(0..tokens),
            kv_head: rng.random_range(0..case.shape.kv_heads()),
            column: rng.random_range(0..case.shape.head_dim().min(case.shape.v_head_dim()) as usize),
            in_values: rng.random(),
        })
    }

    fn write<T: Element>(&self, tensors: &mut Tensors<T>, value: f32) {
        let strides = if self.in_values { tensors.v_strides } else { tensors.k_strides };
        let at = i64::from(self.page) * strides.page
            + i64::from(self.token) * strides.token
            + i64::from(self.kv_head) * strides.head;
        let begin = if self.in_values { tensors.v_begin } else { 0 };
        tensors.kv[begin + at as usize + self.column] = T::from_f32(value);
    }

    /// Whether rows of another sequence stand in an item beside this page without attending to it.
    fn is_beside_others(&self, plan: &Plan) -> bool {
        let page_size = plan.page_size();
        plan.items().iter().any(|item| {
            let pages = &plan.pages()[item.page_begin as usize..][..item.token_count.div_ceil(page_size) as usize];
            !plan.masks(item).is_empty() && pages.contains(&self.page)
        })
    }
}

/// Runs one forest through every variant; counts, by variant, the runs in which the element could have spread.
fn run_forest<T: Element>(
    engine: &impl Executor,
    profile: &DeviceProfile,
    rng: &mut impl Rng,
    case: &Case,
    index: u64,
    exposed: &mut BTreeMap<TileVariant, u64>,
) {
    let Some(place) = Place::draw(rng, case) else { return };
    let scale = softmax_scale(case.shape);
    let mut tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let everything = RowSample::for_batch(&case.batch, case.shape);
    // Rows that are computed again have caps and sinks, too.
    let sinks = draw_sinks(rng, case.shape);
    let mut problem = case.batch.problem(case.shape).with_scale(scale);
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    if rng.random_bool(0.3) {
        problem = problem.with_soft_cap(2.0);
    }
    let oracle = Oracle::compute_problem::<T>(&case.batch, problem, sinks.as_deref(), SEED, everything).unwrap();
    let value = *[f32::NAN, f32::INFINITY, f32::NEG_INFINITY].choose(rng).unwrap();
    place.write(&mut tensors, value);
    let is_own =
        |sequence: u32, head: u32| sequence as usize == place.sequence && head / case.shape.group() == place.kv_head;

    let rows = case.batch.rows();
    let view = case.batch.view(&rows).unwrap();
    let chunk = PlanMode::FixedChunk { tokens: 2 * case.batch.page_size };
    let modes = [PlanMode::Packed, PlanMode::Packed, chunk, PlanMode::Auto];
    let mode = modes[index as usize % modes.len()];
    let (q_heads, v_head_dim) = (case.shape.q_heads() as usize, case.shape.v_head_dim() as usize);
    for variant in profile.variants(&problem) {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let plan = Planner::new(problem, profile.clone(), options).unwrap().plan(&view).unwrap();
        let mut lse = vec![0f32; case.batch.lengths.len() * q_heads];
        let mut out = vec![T::from_f32(0.0); lse.len() * v_head_dim];
        let host = tensors.host_of(problem, sinks.as_deref());
        engine.run_host(&plan, &host, &mut out, Some(&mut lse)).unwrap();
        *exposed.entry(variant).or_default() += u64::from(place.is_beside_others(&plan));

        let what =
            format!("forest {index}, {variant:?}, {mode:?}, {value} at {place:?}\n{problem:?} {sinks:?} {case:?}");
        let mut expected = oracle.clone();
        if place.in_values {
            // Of the sequence's own rows the column alone is lost.
            for row in expected.rows.iter().filter(|row| is_own(row.sequence, row.head)) {
                let at = (row.sequence as usize * q_heads + row.head as usize) * v_head_dim + place.column;
                assert!(!out[at].to_f32().is_finite(), "{}: {what}", out[at].to_f32());
                out[at] = T::from_f32(row.out[place.column] as f32);
            }
        } else {
            expected.rows.retain(|row| !is_own(row.sequence, row.head));
        }
        let report = check(&expected, case.shape.q_heads(), &out, Some(&lse));
        assert!(report.passed, "{report:?}: {what}");
    }
}

/// Asserts that every variant has met many in which the element could have spread.
fn check_isolation(engine: &impl Executor, profile: &DeviceProfile, forests: Forests) {
    let mut exposed = BTreeMap::new();
    forests.for_each(|rng, index, case| match case.shape.dtype() {
        Dtype::F16 => run_forest::<f16>(engine, profile, rng, case, index, &mut exposed),
        _ => run_forest::<bf16>(engine, profile, rng, case, index, &mut exposed),
    });
    let forests = forests.count;
    eprintln!("{forests} forests on {}, runs in which the element stood beside others: {exposed:?}", engine.name());
    let problem = Problem::new(AttentionShape::new(8, 2, 128, Dtype::F16).unwrap(), 16);
    for variant in profile.variants(&problem) {
        assert!(exposed.get(&variant).is_some_and(|&runs| runs * 40 > forests), "{variant:?}: {exposed:?}");
    }
}

fn a_sequences_nan_and_inf_reach_no_other_sequence_on_the_cpu(engine: &Engine) {
    check_isolation(engine, &DeviceProfile::h200(), Forests { count: 120, seed: 1 });
}

fn a_sequences_nan_and_inf_reach_no_other_sequence_in_interpreted_ptx(_: &Engine) {
    check_isolation(&Interpreter, &DeviceProfile::h200(), Forests { count: 40, seed: 1 });
}

/// Head dimensions that random forests do not have.
fn likewise_at_other_head_dims(_: &Engine) {
    let mut exposed = BTreeMap::new();
    Forests { count: 24, seed: 2 }.for_each(|rng, index, case| {
        let (head_dim, v_head_dim) = [(96, 96), (192, 128), (512, 512)][index as usize % 3];
        let (q_heads, kv_heads, dtype) = (case.shape.q_heads(), case.shape.kv_heads(), case.shape.dtype());
        let shape = AttentionShape::new(q_heads, kv_heads, head_dim, dtype).unwrap().with_v_head_dim(v_head_dim);
        let case = Case { shape: shape.unwrap(), ..case.clone() };
        match dtype {
            Dtype::F16 => run_forest::<f16>(&Interpreter, &DeviceProfile::h200(), rng, &case, index, &mut exposed),
            _ => run_forest::<bf16>(&Interpreter, &DeviceProfile::h200(), rng, &case, index, &mut exposed),
        }
    });
    let exposed: u64 = exposed.values().sum();
    assert!(exposed > 8, "{exposed} runs in which the element stood beside others");
}

fn a_sequences_nan_and_inf_reach_no_other_sequence(engine: &Engine) {
    check_isolation(engine, &engine.profile().unwrap(), Forests::of_a_device(400));
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(a_sequences_nan_and_inf_reach_no_other_sequence_on_the_cpu).on_the_cpu(),
        device_test!(a_sequences_nan_and_inf_reach_no_other_sequence_in_interpreted_ptx).on_the_cpu(),
        device_test!(likewise_at_other_head_dims).on_the_cpu(),
        device_test!(a_sequences_nan_and_inf_reach_no_other_sequence),
    ])
}
