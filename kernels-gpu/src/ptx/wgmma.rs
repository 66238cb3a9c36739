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

/// Bytes between the 64-element blocks of a tile, for each 64 rows of it.
const BLOCK_BYTES: u64 = 64 * 128;

/// `asm!` with arrays of registers as operands, in the order in which the template counts them: `inout 32 s; in 16 q;` stands for
/// the elements of `s`, then those of `q`. What follows `then` is passed on.
macro_rules! register_asm {
    (@ [$($asm:tt)*] then $($rest:tt)*) => {
        asm!($($asm)* $($rest)*)
    };
    (@ [$($asm:tt)*] $kind:tt 16 $a:ident $($first:literal)?; $($rest:tt)*) => {
        register_asm!(@ [$($asm)*
            $kind(reg32) $a[$($first +)? 0], $kind(reg32) $a[$($first +)? 1], $kind(reg32) $a[$($first +)? 2],
            $kind(reg32) $a[$($first +)? 3], $kind(reg32) $a[$($first +)? 4], $kind(reg32) $a[$($first +)? 5],
            $kind(reg32) $a[$($first +)? 6], $kind(reg32) $a[$($first +)? 7], $kind(reg32) $a[$($first +)? 8],
            $kind(reg32) $a[$($first +)? 9], $kind(reg32) $a[$($first +)? 10], $kind(reg32) $a[$($first +)? 11],
            $kind(reg32) $a[$($first +)? 12], $kind(reg32) $a[$($first +)? 13], $kind(reg32) $a[$($first +)? 14],
            $kind(reg32) $a[$($first +)? 15],
        ] $($rest)*)
    };
    (@ $asm:tt $kind:tt 32 $a:ident; $($rest:tt)*) => {
        register_asm!(@ $asm $kind 16 $a; $kind 16 $a 16; $($rest)*)
    };
    (@ $asm:tt $kind:tt 64 $a:ident; $($rest:tt)*) => {
        register_asm!(@ $asm $kind 16 $a; $kind 16 $a 16; $kind 16 $a 32; $kind 16 $a 48; $($rest)*)
    };
    (@ $asm:tt $kind:tt 128 $a:ident; $($rest:tt)*) => {
        register_asm!(@ $asm $kind 16 $a; $kind 16 $a 16; $kind 16 $a 32; $kind 16 $a 48;
            $kind 16 $a 64; $kind 16 $a 80; $kind 16 $a 96; $kind 16 $a 112; $($rest)*)
    };
    ([$($template:tt)*] $($operands:tt)*) => {
        register_asm!(@ [$($template)*] $($operands)*)
    };
}

/// Four neighbouring operands of a template: `4 * i` to `4 * i + 3`.
#[rustfmt::skip]
macro_rules! quad {
    (0) => { "{0}, {1}, {2}, {3}" };
    (1) => { "{4}, {5}, {6}, {7}" };
    (2) => { "{8}, {9}, {10}, {11}" };
    (3) => { "{12}, {13}, {14}, {15}" };
    (4) => { "{16}, {17}, {18}, {19}" };
    (5) => { "{20}, {21}, {22}, {23}" };
    (6) => { "{24}, {25}, {26}, {27}" };
    (7) => { "{28}, {29}, {30}, {31}" };
    (8) => { "{32}, {33}, {34}, {35}" };
    (9) => { "{36}, {37}, {38}, {39}" };
    (10) => { "{40}, {41}, {42}, {43}" };
    (11) => { "{44}, {45}, {46}, {47}" };
    (12) => { "{48}, {49}, {50}, {51}" };
    (13) => { "{52}, {53}, {54}, {55}" };
    (14) => { "{56}, {57}, {58}, {59}" };
    (15) => { "{60}, {61}, {62}, {63}" };
    (16) => { "{64}, {65}, {66}, {67}" };
    (17) => { "{68}, {69}, {70}, {71}" };
    (18) => { "{72}, {73}, {74}, {75}" };
    (19) => { "{76}, {77}, {78}, {79}" };
    (20) => { "{80}, {81}, {82}, {83}" };
    (21) => { "{84}, {85}, {86}, {87}" };
    (22) => { "{88}, {89}, {90}, {91}" };
    (23) => { "{92}, {93}, {94}, {95}" };
    (24) => { "{96}, {97}, {98}, {99}" };
    (25) => { "{100}, {101}, {102}, {103}" };
    (26) => { "{104}, {105}, {106}, {107}" };
    (27) => { "{108}, {109}, {110}, {111}" };
    (28) => { "{112}, {113}, {114}, {115}" };
    (29) => { "{116}, {117}, {118}, {119}" };
    (30) => { "{120}, {121}, {122}, {123}" };
    (31) => { "{124}, {125}, {126}, {127}" };
    (32) => { "{128}, {129}, {130}, {131}" };
    (33) => { "{132}, {133}, {134}, {135}" };
    (34) => { "{136}, {137}, {138}, {139}" };
    (35) => { "{140}, {141}, {142}, {143}" };
}

/// The first `n` operands of a template.
macro_rules! operands {
    (16) => {
        concat!(quad!(0), ", ", quad!(1), ", ", quad!(2), ", ", quad!(3))
    };
    (32) => {
        concat!(operands!(16), ", ", quad!(4), ", ", quad!(5), ", ", quad!(6), ", ", quad!(7))
    };
    (48) => {
        concat!(operands!(32), ", ", quad!(8), ", ", quad!(9), ", ", quad!(10), ", ", quad!(11))
    };
    (64) => {
        concat!(operands!(48), ", ", quad!(12), ", ", quad!(13), ", ", quad!(14), ", ", quad!(15))
    };
    (80) => {
        concat!(operands!(64), ", ", quad!(16), ", ", quad!(17), ", ", quad!(18), ", ", quad!(19))
    };
    (96) => {
        concat!(operands!(80), ", ", quad!(20), ", ", quad!(21), ", ", quad!(22), ", ", quad!(23))
    };
    (112) => {
        concat!(operands!(96), ", ", quad!(24), ", ", quad!(25), ", ", quad!(26), ", ", quad!(27))
    };
    (128) => {
        concat!(operands!(112), ", ", quad!(28), ", ", quad!(29), ", ", quad!(30), ", ", quad!(31))
    };
    (144) => {
        concat!(operands!(128), ", ", quad!(32), ", ", quad!(33), ", ", quad!(34), ", ", quad!(35))
    };
}

/// A group of products with A in registers: `shape` is that of the instruction, `accumulators` how many operands come first.
/// Each step has a word that says whether it adds to what the accumulators hold, the [`quad`] of A, and where B lies, 16 bytes
/// a unit, behind the operand `descriptor`. `transposed` is B's layout.
macro_rules! products {
    ($shape:literal $ty:literal, transposed $transposed:literal, accumulators $accumulators:tt,
     [$($adds:literal $a:tt $b:literal,)*] $($operands:tt)*) => {
        register_asm!([
            "{{ .reg .b64 b; .reg .pred adds;",
            "wgmma.fence.sync.aligned;",
            $(
                concat!("setp.ne.b32 adds, ", $adds, ", 0; add.s64 b, {descriptor}, ", $b, ";"),
                concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.", $ty, ".", $ty, " {{", operands!($accumulators), "}}, {{",
                    quad!($a), "}}, b, adds, 1, 1, ", $transposed, ";"),
            )*
            "wgmma.commit_group.sync.aligned; }}",
        ] $($operands)*)
    };
}

/// As [`products`], with A in shared memory behind the operand `a`, whose steps are 16-byte units, too.
macro_rules! products_of_shared {
    ($shape:literal $ty:literal, accumulators $accumulators:tt, [$($adds:literal $a:literal $b:literal,)*] $($operands:tt)*) => {
        register_asm!([
            "{{ .reg .b64 a, b; .reg .pred adds;",
            "wgmma.fence.sync.aligned;",
            $(
                concat!("setp.ne.b32 adds, ", $adds, ", 0; add.s64 a, {queries}, ", $a, "; add.s64 b, {descriptor}, ", $b, ";"),
                concat!("wgmma.mma_async.sync.aligned.", $shape, ".f32.", $ty, ".", $ty, " {{", operands!($accumulators),
                    "}}, a, b, adds, 1, 1, 0, 0;"),
            )*
            "wgmma.commit_group.sync.aligned; }}",
        ] $($operands)*)
    };
}

/// The products of one element type and head dimension, for main-loop steps of SPANS times 64 keys.
pub trait WgmmaOps<const Q_REGS: usize, const O_REGS: usize, const SPANS: usize> {
    /// S = Q Kᵀ: 64 rows (registers) by `64 * SPANS` keys (`[64 * SPANS][128 bytes]` blocks at shared address `k`). Overwrites
    /// `s`.
    ///
    /// # Safety
    /// A whole warpgroup; the K tile is complete and stays until [`wait_scores`]; `s` is not touched before it.
    unsafe fn scores(s: &mut [[f32; 32]; SPANS], q: &[u32; Q_REGS], k: u32);

    /// As [`Self::scores`], of queries that stay in shared memory: 64 rows (`[64][128 bytes]` blocks at shared address `q`).
    ///
    /// # Safety
    /// As [`Self::scores`]; the queries, too, are complete and stay until [`wait_scores`].
    unsafe fn scores_of_shared(s: &mut [[f32; 32]; SPANS], q: u32, k: u32);

    /// O += P V: 64 rows (registers) by `2 * O_REGS` columns, over `64 * SPANS` keys (`[64 * SPANS][128 bytes]` blocks at `v`).
    ///
    /// # Safety
    /// A whole warpgroup; the V tile is complete and stays until [`Self::wait_output`]; `o` and `weights` are not touched
    /// before it.
    unsafe fn accumulate(o: &mut [f32; O_REGS], weights: &[[u32; 16]; SPANS], v: u32);

    /// Waits for all products. `wgmma.wait_group 0`
    fn wait_output(o: &mut [f32; O_REGS], weights: &mut [[u32; 16]; SPANS]);
}

/// Marker of a head dimension.
pub struct HeadDim<const N: u32>;

macro_rules! implement {
    ($head_dim:literal $q_regs:tt $o_regs:tt, $spans:literal [$($s:ident)*] [$($weights:ident)*], $o_and_weights:tt,
     scores $scores_shape:literal $scores:tt $scores_steps:tt $shared_steps:tt, output $output_shape:literal $output_steps:tt) => {
        implement!(@ (crate::element::F16) "f16" $head_dim $q_regs $o_regs, $spans [$($s)*] [$($weights)*], $o_and_weights,
            $scores_shape $scores $scores_steps $shared_steps, $output_shape $output_steps);
        implement!(@ (crate::element::Bf16) "bf16" $head_dim $q_regs $o_regs, $spans [$($s)*] [$($weights)*], $o_and_weights,
            $scores_shape $scores $scores_steps $shared_steps, $output_shape $output_steps);
    };
    (@ ($element:ty) $ty:literal $head_dim:literal $q_regs:tt $o_regs:tt, $spans:literal [$($s:ident)*] [$($weights:ident)*],
     $o_and_weights:tt, $scores_shape:literal $scores:tt $scores_steps:tt $shared_steps:tt, $output_shape:literal $output_steps:tt) => {
        impl WgmmaOps<$q_regs, $o_regs, $spans> for ($element, HeadDim<$head_dim>) {
            #[inline(always)]
            unsafe fn scores([$($s),*]: &mut [[f32; 32]; $spans], q: &[u32; $q_regs], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    products!($scores_shape $ty, transposed 0, accumulators $scores, $scores_steps
                        $(inout 32 $s;)* in $q_regs q; then descriptor = in(reg64) descriptor(k, 16),
                        options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn scores_of_shared([$($s),*]: &mut [[f32; 32]; $spans], q: u32, k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    products_of_shared!($scores_shape $ty, accumulators $scores, $shared_steps
                        $(inout 32 $s;)* then queries = in(reg64) descriptor(q, 16), descriptor = in(reg64) descriptor(k, 16),
                        options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; $o_regs], [$($weights),*]: &[[u32; 16]; $spans], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    products!($output_shape $ty, transposed 1, accumulators $o_regs, $output_steps
                        inout $o_regs o; $(in 16 $weights;)* then descriptor = in(reg64) descriptor(v, $spans * BLOCK_BYTES),
                        options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; $o_regs], weights: &mut [[u32; 16]; $spans]) {
                let [weights, rest @ ..] = weights;
                // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
                unsafe {
                    register_asm!([concat!("wgmma.wait_group.sync.aligned 0; // ", operands!($o_and_weights)),]
                        inout $o_regs o; inout 16 weights; then options(nostack, preserves_flags));
                }
                rest.iter_mut().for_each(hold_weights);
            }
        }
    };
}

// Steps of 16 elements of Q and K: those of a block of 64 are 32 bytes apart. Steps of 16 keys of V: 2,048 bytes.
implement!(64 16 32, 1 [s] [weights], 48,
    scores "m64n64k16" 32 [0 8 0, 1 9 2, 1 10 4, 1 11 6,] [0 0 0, 1 2 2, 1 4 4, 1 6 6,],
    output "m64n64k16" [1 8 0, 1 9 128, 1 10 256, 1 11 384,]);
implement!(64 16 32, 2 [s_0 s_1] [weights_0 weights_1], 48,
    scores "m64n128k16" 64 [0 16 0, 1 17 2, 1 18 4, 1 19 6,] [0 0 0, 1 2 2, 1 4 4, 1 6 6,],
    output "m64n64k16" [1 8 0, 1 9 128, 1 10 256, 1 11 384, 1 12 512, 1 13 640, 1 14 768, 1 15 896,]);
implement!(128 32 64, 1 [s] [weights], 80,
    scores "m64n64k16" 32 [0 8 0, 1 9 2, 1 10 4, 1 11 6, 1 12 512, 1 13 514, 1 14 516, 1 15 518,]
        [0 0 0, 1 2 2, 1 4 4, 1 6 6, 1 512 512, 1 514 514, 1 516 516, 1 518 518,],
    output "m64n128k16" [1 16 0, 1 17 128, 1 18 256, 1 19 384,]);
implement!(128 32 64, 2 [s_0 s_1] [weights_0 weights_1], 80,
    scores "m64n128k16" 64 [0 16 0, 1 17 2, 1 18 4, 1 19 6, 1 20 1024, 1 21 1026, 1 22 1028, 1 23 1030,]
        [0 0 0, 1 2 2, 1 4 4, 1 6 6, 1 512 1024, 1 514 1026, 1 516 1028, 1 518 1030,],
    output "m64n128k16" [1 16 0, 1 17 128, 1 18 256, 1 19 384, 1 20 512, 1 21 640, 1 22 768, 1 23 896,]);

// A warpgroup has half of the columns.
implement!(256 64 64, 1 [s] [weights], 80,
    scores "m64n64k16" 32 [0 8 0, 1 9 2, 1 10 4, 1 11 6, 1 12 512, 1 13 514, 1 14 516, 1 15 518,
        1 16 1024, 1 17 1026, 1 18 1028, 1 19 1030, 1 20 1536, 1 21 1538, 1 22 1540, 1 23 1542,]
        [0 0 0, 1 2 2, 1 4 4, 1 6 6, 1 512 512, 1 514 514, 1 516 516, 1 518 518,
        1 1024 1024, 1 1026 1026, 1 1028 1028, 1 1030 1030, 1 1536 1536, 1 1538 1538, 1 1540 1540, 1 1542 1542,],
    output "m64n128k16" [1 16 0, 1 17 128, 1 18 256, 1 19 384,]);
// Or all of them.
implement!(256 64 128, 1 [s] [weights], 144,
    scores "m64n64k16" 32 [0 8 0, 1 9 2, 1 10 4, 1 11 6, 1 12 512, 1 13 514, 1 14 516, 1 15 518,
        1 16 1024, 1 17 1026, 1 18 1028, 1 19 1030, 1 20 1536, 1 21 1538, 1 22 1540, 1 23 1542,]
        [0 0 0, 1 2 2, 1 4 4, 1 6 6, 1 512 512, 1 514 514, 1 516 516, 1 518 518,
        1 1024 1024, 1 1026 1026, 1 1028 1028, 1 1030 1030, 1 1536 1536, 1 1538 1538, 1 1540 1540, 1 1542 1542,],
    output "m64n256k16" [1 32 0, 1 33 128, 1 34 256, 1 35 384,]);

/// Waits until at most `PENDING` products issued later than these scores are under way. `wgmma.wait_group`
#[inline(always)]
pub fn wait_scores<const PENDING: u32, const SPANS: usize>(scores: &mut [[f32; 32]; SPANS]) {
    let s = &mut scores[0];
    // SAFETY: has no precondition. The operands, named in a comment, may not be used or moved before it.
    unsafe {
        register_asm!([concat!("wgmma.wait_group.sync.aligned {pending}; // ", operands!(32)),]
            inout 32 s; then pending = const PENDING, options(nostack, preserves_flags));
    }
    for block in &mut scores[1..] {
        hold_scores(block);
    }
}

/// Keeps scores where they are up to here.
#[inline(always)]
fn hold_scores(s: &mut [f32; 32]) {
    // SAFETY: no instruction, only a comment that names registers.
    unsafe { register_asm!([concat!("// ", operands!(32)),] inout 32 s; then options(nostack, preserves_flags)) };
}

/// Keeps weights where they are up to here: those that [`WgmmaOps::wait_output`] has no operands for.
#[inline(always)]
fn hold_weights(weights: &mut [u32; 16]) {
    // SAFETY: no instruction, only a comment that names registers.
    unsafe { register_asm!([concat!("// ", operands!(16)),] inout 16 weights; then options(nostack, preserves_flags)) };
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
