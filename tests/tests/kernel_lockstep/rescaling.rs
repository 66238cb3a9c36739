//! The online softmax of the forward kernels where a row's maximum grows: the output so far is rescaled, thousands of times.

use crate::lanes::{Exchange, Lane};
use crate::softmax::{OnlineSoftmax, normaliser, rescale, value_of_row};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f32::consts::LOG2_E;
use std::sync::{Arc, Mutex};

/// Rows of a warp.
const ROWS: usize = 16;
/// Columns of V: those of one lane in the place of a head dimension.
const COLUMNS: usize = 4;
const TILES: usize = 20;

/// Scores and values of the rows of a warp.
struct Stream {
    scale_log2: f32,
    keys: usize,
    /// `[row][key]`; -inf where the row does not attend to the key.
    scores: Vec<f32>,
    /// `[key][column]`.
    values: Vec<[f32; COLUMNS]>,
}

impl Stream {
    /// Scores of N(0, 1), nearly, times `factor`, that grow by `drift` times log2(e) with every tile.
    fn draw(rng: &mut impl Rng, keys: usize, factor: f32, drift: f32) -> Self {
        let mut score = |row: usize, key: usize| {
            // The first rows begin late.
            if key < row % 4 * keys / 8 {
                return f32::NEG_INFINITY;
            }
            let normal: f32 = (0..6).map(|_| rng.random_range(-1.0..1.0f32)).sum::<f32>() / 2f32.sqrt();
            normal + drift * (key * TILES / keys) as f32 / factor
        };
        let scores = (0..ROWS * keys).map(|i| score(i / keys, i % keys)).collect();
        let values = (0..keys).map(|_| [0; COLUMNS].map(|_| rng.random_range(-1.0..1.0))).collect();
        Self { scale_log2: factor * LOG2_E, keys, scores, values }
    }

    /// Output and log-sum-exp, base 2, of a row.
    fn exact(&self, row: usize) -> ([f64; COLUMNS], f64) {
        let exponents = &self.scores[row * self.keys..][..self.keys];
        let exponents: Vec<f64> = exponents.iter().map(|&s| f64::from(s) * f64::from(self.scale_log2)).collect();
        let maximum = exponents.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = exponents.iter().map(|e| (e - maximum).exp2()).sum();
        let mut out = [0.0; COLUMNS];
        for (exponent, values) in exponents.iter().zip(&self.values) {
            for (out, &value) in out.iter_mut().zip(values) {
                *out += (exponent - maximum).exp2() / sum * f64::from(value);
            }
        }
        (out, maximum + sum.log2())
    }

    /// What a lane of the warp does: tiles of `SPANS` spans of `VALUES` scores. Returns how often outputs of its rows that were not
    /// empty have been rescaled.
    fn lane<const LAZY: bool, const SPANS: usize, const VALUES: usize>(&self, lane: usize) -> [usize; 2] {
        let mut softmax = OnlineSoftmax::EMPTY;
        let mut output = [0.0; 2 * COLUMNS];
        let mut rescaled = [0; 2];
        let tile_keys = SPANS * 2 * VALUES;
        let rows = [lane / 4, lane / 4 + 8];
        for tile in 0..self.keys / tile_keys {
            let key_of =
                |span: usize, i: usize| tile * tile_keys + span * 2 * VALUES + i / 2 * 8 + lane % 4 * 2 + i % 2;
            let mut scores = [[f32::NAN; VALUES]; SPANS];
            for (span, scores) in scores.iter_mut().enumerate() {
                for (half, row) in rows.into_iter().enumerate() {
                    for i in 0..VALUES / 2 {
                        scores[value_of_row(half, i)] = self.scores[row * self.keys + key_of(span, i)];
                    }
                }
            }
            let former = softmax.sums;
            if let Some(factors) = softmax.update::<LAZY, VALUES>(&mut scores, self.scale_log2) {
                rescale(&mut output, factors);
                for half in 0..2 {
                    rescaled[half] += usize::from(former[half] > 0.0 && factors[half] > 0.0 && factors[half] < 1.0);
                }
            }
            for (span, weights) in scores.iter().enumerate() {
                for half in 0..2 {
                    for i in 0..VALUES / 2 {
                        let weight = weights[value_of_row(half, i)];
                        assert!((0.0..=OnlineSoftmax::SLACK.exp2()).contains(&weight), "weight {weight}");
                        for (column, value) in self.values[key_of(span, i)].iter().enumerate() {
                            output[value_of_row(half, column)] += weight * value;
                        }
                    }
                }
            }
        }
        softmax.finish();
        for (half, row) in rows.into_iter().enumerate() {
            let scale = normaliser(softmax.sums[half]);
            let (exact, exact_lse) = self.exact(row);
            for (column, exact) in exact.into_iter().enumerate() {
                // The other keys of the row are with the other lanes of the quad.
                let sum = [1, 2].into_iter().fold(output[value_of_row(half, column)], |sum, lane_bit| {
                    sum + crate::lanes::shuffle::xor_f32(sum, lane_bit)
                });
                let got = f64::from(sum * scale);
                assert!((got - exact).abs() < 2e-3, "row {row}: {got}, exact {exact}");
            }
            let lse = f64::from(softmax.references[half] + softmax.sums[half].log2());
            assert!((lse - exact_lse).abs() < 1e-3 + 1e-6 * exact_lse.abs(), "row {row}: {lse}, exact {exact_lse}");
        }
        rescaled
    }

    fn warp<const LAZY: bool, const SPANS: usize, const VALUES: usize>(&self) -> usize {
        let (warp, shared_memory) = (Arc::new(Exchange::default()), Arc::new(Mutex::default()));
        std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..32)
                .map(|thread| {
                    let (warp, shared_memory) = (warp.clone(), shared_memory.clone());
                    scope.spawn(move || {
                        Lane { thread, cta: 0, ctas: 1, warp, shared_memory }.enter();
                        self.lane::<LAZY, SPANS, VALUES>(thread as usize)
                    })
                })
                .collect();
            // Every row once, not once per lane of its quad.
            let rescaled = lanes.into_iter().map(|lane| lane.join().expect("no lane panicked"));
            rescaled.step_by(4).flatten().sum()
        })
    }
}

/// Logits of 16 and 64 times the usual size, and such that grow along the sequence by less and by more than the slack.
fn rescales<const LAZY: bool, const SPANS: usize, const VALUES: usize>() {
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    let keys = TILES * SPANS * 2 * VALUES;
    let mut rescaled = 0;
    for (factor, drift) in [(16.0, 0.0), (64.0, 0.0), (1.0, 3.0), (1.0, 9.0), (4.0, 12.0), (16.0, 20.0), (64.0, 40.0)] {
        for _ in 0..2 {
            rescaled += Stream::draw(&mut rng, keys, factor, drift).warp::<LAZY, SPANS, VALUES>();
        }
    }
    assert!(rescaled > 2000, "an output that was not empty has been rescaled {rescaled} times only");
}

#[test]
fn lazy_references_of_64_keys() {
    rescales::<true, 1, 32>();
}

#[test]
fn lazy_references_of_128_keys() {
    rescales::<true, 2, 32>();
}

#[test]
fn references_that_always_follow() {
    // Steps of 32 keys in fragments of 8.
    rescales::<false, 4, 4>();
}
