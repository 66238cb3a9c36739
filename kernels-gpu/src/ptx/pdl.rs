//! Programmatic dependent launch (sm_90).

use core::arch::asm;

/// `griddepcontrol.wait` (sm_90): waits until the grids this one depends on have finished and their writes are visible.
/// Returns at once if the launch has no programmatic dependency.
#[inline(always)]
pub fn wait_for_prerequisite_grids() {
    // SAFETY: has no precondition. The memory clobber keeps later loads behind it.
    unsafe { asm!("griddepcontrol.wait;", options(nostack, preserves_flags)) };
}

/// `griddepcontrol.launch_dependents` (sm_90): allows the dependent grid to be scheduled once every CTA has called this
/// or exited. Says nothing about the visibility of writes.
#[inline(always)]
pub fn launch_dependents() {
    // SAFETY: has no precondition.
    unsafe { asm!("griddepcontrol.launch_dependents;", options(nostack, preserves_flags)) };
}
