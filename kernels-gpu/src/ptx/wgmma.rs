//! Warpgroup matrix products (sm_90a). PTX ISA, "wgmma.mma_async". All convergent: every thread of an aligned warpgroup
//! takes part.
//!
//! One `asm!` block holds the fence, all k-steps and the commit, so that the compiler cannot place a register copy between
//! them (ptxas would serialise the products). The results may be used after the `wait_*` function that takes them.
//!
//! Accumulators: register `i` of thread `t` is row `16 (t / 32) + (t % 32) / 4 + 8 ((i >> 1) & 1)` and column
//! `8 (i >> 2) + 2 (t % 4) + (i & 1)` of the 64-row tile. A operands in registers use the layout of `mma.m16n8k16`.

use core::arch::asm;

/// The high half of a matrix descriptor for the 128-byte swizzle: stride between 8-row groups 1024 bytes, and
/// `leading_bytes` between 64-element blocks (used by the transposed operand only). PTX ISA, "Matrix descriptor format".
const fn descriptor_base(leading_bytes: u64) -> u64 {
    ((leading_bytes >> 4) << 16) | ((1024 >> 4) << 32) | (1 << 62)
}

#[inline(always)]
fn descriptor(smem_address: u32, leading_bytes: u64) -> u64 {
    ((smem_address & 0x3_ffff) >> 4) as u64 | descriptor_base(leading_bytes)
}

/// Bytes between the 64-element blocks of a tile, for each 64 keys of it.
const BLOCK_BYTES: u64 = 64 * 128;

macro_rules! accumulators_32 {
    () => {
        "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}"
    };
}

macro_rules! accumulators_64 {
    () => {
        "{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}"
    };
}

// Behind the macros that it uses.
mod wide;

/// The products of one element type and head dimension, for main-loop steps of SPANS times 64 keys.
pub trait WgmmaOps<const Q_REGS: usize, const O_REGS: usize, const SPANS: usize> {
    /// S = Q Kᵀ: 64 rows (registers) by `64 * SPANS` keys (`[64 * SPANS][128 bytes]` blocks at shared address `k`). Overwrites `s`.
    ///
    /// # Safety
    /// A whole warpgroup; the K tile is complete and stays until [`wait_scores`]; `s` is not touched before it.
    unsafe fn scores(s: &mut [[f32; 32]; SPANS], q: &[u32; Q_REGS], k: u32);

    /// O += P V: 64 rows (registers) by the head dimension, over `64 * SPANS` keys (`[64 * SPANS][128 bytes]` blocks at `v`).
    ///
    /// # Safety
    /// A whole warpgroup; the V tile is complete and stays until [`Self::wait_output`]; `o` and `weights` are not touched
    /// before it.
    unsafe fn accumulate(o: &mut [f32; O_REGS], weights: &[[u32; 16]; SPANS], v: u32);

    /// Waits for all products. `wgmma.wait_group 0`
    fn wait_output(o: &mut [f32; O_REGS], weights: &mut [[u32; 16]; SPANS]);
}

macro_rules! head_dim_64 {
    ($element:ty, $ty:literal) => {
        impl WgmmaOps<16, 32, 1> for ($element, HeadDim<64>) {
            #[inline(always)]
            unsafe fn scores([s]: &mut [[f32; 32]; 1], q: &[u32; 16], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
                    "{{ .reg .b64 b; .reg .pred accumulate;",
                    "wgmma.fence.sync.aligned;",
                    "setp.ne.b32 accumulate, 0, 0; add.s64 b, {48}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{32}, {33}, {34}, {35}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {48}, 2;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{36}, {37}, {38}, {39}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {48}, 4;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{40}, {41}, {42}, {43}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {48}, 6;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{44}, {45}, {46}, {47}}}, b, accumulate, 1, 1, 0;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    inout(reg32) s[0], inout(reg32) s[1], inout(reg32) s[2], inout(reg32) s[3], inout(reg32) s[4],
                    inout(reg32) s[5], inout(reg32) s[6], inout(reg32) s[7], inout(reg32) s[8], inout(reg32) s[9],
                    inout(reg32) s[10], inout(reg32) s[11], inout(reg32) s[12], inout(reg32) s[13], inout(reg32) s[14],
                    inout(reg32) s[15], inout(reg32) s[16], inout(reg32) s[17], inout(reg32) s[18], inout(reg32) s[19],
                    inout(reg32) s[20], inout(reg32) s[21], inout(reg32) s[22], inout(reg32) s[23], inout(reg32) s[24],
                    inout(reg32) s[25], inout(reg32) s[26], inout(reg32) s[27], inout(reg32) s[28], inout(reg32) s[29],
                    inout(reg32) s[30], inout(reg32) s[31],
                    in(reg32) q[0], in(reg32) q[1], in(reg32) q[2], in(reg32) q[3], in(reg32) q[4], in(reg32) q[5],
                    in(reg32) q[6], in(reg32) q[7], in(reg32) q[8], in(reg32) q[9], in(reg32) q[10], in(reg32) q[11],
                    in(reg32) q[12], in(reg32) q[13], in(reg32) q[14], in(reg32) q[15],
                    in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 32], [weights]: &[[u32; 16]; 1], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
                    "{{ .reg .b64 b;",
                    "wgmma.fence.sync.aligned;",
                    "add.s64 b, {48}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{32}, {33}, {34}, {35}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {48}, 128;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{36}, {37}, {38}, {39}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {48}, 256;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{40}, {41}, {42}, {43}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {48}, 384;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{44}, {45}, {46}, {47}}}, b, 1, 1, 1, 1;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13], inout(reg32) o[14],
                    inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17], inout(reg32) o[18], inout(reg32) o[19],
                    inout(reg32) o[20], inout(reg32) o[21], inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24],
                    inout(reg32) o[25], inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31],
                    in(reg32) weights[0], in(reg32) weights[1], in(reg32) weights[2], in(reg32) weights[3],
                    in(reg32) weights[4], in(reg32) weights[5], in(reg32) weights[6], in(reg32) weights[7],
                    in(reg32) weights[8], in(reg32) weights[9], in(reg32) weights[10], in(reg32) weights[11],
                    in(reg32) weights[12], in(reg32) weights[13], in(reg32) weights[14], in(reg32) weights[15],
                    in(reg64) descriptor(v, BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 32], [weights]: &mut [[u32; 16]; 1]) {
                // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
                unsafe {
                    asm!(
                    "wgmma.wait_group.sync.aligned 0; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}",
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13], inout(reg32) o[14],
                    inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17], inout(reg32) o[18], inout(reg32) o[19],
                    inout(reg32) o[20], inout(reg32) o[21], inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24],
                    inout(reg32) o[25], inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31],
                    inout(reg32) weights[0], inout(reg32) weights[1], inout(reg32) weights[2], inout(reg32) weights[3],
                    inout(reg32) weights[4], inout(reg32) weights[5], inout(reg32) weights[6], inout(reg32) weights[7],
                    inout(reg32) weights[8], inout(reg32) weights[9], inout(reg32) weights[10],
                    inout(reg32) weights[11], inout(reg32) weights[12], inout(reg32) weights[13],
                    inout(reg32) weights[14], inout(reg32) weights[15],
                    options(nostack, preserves_flags));
                }
            }
        }
    };
}

macro_rules! head_dim_128 {
    ($element:ty, $ty:literal) => {
        impl WgmmaOps<32, 64, 1> for ($element, HeadDim<128>) {
            #[inline(always)]
            unsafe fn scores([s]: &mut [[f32; 32]; 1], q: &[u32; 32], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
                    "{{ .reg .b64 b; .reg .pred accumulate;",
                    "wgmma.fence.sync.aligned;",
                    "setp.ne.b32 accumulate, 0, 0; add.s64 b, {64}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{32}, {33}, {34}, {35}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 2;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{36}, {37}, {38}, {39}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 4;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{40}, {41}, {42}, {43}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 6;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{44}, {45}, {46}, {47}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 512;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{48}, {49}, {50}, {51}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 514;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{52}, {53}, {54}, {55}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 516;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{56}, {57}, {58}, {59}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {64}, 518;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{60}, {61}, {62}, {63}}}, b, accumulate, 1, 1, 0;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    inout(reg32) s[0], inout(reg32) s[1], inout(reg32) s[2], inout(reg32) s[3], inout(reg32) s[4],
                    inout(reg32) s[5], inout(reg32) s[6], inout(reg32) s[7], inout(reg32) s[8], inout(reg32) s[9],
                    inout(reg32) s[10], inout(reg32) s[11], inout(reg32) s[12], inout(reg32) s[13], inout(reg32) s[14],
                    inout(reg32) s[15], inout(reg32) s[16], inout(reg32) s[17], inout(reg32) s[18], inout(reg32) s[19],
                    inout(reg32) s[20], inout(reg32) s[21], inout(reg32) s[22], inout(reg32) s[23], inout(reg32) s[24],
                    inout(reg32) s[25], inout(reg32) s[26], inout(reg32) s[27], inout(reg32) s[28], inout(reg32) s[29],
                    inout(reg32) s[30], inout(reg32) s[31],
                    in(reg32) q[0], in(reg32) q[1], in(reg32) q[2], in(reg32) q[3], in(reg32) q[4], in(reg32) q[5],
                    in(reg32) q[6], in(reg32) q[7], in(reg32) q[8], in(reg32) q[9], in(reg32) q[10], in(reg32) q[11],
                    in(reg32) q[12], in(reg32) q[13], in(reg32) q[14], in(reg32) q[15], in(reg32) q[16],
                    in(reg32) q[17], in(reg32) q[18], in(reg32) q[19], in(reg32) q[20], in(reg32) q[21],
                    in(reg32) q[22], in(reg32) q[23], in(reg32) q[24], in(reg32) q[25], in(reg32) q[26],
                    in(reg32) q[27], in(reg32) q[28], in(reg32) q[29], in(reg32) q[30], in(reg32) q[31],
                    in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 64], [weights]: &[[u32; 16]; 1], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
                    "{{ .reg .b64 b;",
                    "wgmma.fence.sync.aligned;",
                    "add.s64 b, {80}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{64}, {65}, {66}, {67}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {80}, 128;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{68}, {69}, {70}, {71}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {80}, 256;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{72}, {73}, {74}, {75}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {80}, 384;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{76}, {77}, {78}, {79}}}, b, 1, 1, 1, 1;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13], inout(reg32) o[14],
                    inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17], inout(reg32) o[18], inout(reg32) o[19],
                    inout(reg32) o[20], inout(reg32) o[21], inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24],
                    inout(reg32) o[25], inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31], inout(reg32) o[32], inout(reg32) o[33], inout(reg32) o[34],
                    inout(reg32) o[35], inout(reg32) o[36], inout(reg32) o[37], inout(reg32) o[38], inout(reg32) o[39],
                    inout(reg32) o[40], inout(reg32) o[41], inout(reg32) o[42], inout(reg32) o[43], inout(reg32) o[44],
                    inout(reg32) o[45], inout(reg32) o[46], inout(reg32) o[47], inout(reg32) o[48], inout(reg32) o[49],
                    inout(reg32) o[50], inout(reg32) o[51], inout(reg32) o[52], inout(reg32) o[53], inout(reg32) o[54],
                    inout(reg32) o[55], inout(reg32) o[56], inout(reg32) o[57], inout(reg32) o[58], inout(reg32) o[59],
                    inout(reg32) o[60], inout(reg32) o[61], inout(reg32) o[62], inout(reg32) o[63],
                    in(reg32) weights[0], in(reg32) weights[1], in(reg32) weights[2], in(reg32) weights[3],
                    in(reg32) weights[4], in(reg32) weights[5], in(reg32) weights[6], in(reg32) weights[7],
                    in(reg32) weights[8], in(reg32) weights[9], in(reg32) weights[10], in(reg32) weights[11],
                    in(reg32) weights[12], in(reg32) weights[13], in(reg32) weights[14], in(reg32) weights[15],
                    in(reg64) descriptor(v, BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 64], [weights]: &mut [[u32; 16]; 1]) {
                // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
                unsafe {
                    asm!(
                    "wgmma.wait_group.sync.aligned 0; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}, {64}, {65}, {66}, {67}, {68}, {69}, {70}, {71}, {72}, {73}, {74}, {75}, {76}, {77}, {78}, {79}",
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13], inout(reg32) o[14],
                    inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17], inout(reg32) o[18], inout(reg32) o[19],
                    inout(reg32) o[20], inout(reg32) o[21], inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24],
                    inout(reg32) o[25], inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31], inout(reg32) o[32], inout(reg32) o[33], inout(reg32) o[34],
                    inout(reg32) o[35], inout(reg32) o[36], inout(reg32) o[37], inout(reg32) o[38], inout(reg32) o[39],
                    inout(reg32) o[40], inout(reg32) o[41], inout(reg32) o[42], inout(reg32) o[43], inout(reg32) o[44],
                    inout(reg32) o[45], inout(reg32) o[46], inout(reg32) o[47], inout(reg32) o[48], inout(reg32) o[49],
                    inout(reg32) o[50], inout(reg32) o[51], inout(reg32) o[52], inout(reg32) o[53], inout(reg32) o[54],
                    inout(reg32) o[55], inout(reg32) o[56], inout(reg32) o[57], inout(reg32) o[58], inout(reg32) o[59],
                    inout(reg32) o[60], inout(reg32) o[61], inout(reg32) o[62], inout(reg32) o[63],
                    inout(reg32) weights[0], inout(reg32) weights[1], inout(reg32) weights[2], inout(reg32) weights[3],
                    inout(reg32) weights[4], inout(reg32) weights[5], inout(reg32) weights[6], inout(reg32) weights[7],
                    inout(reg32) weights[8], inout(reg32) weights[9], inout(reg32) weights[10],
                    inout(reg32) weights[11], inout(reg32) weights[12], inout(reg32) weights[13],
                    inout(reg32) weights[14], inout(reg32) weights[15],
                    options(nostack, preserves_flags));
                }
            }
        }
    };
}

/// Marker of a head dimension.
pub struct HeadDim<const N: u32>;

head_dim_64!(crate::element::F16, "f16");
head_dim_64!(crate::element::Bf16, "bf16");
head_dim_128!(crate::element::F16, "f16");
head_dim_128!(crate::element::Bf16, "bf16");

/// Waits until at most `PENDING` products issued later than these scores are under way. `wgmma.wait_group`
#[inline(always)]
pub fn wait_scores<const PENDING: u32, const SPANS: usize>(scores: &mut [[f32; 32]; SPANS]) {
    let s = &mut scores[0];
    // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
    unsafe {
        asm!(
            "wgmma.wait_group.sync.aligned {32}; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}",
            inout(reg32) s[0], inout(reg32) s[1], inout(reg32) s[2], inout(reg32) s[3], inout(reg32) s[4],
            inout(reg32) s[5], inout(reg32) s[6], inout(reg32) s[7], inout(reg32) s[8], inout(reg32) s[9],
            inout(reg32) s[10], inout(reg32) s[11], inout(reg32) s[12], inout(reg32) s[13], inout(reg32) s[14],
            inout(reg32) s[15], inout(reg32) s[16], inout(reg32) s[17], inout(reg32) s[18], inout(reg32) s[19],
            inout(reg32) s[20], inout(reg32) s[21], inout(reg32) s[22], inout(reg32) s[23], inout(reg32) s[24],
            inout(reg32) s[25], inout(reg32) s[26], inout(reg32) s[27], inout(reg32) s[28], inout(reg32) s[29],
            inout(reg32) s[30], inout(reg32) s[31],
            const PENDING, options(nostack, preserves_flags));
    }
    for block in &mut scores[1..] {
        hold_scores(block);
    }
}

/// Keeps scores where they are up to here.
#[inline(always)]
fn hold_scores(s: &mut [f32; 32]) {
    // SAFETY: no instruction, only a comment that names registers.
    unsafe {
        asm!(
            "// {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}",
            inout(reg32) s[0], inout(reg32) s[1], inout(reg32) s[2], inout(reg32) s[3], inout(reg32) s[4],
            inout(reg32) s[5], inout(reg32) s[6], inout(reg32) s[7], inout(reg32) s[8], inout(reg32) s[9],
            inout(reg32) s[10], inout(reg32) s[11], inout(reg32) s[12], inout(reg32) s[13], inout(reg32) s[14],
            inout(reg32) s[15], inout(reg32) s[16], inout(reg32) s[17], inout(reg32) s[18], inout(reg32) s[19],
            inout(reg32) s[20], inout(reg32) s[21], inout(reg32) s[22], inout(reg32) s[23], inout(reg32) s[24],
            inout(reg32) s[25], inout(reg32) s[26], inout(reg32) s[27], inout(reg32) s[28], inout(reg32) s[29],
            inout(reg32) s[30], inout(reg32) s[31],
            options(nostack, preserves_flags));
    }
}

/// `setmaxnreg.dec`: gives registers of a warpgroup back; `setmaxnreg.inc` (below) takes them. Convergent.
#[inline(always)]
pub fn shrink_registers<const PER_THREAD: u32>() {
    // SAFETY: has no precondition beyond whole-warpgroup execution.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {0};", const PER_THREAD, options(nostack, preserves_flags)) };
}

/// `setmaxnreg.inc`. Convergent.
#[inline(always)]
pub fn grow_registers<const PER_THREAD: u32>() {
    // SAFETY: has no precondition beyond whole-warpgroup execution.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {0};", const PER_THREAD, options(nostack, preserves_flags)) };
}
