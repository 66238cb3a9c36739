//! Plans and runs the forests of the rows, and judges what comes out by the numerics rule and by each row's tolerance.

use super::forest::{self, Forest, Kind, Size};
use super::{Also, Combination, ROWS, Row, Tolerance, Values};
use crate::executor::Executor;
use crate::query_rows::written_out;
use crate::{Case, strided};
use half::{bf16, f16};
use pat_abi::generator::Tensor;
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::plan::PlanMode;
use pat_rs::{
    DeviceProfile, Dtype, Element, HostTensors, KvElement, KvScale, KvStrides, PlanOptions, Planner, QueryTokens,
    supports,
};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fmt;

const SEED: u32 = 37;

/// What became of the combinations of a row.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// The row's name.
    pub row: &'static str,
    /// Combinations that there are.
    pub combinations: usize,
    /// Those that ran.
    pub ran: usize,
    /// Of them, those with fewer sequences or tokens than the row says.
    pub cut: usize,
    /// Largest part of the row's tolerance that an error took.
    pub worst: f64,
    /// What no kernel computes, in the validator's words, and how often it was drawn.
    pub refused: BTreeMap<String, usize>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { row, combinations, ran, cut, worst, refused } = self;
        write!(f, "{row}: {ran} of {combinations} ran, {cut} of them cut, at most {worst:.2} of the tolerance")?;
        refused.iter().try_for_each(|(reason, count)| write!(f, "; {count} refused: {reason}"))
    }
}

/// Runs the rows, of each one case after the other or, `at_once`, as many as there are threads; hands what became of a row to
/// `report` when the row has ended.
///
/// # Panics
/// An output is outside the rule or its row's tolerance, or is another where it must be the same; or the executor refuses what the
/// validator does not.
pub fn run_rows(
    executor: &(impl Executor + Sync),
    size: Size,
    seed: u64,
    at_once: bool,
    mut report: impl FnMut(&Tally),
) {
    let profile = executor.profile().expect("it can be asked");
    for (number, row) in (0u64..).zip(ROWS) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        let first_kind = rng.random_range(0..Kind::ALL.len());
        let cases: Vec<_> = row.draw(size.cases, &mut rng).into_iter().enumerate().collect();
        let run = |&(index, combination): &(usize, Combination)| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream((number << 32) + 1 + index as u64);
            let kind = Kind::ALL[(first_kind + index) % Kind::ALL.len()];
            let forest = forest::draw(row, combination, kind, size, &mut rng);
            (run_forest(executor, &profile, row, &forest, size, index, &mut rng), forest.is_cut)
        };
        let results: Vec<_> =
            if at_once { cases.par_iter().map(run).collect() } else { cases.iter().map(run).collect() };
        let mut tally = Tally { row: row.name, combinations: row.combinations(), ..Tally::default() };
        for (result, is_cut) in results {
            match result {
                Ok(worst) => {
                    tally.ran += 1;
                    tally.cut += usize::from(is_cut);
                    tally.worst = tally.worst.max(worst);
                }
                Err(reason) => *tally.refused.entry(reason).or_default() += 1,
            }
        }
        report(&tally);
    }
}

/// Runs one forest.
///
/// # Errors
/// No kernel computes it: why.
fn run_forest(
    executor: &impl Executor,
    profile: &DeviceProfile,
    row: &Row,
    forest: &Forest,
    size: Size,
    index: usize,
    rng: &mut impl Rng,
) -> Result<f64, String> {
    supports(&forest.problem, None, Some(profile.compute_capability)).map_err(|reason| reason.to_string())?;
    let case = (profile, row, forest, size, index);
    let shape = forest.problem.shape();
    Ok(match (shape.dtype(), shape.kv_dtype()) {
        (Dtype::F16, Dtype::F16) => run::<f16, f16>(executor, case, rng),
        (Dtype::Bf16, Dtype::Bf16) => run::<bf16, bf16>(executor, case, rng),
        (Dtype::F16, Dtype::E4m3) => run::<f16, E4m3>(executor, case, rng),
        (Dtype::F16, Dtype::E5m2) => run::<f16, E5m2>(executor, case, rng),
        (Dtype::Bf16, Dtype::E4m3) => run::<bf16, E4m3>(executor, case, rng),
        (Dtype::Bf16, Dtype::E5m2) => run::<bf16, E5m2>(executor, case, rng),
        other => panic!("no tensors are drawn in {other:?}"),
    })
}

/// The tensors of a case, K and V as they are stored, and what is expected of them.
struct Data<T, C> {
    q: Vec<T>,
    codes: Vec<C>,
    v_begin: usize,
    strides: [KvStrides; 2],
    /// By KV head.
    k_scales: Vec<f32>,
    v_scales: Vec<f32>,
    /// Whether heads have factors of their own.
    by_head: bool,
    sinks: Option<Vec<f32>>,
}

impl<T: Element, C: KvElement> Data<T, C> {
    /// Draws them for all query tokens, written out as `rows`.
    fn draw(row: &Row, forest: &Forest, rows: &OwnedBatch, sample: RowSample, rng: &mut impl Rng) -> (Self, Oracle) {
        let shape = forest.problem.shape();
        let sinks: Option<Vec<f32>> =
            forest.problem.has_sinks().then(|| (0..shape.q_heads()).map(|_| rng.random_range(-4.0..4.0)).collect());
        let asked = (forest.problem, sinks.as_deref());
        let ones = vec![1.0; shape.kv_heads() as usize];
        if row.values == Values::Drawn {
            let drawn = Tensors::<T, C>::draw_stored(rows, shape, forest.layout, SEED).expect("a valid batch");
            let oracle = Oracle::compute_stored::<T, C>(rows, asked, SEED, sample).expect("a valid batch");
            let strides = [drawn.k_strides, drawn.v_strides];
            let data = Self {
                q: drawn.q,
                codes: drawn.kv,
                v_begin: drawn.v_begin,
                strides,
                k_scales: ones.clone(),
                v_scales: ones,
                by_head: false,
                sinks,
            };
            return (data, oracle);
        }
        let mut tensors = Tensors::<T>::draw(rows, shape.with_kv_dtype(T::DTYPE), forest.layout, SEED).expect("valid");
        let (mut k_scales, mut v_scales, mut by_head) = (ones.clone(), ones, false);
        if row.values == Values::Scaled {
            // Powers of 2: what 8 bits stand for is exact in 16.
            by_head = rng.random_bool(0.5);
            for scales in [&mut k_scales, &mut v_scales] {
                scales.iter_mut().for_each(|scale| *scale = 2f32.powi(rng.random_range(-4..3)));
                let first = scales[0];
                scales.iter_mut().filter(|_| !by_head).for_each(|scale| *scale = first);
            }
        } else {
            tensors.q.iter_mut().for_each(|q| *q = T::from_f32(8.0 * q.to_f32().abs()));
            assert_ne!(forest.layout, PoolLayout::Interleaved, "K is not in front of V");
            let keys = &mut tensors.kv[..tensors.v_begin];
            keys.iter_mut().for_each(|k| *k = T::from_f32(-8.0 * k.to_f32().abs()));
        }
        let codes = tensors.narrow(|tensor, head| {
            let scales = if tensor == Tensor::K { &k_scales } else { &v_scales };
            scales[head as usize]
        });
        let oracle = Oracle::of_problem_tensors(rows, &tensors, asked, sample).expect("a valid batch");
        let strides = [tensors.k_strides, tensors.v_strides];
        let (q, v_begin) = (tensors.q, tensors.v_begin);
        (Self { q, codes, v_begin, strides, k_scales, v_scales, by_head, sinks }, oracle)
    }

    /// Runs the query tokens `counts` of a batch of sequences, the first rows of Q.
    fn run(
        &self,
        executor: &impl Executor,
        planner: &mut Planner,
        batch: &OwnedBatch,
        counts: &[u32],
    ) -> (Vec<T>, Vec<f32>) {
        let problem = planner.problem();
        let shape = problem.shape();
        let tables = batch.rows();
        let view = batch.view(&tables).expect("a valid batch");
        let plan = if counts.iter().all(|&count| count == 1) {
            planner.plan(&view)
        } else {
            planner.plan(&QueryTokens::ragged(&view, counts).expect("tokens for them").batch())
        };
        let plan = plan.expect("a problem that is served");
        let rows = counts.iter().sum::<u32>() as usize;
        let heads = shape.q_heads() as usize;
        let q = &self.q[..rows * heads * shape.head_dim() as usize];
        let factors = |scales| if self.by_head { KvScale::Heads(scales) } else { KvScale::Tensor(scales[0]) };
        let mut host = HostTensors::new(problem, q, &self.codes, &self.codes[self.v_begin.min(self.codes.len())..])
            .with_kv_strides(self.strides[0], self.strides[1])
            .with_kv_scales(factors(&self.k_scales), factors(&self.v_scales));
        host.sinks = self.sinks.as_deref();
        let mut out = vec![T::from_f32(f32::NAN); rows * heads * shape.v_head_dim() as usize];
        let mut lse = vec![f32::NAN; rows * heads];
        executor.run_host(&plan, &host, &mut out, Some(&mut lse)).expect("a run");
        (out, lse)
    }

    /// The same sequences, each with pages of its own.
    fn with_copies(&self, batch: &OwnedBatch, layout: PoolLayout) -> (Self, OwnedBatch)
    where
        T: Clone,
    {
        let needed = |(table, length): (&Vec<u32>, &u32)| table[..length.div_ceil(batch.page_size) as usize].to_vec();
        let tables: Vec<Vec<u32>> = batch.block_tables.iter().zip(&batch.lengths).map(needed).collect();
        let pools: &[(usize, usize)] = &match layout {
            PoolLayout::Interleaved => [(0, self.strides[0].page as usize), (0, 0)],
            _ => [(0, self.strides[0].page as usize), (self.v_begin, self.strides[1].page as usize)],
        };
        let (mut codes, mut v_begin) = (Vec::new(), self.v_begin);
        for &(begin, page_elements) in pools {
            if begin > 0 {
                v_begin = codes.len();
            }
            for &page in tables.iter().flatten() {
                codes.extend_from_slice(&self.codes[begin + page as usize * page_elements..][..page_elements]);
            }
        }
        let mut next = 0;
        let mut own = |table: &Vec<u32>| {
            next += table.len() as u32;
            (next - table.len() as u32..next).collect()
        };
        let block_tables = tables.iter().map(&mut own).collect();
        let copies = OwnedBatch { num_pages: next, block_tables, lengths: batch.lengths.clone(), ..*batch };
        let (q, sinks) = (self.q.clone(), self.sinks.clone());
        let (k_scales, v_scales) = (self.k_scales.clone(), self.v_scales.clone());
        (Self { q, codes, v_begin, k_scales, v_scales, sinks, ..*self }, copies)
    }
}

fn bits<T: Element>((out, lse): &(Vec<T>, Vec<f32>)) -> (&[u16], &[u32]) {
    (bytemuck::cast_slice(out), bytemuck::cast_slice(lse))
}

/// Runs one forest; returns the largest part of the row's tolerance that an error takes.
fn run<T: Element, C: KvElement>(
    executor: &impl Executor,
    (profile, row, forest, size, index): (&DeviceProfile, &Row, &Forest, Size, usize),
    rng: &mut impl Rng,
) -> f64 {
    let (problem, shape) = (forest.problem, forest.problem.shape());
    let rows = written_out(&forest.batch, &forest.counts);
    let sample = RowSample::within(&rows, shape, size.oracle_flop);
    let (data, oracle) = Data::<T, C>::draw(row, forest, &rows, sample, rng);
    let page_size = forest.batch.page_size;
    let chunk = PlanMode::FixedChunk { tokens: page_size * 64u32.div_ceil(page_size) };
    let modes = [PlanMode::Auto, PlanMode::Packed, PlanMode::Auto, PlanMode::PerNode, PlanMode::Flat, chunk];
    let mode = match row.also {
        Also::FirstAlone(_, chunks) => PlanMode::FixedChunk { tokens: chunks[index % chunks.len()] },
        Also::Copies => chunk,
        _ => modes[index % modes.len()],
    };
    // Every other case with the kernels that the planner prefers, the others with one of those that can.
    let mut options = PlanOptions::from(mode);
    let variants = profile.variants(&problem);
    if index % 2 == 1 {
        options = options.with_variants([variants[index / 2 % variants.len()]]);
    }
    let planner = |options: &PlanOptions| Planner::new(problem, profile.clone(), options.clone()).expect("a planner");
    let what = || {
        let (lengths, counts) = (&forest.batch.lengths, &forest.counts);
        format!("{}, {problem:?}, {:?}, {options:?}, {lengths:?} {counts:?}", row.name, forest.kind)
    };

    let together = data.run(executor, &mut planner(&options), &forest.batch, &forest.counts);
    let worst = judge(row, &oracle, &together, shape.q_heads()).unwrap_or_else(|error| panic!("{error}: {}", what()));
    match row.also {
        Also::Nothing => {}
        Also::FirstAlone(sequences, _) => {
            let mut alone = forest.batch.clone();
            alone.lengths.truncate(sequences);
            alone.block_tables.truncate(sequences);
            let counts = &forest.counts[..alone.lengths.len()];
            let alone = data.run(executor, &mut planner(&options), &alone, counts);
            let (out, lse) = bits(&alone);
            let (of_all, lse_of_all) = bits(&together);
            assert!(out == &of_all[..out.len()] && lse == &lse_of_all[..lse.len()], "alone, other bits: {}", what());
        }
        Also::Copies => {
            let (copied, batch) = data.with_copies(&forest.batch, forest.layout);
            let apart = copied.run(executor, &mut planner(&options), &batch, &forest.counts);
            assert!(bits(&apart) == bits(&together), "copied, other bits: {}", what());
            // As plans are by default, once with what is shared and once without.
            for (data, batch) in [(&data, &forest.batch), (&copied, &batch)] {
                let output = data.run(executor, &mut planner(&PlanOptions::default()), batch, &forest.counts);
                judge(row, &oracle, &output, shape.q_heads()).unwrap_or_else(|error| panic!("{error}: {}", what()));
            }
        }
        Also::Gaps => {
            let case = Case { batch: rows, shape, layout: forest.layout };
            strided::check::<T>(executor, &case, options.clone(), SEED);
        }
    }
    worst
}

/// Judges an output by the numerics rule and by the row's tolerance.
///
/// # Errors
/// What is outside.
fn judge<T: Element>(row: &Row, oracle: &Oracle, (out, lse): &(Vec<T>, Vec<f32>), q_heads: u32) -> Result<f64, String> {
    let report = check(oracle, q_heads, out, Some(lse));
    if !report.passed {
        return Err(format!("{report:?}"));
    }
    let Tolerance { relative, absolute } = if T::DTYPE == Dtype::F16 { row.f16 } else { row.bf16 };
    let mut worst: f64 = 0.0;
    for expected in &oracle.rows {
        let at = expected.sequence as usize * q_heads as usize + expected.head as usize;
        let dims = expected.out.len();
        let actual = out[at * dims..][..dims].iter().map(|value| f64::from(value.to_f32()));
        let lse = std::iter::once((f64::from(lse[at]), expected.lse));
        for (actual, exact) in actual.zip(expected.out.iter().copied()).chain(lse).filter(|(a, e)| a != e) {
            let part = (actual - exact).abs() / (absolute + relative * exact.abs());
            if part.is_nan() || part > 1.0 {
                let place = format!("row {}, head {}", expected.sequence, expected.head);
                return Err(format!("{place}: {actual}, expected {exact} +- {absolute} and {relative} of it"));
            }
            worst = worst.max(part);
        }
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::softmax_scale;
    use pat_rs::AttentionShape;

    #[test]
    fn outputs_are_held_to_the_rule_and_to_the_tolerance() {
        let batch = OwnedBatch { page_size: 16, num_pages: 3, lengths: vec![33], block_tables: vec![vec![2, 0, 1]] };
        let shape = AttentionShape::new(2, 1, 64, Dtype::F16).unwrap();
        let sample = RowSample::for_batch(&batch, shape);
        let oracle = Oracle::compute::<f16>(&batch, shape, SEED, softmax_scale(shape), sample).unwrap();
        let out: Vec<f16> = oracle.rows.iter().flat_map(|row| &row.plain).map(|&value| f16::from_f32(value)).collect();
        let lse: Vec<f32> = oracle.rows.iter().map(|row| row.lse as f32).collect();
        let exact = ROWS[0];
        let judged = |absolute, out: &[f16], lse: &[f32]| {
            let f16 = Tolerance { relative: 0.0, absolute };
            judge(&Row { f16, ..exact }, &oracle, &(out.to_vec(), lse.to_vec()), 2)
        };
        let worst = judged(1e-3, &out, &lse).unwrap();
        assert!((0.01..1.0).contains(&worst), "{worst}");
        // Half of what the worst error is.
        let message = judged(worst * 5e-4, &out, &lse).unwrap_err();
        assert!(message.starts_with("row 0, head ") && message.contains("expected"), "{message}");
        // A tolerance that is wide leaves the rule.
        for at in [0, 127] {
            let mut off = out.clone();
            off[at] = f16::from_f32(off[at].to_f32() + 0.02);
            assert!(judged(1.0, &off, &lse).unwrap_err().contains("failed_rows: 1"));
        }
        assert!(judged(1.0, &out, &[lse[0], lse[1] + 1e-3]).unwrap_err().contains("lse"));
        assert!(judged(1.0, &out, &[lse[0], f32::NAN]).is_err());
    }
}
