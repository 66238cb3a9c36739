//! Barriers. All convergent, so all LLVM intrinsics: volatile `asm!("bar.sync 0;")` was seen duplicated into both arms
//! of a branch.

use pat_abi::NamedBarrier;

unsafe extern "C" {
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.all"]
    fn llvm_barrier_sync_all(id: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.aligned.count"]
    fn llvm_barrier_sync_count(id: u32, threads: u32);
    #[link_name = "llvm.nvvm.barrier.cta.sync.count"]
    fn llvm_barrier_sync_count_anywhere(id: u32, threads: u32);
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

/// `bar.sync barrier, threads` (sm_20): waits for `threads` threads at a named barrier, all at the same place of the code.
/// Convergent (warp). Both are constants: with a register id ptxas reserves all 16 barriers.
#[inline(always)]
pub fn sync_named(barrier: NamedBarrier, threads: u32) {
    // SAFETY: called by whole warps that add up to `threads`.
    unsafe { llvm_barrier_sync_count(barrier as u32, threads) };
}

/// `barrier.sync barrier, threads` (sm_30): as [`sync_named`], where warps come from different places of the code. With the
/// aligned form compute-sanitizer's synccheck says that threads diverge.
#[inline(always)]
pub fn sync_named_anywhere(barrier: NamedBarrier, threads: u32) {
    // SAFETY: called by whole warps that add up to `threads`.
    unsafe { llvm_barrier_sync_count_anywhere(barrier as u32, threads) };
}

/// `bar.sync`, as [`sync_named`], at the `index`-th barrier from `first` on, a number that is not known when the kernel is compiled.
/// Convergent (warp).
#[inline(always)]
pub fn sync_numbered(first: NamedBarrier, index: u32, threads: u32) {
    // SAFETY: called by whole warps that add up to `threads`.
    unsafe { llvm_barrier_sync_count(first as u32 + index, threads) };
}

/// `bar.arrive` (sm_20): an arrival at such a barrier for others that wait there. Convergent (warp).
#[inline(always)]
pub fn arrive_numbered(first: NamedBarrier, index: u32, threads: u32) {
    // SAFETY: called by whole warps that, with those that wait, add up to `threads`.
    unsafe { llvm_barrier_arrive_count(first as u32 + index, threads) };
}

/// `bar.warp.sync 0xffffffff` (sm_30): waits for the lanes of the warp and orders their memory accesses. Convergent.
#[inline(always)]
pub fn sync_warp() {
    // SAFETY: called by all lanes.
    unsafe { llvm_bar_warp_sync(u32::MAX) };
}
