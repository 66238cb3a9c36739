//! The online softmax of all forward kernels, base 2.
//! (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
//!
//! Accumulators of `mma.m16n8k16` and of `wgmma` hand values out alike: a lane holds two rows, `lane / 4` and `lane / 4 + 8` of its
//! warp's 16, the rest of a row is with the other lanes of its quad, and of every four values the first two are of the first row.

use pat_abi::ForwardParams;

use crate::ptx::{math, shuffle, switches};

/// Index, in a lane's part of an accumulator, of value `i` of its row `row` (0 or 1).
#[inline(always)]
pub const fn value_of_row(row: usize, i: usize) -> usize {
    i / 2 * 4 + 2 * row + i % 2
}

/// Multiplies each of the two rows of a lane by its factor.
#[inline(always)]
pub fn rescale(accumulator: &mut [f32], factors: [f32; 2]) {
    for (i, value) in accumulator.iter_mut().enumerate() {
        *value *= factors[i / 2 % 2];
    }
}

/// Running sums of the two rows of a lane, and the exponents that they are relative to.
///
/// References are of `score * scale_log2` and equal in the four lanes of a row. Sums are per lane until [`Self::finish`].
#[derive(Clone, Copy)]
pub struct OnlineSoftmax {
    /// What exponents are relative to: the row's maximum, or at most [`Self::SLACK`] below it; −inf before the first key.
    pub references: [f32; 2],
    /// Sum of `2^(score*scale_log2 - reference)`.
    pub sums: [f32; 2],
}

impl OnlineSoftmax {
    /// No key seen.
    pub const EMPTY: Self = Self { references: [f32::NEG_INFINITY; 2], sums: [0.0; 2] };

    /// By how much a maximum may exceed a lazy reference. Weights stay below 2^SLACK, far from overflow in 16 bits.
    pub const SLACK: f32 = 8.0;

    /// Turns scores, given as spans of `VALUES`, into weights `2^(score*scale_log2 - reference)`; returns what the output so
    /// far must be multiplied by, if by anything. Sums are rescaled here. `scale_log2` is positive and finite. Convergent.
    ///
    /// `LAZY` references follow the maximum only when that has grown by more than [`Self::SLACK`]: after the first tiles, outputs
    /// need no correction any more. Whether there is one is then the same in all lanes of the warp. Others always follow it.
    #[inline(always)]
    pub fn update<const LAZY: bool, const VALUES: usize>(
        &mut self,
        spans: &mut [[f32; VALUES]],
        scale_log2: f32,
    ) -> Option<[f32; 2]> {
        // Two rows side by side, as trees: the latencies of the exchanges and of the maxima overlap.
        let mut maxima = [0, 1].map(|row| {
            let mut row_maximum = f32::NEG_INFINITY;
            for (span, scores) in spans.iter().enumerate() {
                let mut tree = [0f32; 16];
                for i in 0..VALUES / 2 {
                    tree[i] = scores[value_of_row(row, i)];
                }
                for width in [8, 4, 2, 1] {
                    if width < VALUES / 2 {
                        for i in 0..width {
                            tree[i] = math::max(tree[i], tree[i + width]);
                        }
                    }
                }
                row_maximum = if span == 0 { tree[0] } else { math::max(row_maximum, tree[0]) };
            }
            row_maximum
        });
        for lane_bit in [1, 2] {
            let others = maxima.map(|maximum| shuffle::xor_f32(maximum, lane_bit));
            maxima = [0, 1].map(|row| math::max(maxima[row], others[row]));
        }
        maxima = maxima.map(|maximum| maximum * scale_log2);
        let mut correction = None;
        let grown = [0, 1].map(|row| maxima[row] > self.references[row] + Self::SLACK);
        if !LAZY || shuffle::any(grown[0] || grown[1]) {
            correction = Some([0, 1].map(|row| {
                let former = self.references[row];
                self.references[row] = if !LAZY {
                    math::max(former, maxima[row])
                } else if grown[row] {
                    maxima[row]
                } else {
                    // A row's bits must not depend on what shares its warp, least of all on rows that the item does not have.
                    former
                };
                // A row that attends to nothing so far weighs 0, not NaN.
                let factor = math::exp2(former - subtrahend(self.references[row]));
                if LAZY {
                    self.sums[row] *= factor;
                }
                factor
            }));
        }
        for row in 0..2 {
            let reference = subtrahend(self.references[row]);
            for (span, scores) in spans.iter_mut().enumerate() {
                let mut sum = 0.0;
                for i in 0..VALUES / 2 {
                    let score = &mut scores[value_of_row(row, i)];
                    *score = math::exp2(math::fma(*score, scale_log2, -reference));
                    sum += *score;
                }
                self.sums[row] = match correction {
                    Some(factors) if !LAZY && span == 0 => math::fma(self.sums[row], factors[row], sum),
                    _ => self.sums[row] + sum,
                };
            }
        }
        correction
    }

    /// Adds up the sums of the four lanes of each row. Convergent.
    #[inline(always)]
    pub fn finish(&mut self) {
        for row in 0..2 {
            self.sums[row] += shuffle::xor_f32(self.sums[row], 1);
            self.sums[row] += shuffle::xor_f32(self.sums[row], 2);
        }
    }
}

/// Maps scores where the kernel is to: capped ones become `tanh(scale * score / cap)`, and [`ForwardParams::scale_log2`] holds the
/// rest.
#[inline(always)]
pub fn cap_scores<'a>(params: &ForwardParams, scores: impl IntoIterator<Item = &'a mut f32>) {
    if switches::is_on!(pat_abi::soft_cap_symbol!()) {
        for score in scores {
            *score = capped(*score, params.map_scale);
        }
    }
}

/// Multiplies products Q·K with `factor`, ahead of what becomes of them.
#[inline(always)]
pub fn scale_products(params: &mut ForwardParams, factor: f32) {
    // A map is of what comes behind the scale, and without one its factor is not used.
    params.map_scale *= factor;
    params.scale_log2 *= switches::one_where_on!(factor, pat_abi::soft_cap_symbol!());
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
