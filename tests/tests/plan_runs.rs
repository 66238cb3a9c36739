//! Pages of one token that are planned in runs: the plan's invariants, results of both executors against the oracle, and steps.

use half::f16;
use pat_abi::{RUN_PAGES, TileVariant};
use pat_rs::cuda::LaunchGeometry;
use pat_rs::plan::{PageRuns, PlanCapacity, PlanChange, PlanMode};
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::invariants::{check, modes, random_forest};
use pat_tests::serving::Serving;
use pat_tests::walk::changed_rows;
use pat_tests::{Case, judge, run_plan, softmax_scale};
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

fn shape() -> AttentionShape {
    AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape")
}

fn planner(options: PlanOptions, page_size: u32) -> Planner {
    Planner::new(Problem::new(shape(), page_size), DeviceProfile::h200(), options).expect("a planner")
}

fn plan(planner: &mut Planner, batch: &OwnedBatch) -> Plan {
    let rows = batch.rows();
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

fn has_runs(plan: &Plan) -> bool {
    plan.items().iter().any(|item| item.run_pages > 0)
}

/// Runs wherever most tokens are in some.
fn runs_always() -> PlanOptions {
    PlanOptions::default().with_runs(PageRuns::Always)
}

/// What kernels the runs may have beside those of single pages.
fn options() -> [PlanOptions; 5] {
    [
        runs_always(),
        runs_always().with_variants([TileVariant::Mma16]),
        runs_always().with_variants([TileVariant::Mma32]),
        runs_always().with_variants([TileVariant::Wgmma64, TileVariant::Mma64]),
        runs_always().with_variants([TileVariant::Wgmma128, TileVariant::Mma128]),
    ]
}

#[test]
fn invariants_hold_in_runs() {
    let count = if std::env::var_os("PAT_LONG").is_some() { 3000 } else { 300 };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut in_runs = 0;
    for index in 0..count {
        let Serving { batch, .. } = Serving::draw(&mut rng, 40, 200);
        let options = options()[index % 5].clone();
        let mut predicted = BTreeMap::new();
        for mode in modes(1) {
            // Variants for runs alone are refused where there are none.
            let has_runs_at_all = !matches!(mode, PlanMode::FixedChunk { .. });
            let options = if has_runs_at_all { options.clone() } else { runs_always() };
            let mut planner = planner(options.with_mode(mode), 1);
            let plan = plan(&mut planner, &batch);
            check(&plan, &batch, shape());
            assert_eq!(
                has_runs(&plan),
                planner.batch_of_runs().is_some_and(|runs| runs.length(0) > 0 || has_runs(&plan))
            );
            assert_eq!(plan, self::plan(&mut planner, &batch), "planning is deterministic");
            let tokens: u64 = batch.lengths.iter().map(|length| u64::from(*length)).sum();
            assert_eq!(plan.logical_tokens(), tokens);
            assert!(!has_runs(&plan) || has_runs_at_all);
            in_runs += usize::from(has_runs(&plan));
            predicted.insert(format!("{mode:?}"), plan.prediction().total_us());
        }
        assert!(predicted["Auto"] <= predicted["Flat"], "{predicted:?}");
        // In another order, the same work.
        let mut order: Vec<usize> = (0..batch.lengths.len()).collect();
        order.shuffle(&mut rng);
        let permuted = OwnedBatch {
            lengths: order.iter().map(|&row| batch.lengths[row]).collect(),
            block_tables: order.iter().map(|&row| batch.block_tables[row].clone()).collect(),
            ..batch.clone()
        };
        let [a, b] = [&batch, &permuted].map(|batch| self::plan(&mut planner(options.clone(), 1), batch).summary());
        assert_eq!(a, b);
    }
    assert!(in_runs > count, "{in_runs} of {} plans have runs", 4 * count);
}

#[test]
fn consecutive_tables_are_planned_as_pages_of_16() {
    for (sequences, shared, seed) in [(64, 512, 1), (70, 0, 2), (3, 4096, 3)] {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut next, mut tables, mut lengths) = (shared / 16, Vec::new(), Vec::new());
        for _ in 0..sequences {
            let own = rng.random_range(1..2000u32);
            tables.push((0..shared / 16).chain(next..next + own.div_ceil(16)).collect::<Vec<u32>>());
            lengths.push(shared + own);
            next += own.div_ceil(16);
        }
        let paged = OwnedBatch { page_size: 16, num_pages: next, lengths, block_tables: tables };
        let mut single = OwnedBatch { page_size: 1, num_pages: 16 * next, ..paged.clone() };
        for table in &mut single.block_tables {
            *table = table.iter().flat_map(|page| 16 * page..16 * (page + 1)).collect();
        }
        let expected = plan(&mut planner(PlanOptions::default().with_variants([TileVariant::Wgmma64]), 16), &paged);
        let plan = plan(&mut planner(PlanOptions::default().with_runs(PageRuns::WhereFree), 1), &single);
        check(&plan, &single, shape());
        assert_eq!(plan.prediction(), expected.prediction());
        assert_eq!((plan.queries(), plan.merges()), (expected.queries(), expected.merges()));
        assert!(plan.pages().iter().eq(expected.pages().iter().map(|page| 16 * page).collect::<Vec<_>>().iter()));
        let items = |plan: &Plan| {
            plan.items()
                .iter()
                .map(|item| (item.token_count, item.row_count, plan.masks(item).to_vec()))
                .collect::<Vec<_>>()
        };
        assert_eq!(items(&plan), items(&expected));
        // A second header.
        assert_eq!(plan.bytes().len(), expected.bytes().len() + 192);
    }
}

/// What is not in runs is planned as it is without them.
#[test]
fn other_batches_are_planned_as_without_runs() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for index in 0..60 {
        let batch = random_forest(&mut rng);
        let mode = modes(batch.page_size)[index % 5];
        let [with, without] = [runs_always().with_mode(mode), PlanOptions::from(mode).with_runs(PageRuns::Never)]
            .map(|options| plan(&mut planner(options, batch.page_size), &batch));
        assert_eq!(with, without);
        assert!(!has_runs(&with));
        assert_eq!(with.runs_header().is_some(), batch.page_size == 1);
    }
}

#[test]
fn the_outputs_of_runs_are_those_of_the_oracle() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut launched = BTreeSet::new();
    for index in 0..40u32 {
        let Serving { batch, .. } = Serving::draw(&mut rng, 8, 160);
        let shape =
            AttentionShape::new(8, 2, if index % 3 == 0 { 128 } else { 64 }, Dtype::F16).expect("a valid shape");
        let layout = PoolLayout::ALL[index as usize % PoolLayout::ALL.len()];
        let case = Case { batch, shape, layout };
        let mode = [PlanMode::Auto, PlanMode::Packed, PlanMode::PerNode, PlanMode::Flat][index as usize / 5 % 4];
        let options = options()[index as usize % 5].clone().with_mode(mode);
        let plan = pat_tests::plan(&case, options).expect("a plan");
        let output = run_plan::<f16>(&case, &plan, index).expect("a valid plan");
        let report = judge(&case, &output, index).expect("a valid case");
        assert!(report.passed, "{index}: {report:?}\n{case:?}");
        let tensors = Tensors::<f16>::draw(&case.batch, shape, layout, index).expect("a valid case");
        let mut of_kernels = output.clone();
        of_kernels.out.fill(f16::NAN);
        let (out, lse) = (&mut of_kernels.out, Some(&mut of_kernels.lse[..]));
        Interpreter.run_host(&plan, &tensors.host(softmax_scale(shape)), out, lse).expect("a run");
        let report = judge(&case, &of_kernels, index).expect("a valid case");
        assert!(report.passed, "kernels, {index}: {report:?}\n{case:?}");
        for variant in TileVariant::ALL {
            launched.extend(plan.variant_items(variant).iter().map(|item| (variant.name(), item.run_pages > 0)));
        }
    }
    let expected = ["mma16", "mma32", "wgmma64", "wgmma128"].map(|name| (name, true));
    assert!(expected.iter().all(|launch| launched.contains(launch)), "{launched:?}");
    assert!(
        ["mma16", "mma32", "mma64", "mma128"].iter().all(|name| launched.contains(&(*name, false))),
        "{launched:?}"
    );
}

/// Steps of a serving engine: sequences generate, join, leave, and get further prompts.
#[test]
fn steps_keep_to_the_batch() {
    let mut changes = BTreeSet::new();
    let (mut in_runs, mut one_by_one, mut losses) = (0, 0, Vec::new());
    for seed in 0..if std::env::var_os("PAT_LONG").is_some() { 60 } else { 6 } {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut serving = Serving::draw(&mut rng, 40, [800, 300][seed as usize % 2]);
        let mode = [PlanMode::Auto, PlanMode::Flat, PlanMode::Packed][seed as usize % 3];
        let [mut comparing, mut hinted, mut scratch] = [(); 3].map(|()| planner(runs_always().with_mode(mode), 1));
        // Large enough from the beginning: another pool is another forest.
        serving.batch.num_pages = 1 << 20;
        let mut compared = plan(&mut comparing, &serving.batch);
        let mut told = plan(&mut hinted, &serving.batch);
        for _ in 0..200 {
            let before = serving.batch.clone();
            serving.step();
            let row = rng.random_range(0..serving.batch.lengths.len());
            match rng.random_range(0..20) {
                0 => drop(serving.join(&mut rng, 800)),
                1 if serving.batch.lengths.len() > 1 => serving.leave(row),
                2 => serving.prompt(row, 40),
                3 => serving.batch.lengths[row] = serving.batch.lengths[row].saturating_sub(rng.random_range(0..20)),
                4 => {
                    let other = rng.random_range(0..serving.batch.lengths.len());
                    serving.batch.lengths.swap(row, other);
                    serving.batch.block_tables.swap(row, other);
                }
                _ => {}
            }
            for (table, length) in serving.batch.block_tables.iter_mut().zip(&serving.batch.lengths) {
                table.truncate(*length as usize);
            }
            let generation = compared.generation();
            let rows = serving.batch.rows();
            let view = serving.batch.view(&rows).expect("a valid batch");
            let change = comparing.advance(&view, None, &mut compared).expect("a plan");
            assert_eq!(change == PlanChange::Nothing, generation == compared.generation());
            changes.insert(change);
            let named = changed_rows(&before, &serving.batch);
            hinted.advance(&view, Some(&named), &mut told).expect("a plan");
            assert_eq!(told, compared, "{change:?}, changed rows {named:?}");
            check(&compared, &serving.batch, shape());
            let expected = plan(&mut scratch, &serving.batch);
            assert_eq!(compared.logical_tokens(), expected.logical_tokens());
            if has_runs(&compared) && has_runs(&expected) {
                assert_eq!(compared.unique_kv_bytes(), expected.unique_kv_bytes());
                losses.push(compared.prediction().total_us() / expected.prediction().total_us() - 1.0);
            }
            *if has_runs(&compared) { &mut in_runs } else { &mut one_by_one } += 1;
        }
        assert_eq!(
            comparing
                .advance(&serving.batch.view(&serving.batch.rows()).expect("valid"), None, &mut compared)
                .expect("a plan"),
            PlanChange::Nothing
        );
    }
    assert!(changes.contains(&PlanChange::Pages) && changes.contains(&PlanChange::Forest), "{changes:?}");
    assert!(in_runs > 300 && one_by_one > 20, "{in_runs} plans in runs, {one_by_one} one by one");
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    assert!(mean < 0.02, "predicted {mean} slower in the mean");
}

/// A launch more for what is in no run is for batches beside which it hardly counts.
#[test]
fn single_pages_beside_runs_must_not_cost_much() {
    let batch = |sequences: u32, prompt: u32, generated: u32| {
        let step = sequences;
        let tables = (0..sequences).map(|row| {
            let outputs = sequences * prompt + row;
            (row * prompt..(row + 1) * prompt).chain((0..generated).map(|i| outputs + i * step)).collect()
        });
        let lengths = vec![prompt + generated; sequences as usize];
        let num_pages = sequences * (prompt + generated);
        OwnedBatch { page_size: 1, num_pages, lengths, block_tables: tables.collect() }
    };
    let are_in_runs = |batch: &OwnedBatch, when| {
        let plan = plan(&mut planner(PlanOptions::default().with_runs(when), 1), batch);
        check(&plan, batch, shape());
        has_runs(&plan)
    };
    let cases = [(8, 800, 0, true), (8, 800, 100, false), (300, 4000, 100, true), (30, 80, 90, false)];
    for (sequences, prompt, generated, expected) in cases {
        let batch = batch(sequences, prompt, generated);
        assert_eq!(are_in_runs(&batch, PageRuns::WhereFree), expected, "{sequences} x ({prompt} + {generated})");
        assert_eq!(are_in_runs(&batch, PageRuns::Always), generated < prompt);
        assert!(!are_in_runs(&batch, PageRuns::default()), "only where they are asked for");
    }
    // From step to step: the first generated tokens end it, where it costs too much.
    let (first, second) = (batch(8, 800, 0), batch(8, 800, 3));
    let first = OwnedBatch { num_pages: second.num_pages, ..first };
    let mut planner = planner(PlanOptions::default().with_runs(PageRuns::WhereFree), 1);
    let mut plan = plan(&mut planner, &first);
    assert!(has_runs(&plan) && planner.batch_of_runs().is_some());
    let rows = second.rows();
    let view = second.view(&rows).expect("valid");
    assert_eq!(planner.advance(&view, Some(&[]), &mut plan).expect("a plan"), PlanChange::Forest);
    assert!(!has_runs(&plan) && planner.batch_of_runs().is_none());
    check(&plan, &second, shape());
}

/// A sequence that generates alone gets pages one behind the other: its tokens become runs.
#[test]
fn generated_tokens_become_runs_once_there_are_sixteen() {
    let ids: Vec<u32> = (100..200).collect();
    let table: Vec<u32> = (0..40).chain(ids).collect();
    let tables = [&table[..]];
    let mut planner = planner(runs_always(), 1);
    let batch = |length: &'static [u32; 1]| DecodeBatch::from_block_tables(&tables, length, 1, 1000).expect("valid");
    let mut plan = planner.plan(&batch(&[40])).expect("a plan");
    let tokens = |plan: &Plan, are_runs: bool| {
        let items = plan.items().iter().filter(|item| (item.run_pages > 0) == are_runs);
        items.map(|item| item.token_count).sum::<u32>()
    };
    let mut steps = Vec::new();
    for length in [&[41u32], &[55], &[56], &[57], &[71], &[72], &[80]] {
        planner.advance(&batch(length), Some(&[]), &mut plan).expect("a plan");
        steps.push((tokens(&plan, true), tokens(&plan, false)));
    }
    // The 8 tokens behind two runs of the prompt are a partial run while they are the last ones.
    assert_eq!(steps, [(32, 9), (32, 23), (48, 8), (49, 8), (63, 8), (64, 8), (72, 8)]);
    assert_eq!(planner.batch_of_runs().expect("in runs").pages(0), [0, 16, 100, 116, 132]);
}

#[test]
fn launches_cover_both_parts_and_bad_ids_are_refused() {
    let tables: [&[u32]; 2] = [&(0..64).collect::<Vec<_>>(), &(32..100).collect::<Vec<_>>()];
    let batch = DecodeBatch::from_block_tables(&tables, &[64, 68], 1, 100).expect("valid");
    let mut planner = planner(runs_always(), 1);
    let plan = planner.plan(&batch).expect("a plan");
    let geometry = LaunchGeometry::of(&plan);
    // The last partial run would reach behind the pool: its four tokens are single pages.
    let count = |are_runs: bool| plan.items().iter().filter(|item| (item.run_pages > 0) == are_runs).count() as u32;
    assert_eq!(
        (geometry.max_run_items.iter().sum::<u32>(), geometry.max_items.iter().sum()),
        (count(true), count(false))
    );
    assert!(count(true) > 0 && count(false) > 0);
    assert_eq!(plan.merges().len(), 1);
    assert_eq!(planner.batch_of_runs().expect("in runs").num_pages(), 100 - RUN_PAGES + 1);
    let error = DecodeBatch::from_block_tables(&tables, &[64, 68], 1, 99).unwrap_err().to_string();
    assert!(error.contains("block_tables[1][67]: got 99"), "{error}");
    let error = planner.advance(&batch, Some(&[2]), &mut plan.clone()).unwrap_err().to_string();
    assert!(error.contains("changed_rows") && error.contains("below 2"), "{error}");

    // A plan under a capacity, and one of fixed chunks, has single pages.
    let capacity = PlanCapacity { max_sequences: 2, max_pages: 200, max_items: 64, max_slots: 64 };
    let mut bounded = self::planner(runs_always(), 1).with_capacity(capacity).expect("a capacity");
    assert!(!has_runs(&bounded.plan(&batch).expect("a plan")));
    assert!(bounded.batch_of_runs().is_none());
    // A pool too small for a run.
    let tables: [&[u32]; 1] = [&[0, 1, 2, 3, 4]];
    let small = DecodeBatch::from_block_tables(&tables, &[5], 1, 5).expect("valid");
    assert!(!has_runs(&planner.plan(&small).expect("a plan")));
}

/// Each part has fewer items than are counted, both together more.
#[test]
fn the_work_of_both_parts_is_counted_together() {
    let shape = AttentionShape::new(65_535, 65_535, 128, Dtype::F16).expect("a valid shape");
    let plan = |row_count: u32| {
        // A run, and one token that is behind it in no pool.
        let tables: Vec<Vec<u32>> =
            (0..row_count).map(|row| (34 * row..34 * row + 16).chain([34 * row + 17]).collect()).collect();
        let rows: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let lengths = vec![17; rows.len()];
        let batch = DecodeBatch::from_block_tables(&rows, &lengths, 1, 34 * row_count).expect("valid");
        let options = PlanOptions::from(PlanMode::Flat).with_runs(PageRuns::Always);
        Planner::new(Problem::new(shape, 1), DeviceProfile::h200(), options).expect("a planner").plan(&batch)
    };
    let most = plan(16_384).expect("2^31 - 2^15");
    assert!(has_runs(&most) && most.items().len() == 32_768, "{} items", most.items().len());
    let message = plan(16_385).unwrap_err().to_string();
    assert_eq!(message, "plan items times KV heads: got 2147581950, expected fewer than 2^31");
}

#[test]
fn a_pool_that_grows_is_planned_anew() {
    let tables: [&[u32]; 2] = [&(0..64).collect::<Vec<_>>(), &(32..100).collect::<Vec<_>>()];
    let view = |num_pages| DecodeBatch::from_block_tables(&tables, &[64, 68], 1, num_pages).expect("valid");
    let mut planner = planner(runs_always(), 1);
    let mut plan = planner.plan(&view(100)).expect("a plan");
    assert!(has_runs(&plan));
    for (num_pages, changed_rows) in [(200, Some(&[][..])), (150, None), (100, Some(&[1][..]))] {
        planner.advance(&view(num_pages), changed_rows, &mut plan).expect("a plan");
        assert_eq!(plan.num_pages(), num_pages);
        assert_eq!(planner.batch_of_runs().expect("in runs").num_pages(), num_pages - RUN_PAGES + 1);
    }
}

/// What a planner has made without a capacity is no step of the one that has it.
#[test]
fn a_capacity_begins_with_a_plan_of_its_own() {
    let tables: [&[u32]; 1] = [&(0..20_000).collect::<Vec<_>>()];
    let [first, next] = [&[19_000], &[19_001]]
        .map(|lengths| DecodeBatch::from_block_tables(&tables, lengths, 1, 20_000).expect("valid"));
    for options in [runs_always(), PlanOptions::default()] {
        let mut planner = planner(options, 1);
        let mut plan = planner.plan(&first).expect("a plan");
        assert!(plan.header().slot_count > 0, "a long sequence is cut");
        let capacity = PlanCapacity { max_sequences: 1, max_pages: 20_000, max_items: 1, max_slots: 0 };
        let mut planner = planner.with_capacity(capacity).expect("a valid capacity");
        planner.advance(&next, None, &mut plan).expect("a plan");
        assert!(!has_runs(&plan) && plan.items().len() == 1 && plan.header().slot_count == 0, "{plan:?}");
        assert_eq!(plan.bytes(), planner.plan(&next).expect("a plan").bytes());
    }
}
