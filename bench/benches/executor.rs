//! Wall time of the CPU executor, with sharing and without. Each answer is verified before it is timed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use pat_bench::cpu::CpuCase;
use pat_bench::measure::batch_flop;
use pat_bench::sample::oracle;
use pat_bench::suites::{figure10, realistic};
use pat_rs::plan::PlanMode;
use pat_rs::{DeviceProfile, PlanOptions, Planner};
use pat_workloads::ElementParts;
use std::time::Duration;

/// Small: one call takes milliseconds.
const CASES: [&str; 5] =
    ["1,10_4096,416 16/8", "1,256_256,32 16/8", "1,4,256_32,256,32 16/8", "tree_of_thoughts 32/8", "single_4k 32/8"];

fn executor(criterion: &mut Criterion) {
    let configurations = [figure10(), realistic()].concat();
    for label in CASES {
        let configuration = configurations.iter().find(|c| c.label() == label).expect("a configuration of the suites");
        let shape = configuration.shape(ElementParts::default()).expect("a valid shape");
        let batch = configuration.batch().expect("a batch");
        let rows = batch.rows();
        let view = batch.view(&rows).expect("a valid batch");
        let oracle = oracle::<f16, f16>(&batch, batch.problem(shape)).expect("a valid batch");
        let mut case = CpuCase::<f16, f16>::new(&batch, batch.problem(shape)).expect("a valid batch");
        let mut group = criterion.benchmark_group(format!("executor/{label}"));
        group.throughput(Throughput::Elements(batch_flop(&batch, &batch.problem(shape)) as u64));
        for (name, mode) in [("auto", PlanMode::Auto), ("flat", PlanMode::Flat)] {
            let options = PlanOptions::from(mode);
            let mut planner =
                Planner::new(batch.problem(shape), DeviceProfile::h200(), options).expect("a valid planner");
            let plan = planner.plan(&view).expect("a plan");
            let report = case.verify(&plan, &oracle).expect("a run");
            assert!(report.passed, "{label} {name}: {report:?}");
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter(|| case.run_us(&plan).expect("a run"));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(2));
    targets = executor
}
criterion_main!(benches);
