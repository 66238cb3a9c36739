//! Sliding windows and chunks: plans cover what each row sees and nothing else, and their execution on the CPU agrees with the
//! f64 oracle. (On a device: gpu_scores.)

use half::f16;
use pat_rs::plan::PlanChange;
use pat_rs::{DeviceProfile, Dtype, PlanOptions, Planner, Problem, Reach};
use pat_tests::invariants::{check, modes, random_forest};
use pat_tests::{Case, random_case};
use pat_workloads::{Oracle, OwnedBatch, RowSample, Tensors};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u32 = 19;

fn planner(problem: Problem, options: impl Into<PlanOptions>) -> Planner {
    Planner::new(problem, DeviceProfile::h200(), options.into()).unwrap()
}

#[test]
fn plans_cover_what_rows_of_random_forests_see() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..400 {
        let batch = random_forest(&mut rng);
        let shape = random_case(&mut rng, Dtype::F16).shape;
        let tokens = *[1, 2, batch.page_size, batch.page_size + 1, 128, 300, 1 << 30].choose(&mut rng).unwrap();
        let reach = if rng.random_bool(0.5) { Reach::Window(tokens) } else { Reach::Chunk(tokens) };
        let problem = Problem::new(shape, batch.page_size).with_reach(reach);
        let rows = batch.rows();
        let view = batch.view(&rows).unwrap();
        for mode in modes(batch.page_size) {
            let plan = planner(problem, mode).plan(&view).unwrap();
            check(&plan, &batch, shape);
        }
    }
}

#[test]
fn a_window_that_shows_everything_changes_no_plan() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..100 {
        let batch = random_forest(&mut rng);
        let problem = Problem::new(random_case(&mut rng, Dtype::F16).shape, batch.page_size);
        let rows = batch.rows();
        let view = batch.view(&rows).unwrap();
        // The kernels that serve windows are the mma.sync ones.
        let options = PlanOptions::default().with_variants(DeviceProfile::h200().variants(&problem.with_window(1)));
        let all = planner(problem.with_window(u32::MAX), options.clone()).plan(&view).unwrap();
        let plain = planner(problem, options).plan(&view).unwrap();
        assert_eq!((all.pages(), all.queries(), all.merges()), (plain.pages(), plain.queries(), plain.merges()));
        for (item, plain_item) in all.items().iter().zip(plain.items()) {
            assert_eq!(all.masks(item), plain.masks(plain_item));
            assert!(all.first_tokens(item).iter().all(|&token| token == 0));
        }
    }
}

#[test]
fn advancing_gives_the_plan_of_planning_from_scratch() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let batch = OwnedBatch {
        page_size: 16,
        num_pages: 200,
        lengths: vec![40, 300, 300, 17],
        block_tables: (0..4u32).map(|row| (row % 3 * 50..row % 3 * 50 + 40).collect()).collect(),
    };
    let plain = Problem::new(random_case(&mut rng, Dtype::F16).shape, 16);
    for problem in [plain.with_window(128), plain.with_chunk(64), plain.with_chunk(40)] {
        steps_are_planned_from_scratch(problem, &mut batch.clone());
    }
}

fn steps_are_planned_from_scratch(problem: Problem, batch: &mut OwnedBatch) {
    let mut stepping = planner(problem, PlanOptions::default());
    let rows = batch.rows();
    let mut plan = stepping.plan(&batch.view(&rows).unwrap()).unwrap();
    for _ in 0..40 {
        batch.lengths.iter_mut().for_each(|length| *length += 1);
        let rows = batch.rows();
        let view = batch.view(&rows).unwrap();
        assert_eq!(stepping.advance(&view, None, &mut plan).unwrap(), PlanChange::Forest);
        assert_eq!(plan, planner(problem, PlanOptions::default()).plan(&view).unwrap());
    }
}

/// 48 sequences of gpt-oss-like layers share a long prefix; whatever their length, a step reads 128 tokens of each.
#[test]
fn a_plan_does_not_grow_with_the_context() {
    let shape = pat_rs::AttentionShape::new(64, 8, 64, Dtype::Bf16).unwrap();
    let problem = Problem::new(shape, 16).with_window(128).with_sinks();
    let size = |length: u32| {
        let pages = length.div_ceil(16);
        let tables: Vec<Vec<u32>> = (0..48).map(|row| (row * pages..(row + 1) * pages).collect()).collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let lengths = [length; 48];
        let batch = pat_rs::DecodeBatch::from_block_tables(&tables, &lengths, 16, 48 * pages).unwrap();
        let plan = planner(problem, PlanOptions::default()).plan(&batch).unwrap();
        (plan.bytes().len(), plan.logical_tokens(), plan.prediction().total_us())
    };
    assert_eq!(size(1024), size(65_536));
    assert_eq!(size(1024).1, 48 * 128);
}

#[test]
fn windows_and_chunks_of_random_forests_agree_with_the_oracle() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for index in 0..150 {
        let case = random_case(&mut rng, Dtype::F16);
        let tokens = *[1, 3, 16, 40, 128].choose(&mut rng).unwrap();
        let reach = if rng.random_bool(0.5) { Reach::Window(tokens) } else { Reach::Chunk(tokens) };
        let mut problem = Problem::new(case.shape, case.batch.page_size).with_reach(reach);
        let sinks: Option<Vec<f32>> =
            rng.random_bool(0.5).then(|| (0..case.shape.q_heads()).map(|_| rng.random_range(-4.0..4.0)).collect());
        if sinks.is_some() {
            problem = problem.with_sinks();
        }
        agrees(&case, problem, sinks.as_deref(), index);
    }
}

/// Llama 4: a row sees whole pages, and every kernel that serves plain attention serves its chunks.
#[test]
fn chunks_of_whole_pages_need_no_first_tokens() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let profile = DeviceProfile::h200();
    for _ in 0..100 {
        let batch = random_forest(&mut rng);
        let plain = Problem::new(pat_rs::AttentionShape::new(40, 8, 128, Dtype::Bf16).unwrap(), batch.page_size);
        let tokens = 4 * batch.page_size;
        assert_eq!(profile.variants(&plain.with_chunk(tokens)), profile.variants(&plain));
        let rows = batch.rows();
        let plan = planner(plain.with_chunk(tokens), PlanOptions::default()).plan(&batch.view(&rows).unwrap()).unwrap();
        // What handing over each row from its chunk on gives.
        let begin = |length: u32| length.saturating_sub(1) / tokens * tokens;
        let chunks: Vec<&[u32]> = rows
            .iter()
            .zip(&batch.lengths)
            .map(|(row, &length)| &row[(begin(length) / batch.page_size) as usize..])
            .collect();
        let lengths: Vec<u32> = batch.lengths.iter().map(|&length| length - begin(length)).collect();
        let chunks =
            pat_rs::DecodeBatch::from_block_tables(&chunks, &lengths, batch.page_size, batch.num_pages).unwrap();
        assert_eq!(plan.bytes(), planner(plain, PlanOptions::default()).plan(&chunks).unwrap().bytes());
    }
}

fn agrees(case: &Case, problem: Problem, sinks: Option<&[f32]>, index: usize) {
    let tensors = Tensors::<f16>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let everything = RowSample::for_batch(&case.batch, case.shape);
    let oracle = Oracle::compute_problem::<f16>(&case.batch, problem, sinks, SEED, everything).unwrap();
    let rows = case.batch.rows();
    let mode = modes(case.batch.page_size)[index % 5];
    let view = case.batch.view(&rows).unwrap();
    let plan = planner(problem, mode).plan(&view).unwrap();
    let host = tensors.host_of(problem, sinks);
    let mut out = vec![f16::NAN; tensors.q.len()];
    let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
    pat_rs::cpu::run(&plan, &host, &mut out, Some(&mut lse)).unwrap();
    let report = pat_workloads::check(&oracle, case.shape.q_heads(), &out, Some(&lse));
    assert!(report.passed, "forest {index}, {mode:?}, {problem:?}: {report:?}\n{case:?}");
}
