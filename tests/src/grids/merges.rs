//! Merged attention states, over the parameters that other libraries' tests of it have: FlashInfer's `test_triton_cascade.py` and
//! `test_merge_state_in_place_with_mask`, vLLM's `test_merge_attn_states.py`. States without tokens have a log-sum-exp of -inf
//! here, and any output; outputs are of 16 bits.

use super::Tolerance;
use half::{bf16, f16};
use pat_rs::cpu::State;
use pat_rs::cuda::{DeviceBuffer, DeviceState};
use pat_rs::{Dtype, Element, Engine, RowStrides};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;

const ROWS: [u32; 8] = [256, 512, 613, 1024, 1536, 2048, 4096, 1];
const HEADS: [u32; 5] = [4, 8, 16, 32, 64];
const HEAD_DIMS: [u32; 6] = [32, 48, 64, 96, 128, 256];
/// With f16, and with bf16.
const TOLERANCES: [Tolerance; 2] =
    [Tolerance { relative: 1e-3, absolute: 1e-3 }, Tolerance { relative: 1e-2, absolute: 1e-3 }];

/// Outputs `[rows, heads, head_dim]`, and log-sum-exps.
type Values<T> = (Vec<T>, Vec<f32>);

/// Merges two states where the engine computes; the result takes the place of the first.
fn merge<T: Element>(engine: &Engine, extent: (u32, u32, u32), [a, b]: [&Values<T>; 2]) -> Values<T> {
    let (_, heads, head_dim) = extent;
    let (out_strides, lse_strides) = (RowStrides::contiguous(heads, head_dim), RowStrides::lse(heads));
    if let Some(cuda) = engine.as_cuda() {
        let device = cuda.device();
        let [a, b] = [a, b].map(|(out, lse)| {
            let buffer = |bytes: &[u8]| DeviceBuffer::from_slice(device, bytes).expect("memory");
            (buffer(bytemuck::cast_slice(out)), buffer(bytemuck::cast_slice(lse)))
        });
        let state = |(out, lse): &(DeviceBuffer, DeviceBuffer)| DeviceState {
            out: out.span(),
            out_strides,
            lse: lse.span(),
            lse_strides,
        };
        let (first, second) = (state(&a), state(&b));
        let stream = device.new_stream().expect("a stream");
        cuda.merge_states(extent, T::DTYPE, [&first, &second], &first, &stream).expect("a merge");
        stream.synchronize().expect("the device works");
        return crate::on_device::read_output(&a.0, &a.1).map(|output| (output.out, output.lse)).expect("outputs");
    }
    let (mut a, mut b) = (a.clone(), b.clone());
    let [first, second] = [&mut a, &mut b].map(|(out, lse)| State {
        out: Cell::from_mut(out.as_mut_slice()).as_slice_of_cells(),
        out_strides,
        lse: Cell::from_mut(lse.as_mut_slice()).as_slice_of_cells(),
        lse_strides,
    });
    pat_rs::cpu::merge_states(extent, [&first, &second], &first).expect("a merge");
    a
}

/// The shares of two states in their merger and its log-sum-exp, in f64; `None` without tokens.
fn shares(lse: [f32; 2]) -> Option<([f64; 2], f64)> {
    let lse = lse.map(f64::from);
    let most = lse[0].max(lse[1]);
    let weights = lse.map(|lse| (lse - most).exp());
    let sum: f64 = weights.iter().sum();
    most.is_finite().then(|| (weights.map(|weight| weight / sum), most + sum.ln()))
}

/// Holds a merger to the tolerance, and to one unit in the last place of what is exact.
fn judge<T: Element>(head_dim: u32, [a, b]: [&Values<T>; 2], merged: &Values<T>, what: &str) {
    let Tolerance { relative, absolute } = TOLERANCES[usize::from(T::DTYPE == Dtype::Bf16)];
    for (row, &lse) in merged.1.iter().enumerate() {
        let [of_a, of_b, of_merged] =
            [a, b, merged].map(|(out, _)| &out[row * head_dim as usize..][..head_dim as usize]);
        let Some((shares, expected)) = shares([a.1[row], b.1[row]]) else {
            assert_eq!(lse, f32::NEG_INFINITY, "{what}: of nothing");
            assert!(of_merged.iter().all(|value| value.to_f32() == 0.0), "{what}: outputs of nothing");
            continue;
        };
        assert!((f64::from(lse) - expected).abs() <= 1e-5 * (1.0 + expected.abs()), "{what}: {lse}, not {expected}");
        for ((a, b), actual) in of_a.iter().zip(of_b).zip(of_merged) {
            // Nothing of an output that has no share.
            let part = |share: f64, of: &T| if share > 0.0 { share * f64::from(of.to_f32()) } else { 0.0 };
            let (actual, expected) = (f64::from(actual.to_f32()), part(shares[0], a) + part(shares[1], b));
            // What is added may cancel; it is of the size of numbers here.
            let unit = f64::from(T::EPSILON) * expected.abs() + 1e-6;
            let allowed = unit.min(absolute + relative * expected.abs());
            assert!((actual - expected).abs() <= allowed, "{what}: {actual}, not {expected} +- {allowed:.2e}");
        }
    }
}

/// A state of which about one row in ten has no tokens: only where `other` has some, if there is one.
fn draw<T: Element>(extent: (u32, u32, u32), other: Option<&Values<T>>, rng: &mut impl Rng) -> Values<T> {
    let (rows, heads, head_dim) = extent;
    let count = (rows * heads) as usize;
    let mut out: Vec<T> = (0..count * head_dim as usize).map(|_| T::from_f32(rng.random_range(-2.0..2.0))).collect();
    let mut lse: Vec<f32> = (0..count).map(|_| rng.random_range(-8.0..8.0)).collect();
    for (row, lse) in lse.iter_mut().enumerate() {
        if rng.random_bool(0.1) && other.is_none_or(|other| other.1[row] > f32::NEG_INFINITY) {
            *lse = f32::NEG_INFINITY;
            out[row * head_dim as usize..][..head_dim as usize].fill(T::from_f32(f32::NAN));
        }
    }
    (out, lse)
}

fn agree_in<T: Element>(engine: &Engine, most_elements: u32, rng: &mut impl Rng) -> usize {
    let mut merged = 0;
    for heads in HEADS {
        for head_dim in HEAD_DIMS {
            let most_rows = most_elements / (heads * head_dim);
            let rows = ROWS.choose(rng).expect("not empty").min(&most_rows);
            let extent = (*rows, heads, head_dim);
            let a = draw::<T>(extent, None, rng);
            let b = draw::<T>(extent, Some(&a).filter(|_| rng.random_bool(0.5)), rng);
            let both = merge(engine, extent, [&a, &b]);
            judge(head_dim, [&a, &b], &both, &format!("{extent:?}, {}", T::DTYPE.name()));
            merged += 1;
        }
    }
    // A hundred states in turn.
    let extent = (2048.min(most_elements / (32 * 128 * 4)), 32, 128);
    let mut all = draw::<T>(extent, None, rng);
    for step in 0..100 {
        let next = draw::<T>(extent, None, rng);
        let both = merge(engine, extent, [&all, &next]);
        judge(extent.2, [&all, &next], &both, &format!("{extent:?}, {}, state {step}", T::DTYPE.name()));
        all = both;
    }
    merged + 100
}

/// Merges states of every number of heads and head dim, of at most so many elements; returns how many mergers were judged.
///
/// # Panics
/// A merger is outside its tolerance.
pub fn agree(engine: &Engine, most_elements: u32, seed: u64) -> usize {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    agree_in::<f16>(engine, most_elements, &mut rng) + agree_in::<bf16>(engine, most_elements, &mut rng)
}
