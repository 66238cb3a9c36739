//! The f64 oracle: rows of the exact output, straight from the generator (no pool in memory).

use crate::tensors::fill_row;
use crate::{OwnedBatch, Tensors};
use pat_abi::generator::{self, Tensor};
use pat_rs::{AttentionShape, Element, KvElement, Problem};
use rayon::prelude::*;

/// Work up to which every row is checked.
pub const FULL_CHECK_FLOP: f64 = 5e9;

/// What the rows of one (sequence, KV head) should be, and what a plain implementation makes of them.
#[derive(Clone, Debug)]
pub struct ExpectedRow {
    /// Row of the batch.
    pub sequence: u32,
    /// Query head.
    pub head: u32,
    /// Exact output (f64 from the 16-bit inputs), `[v_head_dim]`.
    pub out: Vec<f64>,
    /// Exact log-sum-exp, natural.
    pub lse: f64,
    /// Output of the plain two-pass implementation: f32 throughout, P and O rounded to the 16-bit type.
    pub plain: Vec<f32>,
    /// `scale * max_t sum_x |q_x k_tx|`: what rounding errors of a score are proportional to.
    pub score_magnitude: f64,
    /// Tokens of the sequence.
    pub tokens: u32,
}

/// Which (sequence, KV head) pairs are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowSample {
    /// Name for reports.
    pub name: String,
    /// (sequence, KV head) pairs; each stands for the rows of all query heads of that KV head.
    pub pairs: Vec<(u32, u32)>,
}

impl RowSample {
    /// Every row if that is at most [`FULL_CHECK_FLOP`], else as many as fit, evenly spread; the sample always contains
    /// the first and the last pair, and at least one.
    pub fn for_batch(batch: &OwnedBatch, shape: AttentionShape) -> Self {
        Self::within(batch, shape, FULL_CHECK_FLOP)
    }

    /// As [`Self::for_batch`], with another bound of the work.
    pub fn within(batch: &OwnedBatch, shape: AttentionShape, most_flop: f64) -> Self {
        let pairs = batch.lengths.len() as u64 * u64::from(shape.kv_heads());
        let tokens: f64 = batch.lengths.iter().map(|&length| f64::from(length)).sum();
        let row_flop = 2.0 * f64::from(shape.head_dim() + shape.v_head_dim());
        let flop = row_flop * tokens * f64::from(shape.q_heads());
        let pair =
            |index: u64| ((index / u64::from(shape.kv_heads())) as u32, (index % u64::from(shape.kv_heads())) as u32);
        if flop <= most_flop {
            return Self { name: "all rows".into(), pairs: (0..pairs).map(pair).collect() };
        }
        let count = ((pairs as f64 * most_flop / flop) as u64).clamp(2, pairs.max(2));
        let mut indices: Vec<u64> = (0..count).map(|i| i * (pairs - 1) / (count - 1)).collect();
        indices.dedup();
        Self {
            name: format!("{} of {pairs} (sequence, KV head) pairs, evenly spread", indices.len()),
            pairs: indices.into_iter().map(pair).collect(),
        }
    }
}

/// Expected rows of a batch.
#[derive(Clone, Debug)]
pub struct Oracle {
    /// Which rows.
    pub sample: RowSample,
    /// The rows.
    pub rows: Vec<ExpectedRow>,
}

impl Oracle {
    /// Computes the sampled rows of a batch whose tensors are drawn from the generator with `seed`, in parallel.
    ///
    /// # Errors
    /// The batch is not valid (see [`pat_rs::DecodeBatch::from_block_tables`]).
    ///
    /// # Panics
    /// The sample names a sequence that the batch does not have.
    pub fn compute<T: Element>(
        batch: &OwnedBatch,
        shape: AttentionShape,
        seed: u32,
        softmax_scale: f32,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        let problem = Problem::new(shape, batch.page_size).with_scale(softmax_scale);
        Self::compute_problem::<T>(batch, problem, None, seed, sample)
    }

    /// As [`Self::compute`], of a problem that may cap scores, have sinks, one for each query head, and a window or chunks.
    ///
    /// # Errors
    /// As [`Self::compute`].
    ///
    /// # Panics
    /// As [`Self::compute`]; or there are too few sinks.
    pub fn compute_problem<T: Element>(
        batch: &OwnedBatch,
        problem: Problem,
        sinks: Option<&[f32]>,
        seed: u32,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        Self::compute_stored::<T, T>(batch, (problem, sinks), seed, sample)
    }

    /// As [`Self::compute_problem`], with elements of K and V of their own type, whose factors are 1.
    ///
    /// # Errors
    /// As [`Self::compute`].
    ///
    /// # Panics
    /// As [`Self::compute_problem`].
    pub fn compute_stored<T: Element, C: KvElement>(
        batch: &OwnedBatch,
        (problem, sinks): (Problem, Option<&[f32]>),
        seed: u32,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        let asked = Asked { problem, sinks, visible: None };
        Self::from_rows::<T>(batch, asked, drawn::<T, C>(seed), sample)
    }

    /// As [`Self::compute_problem`], where row `b` of the batch sees the tokens `visible[b]` of its sequence and no other,
    /// whatever the problem says.
    ///
    /// # Errors
    /// As [`Self::compute`].
    ///
    /// # Panics
    /// As [`Self::compute_problem`]; or there are too few rows in `visible`, or one has a token that its sequence does not have.
    pub fn compute_visible<T: Element>(
        batch: &OwnedBatch,
        (problem, sinks): (Problem, Option<&[f32]>),
        visible: &[Vec<u32>],
        seed: u32,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        let asked = Asked { problem, sinks, visible: Some(visible) };
        Self::from_rows::<T>(batch, asked, drawn::<T, T>(seed), sample)
    }

    /// As [`Self::compute`], of tensors that may have been changed since they were drawn for the batch.
    ///
    /// # Errors
    /// As [`Self::compute`].
    ///
    /// # Panics
    /// As [`Self::compute`]; or the tensors are another batch's.
    pub fn of_tensors<T: Element>(
        batch: &OwnedBatch,
        tensors: &Tensors<T>,
        softmax_scale: f32,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        let problem = Problem::new(tensors.shape(), batch.page_size).with_scale(softmax_scale);
        Self::of_problem_tensors(batch, tensors, (problem, None), sample)
    }

    /// As [`Self::of_tensors`], of a problem as [`Self::compute_problem`] takes it, with its sinks.
    ///
    /// # Errors
    /// As [`Self::compute`].
    ///
    /// # Panics
    /// As [`Self::compute_problem`] and [`Self::of_tensors`].
    pub fn of_problem_tensors<T: Element>(
        batch: &OwnedBatch,
        tensors: &Tensors<T>,
        (problem, sinks): (Problem, Option<&[f32]>),
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        let fill = |(tensor, page, token, head): Place, row: &mut [f32]| {
            T::widen(tensors.row(tensor, page, token, head), row);
        };
        Self::from_rows::<T>(batch, Asked { problem, sinks, visible: None }, fill, sample)
    }

    /// `fill` gives a row of Q, K or V.
    fn from_rows<T: Element>(
        batch: &OwnedBatch,
        asked: Asked<'_>,
        fill: impl Fn(Place, &mut [f32]) + Sync,
        sample: RowSample,
    ) -> pat_rs::Result<Self> {
        batch.view(&batch.rows())?;
        let of_pair = |&pair: &(u32, u32)| expected_rows::<T>(batch, asked, &fill, pair);
        let rows = sample.pairs.par_iter().flat_map_iter(of_pair).collect();
        Ok(Self { sample, rows })
    }
}

/// What is computed.
#[derive(Clone, Copy)]
struct Asked<'a> {
    problem: Problem,
    /// One for each query head.
    sinks: Option<&'a [f32]>,
    /// By row, the tokens that it sees, where the problem does not say.
    visible: Option<&'a [Vec<u32>]>,
}

/// A row of a tensor: page (of Q: sequence), token (of Q: 0), head.
type Place = (Tensor, u32, u32, u32);

/// Rows as the generator draws them, of K and V rounded to their own type.
fn drawn<T: Element, C: KvElement>(seed: u32) -> impl Fn(Place, &mut [f32]) + Sync {
    fn row<E: KvElement>(row_key: u32, row: &mut [f32]) {
        let mut elements = vec![E::zeroed(); row.len()];
        fill_row(row_key, &mut elements);
        E::widen(&elements, row);
    }
    move |(tensor, page, token, head), widened| {
        let key = generator::row_key(seed, tensor as u32, page, token, head);
        if tensor == Tensor::Q { row::<T>(key, widened) } else { row::<C>(key, widened) }
    }
}

/// The rows of all query heads of one KV head.
fn expected_rows<T: Element>(
    batch: &OwnedBatch,
    Asked { problem, sinks, visible }: Asked<'_>,
    fill: &impl Fn(Place, &mut [f32]),
    (sequence, kv_head): (u32, u32),
) -> Vec<ExpectedRow> {
    let (shape, score) = (problem.shape(), problem.score());
    let (head_dim, v_head_dim) = (shape.head_dim() as usize, shape.v_head_dim() as usize);
    let end = batch.lengths[sequence as usize];
    let begin = problem.visibility().reach.first_token(end.saturating_sub(1));
    let seen: Vec<u32> = visible.map_or_else(|| (begin..end).collect(), |rows| rows[sequence as usize].clone());
    let tokens = seen.len() as u32;
    let table = &batch.block_tables[sequence as usize];
    let draw =
        |tensor: Tensor, page: u32, token: u32, head: u32, row: &mut [f32]| fill((tensor, page, token, head), row);
    let (mut k_row, mut v_row) = (vec![0f32; head_dim], vec![0f32; v_head_dim]);
    let place = |token: u32| (table[(token / batch.page_size) as usize], token % batch.page_size);
    let heads: Vec<u32> = (kv_head * shape.group()..(kv_head + 1) * shape.group()).collect();
    let mut q = vec![vec![0f32; head_dim]; heads.len()];
    for (row, &head) in q.iter_mut().zip(&heads) {
        draw(Tensor::Q, sequence, 0, head, row);
    }

    let mut exact_scores = vec![Vec::with_capacity(tokens as usize); heads.len()];
    let mut plain_scores = vec![Vec::with_capacity(tokens as usize); heads.len()];
    let mut score_magnitudes = vec![0f64; heads.len()];
    for &token in &seen {
        let (page, in_page) = place(token);
        draw(Tensor::K, page, in_page, kv_head, &mut k_row);
        for (index, q_row) in q.iter().enumerate() {
            let (mut exact, mut magnitude, mut plain) = ([0f64; 8], [0f64; 8], [0f32; 8]);
            for (q_part, k_part) in q_row.chunks_exact(8).zip(k_row.chunks_exact(8)) {
                for lane in 0..8 {
                    let product = f64::from(q_part[lane]) * f64::from(k_part[lane]);
                    exact[lane] += product;
                    magnitude[lane] += product.abs();
                    plain[lane] += q_part[lane] * k_part[lane];
                }
            }
            let exact = f64::from(score.scale) * exact.iter().sum::<f64>();
            let plain = score.scale * plain.iter().sum::<f32>();
            exact_scores[index]
                .push(score.soft_cap.map_or(exact, |cap| f64::from(cap) * (exact / f64::from(cap)).tanh()));
            plain_scores[index].push(score.soft_cap.map_or(plain, |cap| cap * (plain / cap).tanh()));
            // A cap adds the rounding of a value of its size.
            let magnitude = f64::from(score.scale).abs() * magnitude.iter().sum::<f64>()
                + score.soft_cap.map_or(0.0, |cap| f64::from(cap) / head_dim as f64);
            score_magnitudes[index] = magnitude.max(score_magnitudes[index]);
        }
    }

    // A sink is a score without a value.
    let sinks: Vec<f32> =
        heads.iter().map(|&head| sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head as usize])).collect();
    let exact_maxima: Vec<f64> = exact_scores
        .iter()
        .zip(&sinks)
        .map(|(scores, &sink)| scores.iter().copied().fold(f64::from(sink), f64::max))
        .collect();
    let plain_maxima: Vec<f32> =
        plain_scores.iter().zip(&sinks).map(|(scores, &sink)| scores.iter().copied().fold(sink, f32::max)).collect();
    let mut exact_out = vec![vec![0f64; v_head_dim]; heads.len()];
    let mut plain_out = vec![vec![0f32; v_head_dim]; heads.len()];
    let weight_of_sink = |index: usize| {
        let has_weight = sinks[index] > f32::NEG_INFINITY;
        if has_weight { (f64::from(sinks[index]) - exact_maxima[index]).exp() } else { 0.0 }
    };
    let mut exact_sums: Vec<f64> = (0..heads.len()).map(weight_of_sink).collect();
    let mut plain_sums: Vec<f32> = exact_sums.iter().map(|&sum| sum as f32).collect();
    for (at, &token) in seen.iter().enumerate() {
        let (page, in_page) = place(token);
        draw(Tensor::V, page, in_page, kv_head, &mut v_row);
        for index in 0..heads.len() {
            let exact = (exact_scores[index][at] - exact_maxima[index]).exp();
            let plain = (plain_scores[index][at] - plain_maxima[index]).exp();
            exact_sums[index] += exact;
            plain_sums[index] += plain;
            let plain = T::from_f32(plain).to_f32();
            for dim in 0..v_head_dim {
                exact_out[index][dim] += exact * f64::from(v_row[dim]);
                plain_out[index][dim] += plain * v_row[dim];
            }
        }
    }

    heads
        .into_iter()
        .enumerate()
        .map(|(index, head)| {
            let (mut out, mut plain) = (std::mem::take(&mut exact_out[index]), std::mem::take(&mut plain_out[index]));
            if tokens > 0 {
                out.iter_mut().for_each(|value| *value /= exact_sums[index]);
                plain.iter_mut().for_each(|value| *value = T::from_f32(*value / plain_sums[index]).to_f32());
            }
            // Of a sequence without tokens and without a sink, -inf.
            let lse = exact_maxima[index] + exact_sums[index].ln();
            ExpectedRow { sequence, head, out, lse, plain, score_magnitude: score_magnitudes[index], tokens }
        })
        .collect()
}
