//! Prints docs/planner-quality.md's tables: PAT's 80 configurations, and batches cut from traces.
//!
//! `cargo run --release -p pat-tests --example planner_quality [-- TRACE.jsonl]`

use pat_rs::plan::{PlanMode, PlanSummary};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner};
use pat_tests::pat_schedule::{BLOCK_TOKENS, PatSchedule};
use pat_workloads::{FIGURE_10_HEADS, FIGURE_10_TREES, MOONCAKE_BLOCK_TOKENS, OwnedBatch, TraceCut, TreeSpec};
use std::error::Error;
use std::fs::File;
use std::io::BufReader;

fn summary(batch: &OwnedBatch, shape: AttentionShape, mode: PlanMode) -> pat_rs::Result<PlanSummary> {
    let rows = batch.rows();
    let mut planner = Planner::new(batch.problem(shape), DeviceProfile::h200(), mode.into())?;
    Ok(planner.plan(&batch.view(&rows)?)?.summary())
}

fn main() -> Result<(), Box<dyn Error>> {
    println!(
        "| # | heads | KV tokens: unique | PAT | pat-rs | partials: PAT | pat-rs | predicted us: flat | PAT | pat-rs |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let (mut more, mut slower) = (Vec::new(), Vec::new());
    // Its time over that of PAT's packs, by configuration.
    let mut ratios = Vec::new();
    for (index, tree) in FIGURE_10_TREES.iter().enumerate() {
        let spec: TreeSpec = tree.parse()?;
        let batch = spec.batch(BLOCK_TOKENS, Some(1))?;
        for (q_heads, kv_heads) in FIGURE_10_HEADS {
            let shape = AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16)?;
            let (auto, flat) = (summary(&batch, shape, PlanMode::Auto)?, summary(&batch, shape, PlanMode::Flat)?);
            let pat = PatSchedule::new(&spec, q_heads, kv_heads);
            let tokens = |bytes: u64| bytes / shape.kv_bytes_per_token();
            let planner = Planner::new(batch.problem(shape), DeviceProfile::h200(), PlanOptions::default())?;
            let unique_pages = batch.unique_pages() as u64;
            let of_pat = planner.predict_packs(unique_pages, &pat.cost_packs(), pat.partials())?;
            println!(
                "| {} | {q_heads}/{kv_heads} | {} | {} | {} | {} | {} | {:.1} | {:.1} | {:.1} |",
                index + 1,
                tokens(auto.unique_kv_bytes),
                pat.kv_tokens(),
                tokens(auto.planned_kv_bytes),
                pat.partials(),
                auto.partial_bytes / shape.partial_bytes(),
                flat.predicted_us,
                of_pat.total_us(),
                auto.predicted_us,
            );
            let ratio = auto.predicted_us / of_pat.total_us();
            ratios.push(ratio);
            // Flat plans and packs of one sequence are the same sum in another order.
            if ratio > 1.0 + 1e-9 {
                let (pat_us, own_us) = (of_pat.total_us(), auto.predicted_us);
                slower
                    .push(format!("| {} | {q_heads}/{kv_heads} | {pat_us:.2} | {own_us:.2} | {ratio:.3} |", index + 1));
            }
            if tokens(auto.planned_kv_bytes) > pat.kv_tokens() {
                let packed = summary(&batch, shape, PlanMode::Packed)?;
                more.push(format!(
                    "| {} | {q_heads}/{kv_heads} | {} | {} | {} | {:.2} | {:.2} | {:.2} |",
                    index + 1,
                    pat.kv_tokens(),
                    tokens(auto.planned_kv_bytes),
                    tokens(packed.planned_kv_bytes),
                    of_pat.total_us(),
                    auto.predicted_us,
                    packed.predicted_us
                ));
            }
        }
    }
    println!("\n| # | heads | KV tokens: PAT | pat-rs | widest tiles | predicted us: PAT | pat-rs | widest tiles |");
    println!("|---|---|---|---|---|---|---|---|");
    more.iter().for_each(|line| println!("{line}"));
    println!("\n| # | heads | predicted us: PAT | pat-rs | pat-rs / PAT |");
    println!("|---|---|---|---|---|");
    slower.iter().for_each(|line| println!("{line}"));
    let faster = ratios.iter().filter(|&&ratio| ratio < 1.0 - 1e-9).count();
    let mean = (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp();
    println!("\npredicted to be faster than PAT's packs: {faster} of {}, geometric mean {mean:.3}", ratios.len());
    let Some(trace) = std::env::args().nth(1) else { return Ok(()) };
    println!("\n| batch | step | sharing factor | KV MiB: flat | unique | pat-rs | predicted us: flat | pat-rs |");
    println!("|---|---|---|---|---|---|---|---|");
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16)?;
    for batch_size in [32, 64, 128, 256] {
        for (first_request, step) in [(0, 0), (1000, 200)] {
            let cut = TraceCut { first_request, batch_size, step, page_size: 16, block_tokens: MOONCAKE_BLOCK_TOKENS };
            let batch = cut.batch(BufReader::new(File::open(&trace)?))?;
            let (auto, flat) = (summary(&batch, shape, PlanMode::Auto)?, summary(&batch, shape, PlanMode::Flat)?);
            println!(
                "| {batch_size} from {first_request} | {step} | {:.2} | {} | {} | {} | {:.1} | {:.1} |",
                auto.sharing_factor,
                auto.flat_kv_bytes >> 20,
                auto.unique_kv_bytes >> 20,
                auto.planned_kv_bytes >> 20,
                flat.predicted_us,
                auto.predicted_us,
            );
        }
    }
    Ok(())
}
