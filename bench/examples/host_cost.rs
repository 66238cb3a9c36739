//! Host time of one run beside the bare driver calls that it makes: same kernels, grids and parameters, in turns on one stream.
//! `cargo run --release --example host_cost -p pat-bench`, on a machine with a GPU; some seconds.

use pat_bench::device::DeviceCase;
use pat_bench::statistics::{median, quartiles};
use pat_bench::suites::{figure10, realistic};
use pat_rs::cuda::CudaEngine;
use pat_rs::{PlanOptions, Planner, TileVariant};
use pat_workloads::ElementParts;

const CALLS: u32 = 20_000;
/// One launch, two, and more under forced variants.
const CASES: [&str; 3] = ["1,10_4096,416 32/8", "256_1024 32/8", "loners_64 32/8"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let engine = CudaEngine::new(0)?;
    let profile = engine.device().profile()?;
    println!("{}: host time in us, median of {CALLS} calls (quartiles)", engine.device().name());
    println!("| batch | launches | bare | run | more | bind and run |");
    println!("|---|---|---|---|---|---|");
    let configurations = [figure10(), realistic()].concat();
    for label in CASES {
        let configuration =
            configurations.iter().find(|c| c.label() == label).ok_or_else(|| format!("no configuration {label}"))?;
        let (shape, batch) = (configuration.shape(ElementParts::default())?, configuration.batch()?);
        let rows = batch.rows();
        for variants in [None, Some(vec![TileVariant::Mma16])] {
            let name = if variants.is_some() { "mma16" } else { "automatic" };
            let options =
                variants.map_or_else(PlanOptions::default, |these| PlanOptions::default().with_variants(these));
            let plan = Planner::new(batch.problem(shape), profile.clone(), options)?.plan(&batch.view(&rows)?)?;
            let case = DeviceCase::new(&engine, &batch, batch.problem(shape))?;
            let prepared = case.prepare(&plan)?;
            prepared.host_times(CALLS / 10)?;
            let mut times = prepared.host_times(CALLS)?;
            let mut bound = prepared.bind_and_run_us(CALLS / 10)?;
            let (bare, run) = (median(&mut times.bare_us), median(&mut times.run_us));
            let ([bare_low, bare_high], [run_low, run_high]) =
                (quartiles(&mut times.bare_us), quartiles(&mut times.run_us));
            println!(
                "| {label}, {name} | {} | {bare:.2} ({bare_low:.2} to {bare_high:.2}) | {run:.2} ({run_low:.2} to \
                 {run_high:.2}) | {:+.2} | {:.2} |",
                times.launches,
                run - bare,
                median(&mut bound)
            );
        }
    }
    Ok(())
}
