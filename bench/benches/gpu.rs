//! GPU time of one call by CUDA events, L2 cold and warm. Each answer is verified before it is timed. Skipped, with the
//! reason, where there is no usable device.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use pat_bench::device::DeviceCase;
use pat_bench::sample::oracle;
use pat_bench::suites::{figure10, realistic};
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::{PlanOptions, Planner};
use pat_workloads::ElementParts;
use std::time::Duration;

const CASES: [&str; 7] = [
    "1,10_4096,416 32/8",
    "1,1024_2048,32 64/8",
    "1,4,256_32,256,32 32/8",
    "256_1024 32/8",
    "rollouts_8x32 32/8",
    "agent_swarm 32/8",
    "loners_64 32/8",
];

fn gpu(criterion: &mut Criterion) {
    let engine = match CudaEngine::new(0) {
        Ok(engine) => engine,
        Err(error) => {
            eprintln!("GPU benches skipped: {error}");
            return;
        }
    };
    let flush = L2Flush::new(engine.device()).expect("device memory");
    let configurations = [figure10(), realistic()].concat();
    for label in CASES {
        let configuration = configurations.iter().find(|c| c.label() == label).expect("a configuration of the suites");
        let shape = configuration.shape(ElementParts::default()).expect("a valid shape");
        let batch = configuration.batch().expect("a batch");
        let rows = batch.rows();
        let profile = engine.device().profile().expect("a profile");
        let mut planner = Planner::new(batch.problem(shape), profile, PlanOptions::default()).expect("a valid planner");
        let plan = planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan");
        let oracle = oracle::<f16, f16>(&batch, batch.problem(shape)).expect("a valid batch");
        let mut case = DeviceCase::new(&engine, &batch, batch.problem(shape)).expect("device memory");
        let report = case.verify::<f16>(&plan, &oracle).expect("a run");
        assert!(report.passed, "{label}: {report:?}");
        let prepared = case.prepare(&plan).expect("device memory");
        let mut group = criterion.benchmark_group(format!("gpu/{label}"));
        group.throughput(Throughput::Bytes(plan.summary().unique_kv_bytes));
        for (name, flush) in [("cold", Some(&flush)), ("warm", None)] {
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter_custom(|calls| {
                    let us: f64 = (0..calls).map(|_| prepared.run_us(flush).expect("a run")).sum();
                    Duration::from_secs_f64(us * 1e-6)
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(500));
    targets = gpu
}
criterion_main!(benches);
