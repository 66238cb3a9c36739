//! Loads and stores with an explicit state space. None of them is convergent.
//!
//! Global addresses are `u64`, shared addresses are `u32` offsets of the `.shared` window.

use core::arch::asm;

/// `ld.global.nc.u32` (sm_35): a word that no thread writes while the kernel runs.
///
/// # Safety
/// `address` is a multiple of 4 and inside a live allocation that nothing writes during the kernel.
#[inline(always)]
pub unsafe fn load_global_u32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.u32 {0}, [{1}];", out(reg32) value, in(reg64) address,
            options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// `ld.global.nc.v2.u32` (sm_35): two words that no thread writes while the kernel runs.
///
/// # Safety
/// As [`load_global_u32`], 8 bytes, aligned to 8.
#[inline(always)]
pub unsafe fn load_global_u32x2(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address,
            options(pure, readonly, nostack, preserves_flags));
    }
    [a, b]
}

/// `ld.global.nc.v4.u32` (sm_35): four words that no thread writes while the kernel runs.
///
/// # Safety
/// As [`load_global_u32`], 16 bytes, aligned to 16.
#[inline(always)]
pub unsafe fn load_global_u32x4(address: u64) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.nc.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address,
            options(pure, readonly, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// `ld.global.u32` (sm_20): a word that a kernel before this one may have written. Of what is loaded by `ld.global.nc`, the cache may
/// hold what it was before `griddepcontrol.wait`.
///
/// # Safety
/// As [`load_global_u32`].
#[inline(always)]
pub unsafe fn load_written_u32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.u32 {0}, [{1}];", out(reg32) value, in(reg64) address,
            options(pure, readonly, nostack, preserves_flags));
    }
    value
}

/// `ld.global.v2.u32` (sm_20): as [`load_written_u32`], two words.
///
/// # Safety
/// As [`load_global_u32x2`].
#[inline(always)]
pub unsafe fn load_written_u32x2(address: u64) -> [u32; 2] {
    let (a, b): (u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address,
            options(pure, readonly, nostack, preserves_flags));
    }
    [a, b]
}

/// `ld.global.cg.f32` (sm_20): a value another grid may just have written; cached in L2 only. Volatile, so that it is
/// not moved above a `griddepcontrol.wait`.
///
/// # Safety
/// `address` is a multiple of 4 and inside a live allocation.
#[inline(always)]
pub unsafe fn load_global_l2_f32(address: u64) -> f32 {
    let value: f32;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.cg.f32 {0}, [{1}];", out(reg32) value, in(reg64) address, options(nostack, preserves_flags));
    }
    value
}

/// `ld.global.cg.v2.f32` (sm_20): as [`load_global_l2_f32`], two values.
///
/// # Safety
/// `address` is a multiple of 8 and 8 bytes of a live allocation lie there.
#[inline(always)]
pub unsafe fn load_global_l2_f32x2(address: u64) -> [f32; 2] {
    let (a, b): (f32, f32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.cg.v2.f32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg64) address,
            options(nostack, preserves_flags));
    }
    [a, b]
}

/// `ld.global.cg.v4.f32` (sm_20): as [`load_global_l2_f32`], four values.
///
/// # Safety
/// `address` is a multiple of 16 and 16 bytes of a live allocation lie there.
#[inline(always)]
pub unsafe fn load_global_l2_f32x4(address: u64) -> [f32; 4] {
    let (a, b, c, d): (f32, f32, f32, f32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.global.cg.v4.f32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) address,
            options(nostack, preserves_flags));
    }
    [a, b, c, d]
}

macro_rules! request {
    ($name:ident, $instruction:literal, $count:literal, $operands:literal, [$($i:tt)*]) => {
        /// Read-only load that is issued where it stands. The compiler moves the `load_*` ones down to their first use,
        /// which is right for values needed now and undoes a prefetch. sm_80
        ///
        /// # PTX
        #[doc = concat!("`", $instruction, "`")]
        ///
        /// # Safety
        /// As the `load_*` function of the same width.
        #[inline(always)]
        pub unsafe fn $name(address: u64) -> [u32; $count] {
            let mut values = [0u32; $count];
            // SAFETY: the caller's contract.
            unsafe {
                asm!(concat!($instruction, " ", $operands, ";"), in(reg64) address, $(out(reg32) values[$i],)*
                    options(nostack, preserves_flags));
            }
            values
        }
    };
}

request!(request_global_u32x2, "ld.global.nc.v2.u32", 2, "{{{1}, {2}}}, [{0}]", [0 1]);
request!(request_global_u32x4, "ld.global.nc.v4.u32", 4, "{{{1}, {2}, {3}, {4}}}, [{0}]", [0 1 2 3]);
request!(request_global_u32x1, "ld.global.nc.u32", 1, "{1}, [{0}]", [0]);

/// [`request_global_u32x1`], unwrapped.
///
/// # Safety
/// As [`load_global_u32`].
#[inline(always)]
pub unsafe fn request_global_u32(address: u64) -> u32 {
    // SAFETY: the caller's contract.
    unsafe { request_global_u32x1(address)[0] }
}

/// `st.global.u32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 4, inside a live allocation, and no other thread accesses it unsynchronised.
#[inline(always)]
pub unsafe fn store_global_u32(address: u64, value: u32) {
    // SAFETY: the caller's contract.
    unsafe { asm!("st.global.u32 [{0}], {1};", in(reg64) address, in(reg32) value, options(nostack, preserves_flags)) };
}

/// `st.global.v2.u32` (sm_20).
///
/// # Safety
/// As [`store_global_u32`], 8 bytes, aligned to 8.
#[inline(always)]
pub unsafe fn store_global_u32x2(address: u64, values: [u32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v2.u32 [{0}], {{{1}, {2}}};", in(reg64) address, in(reg32) values[0], in(reg32) values[1],
            options(nostack, preserves_flags));
    }
}

/// `st.global.v4.u32` (sm_20).
///
/// # Safety
/// As [`store_global_u32`], 16 bytes, aligned to 16.
#[inline(always)]
pub unsafe fn store_global_u32x4(address: u64, values: [u32; 4]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.global.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};", in(reg64) address,
            in(reg32) values[0], in(reg32) values[1], in(reg32) values[2], in(reg32) values[3],
            options(nostack, preserves_flags));
    }
}

/// `st.global.f32` (sm_20).
///
/// # Safety
/// As [`store_global_u32`].
#[inline(always)]
pub unsafe fn store_global_f32(address: u64, value: f32) {
    // SAFETY: the caller's contract.
    unsafe { store_global_u32(address, value.to_bits()) };
}

/// `st.global.v2.f32` (sm_20).
///
/// # Safety
/// As [`store_global_u32x2`].
#[inline(always)]
pub unsafe fn store_global_f32x2(address: u64, values: [f32; 2]) {
    // SAFETY: the caller's contract.
    unsafe { store_global_u32x2(address, values.map(f32::to_bits)) };
}

/// `ld.shared.v2.f32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 8 inside the CTA's shared memory, and its writers are ordered before by a barrier.
#[inline(always)]
pub unsafe fn load_shared_f32x2(address: u32) -> [f32; 2] {
    let (a, b): (f32, f32);
    // SAFETY: the caller's contract. Volatile: it must not move across a barrier.
    unsafe {
        asm!("ld.shared.v2.f32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) address,
            options(nostack, preserves_flags));
    }
    [a, b]
}

/// `st.shared.v2.f32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 8 inside the CTA's shared memory, and no other thread accesses it unsynchronised.
#[inline(always)]
pub unsafe fn store_shared_f32x2(address: u32, values: [f32; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v2.f32 [{0}], {{{1}, {2}}};", in(reg32) address, in(reg32) values[0], in(reg32) values[1],
            options(nostack, preserves_flags));
    }
}

/// `st.shared.v4.u32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 16 inside the CTA's shared memory, and no other thread accesses it unsynchronised.
#[inline(always)]
pub unsafe fn store_shared_u32x4(address: u32, values: [u32; 4]) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.v4.u32 [{0}], {{{1}, {2}, {3}, {4}}};", in(reg32) address,
            in(reg32) values[0], in(reg32) values[1], in(reg32) values[2], in(reg32) values[3],
            options(nostack, preserves_flags));
    }
}

/// `st.shared.u16` (sm_20).
///
/// # Safety
/// `address` is a multiple of 2 inside the CTA's shared memory, and no other thread accesses it unsynchronised.
#[inline(always)]
pub unsafe fn store_shared_u16(address: u32, value: u16) {
    // SAFETY: the caller's contract.
    unsafe {
        asm!("st.shared.u16 [{0}], {1};", in(reg32) address, in(reg16) value, options(nostack, preserves_flags));
    }
}

/// `ld.shared.u32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 4 inside the CTA's shared memory, and its writers are ordered before by a barrier.
#[inline(always)]
pub unsafe fn load_shared_u32(address: u32) -> u32 {
    let value;
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.u32 {0}, [{1}];", out(reg32) value, in(reg32) address, options(nostack, preserves_flags));
    }
    value
}

/// `ld.shared.v2.u32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 8 inside the CTA's shared memory, and its writers are ordered before by a barrier.
#[inline(always)]
pub unsafe fn load_shared_u32x2(address: u32) -> [u32; 2] {
    let (a, b);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v2.u32 {{{0}, {1}}}, [{2}];", out(reg32) a, out(reg32) b, in(reg32) address,
            options(nostack, preserves_flags));
    }
    [a, b]
}

/// `ld.shared.v4.u32` (sm_20).
///
/// # Safety
/// `address` is a multiple of 16 inside the CTA's shared memory, and its writers are ordered before by a barrier.
#[inline(always)]
pub unsafe fn load_shared_u32x4(address: u32) -> [u32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ld.shared.v4.u32 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
            options(nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// `prefetch.global.L2` (sm_20): brings the line of `address` to L2.
///
/// # Safety
/// `address` is readable.
#[inline(always)]
pub unsafe fn prefetch_l2(address: u64) {
    // SAFETY: the caller's contract.
    unsafe { asm!("prefetch.global.L2 [{0}];", in(reg64) address, options(nostack, preserves_flags)) };
}
