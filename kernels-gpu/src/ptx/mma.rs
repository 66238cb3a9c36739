//! Tensor-core instructions of one warp and their fragment loads (sm_80). All convergent.

use core::arch::asm;

/// `ldmatrix.sync.aligned.m8n8.x4.shared.b16` (sm_75): four 8x8 matrices of 16-bit elements. Lane l gives the address of
/// row `l % 8` of matrix `l / 8`, and receives elements `2*(l%4)`, `2*(l%4)+1` of row `l/4` of each. Convergent.
///
/// # Safety
/// Every lane's address is a multiple of 16 inside the CTA's shared memory; its writers are ordered before.
#[inline(always)]
pub unsafe fn ldmatrix_x4(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract. Volatile and with a memory clobber: it must stay between the barriers around it.
    unsafe {
        asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
            options(nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// `ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16` (sm_75): as [`ldmatrix_x4`], every matrix transposed. Convergent.
///
/// # Safety
/// As [`ldmatrix_x4`].
#[inline(always)]
pub unsafe fn ldmatrix_x4_transposed(address: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u32, u32, u32);
    // SAFETY: the caller's contract.
    unsafe {
        asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{0}, {1}, {2}, {3}}}, [{4}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
            options(nostack, preserves_flags));
    }
    [a, b, c, d]
}

macro_rules! mma_m16n8k16 {
    ($name:ident, $instruction:literal) => {
        #[doc = concat!("`", $instruction, "` (sm_80): accumulator += A (16x16, row-major) * B (16x8, column-major). Convergent.")]
        #[inline(always)]
        pub fn $name(accumulator: &mut [f32; 4], a: &[u32; 4], b: [u32; 2]) {
            // SAFETY: register arithmetic. Volatile, because a `pure` collective may be sunk into a divergent branch.
            unsafe {
                asm!(concat!($instruction, " {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"),
                    inout(reg32) accumulator[0], inout(reg32) accumulator[1],
                    inout(reg32) accumulator[2], inout(reg32) accumulator[3],
                    in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3], in(reg32) b[0], in(reg32) b[1],
                    options(nomem, nostack, preserves_flags));
            }
        }
    };
}

mma_m16n8k16!(mma_m16n8k16_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
mma_m16n8k16!(mma_m16n8k16_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
