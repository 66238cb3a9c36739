//! Execution of a plan on the CPU: the same items, partials and merge as on the device.
//!
//! Every (item, KV head) is one task whose arithmetic does not depend on how tasks are spread over threads, and results
//! are stored and merged in the plan's order: the bits of the output are the same for any number of threads. A process that was
//! forked after its parent had executed a plan has one thread.

mod append;
mod attend;
mod eight_bit;
mod element;
mod merge_states;

use crate::arguments::{RunTensors, check_features, same};
use crate::{KvScale, KvStrides, Plan, Problem, Result, RowStrides};
pub use append::{CacheLayout, NewRows, append_rounded_rows, append_rows};
use attend::{ItemOutput, Task, TaskRow, attend};
pub use eight_bit::*;
pub use element::{Element, KvElement};
pub use merge_states::{State, merge_states};
use pat_abi::reader::{MergeView, PlanBytes};
use pat_abi::{DIRECT_SLOT, TileVariant};
use rayon::prelude::*;
use std::sync::OnceLock;

/// Tasks whose results are held before they are stored: bounds the memory beyond the plan's partials.
const TASKS_IN_FLIGHT: usize = 4096;

/// Inputs of [`run`] and the layout of its outputs. Strides are in elements: those of Q, K, V and O 0 or positive multiples
/// of 8, as the kernels want them too.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HostTensors<'a, T, C = T> {
    /// What is computed; must be what the plan was made for, but for what happens to scores.
    pub problem: Problem,
    /// Queries, `[sequences, q_heads, head_dim]`; more sequences than the plan has are allowed and ignored.
    pub q: &'a [T],
    /// Key pool, `[num_pages, page_size, kv_heads, head_dim]` in the order that `k_strides` gives.
    pub k: &'a [C],
    /// Value pool; may be a slice that starts inside the key pool's rows.
    pub v: &'a [C],
    /// Factor of K's elements.
    pub k_scale: KvScale<'a>,
    /// Factor of V's elements.
    pub v_scale: KvScale<'a>,
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
    /// Attention sinks, `[q_heads]`; given where the problem has some.
    pub sinks: Option<&'a [f32]>,
}

impl<'a, T, C> HostTensors<'a, T, C> {
    /// Contiguous rows of Q, O and LSE, and pools `[num_pages, page_size, kv_heads, head_dim]`.
    pub fn new(problem: Problem, q: &'a [T], k: &'a [C], v: &'a [C]) -> Self {
        let shape = problem.shape();
        let pool = |head_dim| KvStrides::nhd(problem.page_size(), shape.kv_heads(), head_dim);
        Self {
            problem,
            q,
            k,
            v,
            k_scale: KvScale::ONE,
            v_scale: KvScale::ONE,
            q_strides: RowStrides::contiguous(shape.q_heads(), shape.head_dim()),
            k_strides: pool(shape.head_dim()),
            v_strides: pool(shape.v_head_dim()),
            out_strides: RowStrides::contiguous(shape.q_heads(), shape.v_head_dim()),
            lse_strides: RowStrides::lse(shape.q_heads()),
            sinks: None,
        }
    }

    /// With pools of other layouts.
    pub fn with_kv_strides(self, k_strides: KvStrides, v_strides: KvStrides) -> Self {
        Self { k_strides, v_strides, ..self }
    }

    /// With other layouts of Q and O.
    pub fn with_row_strides(self, q_strides: RowStrides, out_strides: RowStrides) -> Self {
        Self { q_strides, out_strides, ..self }
    }

    /// With factors of K's and V's elements, which have 8 bits.
    pub fn with_kv_scales(self, k_scale: KvScale<'a>, v_scale: KvScale<'a>) -> Self {
        Self { k_scale, v_scale, ..self }
    }

    /// With attention sinks.
    pub fn with_sinks(self, sinks: &'a [f32]) -> Self {
        Self { sinks: Some(sinks), ..self }
    }
}

/// Executes `plan`: writes the output of every sequence to `out` and, where asked, the natural log-sum-exp of its scores
/// to `lse`. An empty sequence gets output 0 and log-sum-exp −inf (with
/// sinks, the head's sink). Elements between the strided rows keep their values.
///
/// # Errors
/// [`crate::Error::PlanMismatch`] when the plan was made for another problem or element type; [`crate::Error::Unsupported`]
/// when no kernel can compute the problem with such pools; [`crate::Error::InvalidArgument`] when a slice is too short for
/// the plan and its strides, or a stride is not accepted. Nothing is written then.
pub fn run<T: Element, C: KvElement>(
    plan: &Plan,
    tensors: &HostTensors<'_, T, C>,
    out: &mut [T],
    mut lse: Option<&mut [f32]>,
) -> Result<()> {
    check(plan, tensors, out.len(), lse.as_deref().map(<[f32]>::len))?;
    let shape = plan.shape();
    let (q_heads, v_head_dim) = (shape.q_heads() as usize, shape.v_head_dim() as usize);
    let slot_rows = plan.header().slot_count as usize * q_heads;
    let mut partial_out = vec![0f32; slot_rows * v_head_dim];
    let mut partial_lse = vec![f32::NEG_INFINITY; slot_rows];
    let mut store = |sequence: u32, head: usize, row: &[f32], row_lse: f32| {
        let at = offset(tensors.out_strides, sequence, head);
        let sink = tensors.sinks.map(|sinks| sinks[head]);
        let (row_lse, share) = tensors.problem.join_denominator(row_lse, sink);
        for (element, &value) in out[at..at + v_head_dim].iter_mut().zip(row) {
            *element = T::from_f32(value * share);
        }
        if let Some(lse) = lse.as_deref_mut() {
            lse[offset(tensors.lse_strides, sequence, head)] = row_lse;
        }
    };

    let has_threads = rayon_has_threads();
    let tasks: Vec<Task<'_>> = Task::all(plan).collect();
    for window in tasks.chunks(TASKS_IN_FLIGHT) {
        let attend = |task: &Task<'_>| attend(plan, tensors, task);
        let results: Vec<ItemOutput> =
            if has_threads { window.par_iter().map(attend).collect() } else { window.iter().map(attend).collect() };
        for (task, result) in window.iter().zip(&results) {
            for (row, (values, &row_lse)) in result.out.chunks_exact(v_head_dim).zip(&result.lse).enumerate() {
                let TaskRow { query_token, head, slot, .. } = task.row(row);
                if slot == DIRECT_SLOT {
                    store(query_token, head, values, row_lse);
                } else {
                    let at = slot as usize * q_heads + head;
                    partial_out[at * v_head_dim..][..v_head_dim].copy_from_slice(values);
                    partial_lse[at] = row_lse;
                }
            }
        }
    }

    let mut merged = vec![0f32; v_head_dim];
    let words = PlanBytes(plan.bytes());
    let merges = MergeView::load(words, 0);
    for row in (0..merges.count).map(|index| merges.row(words, index)) {
        for head in 0..q_heads {
            let rows = (row.slot_begin..row.slot_begin + row.slot_count).map(|slot| slot as usize * q_heads + head);
            let row_lse = merge(rows, &partial_out, &partial_lse, &mut merged);
            store(row.sequence, head, &merged, row_lse);
        }
    }
    Ok(())
}

/// Whether rayon's threads are of this process: a fork, as Python's multiprocessing makes, has none of them, and would wait
/// for them without end.
fn rayon_has_threads() -> bool {
    static PROCESS: OnceLock<u32> = OnceLock::new();
    let process = std::process::id();
    *PROCESS.get_or_init(|| process) == process
}

/// See [`run`] for the errors.
pub(crate) fn check<T: Element, C: KvElement>(
    plan: &Plan,
    tensors: &HostTensors<'_, T, C>,
    out_len: usize,
    lse_len: Option<usize>,
) -> Result<()> {
    same("the element type", plan.shape().dtype(), T::DTYPE)?;
    same("the element type of K and V", plan.shape().kv_dtype(), C::DTYPE)?;
    // The kernels could not, so that a program that is tried here runs there.
    for variant in TileVariant::ALL.into_iter().filter(|variant| !plan.variant_items(*variant).is_empty()) {
        check_features(variant, tensors.problem.switches(), plan.shape())?;
    }
    let (kv_heads, is_eight_bit) = (plan.shape().kv_heads(), C::DTYPE.bytes() == 1);
    tensors.k_scale.check("k_scale", kv_heads, is_eight_bit)?;
    tensors.v_scale.check("v_scale", kv_heads, is_eight_bit)?;
    let checked = RunTensors {
        problem: tensors.problem,
        num_pages: plan.num_pages(),
        rows: plan.sequence_count(),
        q: (tensors.q.len() as u64, tensors.q_strides),
        k: (tensors.k.len() as u64, tensors.k_strides),
        v: (tensors.v.len() as u64, tensors.v_strides),
        out: (out_len as u64, tensors.out_strides),
        lse: lse_len.map(|len| (len as u64, tensors.lse_strides)),
    };
    checked.check(plan.problem().planned())?;
    tensors.problem.check_sinks(tensors.sinks.map(|sinks| sinks.len() as u64))
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

/// Position of a row. [`check`] has made sure that it is inside the slice and not negative.
fn offset(strides: RowStrides, sequence: u32, head: usize) -> usize {
    (i64::from(sequence) * strides.sequence + head as i64 * strides.head) as usize
}
