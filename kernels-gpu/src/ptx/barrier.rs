//! Barriers. All convergent, so all LLVM intrinsics: volatile `asm!("bar.sync 0;")` was seen duplicated into both arms
//! of a branch.

unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn llvm_barrier_sync_all(id: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    fn llvm_barrier_sync_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.barrier.cta.arrive.aligned.count"]
    fn llvm_barrier_arrive_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    fn llvm_bar_warp_sync(mask: u32);
}

/// `bar.sync 0` (sm_20): waits for every thread of the CTA and orders their shared-memory accesses. Convergent (CTA).
#[inline(always)]
pub fn sync_cta() {
    // SAFETY: called by every thread of the CTA.
    unsafe { llvm_barrier_sync_all(0) };
}

/// `bar.sync ID, THREADS` (sm_20): waits for `THREADS` threads at named barrier `ID` (1 to 15). Convergent (warp).
/// The id is a constant: with a register id ptxas reserves all 16 barriers.
#[inline(always)]
pub fn sync_named<const ID: u32, const THREADS: u32>() {
    // SAFETY: called by whole warps that add up to THREADS.
    unsafe { llvm_barrier_sync_count(ID, THREADS) };
}

/// `bar.arrive ID, THREADS` (sm_20): arrives at named barrier `ID` without waiting. Convergent (warp).
#[inline(always)]
pub fn arrive_named<const ID: u32, const THREADS: u32>() {
    // SAFETY: called by whole warps that add up to THREADS with those that wait.
    unsafe { llvm_barrier_arrive_count(ID, THREADS) };
}

/// `bar.warp.sync 0xffffffff` (sm_30): waits for the lanes of the warp and orders their memory accesses. Convergent.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: called by all lanes.
    unsafe { llvm_bar_warp_sync(u32::MAX) };
}
