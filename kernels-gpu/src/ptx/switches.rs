//! The switches of [`pat_abi::switches`], as device code reads them.

use core::arch::asm;

/// Whether the switch of a symbol is on. Read where it stands: known to the compiler as the same in every iteration, it would make
/// it keep two copies of a loop.
macro_rules! is_on {
    ($symbol:expr) => {
        !cfg!(pat_plain) && {
            let value: u32;
            // SAFETY: copies a constant.
            unsafe {
                core::arch::asm!(concat!("mov.u32 {0}, ", $symbol, ";"), out(reg32) value,
                    options(nomem, nostack, preserves_flags));
            }
            value != 0
        }
    };
}
pub(crate) use is_on;

/// `value` in kernels that are compiled for sliding windows; in others 0, which ptxas sees.
#[inline(always)]
pub fn zero_without_windows(value: u32) -> u32 {
    if cfg!(pat_plain) {
        return 0;
    }
    let result: u32;
    // SAFETY: computes with registers.
    unsafe {
        asm!(concat!("mul.lo.u32 {0}, {1}, ", pat_abi::window_symbol!(), ";"), out(reg32) result, in(reg32) value,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// Whether `value` is below `end`, in kernels that are compiled for sliding windows; in others no, which ptxas sees.
#[inline(always)]
pub fn below_in_window(value: u32, end: u32) -> bool {
    if cfg!(pat_plain) {
        return false;
    }
    let result: u32;
    // SAFETY: computes with registers.
    unsafe {
        asm!(
            "set.lt.u32.u32 {0}, {1}, {2};",
            concat!("mul.lo.u32 {0}, {0}, ", pat_abi::window_symbol!(), ";"),
            out(reg32) result, in(reg32) value, in(reg32) end, options(pure, nomem, nostack, preserves_flags));
    }
    result != 0
}

/// `ld.global.nc.u32` (sm_35) in kernels that are compiled for sliding windows, where `is_wanted`; otherwise 0, and nothing is read. It is
/// no branch: one that is never taken would still change how the code around it is laid out.
///
/// # Safety
/// In kernels that are compiled for windows, where it is wanted, as [`super::ldst::load_global_u32`].
#[inline(always)]
pub unsafe fn load_global_u32_under_window_if(is_wanted: bool, address: u64) -> u32 {
    if cfg!(pat_plain) {
        return 0;
    }
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!(
            "{{ .reg .pred wanted; .reg .b32 window;",
            concat!("mul.lo.u32 window, {2}, ", pat_abi::window_symbol!(), ";"),
            "setp.ne.u32 wanted, window, 0;",
            "mov.u32 {0}, 0;",
            "@wanted ld.global.nc.u32 {0}, [{1}]; }}",
            out(reg32) value, in(reg64) address, in(reg32) is_wanted as u32,
            options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// `ld.global.nc.u32` (sm_35) in kernels that are compiled for sliding windows; in others 0, and nothing is read. It is no branch: one
/// that is never taken would still change how the code around it is laid out.
///
/// # Safety
/// In kernels that are compiled for windows, as [`super::ldst::load_global_u32`].
#[inline(always)]
pub unsafe fn load_global_u32_under_window(address: u64) -> u32 {
    if cfg!(pat_plain) {
        return 0;
    }
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!(
            "{{ .reg .pred under_window; .reg .b32 window;",
            concat!("mov.u32 window, ", pat_abi::window_symbol!(), ";"),
            "setp.ne.u32 under_window, window, 0;",
            "mov.u32 {0}, 0;",
            "@under_window ld.global.nc.u32 {0}, [{1}]; }}",
            out(reg32) value, in(reg64) address, options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// `value`; 0 in kernels that are compiled for sliding windows, where `token < first_token`. No branch and no choice either: ptxas sees
/// that a product with 0 is 0, but not that no number is below 0.
#[inline(always)]
pub fn zero_before_window(value: u32, token: u32, first_token: u32) -> u32 {
    if cfg!(pat_plain) {
        return value;
    }
    let result: u32;
    // SAFETY: computes with registers.
    unsafe {
        asm!(
            "{{ .reg .b32 before;",
            "set.lt.u32.u32 before, {2}, {3};",
            concat!("mul.lo.u32 before, before, ", pat_abi::window_symbol!(), ";"),
            "not.b32 before, before;",
            "and.b32 {0}, {1}, before; }}",
            out(reg32) result, in(reg32) value, in(reg32) token, in(reg32) first_token,
            options(pure, nomem, nostack, preserves_flags));
    }
    result
}

/// A f32; 1 in kernels where the switch of a symbol is on. No branch either.
macro_rules! one_where_on {
    ($value:expr, $symbol:expr) => {
        if cfg!(pat_plain) {
            $value
        } else {
            let result: f32;
            // SAFETY: computes with registers.
            unsafe {
                core::arch::asm!(
                    "{{ .reg .b32 capped, kept;",
                    concat!("mul.lo.u32 capped, ", $symbol, ", -1;"),
                    "not.b32 kept, capped;",
                    "and.b32 kept, kept, {1};",
                    "and.b32 capped, capped, 0x3f800000;",
                    "or.b32 {0}, kept, capped; }}",
                    out(reg32) result, in(reg32) $value, options(pure, nomem, nostack, preserves_flags));
            }
            result
        }
    };
}
pub(crate) use one_where_on;
