//! Bytes of words, and packed products. None of it is convergent.

use core::arch::asm;

/// `prmt.b32` (sm_20): byte `i` of the result is the byte of `value` that nibble `i` of `SELECTOR` names, or 0 where that is 4.
#[inline(always)]
pub fn permute<const SELECTOR: u32>(value: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("prmt.b32 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) value, in(reg32) 0, const SELECTOR,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// `fma.rn.f16x2` (sm_53): both halves times `factor`, whose halves are alike; signs of zeros stay.
#[inline(always)]
pub fn scale_f16x2(values: u32, factor: u32) -> u32 {
    let result: u32;
    // SAFETY: register arithmetic.
    unsafe {
        asm!("fma.rn.f16x2 {0}, {1}, {2}, {3};", out(reg32) result, in(reg32) values, in(reg32) factor,
            in(reg32) 0x8000_8000u32, options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// `cvt.rn.f16x2.e4m3x2` (sm_89), twice: the four numbers of a word in the format E4M3 as two binary16 each, the first two first.
#[inline(always)]
pub fn e4m3_to_f16(word: u32) -> [u32; 2] {
    let (first, last): (u32, u32);
    // SAFETY: register arithmetic.
    unsafe {
        asm!("{{ .reg .b16 l, h; mov.b32 {{l, h}}, {2}; cvt.rn.f16x2.e4m3x2 {0}, l; cvt.rn.f16x2.e4m3x2 {1}, h; }}",
            out(reg32) first, out(reg32) last, in(reg32) word, options(pure, nomem, nostack, preserves_flags));
    }
    [first, last]
}
