//! The switches of [`pat_abi::switches`], as device code reads them. Each is read where it stands: known to the compiler as the same in
//! every iteration, it would make it keep two copies of a loop.

use core::arch::asm;

macro_rules! switch {
    ($symbol:expr) => {{
        if cfg!(pat_plain) {
            return false;
        }
        let value: u32;
        // SAFETY: copies a constant.
        unsafe {
            asm!(concat!("mov.u32 {0}, ", $symbol, ";"), out(reg32) value, options(nomem, nostack, preserves_flags));
        }
        value != 0
    }};
}

/// Whether scores are capped.
#[inline(always)]
pub fn soft_cap() -> bool {
    switch!(pat_abi::soft_cap_symbol!())
}

/// Whether there are attention sinks.
#[inline(always)]
pub fn sinks() -> bool {
    switch!(pat_abi::sinks_symbol!())
}

/// Whether rows attend to the later tokens only of their first page.
#[inline(always)]
pub fn window() -> bool {
    switch!(pat_abi::window_symbol!())
}
