//! Batches, shapes and options from the bytes of a fuzzer.

use arbitrary::{Result, Unstructured};
use pat_rs::plan::{PlanCapacity, PlanMode};
use pat_rs::{AttentionShape, Dtype, PlanOptions, Problem, TileVariant};
use pat_workloads::OwnedBatch;

/// A valid batch: rows continue, repeat or cut earlier ones, or name any pages; what follows the ids in use is anything.
pub(super) fn batch(u: &mut Unstructured<'_>) -> Result<OwnedBatch> {
    let page_size = *u.choose(&[1, 2, 3, 8, 16, 24, 32, 64, 128])?;
    let num_pages = u.int_in_range(1..=24)?;
    let mut batch = OwnedBatch { page_size, num_pages, lengths: Vec::new(), block_tables: Vec::new() };
    for _ in 0..u.int_in_range(0..=12)? {
        push_row(u, &mut batch)?;
    }
    Ok(batch)
}

/// Appends a row.
pub(super) fn push_row(u: &mut Unstructured<'_>, batch: &mut OwnedBatch) -> Result<()> {
    let mut table = Vec::new();
    if !batch.block_tables.is_empty() && u.ratio(3, 4)? {
        table.clone_from(u.choose(&batch.block_tables)?);
        table.retain(|&page| page < batch.num_pages);
        table.truncate(u.int_in_range(0..=table.len())?);
    }
    for _ in 0..u.int_in_range(0..=6)? {
        table.push(u.int_in_range(0..=batch.num_pages - 1)?);
    }
    let full = table.len() as u32 * batch.page_size;
    let missing = *u.choose(&[0, 1, batch.page_size / 2, batch.page_size - 1, full])?;
    batch.lengths.push(full.saturating_sub(missing));
    if u.ratio(1, 4)? {
        table.push(u.arbitrary()?);
    }
    batch.block_tables.push(table);
    Ok(())
}

/// A shape that the executors take.
pub(super) fn shape(u: &mut Unstructured<'_>) -> Result<AttentionShape> {
    let kv_heads = u.int_in_range(1..=2)?;
    let group = *u.choose(&[1, 2, 3, 4, 5, 7, 8, 16])?;
    let dtype = *u.choose(&[Dtype::F16, Dtype::Bf16])?;
    Ok(AttentionShape::new(group * kv_heads, kv_heads, *u.choose(&[64, 128, 256])?, dtype).expect("a valid shape"))
}

/// Plain attention, or with a cap, with sinks (one for each query head), or with both.
pub(super) fn problem(u: &mut Unstructured<'_>, plain: Problem) -> Result<(Problem, Option<Vec<f32>>)> {
    let mut problem = plain.with_scale(plain.score().scale * *u.choose(&[1.0, 16.0])?);
    if u.ratio(1, 4)? {
        problem = problem.with_soft_cap(*u.choose(&[1.5, 30.0, 50.0])?);
    }
    if u.ratio(3, 4)? {
        return Ok((problem, None));
    }
    let mut sinks = Vec::new();
    for _ in 0..plain.shape().q_heads() {
        sinks.push(f32::from(u.arbitrary::<i8>()?) / 4.0);
    }
    Ok((problem.with_sinks(), Some(sinks)))
}

/// Any options.
pub(super) fn options(u: &mut Unstructured<'_>, page_size: u32) -> Result<PlanOptions> {
    let chunk = PlanMode::FixedChunk { tokens: page_size * u.int_in_range(1..=4)? };
    let modes = [PlanMode::Auto, PlanMode::Flat, PlanMode::PerNode, PlanMode::Packed, chunk];
    let options = PlanOptions::from(*u.choose(&modes)?);
    if u.ratio(1, 2)? {
        return Ok(options);
    }
    let mut variants = Vec::new();
    for variant in TileVariant::ALL {
        if u.arbitrary()? {
            variants.push(variant);
        }
    }
    Ok(options.with_variants(variants))
}

/// A capacity, often too small.
pub(super) fn capacity(u: &mut Unstructured<'_>) -> Result<PlanCapacity> {
    Ok(PlanCapacity {
        max_sequences: u.int_in_range(0..=16)?,
        max_pages: u.int_in_range(0..=200)?,
        max_items: u.int_in_range(0..=64)?,
        max_slots: u.int_in_range(0..=64)?,
    })
}
