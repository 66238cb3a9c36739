//! The softmax of a stream of tiles.

use crate::ptx::math;
use crate::ptx::shuffle::{any, xor_f32};
use crate::softmax::subtrahend;

/// Running sum of the two rows of a thread, and the exponent it is relative to.
///
/// The reference follows the row maximum (times the scale) only when that has grown by more than [`Self::SLACK`]: after
/// the first tiles, outputs need no correction any more. Weights stay below 2^SLACK, far from overflow in 16 bits.
pub(super) struct OnlineSoftmax {
    scale_log2: f32,
    pub(super) references: [f32; 2],
    pub(super) sums: [f32; 2],
}

impl OnlineSoftmax {
    pub(super) const SLACK: f32 = 8.0;

    #[inline(always)]
    pub(super) fn new(scale_log2: f32) -> Self {
        Self { scale_log2, references: [f32::NEG_INFINITY; 2], sums: [0.0; 2] }
    }

    /// Turns scores into weights `2^(scale * s - reference)`; returns what the output so far must be multiplied by, if by
    /// anything (the same answer in all lanes of a warp).
    #[inline(always)]
    pub(super) fn update<const SPANS: usize>(&mut self, s: &mut [[f32; 32]; SPANS]) -> Option<[f32; 2]> {
        // Two rows side by side, as trees: the latencies of the exchanges and of the maxima overlap.
        let mut maxima = [0, 1].map(|half| {
            let mut row_maximum = f32::NEG_INFINITY;
            for span in 0..SPANS {
                let mut tree = [0f32; 16];
                for i in 0..8 {
                    tree[2 * i] = s[span][4 * i + 2 * half];
                    tree[2 * i + 1] = s[span][4 * i + 2 * half + 1];
                }
                for width in [8, 4, 2, 1] {
                    for i in 0..width {
                        tree[i] = math::max(tree[i], tree[i + width]);
                    }
                }
                row_maximum = if span == 0 { tree[0] } else { math::max(row_maximum, tree[0]) };
            }
            row_maximum
        });
        for lane_bit in [1, 2] {
            let others = maxima.map(|maximum| xor_f32(maximum, lane_bit));
            maxima = [0, 1].map(|half| math::max(maxima[half], others[half]));
        }
        maxima = maxima.map(|maximum| maximum * self.scale_log2);
        let grown = [0, 1].map(|half| maxima[half] > self.references[half] + Self::SLACK);
        let mut correction = None;
        if any(grown[0] || grown[1]) {
            let mut factors = [1f32; 2];
            for half in 0..2 {
                // Only where its own scores ask for it: a row's bits must not depend on what shares its warp, least of all on rows
                // that the item does not have.
                let reference = if grown[half] { maxima[half] } else { self.references[half] };
                // A row that attends to nothing so far weighs 0, not NaN.
                factors[half] = math::exp2(self.references[half] - subtrahend(reference));
                self.sums[half] *= factors[half];
                self.references[half] = reference;
            }
            correction = Some(factors);
        }
        for half in 0..2 {
            let reference = subtrahend(self.references[half]);
            for span in 0..SPANS {
                let mut sum = 0f32;
                for i in 0..8 {
                    for e in 0..2 {
                        let score = &mut s[span][4 * i + 2 * half + e];
                        *score = math::exp2(math::fma(*score, self.scale_log2, -reference));
                        sum += *score;
                    }
                }
                self.sums[half] += sum;
            }
        }
        correction
    }

    /// Sums over the row's four lanes, and the references.
    #[inline(always)]
    pub(super) fn finish(&self) -> ([f32; 2], [f32; 2]) {
        let sums = self.sums.map(|sum| {
            let sum = sum + xor_f32(sum, 1);
            sum + xor_f32(sum, 2)
        });
        (sums, self.references)
    }
}
