//! The switches of [`pat_abi::switches`], as device code reads them.

use core::arch::asm;

/// Whether scores are capped. Read where it stands: known to the compiler as the same in every iteration, it would make it keep two
/// copies of a loop.
#[inline(always)]
pub fn soft_cap() -> bool {
    if cfg!(pat_plain) {
        return false;
    }
    let value: u32;
    // SAFETY: copies a constant.
    unsafe {
        asm!(concat!("mov.u32 {0}, ", pat_abi::soft_cap_symbol!(), ";"), out(reg32) value,
            options(nomem, nostack, preserves_flags));
    }
    value != 0
}
