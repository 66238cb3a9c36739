//! Time of a step with pages of one token, planned in runs and one by one, beside the same tokens in pages of 16: where ids are
//! consecutive, and where generated tokens are scattered over the pool. Every answer is verified before it is timed.
//! `cargo run --release -p pat-bench --example page_runs`, on a machine with a GPU; some seconds.

use half::f16;
use pat_bench::device::{DeviceCase, Repeats};
use pat_bench::sample::oracle;
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::plan::PageRuns;
use pat_rs::{AttentionShape, Dtype, PlanOptions, Planner, TileVariant};
use pat_workloads::OwnedBatch;

/// Tokens of the prompt that 64 sequences share.
const SHARED: u32 = 1024;

/// Which ids the tokens behind the shared prompt have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// Those of a sequence follow each other, generated ones included.
    Consecutive,
    /// Prompts follow each other; generated tokens have the ids that the pool gave step by step.
    Mixed,
}

/// 64 sequences at a time share a prompt; each has 1 to 512 tokens of prompt and 200 to 500 generated ones of its own.
fn serving(sequences: u32, page_size: u32, ids: Ids) -> OwnedBatch {
    let shared_pages = SHARED / page_size;
    let mut free = sequences.div_ceil(64) * shared_pages;
    let own = |sequence: u32| (1 + sequence * 197 % 512, 200 + sequence * 131 % 301);
    let (mut block_tables, mut lengths) = (Vec::new(), Vec::new());
    for sequence in 0..sequences {
        let (prompt, generated) = own(sequence);
        let first = sequence / 64 * shared_pages;
        let pages = if ids == Ids::Consecutive { prompt + generated } else { prompt }.div_ceil(page_size);
        block_tables.push((first..first + shared_pages).chain(free..free + pages).collect::<Vec<_>>());
        lengths.push(SHARED + prompt + generated);
        free += pages;
    }
    for _step in 0..500 {
        for (table, length) in block_tables.iter_mut().zip(&lengths) {
            if table.len() < length.div_ceil(page_size) as usize {
                table.push(free);
                free += 1;
            }
        }
    }
    OwnedBatch { page_size, num_pages: free, lengths, block_tables }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let engine = CudaEngine::new(0)?;
    let (device, profile) = (engine.device(), engine.device().profile()?);
    let flush = L2Flush::new(device)?;
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16)?;
    println!("{}: us, medians of 21 calls, cold L2", device.name());
    println!("| sequences | ids | planned | items | plan bytes | cold | graph | upload | predicted |");
    println!("|---|---|---|---|---|---|---|---|---|");
    for sequences in [16, 64, 256, 1024] {
        for ids in [Ids::Consecutive, Ids::Mixed] {
            let runs = |runs| PlanOptions::default().with_runs(runs);
            for (name, page_size, options) in [
                ("pages of 16", 16, runs(PageRuns::Never)),
                ("in runs", 1, runs(PageRuns::Always)),
                (
                    "in runs, wgmma64",
                    1,
                    runs(PageRuns::Always).with_variants([TileVariant::Wgmma64, TileVariant::Mma64]),
                ),
                ("in runs where free", 1, runs(PageRuns::WhereFree)),
                ("one by one", 1, runs(PageRuns::Never)),
            ] {
                let batch = serving(sequences, page_size, ids);
                let (rows, problem) = (batch.rows(), batch.problem(shape));
                let plan = Planner::new(problem, profile.clone(), options)?.plan(&batch.view(&rows)?)?;
                let mut case = DeviceCase::new(&engine, &batch, problem)?;
                let report = case.verify::<f16>(&plan, &oracle::<f16, f16>(&batch, problem)?)?;
                if !report.passed {
                    return Err(format!("{sequences} sequences, {ids:?}, {name}: {report:?}").into());
                }
                let times = case.time(&plan, &flush, Repeats { warm_ups: 5, timed: 21 })?;
                println!(
                    "| {sequences} | {ids:?} | {name} | {} | {} | {:.1} | {:.1} | {:.1} | {:.1} |",
                    plan.summary().variants.iter().map(|variant| variant.items).sum::<u32>(),
                    plan.bytes().len(),
                    times.cold_us,
                    times.graph_us,
                    times.upload_us,
                    plan.prediction().total_us()
                );
            }
        }
    }
    Ok(())
}
