//! Prints docs/planner-speed.md's tables: median planning times over sizes on one thread and the line fitted to them; and those
//! of decode steps as a serving engine makes them (`steps` prints these alone).
//!
//! `cargo run --release -p pat-rs --example planner_speed [steps]`

use pat_rs::plan::PlanChange;
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem};
use pat_workloads::{DecodeLoop, DecodeLoopSpec, OwnedBatch, RaggedGroups};
use std::collections::BTreeMap;
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

/// Steps of a loop.
const STEPS: usize = 300;

/// Times the loop is made again: of each step's times the least counts, since others use the machine.
const ROUNDS: usize = 5;

/// What one step took and did.
#[derive(Clone, Copy, Debug)]
struct Step {
    change: PlanChange,
    advance_us: f64,
    scratch_us: f64,
    validate_us: f64,
    plan_bytes: usize,
    changed_bytes: usize,
    /// Predicted time over that of the plan from scratch.
    predicted: f64,
}

fn time_us<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = run();
    (result, start.elapsed().as_secs_f64() * 1e6)
}

/// Bytes of the 16-byte units in which two plans differ, those included that only one of them has.
fn changed_bytes(before: &[u8], after: &[u8]) -> usize {
    let differing = before.chunks(16).zip(after.chunks(16)).filter(|(before, after)| before != after).count();
    differing * 16 + after.len().saturating_sub(before.len())
}

/// Makes a loop's steps, each advanced by one planner and planned from scratch by another.
fn steps(spec: DecodeLoopSpec) -> pat_rs::Result<Vec<Step>> {
    let mut engine = DecodeLoop::new(spec);
    let first = engine.batch.clone();
    let (mut advancing, mut plan) = planned(&first.view(&first.rows())?)?;
    let (mut planning, mut scratch) = planned(&first.view(&first.rows())?)?;
    let mut steps = Vec::new();
    for _ in 0..STEPS {
        let changed_rows = engine.step();
        let rows = engine.batch.rows();
        let (view, validate_us) = time_us(|| engine.batch.view(&rows));
        let view = view?;
        let before = plan.bytes().to_vec();
        let (change, advance_us) = time_us(|| advancing.advance(&view, Some(&changed_rows), &mut plan));
        let (planned, scratch_us) = time_us(|| planning.plan_into(&view, &mut scratch));
        planned?;
        steps.push(Step {
            change: change?,
            advance_us,
            scratch_us,
            validate_us,
            plan_bytes: plan.bytes().len(),
            changed_bytes: changed_bytes(&before, plan.bytes()),
            predicted: plan.prediction().total_us() / scratch.prediction().total_us(),
        });
    }
    Ok(steps)
}

fn print_steps(spec: DecodeLoopSpec) -> pat_rs::Result<()> {
    let mut least = steps(spec)?;
    for _ in 1..ROUNDS {
        for (least, again) in least.iter_mut().zip(steps(spec)?) {
            least.advance_us = least.advance_us.min(again.advance_us);
            least.scratch_us = least.scratch_us.min(again.scratch_us);
            least.validate_us = least.validate_us.min(again.validate_us);
        }
    }
    let mean =
        |steps: &[&Step], of: fn(&Step) -> f64| steps.iter().map(|step| of(step)).sum::<f64>() / steps.len() as f64;
    let mut kinds: BTreeMap<PlanChange, Vec<&Step>> = BTreeMap::new();
    for step in &least {
        kinds.entry(step.change).or_default().push(step);
    }
    let all: Vec<&Step> = least.iter().collect();
    let kinds = kinds.iter().map(|(kind, steps)| (format!("{kind:?}"), steps));
    for (kind, steps) in kinds.chain([("all".into(), &all)]) {
        let [advance_us, scratch_us] =
            [|step: &Step| step.advance_us, |step: &Step| step.scratch_us].map(|of| mean(steps, of));
        let most = steps.iter().map(|step| step.predicted).fold(0.0, f64::max);
        println!(
            "| {} x {}{} | {} | {kind} | {} | {advance_us:.1} | {scratch_us:.1} | {:.2} | {:.1} | {:.0} | {:.0} | {:+.2}% | {:+.1}% |",
            spec.sequences,
            spec.shared_pages * spec.page_size,
            if spec.reuses_rows { "" } else { ", moving up" },
            spec.page_size,
            steps.len(),
            advance_us / scratch_us,
            mean(steps, |step| step.validate_us),
            mean(steps, |step| step.plan_bytes as f64),
            mean(steps, |step| step.changed_bytes as f64),
            (mean(steps, |step| step.predicted) - 1.0) * 1e2,
            (most - 1.0) * 1e2
        );
    }
    Ok(())
}

/// Decode steps of 64, 256 and 1,024 sequences.
fn print_loops() -> pat_rs::Result<()> {
    println!(
        "| sequences x shared tokens | page size | change | steps | advance us | from scratch us | ratio | validate us | plan bytes | changed | predicted, mean | most |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for page_size in [16, 1] {
        for (sequences, shared_tokens, reuses_rows) in
            [(64, 512, true), (256, 512, true), (256, 512, false), (256, 0, true), (1024, 512, true)]
        {
            print_steps(DecodeLoopSpec {
                sequences,
                groups: sequences / 64,
                shared_pages: shared_tokens / page_size,
                prompt_tokens: 512,
                output_tokens: 1024,
                page_size,
                reuses_rows,
                seed: 1,
            })?;
        }
    }
    Ok(())
}

fn main() -> pat_rs::Result<()> {
    if std::env::args().any(|argument| argument == "steps") {
        return print_loops();
    }
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
    print_loops()
}
