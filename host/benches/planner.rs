//! Time of planning on one thread: from scratch, over batches of PAT's benchmark and over sizes.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pat_rs::plan::forest::Forest;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner};
use pat_workloads::{OwnedBatch, RaggedGroups, TreeSpec};
use std::time::Duration;

fn planner() -> Planner {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    Planner::new(shape, DeviceProfile::h200(), PlanOptions::default()).expect("a valid planner")
}

fn batches() -> Vec<(String, OwnedBatch)> {
    let mut batches = Vec::new();
    for tree in ["1,10_4096,416", "1,4,256_32,256,32", "256_4096", "1,4,16,64,256,1024_256,32,256,64,32,256"] {
        let spec: TreeSpec = tree.parse().expect("a tree of PAT's benchmark");
        batches.push((format!("tree/{tree}"), spec.batch(32, Some(1)).expect("a batch")));
    }
    for (sequences, private_pages) in [(64, 32), (256, 32), (1024, 32), (4096, 32), (8192, 32), (8192, 96)] {
        let spec = RaggedGroups {
            sequences,
            groups: sequences.div_ceil(64),
            shared_pages: 32,
            private_pages,
            page_size: 16,
            seed: 1,
        };
        batches.push((format!("ragged/{sequences}x{}", 32 + private_pages), spec.batch()));
    }
    batches
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
        let mut planner = planner();
        group.bench_function(BenchmarkId::from_parameter("plan"), |bencher| {
            bencher.iter(|| planner.plan(&view).expect("a plan"));
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = from_scratch
}
criterion_main!(benches);
