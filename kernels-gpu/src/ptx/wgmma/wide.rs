//! The products of main-loop steps of 128 keys: tiles of `[128][128 bytes]` blocks.

use super::{BLOCK_BYTES, HeadDim, WgmmaOps, descriptor};
use core::arch::asm;

macro_rules! head_dim_64 {
    ($element:ty, $ty:literal) => {
        impl WgmmaOps<16, 32, 2> for ($element, HeadDim<64>) {
            #[inline(always)]
            unsafe fn scores([s_0, s_1]: &mut [[f32; 32]; 2], q: &[u32; 16], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
                    "{{ .reg .b64 b; .reg .pred accumulate;",
                    "wgmma.fence.sync.aligned;",
                    "setp.ne.b32 accumulate, 0, 0; add.s64 b, {80}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{64}, {65}, {66}, {67}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {80}, 2;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{68}, {69}, {70}, {71}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {80}, 4;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{72}, {73}, {74}, {75}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {80}, 6;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{76}, {77}, {78}, {79}}}, b, accumulate, 1, 1, 0;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    ] inout 32 s_0; inout 32 s_1; in 16 q; then in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 32], [weights_0, weights_1]: &[[u32; 16]; 2], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
                    "{{ .reg .b64 b;",
                    "wgmma.fence.sync.aligned;",
                    "add.s64 b, {64}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{32}, {33}, {34}, {35}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 128;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{36}, {37}, {38}, {39}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 256;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{40}, {41}, {42}, {43}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 384;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{44}, {45}, {46}, {47}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 512;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{48}, {49}, {50}, {51}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 640;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{52}, {53}, {54}, {55}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 768;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{56}, {57}, {58}, {59}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {64}, 896;",
                    concat!("wgmma.mma_async.sync.aligned.m64n64k16.f32.", $ty, ".", $ty, " {{", accumulators_32!(), "}}, {{{60}, {61}, {62}, {63}}}, b, 1, 1, 1, 1;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    ] inout 32 o; in 16 weights_0; in 16 weights_1; then in(reg64) descriptor(v, 2 * BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 32], weights: &mut [[u32; 16]; 2]) {
                let [first, second] = weights;
                <Self as WgmmaOps<16, 32, 1>>::wait_output(o, core::array::from_mut(first));
                hold_weights(second);
            }
        }
    };
}

macro_rules! head_dim_128 {
    ($element:ty, $ty:literal) => {
        impl WgmmaOps<32, 64, 2> for ($element, HeadDim<128>) {
            #[inline(always)]
            unsafe fn scores([s_0, s_1]: &mut [[f32; 32]; 2], q: &[u32; 32], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
                    "{{ .reg .b64 b; .reg .pred accumulate;",
                    "wgmma.fence.sync.aligned;",
                    "setp.ne.b32 accumulate, 0, 0; add.s64 b, {96}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{64}, {65}, {66}, {67}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 2;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{68}, {69}, {70}, {71}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 4;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{72}, {73}, {74}, {75}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 6;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{76}, {77}, {78}, {79}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 1024;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{80}, {81}, {82}, {83}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 1026;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{84}, {85}, {86}, {87}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 1028;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{88}, {89}, {90}, {91}}}, b, accumulate, 1, 1, 0;"),
                    "setp.ne.b32 accumulate, 1, 0; add.s64 b, {96}, 1030;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{92}, {93}, {94}, {95}}}, b, accumulate, 1, 1, 0;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    ] inout 32 s_0; inout 32 s_1; in 32 q; then in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 64], [weights_0, weights_1]: &[[u32; 16]; 2], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    register_asm!([
                    "{{ .reg .b64 b;",
                    "wgmma.fence.sync.aligned;",
                    "add.s64 b, {96}, 0;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{64}, {65}, {66}, {67}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 128;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{68}, {69}, {70}, {71}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 256;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{72}, {73}, {74}, {75}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 384;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{76}, {77}, {78}, {79}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 512;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{80}, {81}, {82}, {83}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 640;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{84}, {85}, {86}, {87}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 768;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{88}, {89}, {90}, {91}}}, b, 1, 1, 1, 1;"),
                    "add.s64 b, {96}, 896;",
                    concat!("wgmma.mma_async.sync.aligned.m64n128k16.f32.", $ty, ".", $ty, " {{", accumulators_64!(), "}}, {{{92}, {93}, {94}, {95}}}, b, 1, 1, 1, 1;"),
                    "wgmma.commit_group.sync.aligned; }}",
                    ] inout 64 o; in 16 weights_0; in 16 weights_1; then in(reg64) descriptor(v, 2 * BLOCK_BYTES), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            fn wait_output(o: &mut [f32; 64], weights: &mut [[u32; 16]; 2]) {
                let [first, second] = weights;
                <Self as WgmmaOps<32, 64, 1>>::wait_output(o, core::array::from_mut(first));
                hold_weights(second);
            }
        }
    };
}

head_dim_64!(crate::element::F16, "f16");
head_dim_64!(crate::element::Bf16, "bf16");
head_dim_128!(crate::element::F16, "f16");
head_dim_128!(crate::element::Bf16, "bf16");

/// Keeps weights where they are up to here: for those that [`WgmmaOps::wait_output`] of 64 keys does not name.
#[inline(always)]
fn hold_weights(weights: &mut [u32; 16]) {
    // SAFETY: no instruction, only a comment that names registers.
    unsafe {
        register_asm!([
            "// {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}",
            ] inout 16 weights; then options(nostack, preserves_flags));
    }
}
