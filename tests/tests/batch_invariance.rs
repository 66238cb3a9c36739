//! Fixed chunks: the bits of a sequence's output do not depend on the rest of the batch, though whole chunks are shared. What
//! decides them in plans of thousands of random forests; the bits themselves on the CPU executor and in interpreted PTX, each
//! sequence alone beside the batch, batches in reverse order, and parts of batches.

use half::{bf16, f16};
use pat_abi::{Dtype, Family, KERNELS, KernelSpec, Switches, TileVariant};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Element, Plan, PlanOptions, Planner, Problem, Reach};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::invariants::{check, random_forest};
use pat_tests::{Case, Output, random_case};
use pat_workloads::{OwnedBatch, Tensors, TreeSpec};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

const SEED: u32 = 31;

/// These rows of a batch, in this order.
fn rows_of(batch: &OwnedBatch, rows: &[usize]) -> OwnedBatch {
    let lengths = rows.iter().map(|&row| batch.lengths[row]).collect();
    let block_tables = rows.iter().map(|&row| batch.block_tables[row].clone()).collect();
    OwnedBatch { lengths, block_tables, ..*batch }
}

fn plan_of(planner: &mut Planner, batch: &OwnedBatch) -> Plan {
    let rows = batch.rows();
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

/// What an item computes for one of its sequences, in the order of the sequence's partials: the kernel, the pages, where
/// tokens end and begin. Nothing else of it reaches the sequence's rows.
type Pieces = Vec<(u32, TileVariant, u32, Vec<u32>, Vec<u32>, Vec<u32>)>;

/// The pieces of every row of the batch.
fn pieces(plan: &Plan, rows: usize) -> Vec<Pieces> {
    let mut all: Vec<Pieces> = vec![Vec::new(); rows];
    let mut first_slots = vec![0; rows];
    plan.merges().iter().for_each(|merge| first_slots[merge.sequence as usize] = merge.slot_begin);
    for variant in TileVariant::ALL {
        for item in plan.variant_items(variant) {
            let page_count = item.token_count.div_ceil(plan.page_size());
            let pages = plan.pages()[item.page_begin as usize..][..page_count as usize].to_vec();
            let masks = plan.masks(item);
            assert!(masks.iter().all(|mask| mask.is_for_all_rows()), "rows of one item see different tokens");
            let ends: Vec<u32> = masks.iter().map(|mask| mask.token_end()).collect();
            let first_tokens = plan.first_tokens(item).to_vec();
            for query in
                &plan.queries()[item.query_begin as usize..][..(item.row_count / plan.shape().group()) as usize]
            {
                let row = query.query_token as usize;
                let partial = query.slot.wrapping_sub(first_slots[row]);
                all[row].push((partial, variant, item.token_count, pages.clone(), ends.clone(), first_tokens.clone()));
            }
        }
    }
    all.iter_mut().for_each(|pieces| pieces.sort());
    all
}

#[test]
fn what_decides_the_bits_of_a_sequence_is_its_own() {
    let (mut shared, mut of_all) = (0u64, 0u64);
    for index in 0..2000u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(index);
        let batch = random_forest(&mut rng);
        let group = *[1, 2, 4, 8].choose(&mut rng).expect("not empty");
        let shape = AttentionShape::new(2 * group, 2, 128, Dtype::F16).expect("a valid shape");
        let reach =
            *[Reach::Full, Reach::Full, Reach::Window(3 * batch.page_size - 1), Reach::Chunk(5 * batch.page_size)]
                .choose(&mut rng)
                .expect("not empty");
        let problem = batch.problem(shape).with_reach(reach);
        let mode = PlanMode::FixedChunk { tokens: batch.page_size * rng.random_range(1..=6) };
        let profile = if rng.random_bool(0.5) {
            DeviceProfile::h200()
        } else {
            DeviceProfile::by_name("a100-80").expect("known")
        };
        let mut planner = Planner::new(problem, profile, mode.into()).expect("a planner");
        let plan = plan_of(&mut planner, &batch);
        check(&plan, &batch, shape);
        let summary = plan.summary();
        if reach == Reach::Full {
            assert!((summary.unique_kv_bytes..=summary.flat_kv_bytes).contains(&summary.planned_kv_bytes));
            (shared, of_all) = (shared + summary.planned_kv_bytes, of_all + summary.flat_kv_bytes);
        }
        let together = pieces(&plan, batch.lengths.len());
        for (row, expected) in together.iter().enumerate() {
            let alone = plan_of(&mut planner, &rows_of(&batch, &[row]));
            assert_eq!(&pieces(&alone, 1)[0], expected, "forest {index}, row {row}");
        }
        let mut order: Vec<usize> = (0..batch.lengths.len()).filter(|_| rng.random_bool(0.7)).collect();
        order.shuffle(&mut rng);
        let some = pieces(&plan_of(&mut planner, &rows_of(&batch, &order)), order.len());
        assert!(order.iter().zip(&some).all(|(&row, of_row)| *of_row == together[row]), "forest {index}");
    }
    println!("read {:.3} of what every sequence would read for itself", shared as f64 / of_all as f64);
    assert!(shared < of_all * 3 / 4, "{shared} of {of_all}");
}

/// One run of these rows of a case.
fn run<T: Element>(
    executor: &impl Executor,
    planner: &mut Planner,
    (case, tensors): (&Case, &Tensors<T>),
    sinks: Option<&[f32]>,
    rows: &[usize],
) -> Output<T> {
    let plan = plan_of(planner, &rows_of(&case.batch, rows));
    let heads = case.shape.q_heads() as usize;
    let row_elements = heads * case.shape.head_dim() as usize;
    let q: Vec<T> = rows.iter().flat_map(|row| tensors.q[row * row_elements..][..row_elements].to_vec()).collect();
    let mut host = tensors.host(1.0);
    (host.problem, host.q, host.sinks) = (planner.problem(), &q, sinks);
    let (mut out, mut lse) = (
        vec![T::from_f32(f32::NAN); rows.len() * heads * case.shape.v_head_dim() as usize],
        vec![f32::NAN; rows.len() * heads],
    );
    executor.run_host(&plan, &host, &mut out, Some(&mut lse)).expect("a run");
    Output { out, lse }
}

/// The rows of a run, bit by bit.
fn bits<T: Element>(output: &Output<T>, rows: usize) -> Vec<(Vec<u16>, Vec<u32>)> {
    let of_row = |values: usize| values / rows.max(1);
    let (out, lse) = (bytemuck::cast_slice::<T, u16>(&output.out), bytemuck::cast_slice::<f32, u32>(&output.lse));
    let out = out.chunks(of_row(out.len()).max(1));
    out.zip(lse.chunks(of_row(lse.len()).max(1))).map(|(out, lse)| (out.to_vec(), lse.to_vec())).collect()
}

/// Runs a case whole, in reverse order and each sequence alone; tells which part of the flat form's bytes its plan reads.
fn verify<T: Element>(
    executor: &impl Executor,
    mut case: Case,
    variants: Option<TileVariant>,
    rng: &mut ChaCha8Rng,
) -> f64 {
    // Copies: one more token may tell them from the original.
    for _ in 0..6 {
        let row = rng.random_range(0..case.batch.lengths.len());
        case.batch.lengths.push(case.batch.lengths[row].saturating_sub(rng.random_range(0..2)));
        case.batch.block_tables.push(case.batch.block_tables[row].clone());
    }
    let mut problem = case.batch.problem(case.shape);
    let serves = |switches| {
        variants.is_none_or(|variant: TileVariant| variant.serves(switches, case.shape.dtype(), case.shape.head_dim()))
    };
    if serves(Switches { soft_cap: true, ..Switches::OFF }) && rng.random_bool(0.3) {
        problem = problem.with_soft_cap(2.0);
    }
    if serves(Switches { window: true, ..Switches::OFF }) && rng.random_bool(0.3) {
        problem = problem.with_window(2 * case.batch.page_size + 3);
    }
    let sinks: Option<Vec<f32>> =
        rng.random_bool(0.3).then(|| (0..case.shape.q_heads()).map(|_| rng.random_range(-4.0..4.0)).collect());
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    let tokens = case.batch.page_size * 48u32.div_ceil(case.batch.page_size) * rng.random_range(1..=2);
    let mut options = PlanOptions::from(PlanMode::FixedChunk { tokens });
    options.variants = variants.map(|variant| vec![variant]);
    let mut planner = Planner::new(problem, executor.profile().expect("a profile"), options).expect("a planner");
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).expect("a valid case");
    let all: Vec<usize> = (0..case.batch.lengths.len()).collect();
    let summary = plan_of(&mut planner, &case.batch).summary();
    let mut run =
        |rows: &[usize]| bits(&run(executor, &mut planner, (&case, &tensors), sinks.as_deref(), rows), rows.len());
    let together = run(&all);
    let reversed: Vec<usize> = all.iter().rev().copied().collect();
    assert!(run(&reversed).iter().rev().eq(&together), "{problem:?}\n{case:?}");
    for &row in &all {
        assert_eq!(run(&[row])[0], together[row], "row {row}, {problem:?}\n{case:?}");
    }
    summary.planned_kv_bytes as f64 / summary.flat_kv_bytes.max(1) as f64
}

#[test]
fn sequences_have_the_same_bits_alone_and_in_any_batch() {
    let parts: Vec<f64> = (0..200u64)
        .into_par_iter()
        .map(|index| {
            let mut rng = ChaCha8Rng::seed_from_u64(index);
            match index % 2 {
                0 => {
                    let case = random_case(&mut rng, Dtype::F16);
                    verify::<f16>(&pat_rs::Engine::cpu(), case, None, &mut rng)
                }
                _ => {
                    let case = random_case(&mut rng, Dtype::Bf16);
                    verify::<bf16>(&pat_rs::Engine::cpu(), case, None, &mut rng)
                }
            }
        })
        .collect();
    assert!(parts.iter().filter(|part| (0.01..0.8).contains(*part)).count() > 30, "{parts:?}");
}

#[test]
fn kernels_give_sequences_the_same_bits_alone_and_in_any_batch() {
    let kernels: Vec<(&KernelSpec, TileVariant)> = KERNELS
        .iter()
        .filter(|kernel| (kernel.dtype, kernel.kv_dtype) == (Dtype::F16, Dtype::F16))
        .filter_map(|kernel| match kernel.family {
            Family::Forward(variant) => Some((kernel, variant)),
            _ => None,
        })
        .collect();
    assert_eq!(kernels.len(), 26);
    let runs: Vec<_> = kernels.into_iter().flat_map(|kernel| [0, 1].map(|index| (kernel, index))).collect();
    let parts: Vec<f64> = runs
        .into_par_iter()
        .map(|((kernel, variant), index)| {
            let mut rng = ChaCha8Rng::seed_from_u64(500 + index);
            loop {
                let case = random_case(&mut rng, Dtype::F16);
                let longest = case.batch.lengths.iter().max().expect("a sequence");
                if !variant.supports_page_size(case.batch.page_size) || !(100..400).contains(longest) {
                    continue;
                }
                let group = [3, 4][index as usize];
                let shape = AttentionShape::new(2 * group, 2, kernel.head_dim, Dtype::F16)
                    .expect("a valid shape")
                    .with_v_head_dim(kernel.v_head_dim)
                    .unwrap();
                return verify::<f16>(&Interpreter, Case { shape, ..case }, Some(variant), &mut rng);
            }
        })
        .collect();
    assert!(parts.iter().filter(|part| (0.01..0.8).contains(*part)).count() > 10, "{parts:?}");
}

/// The default of a device is one kernel, whatever the batch: that of one sequence.
#[test]
fn one_kernel_serves_all_of_a_batch() {
    let problem = |group| Problem::new(AttentionShape::new(group, 1, 128, Dtype::F16).expect("a valid shape"), 16);
    let mode = PlanMode::FixedChunk { tokens: 64 };
    let variants =
        |group, profile| Planner::new(problem(group), profile, mode.into()).expect("a planner").tile_variants();
    let a100 = || DeviceProfile::by_name("a100-80").expect("a known device");
    assert_eq!(variants(4, DeviceProfile::h200()), [TileVariant::Wgmma64]);
    assert_eq!(variants(4, a100()), [TileVariant::Mma16]);
    assert_eq!(variants(17, a100()), [TileVariant::Mma32]);
    assert_eq!(variants(200, a100()), [TileVariant::Mma128]);
}

/// A prompt of 4,096 tokens behind which every sequence has 300 of its own.
#[test]
fn shared_chunks_are_read_once_for_as_many_sequences_as_a_tile_holds() {
    let tree = "1,64_4096,300".parse::<TreeSpec>().expect("a tree").batch(16, Some(1)).expect("a batch");
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    let mode = PlanMode::FixedChunk { tokens: 512 };
    let kv_bytes = |tokens: u64| tokens * shape.kv_bytes_per_token();
    for (variant, reads) in [(TileVariant::Wgmma64, 4), (TileVariant::Mma16, 16), (TileVariant::Mma64, 4)] {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let mut planner = Planner::new(tree.problem(shape), DeviceProfile::h200(), options).expect("a planner");
        let summary = plan_of(&mut planner, &tree).summary();
        assert_eq!(summary.planned_kv_bytes, kv_bytes(reads * 4096 + 64 * 300), "{variant:?}");
        assert_eq!(summary.flat_kv_bytes, kv_bytes(64 * 4396));
        let of_flat = PlanOptions::from(PlanMode::Flat).with_variants([variant]);
        let mut flat = Planner::new(tree.problem(shape), DeviceProfile::h200(), of_flat).expect("a planner");
        assert!(summary.predicted_us < 0.5 * plan_of(&mut flat, &tree).summary().predicted_us, "{variant:?}");
    }
}
