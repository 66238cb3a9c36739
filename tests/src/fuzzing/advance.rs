//! Steps of a batch that lives: `advance` gives a plan of every step, with fixed chunks the one from scratch, whether it is told
//! what has changed or not.

use super::batches;
use crate::invariants;
use crate::walk::changed_rows;
use arbitrary::{Result, Unstructured};
use pat_rs::plan::{PlanChange, PlanMode};
use pat_rs::{DeviceProfile, Planner};
use pat_workloads::OwnedBatch;

const MOST_STEPS: usize = 64;

/// Any steps.
pub(super) fn advance(bytes: &[u8]) {
    // Out of bytes: the walk ends.
    let _ = walk(&mut Unstructured::new(bytes));
}

fn walk(u: &mut Unstructured<'_>) -> Result<()> {
    let (mut batch, shape) = (batches::batch(u)?, batches::shape(u)?);
    let options = batches::options(u, batch.page_size)?;
    let is_fixed = matches!(options.mode, PlanMode::FixedChunk { .. });
    let Ok(planner) = Planner::new(batch.problem(shape), DeviceProfile::h200(), options) else { return Ok(()) };
    let planner = if u.ratio(1, 4)? {
        let Ok(bounded) = planner.with_capacity(batches::capacity(u)?) else { return Ok(()) };
        bounded
    } else {
        planner
    };
    let (mut scratch, mut comparing, mut hinted) = (planner.clone(), planner.clone(), planner);
    let rows = batch.rows();
    let view = batch.view(&rows).expect("a valid batch");
    let (Ok(mut compared), Ok(mut told)) = (comparing.plan(&view), hinted.plan(&view)) else { return Ok(()) };
    for _ in 0..MOST_STEPS {
        if u.is_empty() {
            break;
        }
        let before = batch.clone();
        step(u, &mut batch)?;
        let (rows, changed) = (batch.rows(), changed_rows(&before, &batch));
        let view = batch.view(&rows).expect("a valid batch");
        let expected = scratch.plan(&view);
        let mut has_failed = false;
        for (planner, plan, hint) in [(&mut comparing, &mut compared, None), (&mut hinted, &mut told, Some(&changed))] {
            let was = plan.clone();
            let result = planner.advance(&view, hint.map(Vec::as_slice), plan);
            has_failed = result.is_err();
            match result {
                Ok(change) => {
                    assert_eq!(change == PlanChange::Nothing, was.generation() == plan.generation(), "{change:?}");
                    invariants::check(plan, &batch, shape);
                    if is_fixed {
                        assert!(expected.as_ref().ok() == Some(&*plan), "{change:?}: not the plan from scratch");
                    }
                }
                Err(error) => {
                    assert_eq!(Some(error.to_string()), expected.as_ref().err().map(ToString::to_string));
                    assert!(
                        was == *plan && was.generation() == plan.generation(),
                        "a refused step has changed the plan"
                    );
                }
            }
        }
        if has_failed {
            break;
        }
        assert!(compared == told, "what has changed was told, and makes a difference");
    }
    Ok(())
}

fn step(u: &mut Unstructured<'_>, batch: &mut OwnedBatch) -> Result<()> {
    let rows = batch.lengths.len();
    if rows == 0 || u.ratio(1, 16)? {
        return batches::push_row(u, batch);
    }
    let row = u.choose_index(rows)?;
    let used = batch.lengths[row].div_ceil(batch.page_size) as usize;
    match u.int_in_range(0..=7)? {
        // A decode step of all rows.
        0..=2 => {
            for row in 0..rows {
                if batch.lengths[row] > 0 {
                    set_length(u, batch, row, batch.lengths[row] + 1)?;
                }
            }
        }
        3 => {
            let length =
                (batch.lengths[row] + u.int_in_range(0..=4 * batch.page_size)?).saturating_sub(batch.page_size);
            set_length(u, batch, row, length)?;
        }
        4 if used > 0 => batch.block_tables[row][u.choose_index(used)?] = u.int_in_range(0..=batch.num_pages - 1)?,
        5 => {
            batch.lengths.remove(row);
            batch.block_tables.remove(row);
        }
        6 => {
            let other = u.choose_index(rows)?;
            batch.lengths.swap(row, other);
            batch.block_tables.swap(row, other);
        }
        _ => batch.lengths[row] = 0,
    }
    Ok(())
}

/// Gives a row a length, and the pages it takes.
fn set_length(u: &mut Unstructured<'_>, batch: &mut OwnedBatch, row: usize, length: u32) -> Result<()> {
    let (used, needed) = [batch.lengths[row], length].map(|length| length.div_ceil(batch.page_size) as usize).into();
    let table = &mut batch.block_tables[row];
    // What stood behind the entries in use may be no page.
    for at in used..needed {
        let page = u.int_in_range(0..=batch.num_pages - 1)?;
        if at < table.len() { table[at] = page } else { table.push(page) }
    }
    batch.lengths[row] = length;
    Ok(())
}
