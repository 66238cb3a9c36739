//! Special registers and the shared-memory window.

use core::arch::{asm, global_asm};

// `static` items cannot be placed in `.shared` (rustc puts them in `.global`): the one dynamic array is declared in PTX.
// 1024 bytes is what the 128-byte TMA swizzle wants of its tiles.
global_asm!(".extern .shared .align 1024 .b8 pat_dynamic_smem[];");

/// `mov.u32 %tid.x` (sm_20): index of the thread in its one-dimensional CTA.
#[inline(always)]
pub fn thread_index() -> u32 {
    let value: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}

/// As [`thread_index`], read where it stands: what is computed from it on a rare path takes no register elsewhere, as it
/// would if the compiler moved it out of the loop.
#[inline(always)]
pub fn thread_index_here() -> u32 {
    let value: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %tid.x;", out(reg32) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// `mov.u32 %ctaid.x` (sm_20): index of the CTA in its one-dimensional grid.
#[inline(always)]
pub fn cta_index() -> u32 {
    let value: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %ctaid.x;", out(reg32) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}

/// `mov.u32 %nctaid.x` (sm_20): number of CTAs in the grid.
#[inline(always)]
pub fn cta_count() -> u32 {
    let value: u32;
    // SAFETY: reads a special register.
    unsafe { asm!("mov.u32 {0}, %nctaid.x;", out(reg32) value, options(pure, nomem, nostack, preserves_flags)) };
    value
}

/// `value`, which the compiler is not to know: a loop that it bounds stays a loop. For paths so rare that their length counts
/// and their speed does not.
#[inline(always)]
pub fn run_time(value: u32) -> u32 {
    let hidden: u32;
    // SAFETY: copies a register.
    unsafe { asm!("mov.u32 {0}, {1};", out(reg32) hidden, in(reg32) value, options(nomem, nostack, preserves_flags)) };
    hidden
}

/// As [`run_time`], of an address: what is made of it on such a path is made there, and takes no register elsewhere.
#[inline(always)]
pub fn run_time_address(address: u64) -> u64 {
    let hidden: u64;
    // SAFETY: copies a register.
    unsafe {
        asm!("mov.u64 {0}, {1};", out(reg64) hidden, in(reg64) address, options(nomem, nostack, preserves_flags))
    };
    hidden
}

/// `.pragma "nounroll"`: ptxas does not unroll the loop that begins with this. For the same paths.
#[inline(always)]
pub fn keep_loop() {
    // SAFETY: is no instruction.
    unsafe { asm!(".pragma \"nounroll\";", options(nomem, nostack, preserves_flags)) };
}

/// Start of the dynamic shared memory of the CTA, as an address of the `.shared` window. A multiple of 1024 bytes.
#[inline(always)]
pub fn dynamic_smem() -> u32 {
    let address: u64;
    // SAFETY: takes the address of the symbol declared above.
    unsafe {
        asm!("mov.u64 {0}, pat_dynamic_smem;", out(reg64) address, options(pure, nomem, nostack, preserves_flags));
    }
    address as u32
}
