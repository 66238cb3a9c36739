//! Prints docs/planner-speed.md's table of pages of one token: what planning costs and how many bytes a plan has, where ids are
//! consecutive and where generated tokens are scattered over the pool, beside the same tokens in pages of 16.
//!
//! `cargo run --release -p pat-rs --example run_speed`

use pat_rs::plan::PageRuns;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Planner, Problem};
use pat_workloads::OwnedBatch;
use std::time::Instant;

/// Tokens of the prompt that 64 sequences share.
const SHARED: u32 = 512;

/// Steps of a round.
const STEPS: u32 = 48;

/// Rounds: of each time the least counts, since others use the machine.
const ROUNDS: usize = 15;

/// Which ids the tokens behind the shared prompt have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ids {
    /// Those of a sequence follow each other, generated ones included.
    Consecutive,
    /// Prompts follow each other; generated tokens get the next free id of the pool, each sequence one per step.
    Mixed,
}

/// Sequences in the middle of generating.
struct Serving {
    batch: OwnedBatch,
    ids: Ids,
    /// By sequence, the next id, where they are consecutive.
    next: Vec<u32>,
    /// The next id of the pool.
    free: u32,
}

impl Serving {
    fn new(sequences: u32, page_size: u32, ids: Ids) -> Self {
        let shared_pages = SHARED / page_size;
        let mut free = sequences.div_ceil(64) * shared_pages;
        let (mut block_tables, mut lengths, mut next, mut generated) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for sequence in 0..sequences {
            let first = sequence / 64 * shared_pages;
            // Prompts of 1 to 512 tokens, 200 to 500 generated ones.
            let (prompt, output) = (1 + sequence * 197 % 512, 200 + sequence * 131 % 301);
            let prompt_pages = u32::div_ceil(prompt, page_size);
            block_tables.push((first..first + shared_pages).chain(free..free + prompt_pages).collect::<Vec<_>>());
            lengths.push(SHARED + prompt);
            next.push(free + prompt_pages);
            generated.push(output);
            free += prompt_pages + if ids == Ids::Consecutive { (output + STEPS).div_ceil(page_size) } else { 0 };
        }
        let num_pages = free + sequences * (500 + STEPS);
        let batch = OwnedBatch { page_size, num_pages, lengths, block_tables };
        let mut serving = Self { batch, ids, next, free };
        // All of them generate their newest token at the same time.
        for step in (0..500).rev() {
            generated.iter().enumerate().filter(|(_, output)| **output > step).for_each(|(row, _)| serving.grow(row));
        }
        serving
    }

    fn grow(&mut self, row: usize) {
        let (length, table) = (&mut self.batch.lengths[row], &mut self.batch.block_tables[row]);
        *length += 1;
        if length.div_ceil(self.batch.page_size) as usize > table.len() {
            let next = if self.ids == Ids::Consecutive { &mut self.next[row] } else { &mut self.free };
            table.push(*next);
            *next += 1;
        }
    }
}

fn time_us<T>(run: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = run();
    (result, start.elapsed().as_secs_f64() * 1e6)
}

/// What a step takes.
#[derive(Clone, Copy, Debug)]
struct Costs {
    validate_us: f64,
    advance_us: f64,
    scratch_us: f64,
    plan_bytes: f64,
    predicted_us: f64,
}

fn round(sequences: u32, page_size: u32, ids: Ids, options: &PlanOptions) -> pat_rs::Result<Vec<Costs>> {
    let mut serving = Serving::new(sequences, page_size, ids);
    let problem = Problem::new(AttentionShape::new(32, 8, 128, Dtype::F16)?, page_size);
    let planner = Planner::new(problem, DeviceProfile::h200(), options.clone())?;
    let (mut advancing, mut planning) = (planner.clone(), planner);
    let first = serving.batch.clone();
    let mut plan = advancing.plan(&first.view(&first.rows())?)?;
    let mut scratch = planning.plan(&first.view(&first.rows())?)?;
    let mut steps = Vec::new();
    for _ in 0..STEPS {
        (0..sequences as usize).for_each(|row| serving.grow(row));
        let rows = serving.batch.rows();
        let (view, validate_us) = time_us(|| serving.batch.view(&rows));
        let view = view?;
        let (change, advance_us) = time_us(|| advancing.advance(&view, Some(&[]), &mut plan));
        let (planned, scratch_us) = time_us(|| planning.plan_into(&view, &mut scratch));
        change?;
        planned?;
        let (plan_bytes, predicted_us) = (plan.bytes().len() as f64, plan.prediction().total_us());
        steps.push(Costs { validate_us, advance_us, scratch_us, plan_bytes, predicted_us });
    }
    Ok(steps)
}

fn main() -> pat_rs::Result<()> {
    println!("| sequences | ids | planned | validate us | advance us | from scratch us | plan bytes | predicted us |");
    println!("|---|---|---|---|---|---|---|---|");
    for sequences in [64, 256, 1024] {
        for ids in [Ids::Consecutive, Ids::Mixed] {
            for (name, page_size, options) in [
                ("pages of 16", 16, PlanOptions::default()),
                ("in runs", 1, PlanOptions::default().with_runs(PageRuns::Always)),
                ("one by one", 1, PlanOptions::default().with_runs(PageRuns::Never)),
            ] {
                let mut least = round(sequences, page_size, ids, &options)?;
                for _ in 1..ROUNDS {
                    for (least, again) in least.iter_mut().zip(round(sequences, page_size, ids, &options)?) {
                        least.validate_us = least.validate_us.min(again.validate_us);
                        least.advance_us = least.advance_us.min(again.advance_us);
                        least.scratch_us = least.scratch_us.min(again.scratch_us);
                    }
                }
                let mean = |of: fn(&Costs) -> f64| least.iter().map(of).sum::<f64>() / f64::from(STEPS);
                println!(
                    "| {sequences} | {ids:?} | {name} | {:.1} | {:.1} | {:.1} | {:.0} | {:.1} |",
                    mean(|step| step.validate_us),
                    mean(|step| step.advance_us),
                    mean(|step| step.scratch_us),
                    mean(|step| step.plan_bytes),
                    mean(|step| step.predicted_us)
                );
            }
        }
    }
    Ok(())
}
