//! Kernel sources on the host: 32 threads are the lanes of a warp and meet at every shuffle. Of the merge kernel: whatever the
//! grid, and whether a CTA, a warp or a quarter of a warp's time goes to a row, the bits are the same, and they are the exact
//! result's. Of the forward kernels the online softmax ([`rescaling`]).

#[path = "../../../kernels-gpu/src/finish.rs"]
mod finish;
mod lanes;
#[path = "../../../kernels-gpu/src/kernels/merge.rs"]
#[expect(clippy::needless_range_loop, reason = "as in the device crate: LLVM unrolls these")]
mod merge;
#[path = "../../../kernels-gpu/src/plan_words.rs"]
mod plan_words;
mod rescaling;
#[path = "../../../kernels-gpu/src/softmax.rs"]
#[expect(unreachable_pub, dead_code, reason = "as in the device crate, of which this is a part")]
mod softmax;

/// The device crate's names.
mod ptx {
    pub(crate) use crate::lanes::{barrier, ldst, math, shuffle, special, switches};
}
mod element {
    pub(crate) trait Element {
        fn pack(low: f32, high: f32) -> u32;
    }
    pub(crate) struct F16;
    impl Element for F16 {
        fn pack(low: f32, high: f32) -> u32 {
            let bits = |value| u32::from(half::f16::from_f32(value).to_bits());
            bits(low) | bits(high) << 16
        }
    }
}
mod item {
    pub(crate) fn strided(base: u64, i: u32, i_stride: i64, j: u32, j_stride: i64) -> u64 {
        base.strict_add_signed(i64::from(i) * i_stride).strict_add_signed(i64::from(j) * j_stride)
    }
}
use half::f16;
use lanes::{Exchange, Lane};
use pat_abi::params::Denominators;
use pat_abi::{FastDivisor, MergeParams, MergeRow, PLAN_MAGIC, PlanHeader};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::{Arc, Mutex};

/// Sixteen bytes: what the widest loads are aligned to.
#[repr(C, align(16))]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Line([u32; 4]);

fn lines(words: &[u32]) -> Vec<Line> {
    words.chunks(4).map(|chunk| Line(std::array::from_fn(|i| chunk.get(i).copied().unwrap_or(0)))).collect()
}

/// Partials of rows, one list of slot counts per sequence.
struct Partials<'a> {
    slot_counts: &'a [u32],
    q_heads: u32,
    head_dim: usize,
    /// By (slot, head); empty ones hold NaN and a log-sum-exp (base 2) of -inf.
    outputs: Vec<f32>,
    lses: Vec<f32>,
    /// By head, if there are any.
    sinks: Option<Vec<f32>>,
}

impl<'a> Partials<'a> {
    fn draw(slot_counts: &'a [u32], q_heads: u32, head_dim: usize, rng: &mut impl Rng) -> Self {
        let count = (slot_counts.iter().sum::<u32>() * q_heads) as usize;
        let lses: Vec<f32> = (0..count)
            .map(|_| if rng.random_bool(0.1) { f32::NEG_INFINITY } else { rng.random_range(-9.0..9.0) })
            .collect();
        let of_partial = |lse: &f32| if *lse == f32::NEG_INFINITY { f32::NAN } else { 1.0 };
        let outputs = lses
            .iter()
            .flat_map(|lse| std::iter::repeat_n(of_partial(lse), head_dim))
            .map(|scale| scale * rng.random_range(-1.0..1.0f32))
            .collect();
        Self { slot_counts, q_heads, head_dim, outputs, lses, sinks: None }
    }

    fn rows(&self) -> u32 {
        self.slot_counts.len() as u32 * self.q_heads
    }

    fn slot_begin(&self, sequence: usize) -> u32 {
        self.slot_counts[..sequence].iter().sum()
    }

    /// A plan of nothing but merge rows, as the planner orders them.
    fn plan(&self) -> Vec<Line> {
        let mut merges: Vec<MergeRow> = (0..)
            .zip(self.slot_counts)
            .map(|(sequence, &slot_count)| {
                let slot_begin = self.slot_begin(sequence as usize);
                MergeRow { sequence, slot_begin, slot_count, reserved: 0 }
            })
            .collect();
        merges.sort_by_key(|row| std::cmp::Reverse(row.slot_count));
        let mut header: PlanHeader = bytemuck::Zeroable::zeroed();
        header.magic = PLAN_MAGIC;
        header.merge_count = merges.len() as u32;
        header.merges_offset_bytes = size_of::<PlanHeader>() as u32;
        let words: &[u32] = bytemuck::cast_slice(std::slice::from_ref(&header));
        lines(&[words, bytemuck::cast_slice(&merges)].concat())
    }

    /// Launches the kernel with `ctas` CTAs; outputs are poisoned first.
    fn merge<const COLUMNS: usize, const LANES: u32, const PARTS: u32>(&self, ctas: u32) -> (Vec<f16>, Vec<f32>) {
        assert_eq!(COLUMNS * (LANES * PARTS) as usize, self.head_dim);
        let plan = self.plan();
        let (outputs, lses) = (lines(bytemuck::cast_slice(&self.outputs)), lines(bytemuck::cast_slice(&self.lses)));
        let mut out = lines(&vec![u32::MAX; self.rows() as usize * self.head_dim / 2]);
        let mut lse = lines(&vec![u32::MAX; self.rows() as usize]);
        let sinks = lines(bytemuck::cast_slice(self.sinks.as_deref().unwrap_or_default()));
        let address = |lines: &[Line]| lines.as_ptr().expose_provenance() as u64;
        let params = MergeParams {
            plan: address(&plan),
            out: out.as_mut_ptr().expose_provenance() as u64,
            lse: lse.as_mut_ptr().expose_provenance() as u64,
            partial_out: address(&outputs),
            partial_lse: address(&lses),
            denominators: Denominators { sinks: if self.sinks.is_some() { address(&sinks) } else { 0 } },
            out_sequence_stride: i64::from(self.q_heads) * self.head_dim as i64 * 2,
            out_head_stride: self.head_dim as i64 * 2,
            lse_sequence_stride: i64::from(self.q_heads) * 4,
            lse_head_stride: 4,
            q_heads: FastDivisor::new(self.q_heads),
        };
        for cta in 0..ctas {
            let shared_memory = Arc::new(Mutex::new(vec![f32::NAN; 4 * 32 * COLUMNS]));
            for warp in (0..4).rev() {
                let exchange = Arc::new(Exchange::default());
                std::thread::scope(|scope| {
                    for thread in 32 * warp..32 * warp + 32 {
                        let (warp, shared_memory) = (exchange.clone(), shared_memory.clone());
                        let (lane, params) = (Lane { thread, cta, ctas, warp, shared_memory }, &params);
                        scope.spawn(move || {
                            lane.enter();
                            // SAFETY: the buffers live and are as the plan says; a whole warp, and all warps of the CTA.
                            unsafe { merge::merge::<element::F16, COLUMNS, LANES, PARTS>(params, || {}) };
                        });
                    }
                });
            }
        }
        let rows = self.rows() as usize;
        let out: &[f16] = bytemuck::cast_slice(&out);
        let lse: &[f32] = bytemuck::cast_slice(&lse);
        (out[..rows * self.head_dim].to_vec(), lse[..rows].to_vec())
    }

    /// The exact output and natural log-sum-exp of a row.
    fn exact(&self, sequence: usize, head: u32) -> (Vec<f64>, f64) {
        let begin = self.slot_begin(sequence);
        let partials = (begin..begin + self.slot_counts[sequence]).map(|slot| (slot * self.q_heads + head) as usize);
        let partials: Vec<usize> = partials.filter(|&partial| self.lses[partial] > f32::NEG_INFINITY).collect();
        let weight = |partial: usize| f64::from(self.lses[partial]).exp2();
        let sink = self.sinks.as_ref().map_or(0.0, |sinks| f64::from(sinks[head as usize]).exp());
        let sum: f64 = partials.iter().map(|&partial| weight(partial)).sum::<f64>() + sink;
        let column = |column| {
            let terms = partials.iter().map(|&p| weight(p) * f64::from(self.outputs[p * self.head_dim + column]));
            if sum > 0.0 { terms.sum::<f64>() / sum } else { 0.0 }
        };
        ((0..self.head_dim).map(column).collect(), sum.ln())
    }
}

fn every_grid_gives_the_same_exact_bits<const COLUMNS: usize, const LANES: u32, const PARTS: u32>(
    slot_counts: &[u32],
    q_heads: u32,
) {
    for with_sinks in [false, true] {
        every_grid_gives_the_same::<COLUMNS, LANES, PARTS>(slot_counts, q_heads, with_sinks);
    }
}

fn every_grid_gives_the_same<const COLUMNS: usize, const LANES: u32, const PARTS: u32>(
    slot_counts: &[u32],
    q_heads: u32,
    with_sinks: bool,
) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut partials = Partials::draw(slot_counts, q_heads, (LANES * PARTS) as usize * COLUMNS, &mut rng);
    partials.sinks = with_sinks.then(|| (0..q_heads).map(|head| 4.0 * head as f32 - 6.0).collect());
    let rows = partials.rows();
    // No more parts of rows than CTAs; no more than warps; more.
    let parts = rows * PARTS;
    let [by_cta, by_warp, by_quarter] =
        [parts, parts.div_ceil(4), parts.div_ceil(16)].map(|ctas| partials.merge::<COLUMNS, LANES, PARTS>(ctas));
    assert!(parts > 4 * parts.div_ceil(16), "too few rows for the last kind");
    let bits = |(out, lse): &(Vec<f16>, Vec<f32>)| {
        (bytemuck::cast_slice::<f16, u16>(out).to_vec(), bytemuck::cast_slice::<f32, u32>(lse).to_vec())
    };
    assert!(bits(&by_cta) == bits(&by_warp), "{slot_counts:?}: by CTA and by warp");
    assert!(bits(&by_cta) == bits(&by_quarter), "{slot_counts:?}: by CTA and four rows to a warp");
    let (out, lse) = by_cta;
    for row in 0..rows as usize {
        let (sequence, head) = (row / q_heads as usize, row as u32 % q_heads);
        let (exact_out, exact_lse) = partials.exact(sequence, head);
        for (got, exact) in out[row * partials.head_dim..].iter().zip(&exact_out) {
            assert!((f64::from(*got) - exact).abs() < 1e-3, "sequence {sequence}, head {head}: {got}, exact {exact}");
        }
        let got = f64::from(lse[row]);
        assert!(got == exact_lse || (got - exact_lse).abs() < 2e-5, "sequence {sequence}: {got}, exact {exact_lse}");
    }
}

#[test]
fn rows_of_few_partials() {
    every_grid_gives_the_same_exact_bits::<4, 32, 1>(&[2, 3, 0, 8, 1, 5], 4);
}

#[test]
fn rows_of_many_partials() {
    every_grid_gives_the_same_exact_bits::<4, 32, 1>(&[9, 0, 33], 5);
}

#[test]
fn rows_of_few_and_many_partials() {
    every_grid_gives_the_same_exact_bits::<2, 32, 1>(&[3, 40, 2, 2], 3);
}

#[test]
fn rows_that_not_all_lanes_have_columns_of() {
    every_grid_gives_the_same_exact_bits::<4, 24, 1>(&[2, 3, 0, 8, 1, 5], 4);
    every_grid_gives_the_same_exact_bits::<4, 24, 1>(&[9, 0, 33], 5);
}

#[test]
fn rows_of_two_parts() {
    every_grid_gives_the_same_exact_bits::<4, 32, 2>(&[2, 3, 0, 8, 1, 5], 2);
    every_grid_gives_the_same_exact_bits::<4, 32, 2>(&[3, 33, 0], 2);
}
