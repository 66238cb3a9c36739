//! One work item and KV head: online softmax over tiles of KV tokens, in f32. The arithmetic is the executor's own, since the
//! kernels are compared with it; the plan is read as they read it.

use super::{Element, HostTensors, KvElement, offset};
use crate::{KvStrides, Plan};
use pat_abi::reader::{Exceptions, PlanBytes, PlanView, Stream, Work};
use pat_abi::{FastDivisor, GroupParts, PageMask, PlanHeader, RUN_PAGES, TileVariant};

/// KV tokens per tile: two tiles in f32 (K and V, 32 KiB at head dimension 128) stay in the first-level cache.
const KEYS: usize = 32;

/// Normalised output rows and their natural log-sum-exps.
pub(super) struct ItemOutput {
    /// `[row_count, head_dim]`.
    pub(super) out: Vec<f32>,
    /// `[row_count]`.
    pub(super) lse: Vec<f32>,
}

/// One item of a plan for one KV head, and one part of its group.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    words: PlanBytes<'a>,
    view: PlanView,
    work: Work,
    exceptions: Exceptions,
    group: FastDivisor,
    /// Of the part.
    first_head: u32,
    entries: Entries,
}

/// What the page ids of items stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entries {
    /// Pages of so many tokens.
    Pages(u32),
    /// [`RUN_PAGES`] pages of one token, from the page on.
    Runs,
}

impl Entries {
    /// Those of a plan, and where the header of their items lies.
    fn all(plan: &Plan) -> impl Iterator<Item = (Self, u64)> {
        let runs = plan.runs_header().map(|_| (Self::Runs, u64::from(PlanHeader::RUNS_OFFSET_BYTES)));
        [(Self::Pages(plan.page_size()), 0)].into_iter().chain(runs)
    }

    fn tokens(self) -> u32 {
        match self {
            Self::Pages(tokens) => tokens,
            Self::Runs => RUN_PAGES,
        }
    }
}

/// Where a row of an item comes from and goes to.
pub(super) struct TaskRow {
    /// Row of Q, O and LSE.
    pub(super) query_token: u32,
    /// Query head.
    pub(super) head: usize,
    /// See [`pat_abi::ItemQuery::slot`].
    pub(super) slot: u32,
    /// End of the tokens of the stream that it may attend to.
    kv_limit: usize,
}

impl<'a> Task<'a> {
    /// All of a plan, in launch order.
    pub(super) fn all(plan: &'a Plan) -> impl Iterator<Item = Self> {
        let words = PlanBytes(plan.bytes());
        let (group, kv_heads) = (FastDivisor::new(plan.shape().group()), FastDivisor::new(plan.shape().kv_heads()));
        let launches = Entries::all(plan).flat_map(|entries| TileVariant::ALL.map(|variant| (entries, variant)));
        launches.flat_map(move |((entries, header), variant)| {
            let view = PlanView::load(words, header, variant, kv_heads.divisor);
            GroupParts::new(group.divisor, variant).first_heads().flat_map(move |first_head| {
                (0..view.work_count).map(move |index| {
                    let exceptions = Exceptions::load(words, header, &view, index, kv_heads);
                    let work = view.work(words, index, kv_heads);
                    Self { words, view, work, exceptions, group, first_head, entries }
                })
            })
        })
    }

    /// Row `row` of the item.
    pub(super) fn row(&self, row: usize) -> TaskRow {
        let (query, head) = self.view.row(&self.work, row as u32, self.group);
        let [query_token, slot] = query.token_and_slot(self.words);
        let kv_limit = self.exceptions.kv_limit(self.words, self.group.divide(row as u32)) as usize;
        TaskRow { query_token, head: (self.first_head + head) as usize, slot, kv_limit }
    }
}

/// Attention of an item's rows over its stream of KV tokens.
pub(super) fn attend<T: Element, C: KvElement>(
    plan: &Plan,
    tensors: &HostTensors<'_, T, C>,
    task: &Task<'_>,
) -> ItemOutput {
    let (head_dim, v_head_dim) = (plan.shape().head_dim() as usize, plan.shape().v_head_dim() as usize);
    let rows = task.work.row_count as usize;
    let stream = task.view.stream(&task.work);
    // Of all elements of K the same in an item, which has one KV head.
    let scale = tensors.problem.score().scale * tensors.k_scale.of_head(task.work.kv_head);
    let v_scale = tensors.v_scale.of_head(task.work.kv_head);
    let mut q = vec![0f32; rows * head_dim];
    let mut limits = vec![0; rows];
    for (row, (values, limit)) in q.chunks_exact_mut(head_dim).zip(&mut limits).enumerate() {
        let TaskRow { query_token, head, kv_limit, .. } = task.row(row);
        *limit = kv_limit;
        T::widen(&tensors.q[offset(tensors.q_strides, query_token, head)..][..head_dim], values);
        // Folded into Q once instead of into every score.
        values.iter_mut().for_each(|value| *value *= scale);
    }

    let mut out = vec![0f32; rows * v_head_dim];
    let mut maximum = vec![f32::NEG_INFINITY; rows];
    let mut sum = vec![0f32; rows];
    let mut row_values = vec![0f32; head_dim];
    let mut k_transposed = vec![[0f32; KEYS]; head_dim];
    let mut v = vec![0f32; KEYS * v_head_dim];
    for Segment { token_begin, token_end, row_begin, row_end } in segments(task, &stream) {
        for begin in (token_begin..token_end).step_by(KEYS) {
            let keys = KEYS.min(token_end - begin);
            for key in 0..keys {
                let at = |strides| kv_offset(task, &stream, strides, begin + key);
                C::widen(&tensors.k[at(tensors.k_strides)..][..head_dim], &mut row_values);
                for (column, &value) in k_transposed.iter_mut().zip(&row_values) {
                    column[key] = value;
                }
                C::widen(&tensors.v[at(tensors.v_strides)..][..v_head_dim], &mut v[key * v_head_dim..][..v_head_dim]);
            }
            for row in row_begin..row_end {
                let keys = keys.min(limits[row].saturating_sub(begin));
                if keys == 0 {
                    continue;
                }
                // Columns from `keys` on hold an earlier tile's keys; their scores are never read.
                let mut scores = [0f32; KEYS];
                for (&q_value, column) in q[row * head_dim..][..head_dim].iter().zip(&k_transposed) {
                    for (score, &k_value) in scores.iter_mut().zip(column) {
                        *score += q_value * k_value;
                    }
                }
                let scores = &mut scores[..keys];
                tensors.problem.map_scores(scores);
                let new_maximum = scores.iter().copied().fold(maximum[row], f32::max);
                let rescale = (maximum[row] - new_maximum).exp();
                maximum[row] = new_maximum;
                scores.iter_mut().for_each(|score| *score = (*score - new_maximum).exp());
                sum[row] = sum[row] * rescale + scores.iter().sum::<f32>();
                let out_row = &mut out[row * v_head_dim..][..v_head_dim];
                if rescale != 1.0 {
                    out_row.iter_mut().for_each(|value| *value *= rescale);
                }
                for (&weight, values) in scores.iter().zip(v.chunks_exact(v_head_dim)) {
                    for (value, &v_value) in out_row.iter_mut().zip(values) {
                        *value += weight * v_value;
                    }
                }
            }
        }
    }

    for (values, &sum) in out.chunks_exact_mut(v_head_dim).zip(&sum) {
        // A row that attends to nothing stays 0.
        let sum = if sum == 0.0 { 1.0 } else { sum };
        values.iter_mut().for_each(|value| *value = *value / sum * v_scale);
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
fn segments(task: &Task<'_>, stream: &Stream) -> Vec<Segment> {
    let row_count = task.work.row_count;
    if !stream.has_masks() && !task.exceptions.has_first_tokens() {
        let (token_end, row_end) = (stream.token_count as usize, row_count as usize);
        return vec![Segment { token_begin: 0, token_end, row_begin: 0, row_end }];
    }
    let page_size = task.entries.tokens();
    let mut segments: Vec<Segment> = Vec::new();
    for entry in 0..stream.token_count.div_ceil(page_size) {
        let page_begin = entry * page_size;
        let mask = if stream.has_masks() {
            stream.mask(task.words, entry)
        } else {
            PageMask::new((0, PageMask::ALL_ROWS), page_size.min(stream.token_count - page_begin))
        };
        let token_begin = (page_begin + task.exceptions.first_token(task.words, entry)) as usize;
        let token_end = (page_begin + mask.token_end()) as usize;
        let (row_begin, row_end) = (mask.row_begin() as usize, mask.row_end().min(row_count) as usize);
        match segments.last_mut() {
            Some(last) if last.token_end == token_begin && (last.row_begin, last.row_end) == (row_begin, row_end) => {
                last.token_end = token_end;
            }
            _ => segments.push(Segment { token_begin, token_end, row_begin, row_end }),
        }
    }
    segments
}

/// Position of a token's row. `super::check` has made sure that it is inside the slice and not negative.
fn kv_offset(task: &Task<'_>, stream: &Stream, strides: KvStrides, token: usize) -> usize {
    let page_size = task.entries.tokens() as usize;
    // In a run, tokens are pages.
    let token_stride = if task.entries == Entries::Runs { strides.page } else { strides.token };
    let page = stream.page_id(task.words, (token / page_size) as u32);
    (i64::from(page) * strides.page
        + (token % page_size) as i64 * token_stride
        + i64::from(task.work.kv_head) * strides.head) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanMode;
    use crate::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, Planner, Problem};
    use half::f16;

    #[test]
    fn first_tokens_and_kv_limits_count() {
        const DIM: usize = 64;
        let problem = Problem::new(AttentionShape::new(2, 1, DIM as u32, Dtype::F16).unwrap(), 8);
        let tables: [&[u32]; 1] = [&[2, 0, 1]];
        let table = tables[0];
        let batch = DecodeBatch::from_block_tables(&tables, &[20], 8, 3).unwrap();
        let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanMode::Flat.into()).unwrap();
        let mut plan = planner.plan(&batch).unwrap();
        assert_eq!(plan.items().len(), 1);
        let element = |i: usize| f16::from_f32((i * 37 % 101) as f32 / 50.0 - 1.0);
        let [q, k, v] = [(0, 2), (1000, 24), (9000, 24)]
            .map(|(from, rows)| (from..from + rows * DIM).map(element).collect::<Vec<_>>());
        let tensors = HostTensors::new(problem, &q, &k, &v);
        let attend_to = |plan: &Plan| {
            let (mut out, mut lse) = (vec![f16::ZERO; 2 * DIM], vec![0.0; 2]);
            crate::cpu::run(plan, &tensors, &mut out, Some(&mut lse)).unwrap();
            (out, lse)
        };
        let check = |(out, lse): (Vec<f16>, Vec<f32>), tokens: Vec<usize>| {
            let row = |token: usize| (table[token / 8] as usize * 8 + token % 8) * DIM;
            for head in 0..2 {
                let dot =
                    |token| (0..DIM).map(|x| q[head * DIM + x].to_f64() * k[row(token) + x].to_f64()).sum::<f64>();
                let scale = f64::from(problem.score().scale);
                let weights: Vec<f64> = tokens.iter().map(|&token| (scale * dot(token)).exp()).collect();
                let sum: f64 = weights.iter().sum();
                assert!((f64::from(lse[head]) - sum.ln()).abs() < 1e-4, "{tokens:?}");
                for x in 0..DIM {
                    let terms = tokens.iter().zip(&weights).map(|(&token, weight)| weight * v[row(token) + x].to_f64());
                    let exact = terms.sum::<f64>() / sum;
                    assert!((out[head * DIM + x].to_f64() - exact).abs() < 2e-3, "{tokens:?}");
                }
            }
        };
        check(attend_to(&plan), (0..20).collect());
        plan.limit_first_item(&[3, 0, 2], &[18]);
        check(attend_to(&plan), (3..16).collect());
        plan.limit_first_item(&[3, 1, 0], &[18]);
        check(attend_to(&plan), (3..8).chain(9..18).collect());
    }
}
