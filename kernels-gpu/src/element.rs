//! The 16-bit element types: of Q and O always, of K and V unless these have 8 bits.

use crate::ptx::{math, mma};

/// A 16-bit floating-point type that the tensor cores multiply with f32 accumulation.
pub trait Element {
    /// Whether it is binary16.
    const IS_F16: bool;

    /// Two f32, rounded to nearest even, `low` in the low half of the word.
    fn pack(low: f32, high: f32) -> u32;

    /// The two elements of a word, exactly, the low half first.
    fn unpack(word: u32) -> [f32; 2];

    /// `sum + 0 * element` for both elements of a word: NaN once one was not finite.
    fn add_zero_times(sum: u32, word: u32) -> u32;

    /// accumulator (16x8) += A (16x16, row-major) * B (16x8, column-major). Convergent.
    fn multiply(accumulator: &mut [f32; 4], a: &[u32; 4], b: [u32; 2]);
}

/// IEEE 754 binary16.
pub struct F16;

/// bfloat16.
pub struct Bf16;

impl Element for F16 {
    const IS_F16: bool = true;

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        math::pack_f16x2(low, high)
    }

    #[inline(always)]
    fn unpack(word: u32) -> [f32; 2] {
        math::unpack_f16x2(word)
    }

    #[inline(always)]
    fn add_zero_times(sum: u32, word: u32) -> u32 {
        math::add_zero_times_f16x2(sum, word)
    }

    #[inline(always)]
    fn multiply(accumulator: &mut [f32; 4], a: &[u32; 4], b: [u32; 2]) {
        mma::mma_m16n8k16_f16(accumulator, a, b);
    }
}

impl Element for Bf16 {
    const IS_F16: bool = false;

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        math::pack_bf16x2(low, high)
    }

    #[inline(always)]
    fn unpack(word: u32) -> [f32; 2] {
        // The upper halves of f32s.
        [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
    }

    #[inline(always)]
    fn add_zero_times(sum: u32, word: u32) -> u32 {
        math::add_zero_times_bf16x2(sum, word)
    }

    #[inline(always)]
    fn multiply(accumulator: &mut [f32; 4], a: &[u32; 4], b: [u32; 2]) {
        mma::mma_m16n8k16_bf16(accumulator, a, b);
    }
}
