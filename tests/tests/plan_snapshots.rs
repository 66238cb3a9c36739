//! What the planner makes of some hundred batches and steps, in numbers: a change of the planner that changes plans shows in the
//! diff of the snapshot, one that should change none is held to it. (`INSTA_UPDATE=always` writes it anew.)

use fnv::FnvHasher;
use pat_rs::plan::{PageRuns, PlanCapacity, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem, QueryTokens};
use pat_tests::invariants::{modes, random_forest};
use pat_tests::serving::Serving;
use pat_tests::walk::{Limits, Walk, changed_rows};
use pat_workloads::{OwnedBatch, RaggedGroups, TreeSpec};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::hash::Hasher;

const HEADS: [(u32, u32, u32); 5] = [(32, 8, 128), (16, 2, 64), (8, 8, 128), (64, 8, 128), (16, 8, 256)];
const DEVICES: [&str; 3] = ["h200", "a100-80", "h100-sxm"];

fn problem(index: usize, page_size: u32) -> Problem {
    let (q_heads, kv_heads, head_dim) = HEADS[index % HEADS.len()];
    Problem::new(AttentionShape::new(q_heads, kv_heads, head_dim, Dtype::F16).expect("a valid shape"), page_size)
}

fn profile(index: usize) -> DeviceProfile {
    DeviceProfile::by_name(DEVICES[index % DEVICES.len()]).expect("a known device")
}

fn planner(problem: Problem, index: usize, options: impl Into<PlanOptions>) -> Planner {
    Planner::new(problem, profile(index), options.into()).expect("a planner")
}

fn plan(planner: &mut Planner, batch: &OwnedBatch) -> Plan {
    let rows = batch.rows();
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

/// Everything that is uploaded, the same on every machine.
fn hash(hasher: &mut FnvHasher, plan: &Plan) {
    hasher.write(plan.bytes());
}

/// A plan in a line: where its time goes, and its records.
fn line(plan: &Plan) -> String {
    let mut hasher = FnvHasher::default();
    hash(&mut hasher, plan);
    let header = plan.header();
    let variants: Vec<String> =
        plan.summary().variants.iter().map(|variant| format!("{} {}", variant.variant, variant.items)).collect();
    let us = plan.prediction().total_us();
    format!("{}; {} slots, {us:.4} us, {:016x}", variants.join(", "), header.slot_count, hasher.finish())
}

#[test]
fn plans_are_what_they_were() {
    let mut lines = String::new();
    let mut say = |what: String, plan: &Plan| writeln!(lines, "{what}: {}", line(plan)).expect("writing to a string");
    let mut rng = ChaCha8Rng::seed_from_u64(71);
    for index in 0..45 {
        let batch = random_forest(&mut rng);
        let problem = problem(index, batch.page_size);
        for mode in modes(batch.page_size) {
            say(format!("forest {index} {mode:?}"), &plan(&mut planner(problem, index / 5, mode), &batch));
        }
        let windowed = problem.with_window(3 * batch.page_size);
        say(format!("forest {index} window"), &plan(&mut planner(windowed, index / 5, PlanMode::Auto), &batch));
        let tokens = batch.lengths.iter().map(|&length| if length == 0 { 3 } else { length.min(3) });
        let rows = batch.rows();
        let view = batch.view(&rows).expect("a valid batch");
        let queries = QueryTokens::ragged(&view, &tokens.collect::<Vec<_>>()).expect("valid counts");
        let mut drafts = planner(problem.with_query_tokens(3), index / 5, PlanMode::Auto);
        say(format!("forest {index} drafts"), &drafts.plan(&queries.batch()).expect("a plan"));
    }
    for (index, tree) in
        ["1,4,256_32,256,32", "1,8,64_2048,256,64", "2,32_512,1024", "1_16384", "4,4,4_64,64,64", "1,128_8192,96"]
            .iter()
            .enumerate()
    {
        let batch = tree.parse::<TreeSpec>().expect("a tree").batch(32, Some(1)).expect("a batch");
        for (device, name) in DEVICES.into_iter().enumerate() {
            say(format!("{tree} {}", name), &plan(&mut planner(problem(index, 32), device, PlanMode::Auto), &batch));
        }
    }
    // Groups that fill a device, and some that do not.
    for index in 0..24u32 {
        let groups = [1, 3, 8, 24][index as usize % 4];
        let (sequences, private_pages) =
            (groups * [2, 5, 17][index as usize % 3], [1, 6, 40, 90, 300][index as usize % 5]);
        let (shared_pages, seed) = ([0, 3, 64, 200, 31, 12][index as usize / 4], u64::from(index));
        let batch = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size: 16, seed }.batch();
        for (device, name) in DEVICES.into_iter().enumerate() {
            let problem = problem(index as usize / 3, 16);
            say(format!("groups {index} {}", name), &plan(&mut planner(problem, device, PlanMode::Auto), &batch));
        }
        let packed = plan(&mut planner(problem(index as usize / 3, 16), 0, PlanMode::Packed), &batch);
        say(format!("groups {index} packed"), &packed);
    }
    for index in 0..10 {
        let Serving { batch, .. } = Serving::draw(&mut rng, 60, 900);
        for runs in [PageRuns::WhereFree, PageRuns::Always] {
            let options = PlanOptions::default().with_runs(runs);
            say(
                format!("tables of single tokens {index} {runs:?}"),
                &plan(&mut planner(problem(index, 1), 0, options), &batch),
            );
        }
    }
    insta::assert_snapshot!(lines);
}

/// Steps of a batch that lives, each planned from the last one's plan.
#[test]
fn steps_are_what_they_were() {
    let mut lines = String::new();
    for seed in 0..48u64 {
        let index = seed as usize;
        let limits = Limits { num_pages: 2048, sequences: 40, tokens: 1200 };
        let mut walk = Walk::new(seed, &[[1, 16, 32][index % 3]], limits);
        let page_size = walk.batch.page_size;
        let mode = [PlanMode::Auto, PlanMode::Auto, PlanMode::FixedChunk { tokens: 4 * page_size }, PlanMode::PerNode]
            [index % 4];
        let mut planner = planner(problem(index, page_size), index / 3, mode);
        let is_bounded = index % 5 == 4;
        if is_bounded {
            let capacity = PlanCapacity::for_batches(40, 40 * (1201u32).div_ceil(page_size), planner.profile());
            planner = planner.with_capacity(capacity).expect("a planner");
        }
        let mut current = plan(&mut planner, &walk.batch);
        let mut hasher = FnvHasher::default();
        let (mut changes, mut us) = (BTreeMap::new(), 0.0);
        for step in 0..40 {
            let before = walk.batch.clone();
            walk.step();
            let hint = (step % 3 == 0).then(|| changed_rows(&before, &walk.batch));
            let rows = walk.batch.rows();
            let view = walk.batch.view(&rows).expect("a valid batch");
            let change = planner.advance(&view, hint.as_deref(), &mut current).expect("a plan");
            *changes.entry(format!("{change:?}")).or_insert(0) += 1;
            hash(&mut hasher, &current);
            us += current.prediction().total_us();
        }
        writeln!(lines, "walk {seed}: {changes:?}, {us:.3} us, {:016x}", hasher.finish()).expect("writing to a string");
    }
    // Nearly all steps of a server: a token more for each sequence, and what follows from it.
    for index in 0..6usize {
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        let (groups, seed) = (3 + index as u32, index as u64);
        let (sequences, shared_pages, private_pages) = (8 * groups - 3, 12 * groups, 20);
        let mut batch = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size: 16, seed }.batch();
        let mut next = batch.num_pages;
        batch.num_pages += 20_000;
        let mut planner = planner(problem(index, 16), index, PlanMode::Auto);
        let mut current = plan(&mut planner, &batch);
        let (mut hasher, mut us) = (FnvHasher::default(), 0.0);
        let mut changes = BTreeMap::new();
        for _ in 0..60 {
            for row in 0..batch.lengths.len() {
                batch.lengths[row] += 1;
                if batch.lengths[row].div_ceil(16) as usize > batch.block_tables[row].len() {
                    batch.block_tables[row].push(next);
                    next += 1;
                }
            }
            if rng.random_bool(0.1) {
                let row = rng.random_range(0..batch.lengths.len());
                batch.lengths.swap_remove(row);
                batch.block_tables.swap_remove(row);
            }
            let rows = batch.rows();
            let view = batch.view(&rows).expect("a valid batch");
            let change = planner.advance(&view, None, &mut current).expect("a plan");
            *changes.entry(format!("{change:?}")).or_insert(0) += 1;
            hash(&mut hasher, &current);
            us += current.prediction().total_us();
        }
        writeln!(lines, "server {index}: {changes:?}, {us:.3} us, {:016x}", hasher.finish())
            .expect("writing to a string");
    }
    insta::assert_snapshot!(lines);
}
