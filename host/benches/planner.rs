//! Time of planning on one thread: from scratch, over batches of PAT's benchmark and over sizes, and from step to step. What the
//! plans are is for the tests to check (`tests/tests/plan_advance.rs`).

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pat_rs::plan::forest::Forest;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner};
use pat_workloads::{OwnedBatch, RaggedGroups, TreeSpec};
use std::time::Duration;

fn planner(batch: &OwnedBatch) -> Planner {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    Planner::new(batch.problem(shape), DeviceProfile::h200(), PlanOptions::default()).expect("a valid planner")
}

fn batches() -> Vec<(String, OwnedBatch)> {
    let mut batches = Vec::new();
    for tree in ["1,10_4096,416", "1,4,256_32,256,32", "256_4096", "1,4,16,64,256,1024_256,32,256,64,32,256"] {
        let spec: TreeSpec = tree.parse().expect("a tree of PAT's benchmark");
        batches.push((format!("tree/{tree}"), spec.batch(32, Some(1)).expect("a batch")));
    }
    for (sequences, private_pages) in [(64, 32), (256, 32), (1024, 32), (4096, 32), (8192, 32), (8192, 96)] {
        batches.push((format!("ragged/{sequences}x{}", 32 + private_pages), ragged(sequences, private_pages)));
    }
    batches
}

fn ragged(sequences: u32, private_pages: u32) -> OwnedBatch {
    let groups = sequences.div_ceil(64);
    RaggedGroups { sequences, groups, shared_pages: 32, private_pages, page_size: 16, seed: 1 }.batch()
}

fn from_scratch(criterion: &mut Criterion) {
    for (name, batch) in batches() {
        let rows = batch.rows();
        let pages: usize = batch.lengths.iter().map(|length| length.div_ceil(batch.page_size) as usize).sum();
        let mut group = criterion.benchmark_group(&name);
        group.throughput(Throughput::Elements(pages as u64));
        group.bench_function(BenchmarkId::from_parameter("validate"), |bencher| {
            bencher.iter(|| batch.view(&rows).expect("a valid batch"));
        });
        let view = batch.view(&rows).expect("a valid batch");
        let mut forest = Forest::default();
        group.bench_function(BenchmarkId::from_parameter("forest"), |bencher| bencher.iter(|| forest.build(&view)));
        let mut planner = planner(&batch);
        group.bench_function(BenchmarkId::from_parameter("plan"), |bencher| {
            bencher.iter(|| planner.plan(&view).expect("a plan"));
        });
        let mut plan = planner.plan(&view).expect("a plan");
        let again = plan.clone();
        planner.plan_into(&view, &mut plan).expect("a plan");
        assert_eq!(plan, again, "{name}");
        group.bench_function(BenchmarkId::from_parameter("plan_into"), |bencher| {
            bencher.iter(|| planner.plan_into(&view, &mut plan).expect("a plan"));
        });
        group.finish();
    }
}

/// A decode step of a batch, and the step after it, in turn: the same work every time.
fn advance(criterion: &mut Criterion) {
    for sequences in [64, 256, 1024, 4096] {
        let mut before = ragged(sequences, 32);
        before.lengths.iter_mut().for_each(|length| *length = length.next_multiple_of(16) - 8);
        // A token more for all; and another page for one sequence in 16.
        let (mut lengths, mut pages) = (before.clone(), before.clone());
        lengths.lengths.iter_mut().chain(&mut pages.lengths).for_each(|length| *length += 1);
        for (table, length) in pages.block_tables.iter_mut().zip(&mut pages.lengths).step_by(16) {
            table.push(0);
            *length = length.next_multiple_of(16) + 1;
        }
        let mut group = criterion.benchmark_group(format!("advance/{sequences}x64"));
        let cases = [
            ("lengths, hinted", &lengths, Some(&[][..])),
            ("lengths", &lengths, None),
            ("pages, hinted", &pages, Some(&[][..])),
            ("pages", &pages, None),
        ];
        for (name, after, hint) in cases {
            let (before_rows, after_rows) = (before.rows(), after.rows());
            let views = [after.view(&after_rows).expect("valid"), before.view(&before_rows).expect("valid")];
            let mut planner = planner(&before);
            let mut plan = planner.plan(&views[1]).expect("a plan");
            // The first change of pages is planned with room for more.
            for view in &views {
                planner.advance(view, hint, &mut plan).expect("a plan");
            }
            let mut step = 0;
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter(|| {
                    step += 1;
                    planner.advance(&views[(step - 1) % 2], hint, &mut plan).expect("a plan")
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = from_scratch, advance
}
criterion_main!(benches);
