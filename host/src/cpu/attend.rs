//! One work item and KV head: online softmax over tiles of KV tokens, in f32.

use super::{Element, HostTensors, offset};
use crate::{KvStrides, Plan};
use pat_abi::{PackQuery, WorkItem};

/// KV tokens per tile: two tiles in f32 (K and V, 32 KiB at head dimension 128) stay in the first-level cache.
const KEYS: usize = 32;

/// Normalised output rows and their natural log-sum-exps.
pub(super) struct ItemOutput {
    /// `[row_count, head_dim]`.
    pub(super) out: Vec<f32>,
    /// `[row_count]`.
    pub(super) lse: Vec<f32>,
}

/// The query and the query head of row `row` of an item.
pub(super) fn query_and_head(plan: &Plan, item: &WorkItem, kv_head: usize, row: usize) -> (PackQuery, usize) {
    let group = plan.shape().group() as usize;
    (plan.queries()[item.query_begin as usize + row / group], kv_head * group + row % group)
}

/// Attention of an item's rows over its stream of KV tokens.
pub(super) fn attend<T: Element>(
    plan: &Plan,
    tensors: &HostTensors<'_, T>,
    item: &WorkItem,
    kv_head: usize,
) -> ItemOutput {
    let head_dim = plan.shape().head_dim() as usize;
    let rows = item.row_count as usize;
    let scale = tensors.problem.score().scale;
    let mut q = vec![0f32; rows * head_dim];
    for (row, values) in q.chunks_exact_mut(head_dim).enumerate() {
        let (query, head) = query_and_head(plan, item, kv_head, row);
        T::widen(&tensors.q[offset(tensors.q_strides, query.sequence, head)..][..head_dim], values);
        // Folded into Q once instead of into every score.
        values.iter_mut().for_each(|value| *value *= scale);
    }

    let mut out = vec![0f32; rows * head_dim];
    let mut maximum = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0f32; rows];
    let mut row_values = vec![0f32; head_dim];
    let mut k_transposed = vec![[0f32; KEYS]; head_dim];
    let mut v = vec![0f32; KEYS * head_dim];
    for Segment { token_begin, token_end, row_begin, row_end } in segments(plan, item) {
        for begin in (token_begin..token_end).step_by(KEYS) {
            let keys = KEYS.min(token_end - begin);
            for key in 0..keys {
                let at = |strides| kv_offset(plan, item, strides, begin + key, kv_head);
                T::widen(&tensors.k[at(tensors.k_strides)..][..head_dim], &mut row_values);
                for (column, &value) in k_transposed.iter_mut().zip(&row_values) {
                    column[key] = value;
                }
                T::widen(&tensors.v[at(tensors.v_strides)..][..head_dim], &mut v[key * head_dim..][..head_dim]);
            }
            for row in row_begin..row_end {
                // Columns from `keys` on hold an earlier tile's keys; their scores are never read.
                let mut scores = [0f32; KEYS];
                for (&q_value, column) in q[row * head_dim..][..head_dim].iter().zip(&k_transposed) {
                    for (score, &k_value) in scores.iter_mut().zip(column) {
                        *score += q_value * k_value;
                    }
                }
                let scores = &mut scores[..keys];
                if let Some(cap) = tensors.problem.score().soft_cap {
                    scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
                }
                let new_maximum = scores.iter().copied().fold(maximum[row], f32::max);
                let rescale = (maximum[row] - new_maximum).exp();
                maximum[row] = new_maximum;
                scores.iter_mut().for_each(|score| *score = (*score - new_maximum).exp());
                sum[row] = sum[row] * rescale + scores.iter().sum::<f32>();
                let out_row = &mut out[row * head_dim..][..head_dim];
                if rescale != 1.0 {
                    out_row.iter_mut().for_each(|value| *value *= rescale);
                }
                for (&weight, values) in scores.iter().zip(v.chunks_exact(head_dim)) {
                    for (value, &v_value) in out_row.iter_mut().zip(values) {
                        *value += weight * v_value;
                    }
                }
            }
        }
    }

    for (values, &sum) in out.chunks_exact_mut(head_dim).zip(&sum) {
        values.iter_mut().for_each(|value| *value /= sum);
    }
    let lse = maximum.iter().zip(&sum).map(|(&maximum, &sum)| maximum + sum.ln()).collect();
    ItemOutput { out, lse }
}

/// Consecutive tokens of a stream and the rows that attend to them.
struct Segment {
    token_begin: usize,
    token_end: usize,
    row_begin: usize,
    row_end: usize,
}

/// The stream of an item as segments: one, or where the item has masks as few as they allow.
fn segments(plan: &Plan, item: &WorkItem) -> Vec<Segment> {
    let masks = plan.masks(item);
    if masks.is_empty() {
        let (token_end, row_end) = (item.token_count as usize, item.row_count as usize);
        return vec![Segment { token_begin: 0, token_end, row_begin: 0, row_end }];
    }
    let page_size = plan.page_size() as usize;
    let mut segments: Vec<Segment> = Vec::new();
    for (page, mask) in masks.iter().enumerate() {
        let (token_begin, rows) =
            (page * page_size, (mask.row_begin() as usize, mask.row_end().min(item.row_count) as usize));
        let token_end = token_begin + mask.tokens() as usize;
        match segments.last_mut() {
            Some(last) if last.token_end == token_begin && (last.row_begin, last.row_end) == rows => {
                last.token_end = token_end;
            }
            _ => segments.push(Segment { token_begin, token_end, row_begin: rows.0, row_end: rows.1 }),
        }
    }
    segments
}

/// Position of a token's row. `super::check` has made sure that it is inside the slice and not negative.
fn kv_offset(plan: &Plan, item: &WorkItem, strides: KvStrides, token: usize, kv_head: usize) -> usize {
    let page_size = plan.page_size() as usize;
    let page = plan.pages()[item.page_begin as usize + token / page_size];
    (i64::from(page) * strides.page + (token % page_size) as i64 * strides.token + kv_head as i64 * strides.head)
        as usize
}
