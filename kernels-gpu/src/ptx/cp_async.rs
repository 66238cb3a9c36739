//! Asynchronous copies from global to shared memory, 16 bytes per lane (sm_80). Not convergent.

use core::arch::asm;

/// `cp.async.cg.shared.global` (sm_80): copies `source_bytes` (16 or 0) bytes and fills the rest of the 16 with
/// zeros; with 0 nothing is read. Bypasses L1. No L2 prefetch hint: 128 bytes
/// measured the same and wants PTX 7.4, 256 bytes measured 9% slower.
///
/// # Safety
/// Both addresses are multiples of 16; `source` is readable if `source_bytes` is 16; `destination` is shared memory of
/// the CTA that nobody reads until the copy's group has been waited for and published.
#[inline(always)]
pub unsafe fn copy_16_bytes(destination: u32, source: u64, source_bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.cg.shared.global [{0}], [{1}], 16, {2};",
            in(reg32) destination, in(reg64) source, in(reg32) source_bytes, options(nostack, preserves_flags));
    }
}

/// `cp.async.commit_group` (sm_80): closes the group of the copies this thread issued since the last call.
#[inline(always)]
pub fn commit_group() {
    // SAFETY: has no precondition.
    unsafe { asm!("cp.async.commit_group;", options(nostack, preserves_flags)) };
}

/// `cp.async.wait_group` (sm_80): waits until at most `PENDING` of this thread's newest groups are unfinished.
#[inline(always)]
pub fn wait_group<const PENDING: u32>() {
    // SAFETY: has no precondition.
    unsafe { asm!("cp.async.wait_group {0};", const PENDING, options(nostack, preserves_flags)) };
}
