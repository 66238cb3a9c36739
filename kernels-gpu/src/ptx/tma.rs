//! Tensor copies by the copy engine (sm_90). PTX ISA, "cp.async.bulk.tensor".

use core::arch::asm;

/// `cp.async.bulk.tensor.4d...mbarrier::complete_tx::bytes`: copies the box at `coordinates` (innermost first) to shared
/// memory and counts its bytes on `barrier`. Elements outside the tensor arrive as zeros and count too.
///
/// # Safety
/// `map` is the generic address of a 4-D tensor map; `destination` has room for its box, aligned as the map's swizzle
/// wants (1024 bytes); `barrier` is told to expect the box's bytes in the same phase, before or after. One thread calls it.
#[inline(always)]
pub unsafe fn load_4d(destination: u32, map: u64, coordinates: [u32; 4], barrier: u32) {
    let [c0, c1, c2, c3] = coordinates;
    // SAFETY: the caller's contract.
    unsafe {
        asm!(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}];",
            in(reg32) destination, in(reg64) map, in(reg32) c0, in(reg32) c1, in(reg32) c2, in(reg32) c3,
            in(reg32) barrier, options(nostack, preserves_flags));
    }
}

/// As [`load_4d`], with an `L2::evict_first` hint: what is read here and nowhere else should not push out of L2 what will
/// be read again. (A hint of `evict_normal` for the rest was measured 15% slower than none.)
///
/// # Safety
/// As [`load_4d`].
#[inline(always)]
pub unsafe fn load_4d_once(destination: u32, map: u64, coordinates: [u32; 4], barrier: u32) {
    let [c0, c1, c2, c3] = coordinates;
    // SAFETY: the caller's contract.
    unsafe {
        asm!(
            "{{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}], policy; }}",
            in(reg32) destination, in(reg64) map, in(reg32) c0, in(reg32) c1, in(reg32) c2, in(reg32) c3,
            in(reg32) barrier, options(nostack, preserves_flags));
    }
}

/// `prefetch.tensormap`: brings a tensor map into the descriptor cache ahead of its first use.
///
/// # Safety
/// `map` is the generic address of a tensor map.
#[inline(always)]
pub unsafe fn prefetch_map(map: u64) {
    // SAFETY: the caller's contract.
    unsafe { asm!("prefetch.tensormap [{0}];", in(reg64) map, options(nostack, preserves_flags)) };
}
