//! Online softmax of a 16-row tile, base 2.
//! (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)

use pat_abi::ForwardParams;

use crate::ptx::{math, shuffle, switches};
use crate::tile::fragment::Accumulator;

/// Running maximum and sum of the two rows a lane holds: rows `lane / 4` and `lane / 4 + 8` of the warp's tile.
///
/// Maxima are of `score * scale_log2` and equal in the four lanes of a row. Sums are per lane until [`Self::finish`].
#[derive(Clone, Copy)]
pub struct RowStates {
    /// Running maximum; −inf before the first key.
    pub max: [f32; 2],
    /// Sum of `2^(score*scale_log2 - max)`.
    pub sum: [f32; 2],
}

impl RowStates {
    /// No key seen.
    pub const EMPTY: Self = Self { max: [f32::NEG_INFINITY; 2], sum: [0.0; 2] };

    /// Replaces scores by unnormalised probabilities and returns the factors by which earlier sums, already rescaled
    /// here, and the output accumulator have shrunk. `scale_log2` is positive and finite. Convergent.
    #[inline(always)]
    pub fn update<const STEPS: usize>(&mut self, scores: &mut Accumulator<STEPS>, scale_log2: f32) -> [f32; 2] {
        let mut factors = [0.0; 2];
        for r in 0..2 {
            let mut row_max = math::max(scores[0][0][2 * r], scores[0][0][2 * r + 1]);
            for step in 0..STEPS {
                for half in 0..2 {
                    row_max = math::max(row_max, math::max(scores[step][half][2 * r], scores[step][half][2 * r + 1]));
                }
            }
            row_max = math::max(row_max, shuffle::xor_f32(row_max, 1));
            row_max = math::max(row_max, shuffle::xor_f32(row_max, 2));
            let max = math::max(self.max[r], row_max * scale_log2);
            // Without any key so far, −inf − (−inf) would be NaN.
            let reference = subtrahend(max);
            factors[r] = math::exp2(self.max[r] - reference);
            self.max[r] = max;
            let mut sum = 0.0;
            for step in 0..STEPS {
                for half in 0..2 {
                    for e in 2 * r..2 * r + 2 {
                        let p = math::exp2(math::fma(scores[step][half][e], scale_log2, -reference));
                        scores[step][half][e] = p;
                        sum += p;
                    }
                }
            }
            self.sum[r] = math::fma(self.sum[r], factors[r], sum);
        }
        factors
    }

    /// Adds up the sums of the four lanes of each row. Convergent.
    #[inline(always)]
    pub fn finish(&mut self) {
        for r in 0..2 {
            self.sum[r] += shuffle::xor_f32(self.sum[r], 1);
            self.sum[r] += shuffle::xor_f32(self.sum[r], 2);
        }
    }
}

/// Caps scores where the kernel is to: they become `tanh(scale * score / cap)`, and [`ForwardParams::scale_log2`] holds the rest.
#[inline(always)]
pub fn cap_scores<'a>(params: &ForwardParams, scores: impl IntoIterator<Item = &'a mut f32>) {
    if switches::soft_cap() {
        for score in scores {
            *score = capped(*score, params.soft_cap_scale);
        }
    }
}

/// `tanh` of `x * scale / (2 * log2(e))`. (`tanh.approx` errs by 2^-11, too much for a score.)
#[inline(always)]
fn capped(x: f32, scale: f32) -> f32 {
    math::fma(-2.0, math::reciprocal(math::exp2(x * scale) + 1.0), 1.0)
}

/// What to subtract from exponents whose maximum is `max`: 0 instead of −inf, so that an empty state weighs 0, not NaN.
#[inline(always)]
pub fn subtrahend(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// 1/sum, and 0 for an empty state.
#[inline(always)]
pub fn normaliser(sum: f32) -> f32 {
    if sum > 0.0 { math::reciprocal(sum) } else { 0.0 }
}
