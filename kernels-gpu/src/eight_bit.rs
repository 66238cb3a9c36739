//! The 8-bit element types of K and V, widened to binary16 before they are multiplied: exactly, for all 256 codes, but for a
//! factor of the type.
//!
//! A code is a sign, exponent bits and fraction bits, as a 16-bit number is, with fewer of both. Moved to where binary16 has its
//! exponent's low bits, it is the number but for a power of 2 by which the exponents' biases differ; that holds for subnormal
//! numbers, too. E5m2 needs no more. In E4m3 the largest magnitude means NaN: it is 480 where the largest number is 448. Times
//! 144, 480 is too large for binary16 and becomes infinite, while all numbers stay exact. What is computed from infinities is
//! made NaN ([`Code::settle`]); results are divided by the factor. The sm_90a file has an instruction for E4m3, and needs none
//! of this.
//!
//! The other way, numbers are rounded to nearest even, and what is too large becomes the largest finite number, as
//! `cvt.rn.satfinite` does (PTX ISA, "cvt"), which architectures before sm_89 do not have.

use crate::ptx::bytes::{e4m3_to_f16, permute, scale_f16x2};
use crate::ptx::ldst::load_written_u32;
use crate::ptx::math;

/// An 8-bit floating-point type.
pub trait Code: Copy {
    /// What widened numbers are multiplied with.
    const FACTOR: f32;

    /// The even and the odd bytes of a word as two binary16 each, times [`Self::FACTOR`].
    fn widen(word: u32) -> [u32; 2];

    /// The four numbers of a word as two binary16 each, exactly, the first two first; NaN for NaN. From sm_89 on.
    fn exact(word: u32) -> [u32; 2];

    /// Whether [`Self::keys`] leaves codes in their order.
    const KEYS_IN_ORDER: bool;

    /// The four numbers of a word as two binary16 each, times [`Self::FACTOR`], in the order that costs least: the first two
    /// first, or as [`Self::widen`] has them.
    fn keys(word: u32) -> [u32; 2];

    /// A number that sums of products with widened numbers have made: where it is infinite for NaN, it becomes NaN.
    fn settle(value: f32) -> f32;

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
    f32::from_bits(unsafe { load_written_u32(factors + kv_head as u64 * 4) })
}

/// Whether there is an instruction that converts E4m3.
const CONVERTS: bool = cfg!(pat_sm90a);

/// 4 bits of exponent, 3 of fraction; no infinities, NaN where all are set.
#[derive(Clone, Copy)]
pub struct E4m3;

/// 5 bits of exponent, 2 of fraction: the upper byte of a binary16.
#[derive(Clone, Copy)]
pub struct E5m2;

// Which two bytes of a word go to the upper bytes of its halves.
const EVEN: u32 = 0x2404;
const ODD: u32 = 0x3414;
const FIRST: u32 = 0x1404;
const LAST: u32 = 0x3424;
/// The even bytes of a word in front of the odd ones.
const EVEN_FIRST: u32 = 0x3120;

impl Code for E4m3 {
    const FRACTION_BITS: u32 = 3;
    const BIAS: u32 = 7;
    const LARGEST: u32 = 0x7e;

    const FACTOR: f32 = if CONVERTS { 1.0 } else { 144.0 };

    #[inline(always)]
    fn widen(word: u32) -> [u32; 2] {
        if CONVERTS {
            return e4m3_to_f16(permute::<EVEN_FIRST>(word));
        }
        // Codes are in the upper bytes of both halves.
        [word << 8, word].map(|codes| {
            let numbers = codes >> 1 & 0x3f80_3f80 | codes & 0x8000_8000;
            // 144 times 2^8: biases of 15 and 7.
            scale_f16x2(numbers, 0x7880_7880)
        })
    }

    #[inline(always)]
    fn exact(word: u32) -> [u32; 2] {
        e4m3_to_f16(word)
    }

    const KEYS_IN_ORDER: bool = CONVERTS;

    #[inline(always)]
    fn keys(word: u32) -> [u32; 2] {
        if CONVERTS { Self::exact(word) } else { Self::widen(word) }
    }

    #[inline(always)]
    fn settle(value: f32) -> f32 {
        if CONVERTS { value } else { math::fma(value, 0.0, value) }
    }
}

impl Code for E5m2 {
    const FRACTION_BITS: u32 = 2;
    const BIAS: u32 = 15;
    const LARGEST: u32 = 0x7b;

    const FACTOR: f32 = 1.0;

    #[inline(always)]
    fn widen(word: u32) -> [u32; 2] {
        [permute::<EVEN>(word), permute::<ODD>(word)]
    }

    #[inline(always)]
    fn exact(word: u32) -> [u32; 2] {
        [permute::<FIRST>(word), permute::<LAST>(word)]
    }

    const KEYS_IN_ORDER: bool = true;

    #[inline(always)]
    fn keys(word: u32) -> [u32; 2] {
        Self::exact(word)
    }

    #[inline(always)]
    fn settle(value: f32) -> f32 {
        value
    }
}
