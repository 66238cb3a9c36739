//! Execution of a plan on the CPU: the same items, partials and merge as on the device.
//!
//! Every (item, KV head) is one task whose arithmetic does not depend on how tasks are spread over threads, and results
//! are stored and merged in the plan's order: the bits of the output are the same for any number of threads.

mod append;
mod arguments;
mod attend;
mod element;
mod merge_states;

use crate::{KvStrides, Plan, Result, RowStrides};
pub use append::{CacheLayout, NewRows, append_rows};
use attend::{ItemOutput, attend};
pub use element::Element;
pub use merge_states::{State, merge_states};
use pat_abi::{DIRECT_SLOT, WorkItem};
use rayon::prelude::*;

/// Tasks whose results are held before they are stored: bounds the memory beyond the plan's partials.
const TASKS_IN_FLIGHT: usize = 4096;

/// Inputs of [`run`] and the layout of its outputs. Strides are in elements and must not be negative.
#[derive(Clone, Copy, Debug)]
pub struct HostTensors<'a, T> {
    /// Queries, `[sequences, q_heads, head_dim]`; more sequences than the plan has are allowed and ignored.
    pub q: &'a [T],
    /// Key pool, `[num_pages, page_size, kv_heads, head_dim]` in the order that `k_strides` gives.
    pub k: &'a [T],
    /// Value pool; may be a slice that starts inside the key pool's rows.
    pub v: &'a [T],
    /// Layout of `q`.
    pub q_strides: RowStrides,
    /// Layout of `k`.
    pub k_strides: KvStrides,
    /// Layout of `v`.
    pub v_strides: KvStrides,
    /// Layout of the output.
    pub out_strides: RowStrides,
    /// Layout of the log-sum-exps.
    pub lse_strides: RowStrides,
    /// Factor of the scores, usually `1/sqrt(head_dim)`.
    pub softmax_scale: f32,
}

/// Executes `plan`: writes the output of every sequence to `out` and, where asked, the natural log-sum-exp of its scores
/// to `lse`. An empty sequence gets output 0 and log-sum-exp −inf. Elements between the strided rows keep their values.
///
/// # Errors
/// [`crate::Error::PlanMismatch`] when `T` is not the plan's element type; [`crate::Error::InvalidArgument`] when a slice
/// is too short for the plan and its strides, a stride is negative, or the scale is not finite. Nothing is written then.
pub fn run<T: Element>(
    plan: &Plan,
    tensors: &HostTensors<'_, T>,
    out: &mut [T],
    mut lse: Option<&mut [f32]>,
) -> Result<()> {
    arguments::check(plan, tensors, out.len(), lse.as_deref().map(<[f32]>::len))?;
    let shape = plan.shape();
    let (q_heads, kv_heads, head_dim) =
        (shape.q_heads() as usize, shape.kv_heads() as usize, shape.head_dim() as usize);
    let slot_rows = plan.header().slot_count as usize * q_heads;
    let mut partial_out = vec![0f32; slot_rows * head_dim];
    let mut partial_lse = vec![f32::NEG_INFINITY; slot_rows];
    let mut store = |sequence: u32, head: usize, row: &[f32], row_lse: f32| {
        let at = offset(tensors.out_strides, sequence, head);
        for (element, &value) in out[at..at + head_dim].iter_mut().zip(row) {
            *element = T::from_f32(value);
        }
        if let Some(lse) = lse.as_deref_mut() {
            lse[offset(tensors.lse_strides, sequence, head)] = row_lse;
        }
    };

    let tasks: Vec<(&WorkItem, usize)> =
        plan.items().iter().flat_map(|item| (0..kv_heads).map(move |kv_head| (item, kv_head))).collect();
    for window in tasks.chunks(TASKS_IN_FLIGHT) {
        let results: Vec<ItemOutput> =
            window.par_iter().map(|&(item, kv_head)| attend(plan, tensors, item, kv_head)).collect();
        for (&(item, kv_head), result) in window.iter().zip(&results) {
            for (row, (values, &row_lse)) in result.out.chunks_exact(head_dim).zip(&result.lse).enumerate() {
                let (query, head) = attend::query_and_head(plan, item, kv_head, row);
                if query.slot == DIRECT_SLOT {
                    store(query.sequence, head, values, row_lse);
                } else {
                    let at = query.slot as usize * q_heads + head;
                    partial_out[at * head_dim..][..head_dim].copy_from_slice(values);
                    partial_lse[at] = row_lse;
                }
            }
        }
    }

    let mut merged = vec![0f32; head_dim];
    for row in plan.merges() {
        for head in 0..q_heads {
            let rows = (row.slot_begin..row.slot_begin + row.slot_count).map(|slot| slot as usize * q_heads + head);
            let row_lse = merge(rows, &partial_out, &partial_lse, &mut merged);
            store(row.sequence, head, &merged, row_lse);
        }
    }
    Ok(())
}

/// Combines the partials at `rows` into `merged` and returns their joint log-sum-exp: 0 and −inf where there are none.
fn merge(
    rows: impl Iterator<Item = usize> + Clone,
    partial_out: &[f32],
    partial_lse: &[f32],
    merged: &mut [f32],
) -> f32 {
    let head_dim = merged.len();
    merged.fill(0.0);
    let maximum = rows.clone().map(|row| partial_lse[row]).fold(f32::NEG_INFINITY, f32::max);
    if maximum == f32::NEG_INFINITY {
        return maximum;
    }
    let total: f32 = rows.clone().map(|row| (partial_lse[row] - maximum).exp()).sum();
    for row in rows {
        let weight = (partial_lse[row] - maximum).exp() / total;
        for (sum, &value) in merged.iter_mut().zip(&partial_out[row * head_dim..]) {
            *sum += weight * value;
        }
    }
    maximum + total.ln()
}

/// Position of a row. `arguments::check` has made sure that it is inside the slice and not negative.
fn offset(strides: RowStrides, sequence: u32, head: usize) -> usize {
    (i64::from(sequence) * strides.sequence + head as i64 * strides.head) as usize
}
