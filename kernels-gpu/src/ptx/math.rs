//! Approximate and packed arithmetic. None of it is convergent.

use core::arch::asm;

/// `ex2.approx.ftz.f32` (sm_20): 2^x; `-inf` gives 0.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("ex2.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack, preserves_flags));
    }
    y
}

/// `lg2.approx.ftz.f32` (sm_20): log2(x); 0 gives `-inf`.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("lg2.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack, preserves_flags));
    }
    y
}

/// `rcp.approx.ftz.f32` (sm_20): 1/x, within one unit in the last place.
#[inline(always)]
pub fn reciprocal(x: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("rcp.approx.ftz.f32 {0}, {1};", out(reg32) y, in(reg32) x, options(pure, nomem, nostack, preserves_flags));
    }
    y
}

/// `fma.rn.f32` (sm_20): a*b + c, rounded once. Written `a*b + c`, LLVM would keep two instructions.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.f32 {0}, {1}, {2}, {3};", out(reg32) y, in(reg32) a, in(reg32) b, in(reg32) c,
            options(pure, nomem, nostack, preserves_flags));
    }
    y
}

/// `max.f32` (sm_20): the greater of two values; of a NaN and a number, the number.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    let y: f32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("max.f32 {0}, {1}, {2};", out(reg32) y, in(reg32) a, in(reg32) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    y
}

/// `cvt.rn.f16x2.f32` (sm_80): two f32 to two binary16 values, `low` in the low half.
#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> u32 {
    let packed: u32;
    // SAFETY: register arithmetic. The instruction takes the high half first.
    unsafe {
        asm!("cvt.rn.f16x2.f32 {0}, {1}, {2};", out(reg32) packed, in(reg32) high, in(reg32) low,
            options(pure, nomem, nostack, preserves_flags));
    }
    packed
}

/// `cvt.f32.f16` (sm_53), twice: the two binary16 values of a word, the low half first.
#[inline(always)]
pub fn unpack_f16x2(word: u32) -> [f32; 2] {
    let (low, high): (f32, f32);
    // SAFETY: register arithmetic.
    unsafe {
        asm!("{{ .reg .b16 l, h; mov.b32 {{l, h}}, {2}; cvt.f32.f16 {0}, l; cvt.f32.f16 {1}, h; }}",
            out(reg32) low, out(reg32) high, in(reg32) word, options(pure, nomem, nostack, preserves_flags));
    }
    [low, high]
}

/// `fma.rn.f16x2` (sm_53) with a factor of 0: `sum`, and NaN where the binary16 value is not finite.
#[inline(always)]
pub fn add_zero_times_f16x2(sum: u32, values: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.f16x2 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) values, in(reg32) 0, in(reg32) sum,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// `fma.rn.bf16x2` (sm_80) with a factor of 0: `sum`, and NaN where the bfloat16 value is not finite.
#[inline(always)]
pub fn add_zero_times_bf16x2(sum: u32, values: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.bf16x2 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) values, in(reg32) 0, in(reg32) sum,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// `cvt.rn.bf16x2.f32` (sm_80): two f32 to two bfloat16 values, `low` in the low half.
#[inline(always)]
pub fn pack_bf16x2(low: f32, high: f32) -> u32 {
    let packed: u32;
    // SAFETY: register arithmetic. The instruction takes the high half first.
    unsafe {
        asm!("cvt.rn.bf16x2.f32 {0}, {1}, {2};", out(reg32) packed, in(reg32) high, in(reg32) low,
            options(pure, nomem, nostack, preserves_flags));
    }
    packed
}
