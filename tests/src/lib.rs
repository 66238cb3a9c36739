//! Test support: small random ragged forests and a run of the CPU executor.

pub mod device_tests;
pub mod executor;
pub mod forests;
pub mod fuzzing;
pub mod grids;
pub mod interpreted;
pub mod invariants;
pub mod models;
pub mod on_device;
pub mod pat_schedule;
pub mod query_rows;
pub mod serving;
pub mod strided;
pub mod trees;
pub mod walk;

use pat_rs::{AttentionShape, DeviceProfile, Dtype, Element, Plan, PlanOptions, Planner};
use pat_workloads::{NumericsReport, Oracle, OwnedBatch, PoolLayout, RowSample, Tensors};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

/// A small batch and the shape to run it with.
#[derive(Clone, Debug)]
pub struct Case {
    /// Block tables and lengths.
    pub batch: OwnedBatch,
    /// Heads, head dimension, element type.
    pub shape: AttentionShape,
    /// Layout of the KV pools.
    pub layout: PoolLayout,
}

/// Output and log-sum-exps, contiguous.
#[derive(Clone, Debug, PartialEq)]
pub struct Output<T> {
    /// `[sequences, q_heads, v_head_dim]`.
    pub out: Vec<T>,
    /// `[sequences, q_heads]`.
    pub lse: Vec<f32>,
}

/// Draws a ragged forest: sequences continue a prefix of an earlier one, repeat it, are cut from it, or stand alone;
/// lengths fall on, before and behind page borders; some are 0. The pool has pages that nobody owns, ids are shuffled.
///
/// # Panics
/// Never: the shapes it draws are valid.
pub fn random_case(rng: &mut impl Rng, dtype: Dtype) -> Case {
    random_case_of_pages(rng, dtype, &[1, 16, 32, 64, 128])
}

/// As [`random_case`], of pages of one of these sizes.
///
/// # Panics
/// There are none.
pub fn random_case_of_pages(rng: &mut impl Rng, dtype: Dtype, page_sizes: &[u32]) -> Case {
    let page_size = *page_sizes.choose(rng).expect("not empty");
    let group = *[1u32, 2, 3, 4, 5, 7, 8, 16].choose(rng).expect("not empty");
    let kv_heads = rng.random_range(1..=2u32);
    let head_dim = *[64u32, 128, 256].choose(rng).expect("not empty");
    let mut next_page = 0u32;
    let mut lengths: Vec<u32> = Vec::new();
    let mut block_tables: Vec<Vec<u32>> = Vec::new();
    for _ in 0..rng.random_range(1..=10) {
        let parent = rng.random_range(0..lengths.len().max(1));
        let (mut table, length) = match rng.random_range(0..8) {
            0 => (Vec::new(), 0),
            1 => (Vec::new(), 1),
            2 if !lengths.is_empty() => (block_tables[parent].clone(), lengths[parent]),
            3 if !lengths.is_empty() => (block_tables[parent].clone(), rng.random_range(0..=lengths[parent])),
            kind => {
                let mut table =
                    if kind < 7 { block_tables.get(parent).cloned().unwrap_or_default() } else { Vec::new() };
                table.truncate(rng.random_range(0..=table.len()));
                // A shared last page must be full for a longer sequence to own rows behind it.
                let shared = table.len() as u32 * page_size;
                let tail = match rng.random_range(0..4) {
                    0 => page_size - 1,
                    1 => page_size,
                    2 => page_size + 1,
                    _ => rng.random_range(0..=3 * page_size.max(40)),
                };
                (table, shared + tail)
            }
        };
        while (table.len() as u32) < length.div_ceil(page_size) {
            table.push(next_page);
            next_page += 1;
        }
        lengths.push(length);
        block_tables.push(table);
    }
    let num_pages = next_page + rng.random_range(1..4);
    let mut page_ids: Vec<u32> = (0..num_pages).collect();
    page_ids.shuffle(rng);
    for (table, length) in block_tables.iter_mut().zip(&lengths) {
        table.iter_mut().for_each(|page| *page = page_ids[*page as usize]);
        // What stands behind the last page must not be read.
        table.truncate(length.div_ceil(page_size) as usize);
        table.push(u32::MAX);
    }
    let shape = AttentionShape::new(group * kv_heads, kv_heads, head_dim, dtype).expect("a valid shape");
    let layout = *PoolLayout::ALL.choose(rng).expect("not empty");
    Case { batch: OwnedBatch { page_size, num_pages, lengths, block_tables }, shape, layout }
}

/// Sinks, in three of ten cases.
pub fn draw_sinks(rng: &mut impl Rng, shape: AttentionShape) -> Option<Vec<f32>> {
    rng.random_bool(0.3).then(|| (0..shape.q_heads()).map(|_| rng.random_range(-4.0..4.0)).collect())
}

/// The usual scale of the scores.
pub fn softmax_scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim() as f32).sqrt()
}

/// Plans and executes a case on the CPU.
///
/// # Errors
/// Of planning and execution.
pub fn run_cpu<T: Element>(case: &Case, options: PlanOptions, seed: u32) -> pat_rs::Result<Output<T>> {
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, seed)?;
    run_tensors(case, options, &tensors, softmax_scale(case.shape))
}

/// Executes a plan of a case on the CPU.
///
/// # Errors
/// Of execution.
pub fn run_plan<T: Element>(case: &Case, plan: &Plan, seed: u32) -> pat_rs::Result<Output<T>> {
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, seed)?;
    execute(case, plan, &tensors, softmax_scale(case.shape))
}

/// The plan of a case for an H200.
///
/// # Errors
/// Of planning.
pub fn plan(case: &Case, options: PlanOptions) -> pat_rs::Result<Plan> {
    let rows = case.batch.rows();
    Planner::new(case.batch.problem(case.shape), DeviceProfile::h200(), options)?.plan(&case.batch.view(&rows)?)
}

/// Plans and executes a case on the CPU, with these tensors and this scale of the scores.
///
/// # Errors
/// Of planning and execution.
pub fn run_tensors<T: Element>(
    case: &Case,
    options: PlanOptions,
    tensors: &Tensors<T>,
    scale: f32,
) -> pat_rs::Result<Output<T>> {
    execute(case, &plan(case, options)?, tensors, scale)
}

fn execute<T: Element>(case: &Case, plan: &Plan, tensors: &Tensors<T>, scale: f32) -> pat_rs::Result<Output<T>> {
    let mut output =
        Output { out: tensors.nan_out(), lse: vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize] };
    pat_rs::cpu::run(plan, &tensors.host(scale), &mut output.out, Some(&mut output.lse))?;
    Ok(output)
}

/// Judges all rows of an output by the numerics rule.
///
/// # Errors
/// The batch is not valid.
pub fn judge<T: Element>(case: &Case, output: &Output<T>, seed: u32) -> pat_rs::Result<NumericsReport> {
    let sample = RowSample::for_batch(&case.batch, case.shape);
    let oracle = Oracle::compute::<T>(&case.batch, case.shape, seed, softmax_scale(case.shape), sample)?;
    Ok(pat_workloads::check(&oracle, case.shape.q_heads(), &output.out, Some(&output.lse)))
}
