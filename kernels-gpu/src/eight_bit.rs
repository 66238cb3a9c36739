//! The 8-bit element types of K and V, widened to the 16-bit type of Q before they are multiplied: exactly, for all 256 codes.
//!
//! A code is a sign, exponent bits and fraction bits, as a 16-bit number is, with fewer of both. Moved to where the 16-bit
//! type has its exponent's low bits, it is the number but for a power of 2 by which the exponents' biases differ; that holds
//! for subnormal numbers, too. The largest exponents mean infinities and NaN in some of the types: a carry out of the exponent
//! finds these.
//!
//! The other way, numbers are rounded to nearest even, and what is too large becomes the largest finite number, as
//! `cvt.rn.satfinite` does (PTX ISA, "cvt"), which architectures before sm_89 do not have.

use crate::ptx::bytes::{scale_bf16x2, scale_f16x2};
use crate::ptx::ldst::load_global_u32;

/// An 8-bit floating-point type.
pub trait Code: Copy {
    /// Two numbers as binary16, of codes in the upper bytes of both halves of a word whose lower bytes are 0.
    fn to_f16x2(codes: u32) -> u32;

    /// As [`Self::to_f16x2`], as bfloat16.
    fn to_bf16x2(codes: u32) -> u32;

    /// Bits of fraction.
    const FRACTION_BITS: u32;
    /// What is added to exponents.
    const BIAS: u32;
    /// The largest finite number.
    const LARGEST: u32;

    /// The code of the nearest number, ties to even; what is too large, infinities among it, becomes the largest finite number.
    #[inline(always)]
    fn nearest(value: f32) -> u32 {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        if magnitude > f32::INFINITY.to_bits() {
            return NAN;
        }
        // The smallest number with a whole fraction is 2^(1 - bias).
        let code = if magnitude < (128 - Self::BIAS) << 23 {
            // Beside this number, whose last place is the smallest code's, the sum is rounded to codes.
            let unit = f32::from_bits((151 - Self::BIAS - Self::FRACTION_BITS) << 23);
            (f32::from_bits(magnitude) + unit).to_bits() - unit.to_bits()
        } else {
            let dropped = 23 - Self::FRACTION_BITS;
            let half = (1 << (dropped - 1)) - 1 + (magnitude >> dropped & 1);
            let code = ((magnitude + half) >> dropped) - ((127 - Self::BIAS) << Self::FRACTION_BITS);
            if code < Self::LARGEST { code } else { Self::LARGEST }
        };
        code | bits >> 24 & 0x80
    }

    /// The codes of four numbers, the first in the lowest byte.
    #[inline(always)]
    fn nearest_four(values: [f32; 4]) -> u32 {
        let [a, b, c, d] = values.map(Self::nearest);
        a | b << 8 | c << 16 | d << 24
    }
}

/// Of all types.
const NAN: u32 = 0x7f;

/// The factor of a KV head's elements; `factors` is the address of one for each head, or 0.
///
/// # Safety
/// Where there are factors, there is one for this head.
#[inline(always)]
pub unsafe fn factor_of_head(factors: u64, kv_head: u32) -> f32 {
    if factors == 0 {
        return 1.0;
    }
    // SAFETY: the caller's contract.
    f32::from_bits(unsafe { load_global_u32(factors + kv_head as u64 * 4) })
}

/// 4 bits of exponent, 3 of fraction; no infinities, NaN where all are set.
#[derive(Clone, Copy)]
pub struct E4m3;

/// 5 bits of exponent, 2 of fraction: the upper byte of a binary16.
#[derive(Clone, Copy)]
pub struct E5m2;

const SIGNS: u32 = 0x8000_8000;

impl Code for E4m3 {
    const FRACTION_BITS: u32 = 3;
    const BIAS: u32 = 7;
    const LARGEST: u32 = 0x7e;

    #[inline(always)]
    fn to_f16x2(codes: u32) -> u32 {
        let magnitudes = codes >> 1 & 0x3f80_3f80;
        // One more in the last place carries NaN alone into the exponent's highest bit.
        let nan = (magnitudes + 0x0080_0080) & 0x4000_4000;
        // 2^8: biases of 15 and 7.
        scale_f16x2(magnitudes | codes & SIGNS, 0x5c00_5c00) | ((nan << 1) - (nan >> 5))
    }

    #[inline(always)]
    fn to_bf16x2(codes: u32) -> u32 {
        let magnitudes = codes >> 4 & 0x07f0_07f0;
        let nan = (magnitudes + 0x0010_0010) & 0x0800_0800;
        // 2^120: biases of 127 and 7.
        scale_bf16x2(magnitudes | codes & SIGNS, 0x7b80_7b80) | ((nan << 4) - (nan >> 5))
    }
}

impl Code for E5m2 {
    const FRACTION_BITS: u32 = 2;
    const BIAS: u32 = 15;
    const LARGEST: u32 = 0x7b;

    #[inline(always)]
    fn to_f16x2(codes: u32) -> u32 {
        codes
    }

    #[inline(always)]
    fn to_bf16x2(codes: u32) -> u32 {
        let magnitudes = codes >> 3 & 0x0fe0_0fe0;
        // The largest exponent, of infinities and NaN: it becomes the largest of a bfloat16, the fraction stays.
        let special = (magnitudes + 0x0080_0080) & 0x1000_1000;
        // 2^112: biases of 127 and 15.
        scale_bf16x2(magnitudes | codes & SIGNS, 0x7780_7780) | ((special << 3) - (special >> 5))
    }
}
