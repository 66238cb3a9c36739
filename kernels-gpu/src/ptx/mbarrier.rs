//! Transaction barriers in shared memory (sm_80; transaction counts sm_90). PTX ISA, "mbarrier".

use core::arch::asm;

/// `mbarrier.init.shared::cta.b64`: a barrier whose phase completes after `arrivals` arrivals and all expected bytes.
///
/// # Safety
/// `barrier` is an 8-byte aligned shared address nobody else uses; one thread calls it, and [`fence_init`] plus a CTA
/// barrier stand between it and the first use.
#[inline(always)]
pub unsafe fn init(barrier: u32, arrivals: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) barrier, in(reg32) arrivals,
            options(nostack, preserves_flags));
    }
}

/// `fence.mbarrier_init.release.cluster`: makes initialised barriers visible to the copy engine.
#[inline(always)]
pub fn fence_init() {
    // SAFETY: has no precondition.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack, preserves_flags)) };
}

/// `fence.proxy.async.shared::cta`: orders this thread's shared-memory accesses before later ones of the copy engine and
/// the tensor cores (the *async proxy*).
#[inline(always)]
pub fn fence_async_proxy() {
    // SAFETY: has no precondition.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags)) };
}

/// `mbarrier.arrive.shared::cta.b64`: one arrival, lane 0's. Predicated: behind a branch, LLVM would duplicate the following
/// code into both arms.
///
/// # Safety
/// `barrier` is an initialised barrier.
#[inline(always)]
pub unsafe fn arrive_lane_0(barrier: u32, lane: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("{{ .reg .pred p; setp.eq.u32 p, {1}, 0; @p mbarrier.arrive.shared::cta.b64 _, [{0}]; }}",
            in(reg32) barrier, in(reg32) lane, options(nostack, preserves_flags));
    }
}

/// `mbarrier.arrive.expect_tx.shared::cta.b64`: one arrival, and `bytes` more to come from the copy engine in this phase.
///
/// # Safety
/// `barrier` is an initialised barrier; exactly `bytes` bytes of copies are issued on it in this phase.
#[inline(always)]
pub unsafe fn arrive_expect_bytes(barrier: u32, bytes: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};", in(reg32) barrier, in(reg32) bytes,
            options(nostack, preserves_flags));
    }
}

/// `cp.async.mbarrier.arrive.noinc.shared::cta.b64`: one arrival when all earlier `cp.async` of this thread have landed.
///
/// # Safety
/// `barrier` is an initialised barrier whose arrival count includes this arrival.
#[inline(always)]
pub unsafe fn arrive_on_copies(barrier: u32) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{0}];", in(reg32) barrier,
            options(nostack, preserves_flags));
    }
}

/// `mbarrier.try_wait.parity.shared::cta.b64` in a loop: returns once the phase with parity `parity` has completed. A
/// fresh barrier counts as having completed a phase of parity 1.
///
/// # Safety
/// `barrier` is an initialised barrier.
#[inline(always)]
pub unsafe fn wait(barrier: u32, parity: u32) {
    loop {
        let done: u32;
        // SAFETY: the caller's contract.
        unsafe {
            asm!(
                "{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{1}], {2}; selp.u32 {0}, 1, 0, p; }}",
                out(reg32) done, in(reg32) barrier, in(reg32) parity, options(nostack, preserves_flags));
        }
        if done != 0 {
            return;
        }
    }
}
