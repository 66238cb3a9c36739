//! Block tables, lengths and options, through planning and the CPU executor.

use super::batches;
use crate::{Case, invariants};
use arbitrary::{Result, Unstructured};
use half::{bf16, f16};
use pat_rs::{DecodeBatch, DeviceProfile, Dtype, Element, Plan, Planner, Problem, supports};
use pat_workloads::{Oracle, PoolLayout, RowSample, Tensors, check};

const SEED: u32 = 5;
/// Elements of Q and of a pool up to which a case is executed: some thousand cases a second.
const MOST_ELEMENTS: u32 = 1 << 16;

/// Tables in any form are refused or can be read to their ends; plans hold their invariants; the CPU executor agrees with the
/// oracle.
pub(super) fn plan(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    // Out of bytes: the case ends.
    let _ = if u.arbitrary().unwrap_or(false) { tables(&mut u) } else { case(&mut u) };
}

/// Any integers as tables and lengths.
fn tables(u: &mut Unstructured<'_>) -> Result<()> {
    // Half of them small, so that some tables are valid.
    let integer = |u: &mut Unstructured<'_>| if u.arbitrary()? { Ok(u.int_in_range(-1..=8)?) } else { u.arbitrary() };
    let (page_size, num_pages): (u8, i32) = (u.arbitrary()?, integer(u)?);
    let [ids, indptr, lengths] = [(); 3].map(|()| {
        let count = u.int_in_range(0..=8).unwrap_or(0);
        (0..count).map(|_| integer(u).unwrap_or(0)).collect::<Vec<i32>>()
    });
    let (page_size, num_pages) = (u32::from(page_size), num_pages as u32);
    let row_stride = *u.choose(&[0, 1, 2, 3, usize::MAX])?;
    let unsigned: &[u32] = bytemuck::cast_slice(&ids);
    let rows: Vec<&[u32]> = lengths.iter().map(|&length| &unsigned[..unsigned.len().min(length as usize)]).collect();
    for batch in [
        DecodeBatch::from_block_tables(&rows, &lengths, page_size, num_pages),
        DecodeBatch::from_padded(&ids, row_stride, &lengths, page_size, num_pages),
        DecodeBatch::from_csr(&indptr, &ids, &lengths, page_size, num_pages),
    ] {
        match batch {
            Err(error) => assert!(!error.to_string().is_empty()),
            Ok(batch) => {
                for sequence in 0..batch.sequence_count() {
                    let pages = batch.pages(sequence);
                    assert_eq!(pages.len(), batch.length(sequence).div_ceil(page_size) as usize);
                    assert!(pages.iter().all(|&page| page < num_pages));
                }
            }
        }
    }
    Ok(())
}

fn case(u: &mut Unstructured<'_>) -> Result<()> {
    let (batch, shape) = (batches::batch(u)?, batches::shape(u)?);
    let (problem, sinks) = batches::problem(u, batch.problem(shape))?;
    let options = batches::options(u, batch.page_size)?;
    let capacity = if u.ratio(1, 4)? { Some(batches::capacity(u)?) } else { None };
    let profile = DeviceProfile::by_name(u.choose(&["h200", "h100-sxm", "a100-80"])?).expect("a known device");
    let layout = *u.choose(&PoolLayout::ALL)?;
    let is_served = supports(&problem, None, Some(profile.compute_capability)).is_ok();
    let is_free = is_served && capacity.is_none() && options.variants.is_none();
    let rows = batch.rows();
    let planned = Planner::new(problem, profile, options)
        .and_then(|planner| match capacity {
            Some(capacity) => planner.with_capacity(capacity),
            None => Ok(planner),
        })
        .and_then(|mut planner| planner.plan(&batch.view(&rows).expect("a valid batch")));
    match planned {
        Err(error) => assert!(!is_free && !error.to_string().is_empty(), "{error}"),
        Ok(plan) => {
            invariants::check(&plan, &batch, shape);
            let pool = batch.num_pages * batch.page_size * shape.kv_heads() * shape.head_dim();
            let q = batch.lengths.len() as u32 * shape.q_heads() * shape.head_dim();
            if pool.max(q) <= MOST_ELEMENTS {
                let case = Case { batch, shape, layout };
                match shape.dtype() {
                    Dtype::F16 => execute::<f16>(&plan, &case, problem, sinks.as_deref()),
                    _ => execute::<bf16>(&plan, &case, problem, sinks.as_deref()),
                }
            }
        }
    }
    Ok(())
}

fn execute<T: Element>(plan: &Plan, case: &Case, problem: Problem, sinks: Option<&[f32]>) {
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).expect("a valid case");
    let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
    let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
    let host = tensors.host_of(problem, sinks);
    pat_rs::cpu::run(plan, &host, &mut out, Some(&mut lse)).expect("a valid run");
    let sample = RowSample::for_batch(&case.batch, case.shape);
    let oracle = Oracle::compute_problem::<T>(&case.batch, problem, sinks, SEED, sample).expect("a valid case");
    let report = check(&oracle, case.shape.q_heads(), &out, Some(&lse));
    assert!(report.passed, "{report:?}\n{problem:?}, sinks {sinks:?}\n{case:?}");
}
