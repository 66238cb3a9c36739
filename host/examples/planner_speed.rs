//! Prints docs/planner-speed.md's tables: median planning times over sizes on one thread, and the line fitted to them.
//!
//! `cargo run --release -p pat-rs --example planner_speed`

use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem};
use pat_workloads::{OwnedBatch, RaggedGroups};
use std::time::{Duration, Instant};

/// The target: microseconds, per sequence, per page.
const TARGET_US: [f64; 3] = [10.0, 0.1, 0.002];

fn median_us(mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || (begin.elapsed() < Duration::from_millis(300) && times.len() < 2000) {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn planned(view: &DecodeBatch<'_>) -> pat_rs::Result<(Planner, Plan)> {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16)?;
    let mut planner =
        Planner::new(Problem::new(shape, view.page_size()), DeviceProfile::h200(), PlanOptions::default())?;
    let plan = planner.plan(view)?;
    Ok((planner, plan))
}

fn batch(sequences: u32, pages: u32) -> OwnedBatch {
    let (shared_pages, private_pages) = (pages / 2, pages / 2);
    let groups = sequences.div_ceil(64);
    let mut batch = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size: 16, seed: 1 }.batch();
    // Away from page borders: a step changes lengths only.
    batch.lengths.iter_mut().for_each(|length| *length = length.next_multiple_of(16) - 8);
    batch
}

/// Least squares of relative errors for `time = a + b * sequences + c * pages`, by the normal equations.
fn fit(points: &[(f64, f64, f64)]) -> [f64; 3] {
    let mut m = [[0.0; 4]; 3];
    for &(sequences, pages, us) in points {
        let row = [1.0 / us, sequences / us, pages / us];
        for i in 0..3 {
            for j in 0..3 {
                m[i][j] += row[i] * row[j];
            }
            m[i][3] += row[i];
        }
    }
    for i in 0..3 {
        for other in 0..3 {
            if other != i {
                let factor = m[other][i] / m[i][i];
                let pivot = m[i];
                m[other].iter_mut().zip(pivot).for_each(|(x, p)| *x -= factor * p);
            }
        }
    }
    [0, 1, 2].map(|i| m[i][3] / m[i][i])
}

fn main() -> pat_rs::Result<()> {
    println!(
        "| sequences | pages | plan bytes | validate us | from scratch us | target us | lengths, hinted us | lengths us | pages, hinted us |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut points = Vec::new();
    for sequences in [8, 32, 64, 256, 1024, 4096, 8192] {
        for pages_each in [8, 32, 128, 512] {
            let before = batch(sequences, pages_each);
            let pages: u32 = before.lengths.iter().map(|length| length.div_ceil(16)).sum();
            if pages > 1_200_000 {
                continue;
            }
            let mut after = before.clone();
            after.lengths.iter_mut().for_each(|length| *length += 1);
            // Every second sequence gets another page. Where that fills the first page of its own, the forest may change:
            // those stay as they are.
            let mut longer = before.clone();
            longer.block_tables.iter_mut().for_each(|table| table.push(0));
            let full_pages = pages_each / 2 + 1;
            let growing = longer.lengths.iter_mut().filter(|length| **length >= full_pages * 16);
            growing.step_by(2).for_each(|length| *length += 16);
            let (before_rows, after_rows, longer_rows) = (before.rows(), after.rows(), longer.rows());
            let views = [before.view(&before_rows)?, after.view(&after_rows)?];
            let growing = [before.view(&before_rows)?, longer.view(&longer_rows)?];
            let validate_us = median_us(|| drop(std::hint::black_box(before.view(&before_rows))));
            let (mut planner, mut plan) = planned(&views[0])?;
            let scratch_us = median_us(|| planner.plan_into(&views[0], &mut plan).expect("it was planned before"));
            let mut step = 0;
            let mut advance_us = |views: &[DecodeBatch<'_>; 2], hint| {
                median_us(|| {
                    step += 1;
                    planner.advance(&views[step % 2], hint, &mut plan).expect("it was planned before");
                })
            };
            let hint = Some(&[][..]);
            let (hinted_us, compared_us) = (advance_us(&views, hint), advance_us(&views, None));
            let pages_us = advance_us(&growing, hint);
            let (n, p) = (f64::from(sequences), f64::from(pages));
            let target_us = TARGET_US[0] + TARGET_US[1] * n + TARGET_US[2] * p;
            points.push((n, p, scratch_us));
            println!(
                "| {sequences} | {pages} | {} | {validate_us:.1} | {scratch_us:.1} | {target_us:.1} | {hinted_us:.1} | {compared_us:.1} | {pages_us:.1} |",
                plan.bytes().len()
            );
        }
    }
    let [us, per_sequence_us, per_page_us] = fit(&points);
    println!(
        "\nfitted: {us:.1} us + {:.0} ns per sequence + {:.2} ns per page",
        per_sequence_us * 1e3,
        per_page_us * 1e3
    );
    Ok(())
}
