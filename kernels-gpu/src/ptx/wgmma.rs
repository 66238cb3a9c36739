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

/// `asm!` with arrays of registers as operands, in the order in which the template counts them: `inout 32 s; in 16 q;` stands for
/// the elements of `s`, then those of `q`. What follows `then` is passed on.
macro_rules! register_asm {
    (@ [$($asm:tt)*] then $($rest:tt)*) => {
        asm!($($asm)* $($rest)*)
    };
    (@ [$($asm:tt)*] $kind:tt 16 $a:ident; $($rest:tt)*) => {
        register_asm!(@ [$($asm)*
            $kind(reg32) $a[0], $kind(reg32) $a[1], $kind(reg32) $a[2], $kind(reg32) $a[3], $kind(reg32) $a[4],
            $kind(reg32) $a[5], $kind(reg32) $a[6], $kind(reg32) $a[7], $kind(reg32) $a[8], $kind(reg32) $a[9],
            $kind(reg32) $a[10], $kind(reg32) $a[11], $kind(reg32) $a[12], $kind(reg32) $a[13], $kind(reg32) $a[14],
            $kind(reg32) $a[15],
        ] $($rest)*)
    };
    (@ [$($asm:tt)*] $kind:tt 32 $a:ident; $($rest:tt)*) => {
        register_asm!(@ [$($asm)*
            $kind(reg32) $a[0], $kind(reg32) $a[1], $kind(reg32) $a[2], $kind(reg32) $a[3], $kind(reg32) $a[4],
            $kind(reg32) $a[5], $kind(reg32) $a[6], $kind(reg32) $a[7], $kind(reg32) $a[8], $kind(reg32) $a[9],
            $kind(reg32) $a[10], $kind(reg32) $a[11], $kind(reg32) $a[12], $kind(reg32) $a[13], $kind(reg32) $a[14],
            $kind(reg32) $a[15], $kind(reg32) $a[16], $kind(reg32) $a[17], $kind(reg32) $a[18], $kind(reg32) $a[19],
            $kind(reg32) $a[20], $kind(reg32) $a[21], $kind(reg32) $a[22], $kind(reg32) $a[23], $kind(reg32) $a[24],
            $kind(reg32) $a[25], $kind(reg32) $a[26], $kind(reg32) $a[27], $kind(reg32) $a[28], $kind(reg32) $a[29],
            $kind(reg32) $a[30], $kind(reg32) $a[31],
        ] $($rest)*)
    };
    (@ [$($asm:tt)*] $kind:tt 64 $a:ident; $($rest:tt)*) => {
        register_asm!(@ [$($asm)*
            $kind(reg32) $a[0], $kind(reg32) $a[1], $kind(reg32) $a[2], $kind(reg32) $a[3], $kind(reg32) $a[4],
            $kind(reg32) $a[5], $kind(reg32) $a[6], $kind(reg32) $a[7], $kind(reg32) $a[8], $kind(reg32) $a[9],
            $kind(reg32) $a[10], $kind(reg32) $a[11], $kind(reg32) $a[12], $kind(reg32) $a[13], $kind(reg32) $a[14],
            $kind(reg32) $a[15], $kind(reg32) $a[16], $kind(reg32) $a[17], $kind(reg32) $a[18], $kind(reg32) $a[19],
            $kind(reg32) $a[20], $kind(reg32) $a[21], $kind(reg32) $a[22], $kind(reg32) $a[23], $kind(reg32) $a[24],
            $kind(reg32) $a[25], $kind(reg32) $a[26], $kind(reg32) $a[27], $kind(reg32) $a[28], $kind(reg32) $a[29],
            $kind(reg32) $a[30], $kind(reg32) $a[31], $kind(reg32) $a[32], $kind(reg32) $a[33], $kind(reg32) $a[34],
            $kind(reg32) $a[35], $kind(reg32) $a[36], $kind(reg32) $a[37], $kind(reg32) $a[38], $kind(reg32) $a[39],
            $kind(reg32) $a[40], $kind(reg32) $a[41], $kind(reg32) $a[42], $kind(reg32) $a[43], $kind(reg32) $a[44],
            $kind(reg32) $a[45], $kind(reg32) $a[46], $kind(reg32) $a[47], $kind(reg32) $a[48], $kind(reg32) $a[49],
            $kind(reg32) $a[50], $kind(reg32) $a[51], $kind(reg32) $a[52], $kind(reg32) $a[53], $kind(reg32) $a[54],
            $kind(reg32) $a[55], $kind(reg32) $a[56], $kind(reg32) $a[57], $kind(reg32) $a[58], $kind(reg32) $a[59],
            $kind(reg32) $a[60], $kind(reg32) $a[61], $kind(reg32) $a[62], $kind(reg32) $a[63],
        ] $($rest)*)
    };
    ([$($template:tt)*] $($operands:tt)*) => {
        register_asm!(@ [$($template)*] $($operands)*)
    };
}

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
                    register_asm!([
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
                    ] inout 32 s; in 16 q; then in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 32], [weights]: &[[u32; 16]; 1], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
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
                    ] inout 32 o; in 16 weights; then in(reg64) descriptor(v, BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 32], [weights]: &mut [[u32; 16]; 1]) {
                // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
                unsafe {
                    register_asm!([
                    "wgmma.wait_group.sync.aligned 0; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}",
                    ] inout 32 o; inout 16 weights; then options(nostack, preserves_flags));
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
                    register_asm!([
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
                    ] inout 32 s; in 32 q; then in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 64], [weights]: &[[u32; 16]; 1], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
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
                    ] inout 64 o; in 16 weights; then in(reg64) descriptor(v, BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 64], [weights]: &mut [[u32; 16]; 1]) {
                // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
                unsafe {
                    register_asm!([
                    "wgmma.wait_group.sync.aligned 0; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}, {32}, {33}, {34}, {35}, {36}, {37}, {38}, {39}, {40}, {41}, {42}, {43}, {44}, {45}, {46}, {47}, {48}, {49}, {50}, {51}, {52}, {53}, {54}, {55}, {56}, {57}, {58}, {59}, {60}, {61}, {62}, {63}, {64}, {65}, {66}, {67}, {68}, {69}, {70}, {71}, {72}, {73}, {74}, {75}, {76}, {77}, {78}, {79}",
                    ] inout 64 o; inout 16 weights; then options(nostack, preserves_flags));
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
        register_asm!([
            "wgmma.wait_group.sync.aligned {32}; // {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}",
            ] inout 32 s; then const PENDING, options(nostack, preserves_flags));
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
        register_asm!([
            "// {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}, {16}, {17}, {18}, {19}, {20}, {21}, {22}, {23}, {24}, {25}, {26}, {27}, {28}, {29}, {30}, {31}",
            ] inout 32 s; then options(nostack, preserves_flags));
    }
}

/// How warpgroups divide the registers of a CTA.
pub trait RegisterSplit {
    /// Registers per thread of producers.
    const PRODUCERS: u32;
    /// Registers per thread of consumers.
    const CONSUMERS: u32;
}

/// `setmaxnreg.dec`: gives registers of a warpgroup back; `setmaxnreg.inc` (below) takes them. Convergent.
#[inline(always)]
pub fn shrink_registers<S: RegisterSplit>() {
    // SAFETY: has no precondition beyond whole-warpgroup execution.
    unsafe { asm!("setmaxnreg.dec.sync.aligned.u32 {0};", const S::PRODUCERS, options(nostack, preserves_flags)) };
}

/// `setmaxnreg.inc`. Convergent.
#[inline(always)]
pub fn grow_registers<S: RegisterSplit>() {
    // SAFETY: has no precondition beyond whole-warpgroup execution.
    unsafe { asm!("setmaxnreg.inc.sync.aligned.u32 {0};", const S::CONSUMERS, options(nostack, preserves_flags)) };
}
