//! The products of main-loop steps of 128 keys: tiles of `[128][128 bytes]` blocks.

use super::{BLOCK_BYTES, HeadDim, WgmmaOps, descriptor};
use core::arch::asm;

macro_rules! head_dim_64 {
    ($element:ty, $ty:literal) => {
        impl WgmmaOps<16, 32, 2> for ($element, HeadDim<64>) {
            #[inline(always)]
            unsafe fn scores(s: &mut [[f32; 32]; 2], q: &[u32; 16], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
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
                    inout(reg32) s[0][0], inout(reg32) s[0][1], inout(reg32) s[0][2], inout(reg32) s[0][3],
                    inout(reg32) s[0][4], inout(reg32) s[0][5], inout(reg32) s[0][6], inout(reg32) s[0][7],
                    inout(reg32) s[0][8], inout(reg32) s[0][9], inout(reg32) s[0][10], inout(reg32) s[0][11],
                    inout(reg32) s[0][12], inout(reg32) s[0][13], inout(reg32) s[0][14], inout(reg32) s[0][15],
                    inout(reg32) s[0][16], inout(reg32) s[0][17], inout(reg32) s[0][18], inout(reg32) s[0][19],
                    inout(reg32) s[0][20], inout(reg32) s[0][21], inout(reg32) s[0][22], inout(reg32) s[0][23],
                    inout(reg32) s[0][24], inout(reg32) s[0][25], inout(reg32) s[0][26], inout(reg32) s[0][27],
                    inout(reg32) s[0][28], inout(reg32) s[0][29], inout(reg32) s[0][30], inout(reg32) s[0][31],
                    inout(reg32) s[1][0], inout(reg32) s[1][1], inout(reg32) s[1][2], inout(reg32) s[1][3],
                    inout(reg32) s[1][4], inout(reg32) s[1][5], inout(reg32) s[1][6], inout(reg32) s[1][7],
                    inout(reg32) s[1][8], inout(reg32) s[1][9], inout(reg32) s[1][10], inout(reg32) s[1][11],
                    inout(reg32) s[1][12], inout(reg32) s[1][13], inout(reg32) s[1][14], inout(reg32) s[1][15],
                    inout(reg32) s[1][16], inout(reg32) s[1][17], inout(reg32) s[1][18], inout(reg32) s[1][19],
                    inout(reg32) s[1][20], inout(reg32) s[1][21], inout(reg32) s[1][22], inout(reg32) s[1][23],
                    inout(reg32) s[1][24], inout(reg32) s[1][25], inout(reg32) s[1][26], inout(reg32) s[1][27],
                    inout(reg32) s[1][28], inout(reg32) s[1][29], inout(reg32) s[1][30], inout(reg32) s[1][31],
                    in(reg32) q[0], in(reg32) q[1], in(reg32) q[2], in(reg32) q[3], in(reg32) q[4], in(reg32) q[5],
                    in(reg32) q[6], in(reg32) q[7], in(reg32) q[8], in(reg32) q[9], in(reg32) q[10],
                    in(reg32) q[11], in(reg32) q[12], in(reg32) q[13], in(reg32) q[14], in(reg32) q[15],
                    in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 32], weights: &[[u32; 16]; 2], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
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
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13],
                    inout(reg32) o[14], inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17],
                    inout(reg32) o[18], inout(reg32) o[19], inout(reg32) o[20], inout(reg32) o[21],
                    inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24], inout(reg32) o[25],
                    inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31],
                    in(reg32) weights[0][0], in(reg32) weights[0][1], in(reg32) weights[0][2],
                    in(reg32) weights[0][3], in(reg32) weights[0][4], in(reg32) weights[0][5],
                    in(reg32) weights[0][6], in(reg32) weights[0][7], in(reg32) weights[0][8],
                    in(reg32) weights[0][9], in(reg32) weights[0][10], in(reg32) weights[0][11],
                    in(reg32) weights[0][12], in(reg32) weights[0][13], in(reg32) weights[0][14],
                    in(reg32) weights[0][15], in(reg32) weights[1][0], in(reg32) weights[1][1],
                    in(reg32) weights[1][2], in(reg32) weights[1][3], in(reg32) weights[1][4],
                    in(reg32) weights[1][5], in(reg32) weights[1][6], in(reg32) weights[1][7],
                    in(reg32) weights[1][8], in(reg32) weights[1][9], in(reg32) weights[1][10],
                    in(reg32) weights[1][11], in(reg32) weights[1][12], in(reg32) weights[1][13],
                    in(reg32) weights[1][14], in(reg32) weights[1][15],
                    in(reg64) descriptor(v, 2 * BLOCK_BYTES), options(nostack, preserves_flags));
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
            unsafe fn scores(s: &mut [[f32; 32]; 2], q: &[u32; 32], k: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
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
                    inout(reg32) s[0][0], inout(reg32) s[0][1], inout(reg32) s[0][2], inout(reg32) s[0][3],
                    inout(reg32) s[0][4], inout(reg32) s[0][5], inout(reg32) s[0][6], inout(reg32) s[0][7],
                    inout(reg32) s[0][8], inout(reg32) s[0][9], inout(reg32) s[0][10], inout(reg32) s[0][11],
                    inout(reg32) s[0][12], inout(reg32) s[0][13], inout(reg32) s[0][14], inout(reg32) s[0][15],
                    inout(reg32) s[0][16], inout(reg32) s[0][17], inout(reg32) s[0][18], inout(reg32) s[0][19],
                    inout(reg32) s[0][20], inout(reg32) s[0][21], inout(reg32) s[0][22], inout(reg32) s[0][23],
                    inout(reg32) s[0][24], inout(reg32) s[0][25], inout(reg32) s[0][26], inout(reg32) s[0][27],
                    inout(reg32) s[0][28], inout(reg32) s[0][29], inout(reg32) s[0][30], inout(reg32) s[0][31],
                    inout(reg32) s[1][0], inout(reg32) s[1][1], inout(reg32) s[1][2], inout(reg32) s[1][3],
                    inout(reg32) s[1][4], inout(reg32) s[1][5], inout(reg32) s[1][6], inout(reg32) s[1][7],
                    inout(reg32) s[1][8], inout(reg32) s[1][9], inout(reg32) s[1][10], inout(reg32) s[1][11],
                    inout(reg32) s[1][12], inout(reg32) s[1][13], inout(reg32) s[1][14], inout(reg32) s[1][15],
                    inout(reg32) s[1][16], inout(reg32) s[1][17], inout(reg32) s[1][18], inout(reg32) s[1][19],
                    inout(reg32) s[1][20], inout(reg32) s[1][21], inout(reg32) s[1][22], inout(reg32) s[1][23],
                    inout(reg32) s[1][24], inout(reg32) s[1][25], inout(reg32) s[1][26], inout(reg32) s[1][27],
                    inout(reg32) s[1][28], inout(reg32) s[1][29], inout(reg32) s[1][30], inout(reg32) s[1][31],
                    in(reg32) q[0], in(reg32) q[1], in(reg32) q[2], in(reg32) q[3], in(reg32) q[4], in(reg32) q[5],
                    in(reg32) q[6], in(reg32) q[7], in(reg32) q[8], in(reg32) q[9], in(reg32) q[10],
                    in(reg32) q[11], in(reg32) q[12], in(reg32) q[13], in(reg32) q[14], in(reg32) q[15],
                    in(reg32) q[16], in(reg32) q[17], in(reg32) q[18], in(reg32) q[19], in(reg32) q[20],
                    in(reg32) q[21], in(reg32) q[22], in(reg32) q[23], in(reg32) q[24], in(reg32) q[25],
                    in(reg32) q[26], in(reg32) q[27], in(reg32) q[28], in(reg32) q[29], in(reg32) q[30],
                    in(reg32) q[31],
                    in(reg64) descriptor(k, 16), options(nostack, preserves_flags));
                }
            }

            #[inline(always)]
            unsafe fn accumulate(o: &mut [f32; 64], weights: &[[u32; 16]; 2], v: u32) {
                // SAFETY: the caller's contract.
                unsafe {
                    asm!(
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
                    inout(reg32) o[0], inout(reg32) o[1], inout(reg32) o[2], inout(reg32) o[3], inout(reg32) o[4],
                    inout(reg32) o[5], inout(reg32) o[6], inout(reg32) o[7], inout(reg32) o[8], inout(reg32) o[9],
                    inout(reg32) o[10], inout(reg32) o[11], inout(reg32) o[12], inout(reg32) o[13],
                    inout(reg32) o[14], inout(reg32) o[15], inout(reg32) o[16], inout(reg32) o[17],
                    inout(reg32) o[18], inout(reg32) o[19], inout(reg32) o[20], inout(reg32) o[21],
                    inout(reg32) o[22], inout(reg32) o[23], inout(reg32) o[24], inout(reg32) o[25],
                    inout(reg32) o[26], inout(reg32) o[27], inout(reg32) o[28], inout(reg32) o[29],
                    inout(reg32) o[30], inout(reg32) o[31], inout(reg32) o[32], inout(reg32) o[33],
                    inout(reg32) o[34], inout(reg32) o[35], inout(reg32) o[36], inout(reg32) o[37],
                    inout(reg32) o[38], inout(reg32) o[39], inout(reg32) o[40], inout(reg32) o[41],
                    inout(reg32) o[42], inout(reg32) o[43], inout(reg32) o[44], inout(reg32) o[45],
                    inout(reg32) o[46], inout(reg32) o[47], inout(reg32) o[48], inout(reg32) o[49],
                    inout(reg32) o[50], inout(reg32) o[51], inout(reg32) o[52], inout(reg32) o[53],
                    inout(reg32) o[54], inout(reg32) o[55], inout(reg32) o[56], inout(reg32) o[57],
                    inout(reg32) o[58], inout(reg32) o[59], inout(reg32) o[60], inout(reg32) o[61],
                    inout(reg32) o[62], inout(reg32) o[63],
                    in(reg32) weights[0][0], in(reg32) weights[0][1], in(reg32) weights[0][2],
                    in(reg32) weights[0][3], in(reg32) weights[0][4], in(reg32) weights[0][5],
                    in(reg32) weights[0][6], in(reg32) weights[0][7], in(reg32) weights[0][8],
                    in(reg32) weights[0][9], in(reg32) weights[0][10], in(reg32) weights[0][11],
                    in(reg32) weights[0][12], in(reg32) weights[0][13], in(reg32) weights[0][14],
                    in(reg32) weights[0][15], in(reg32) weights[1][0], in(reg32) weights[1][1],
                    in(reg32) weights[1][2], in(reg32) weights[1][3], in(reg32) weights[1][4],
                    in(reg32) weights[1][5], in(reg32) weights[1][6], in(reg32) weights[1][7],
                    in(reg32) weights[1][8], in(reg32) weights[1][9], in(reg32) weights[1][10],
                    in(reg32) weights[1][11], in(reg32) weights[1][12], in(reg32) weights[1][13],
                    in(reg32) weights[1][14], in(reg32) weights[1][15],
                    in(reg64) descriptor(v, 2 * BLOCK_BYTES), options(nostack, preserves_flags));
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
        asm!(
            "// {0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}, {8}, {9}, {10}, {11}, {12}, {13}, {14}, {15}",
            inout(reg32) weights[0], inout(reg32) weights[1], inout(reg32) weights[2], inout(reg32) weights[3],
            inout(reg32) weights[4], inout(reg32) weights[5], inout(reg32) weights[6], inout(reg32) weights[7],
            inout(reg32) weights[8], inout(reg32) weights[9], inout(reg32) weights[10], inout(reg32) weights[11],
            inout(reg32) weights[12], inout(reg32) weights[13], inout(reg32) weights[14], inout(reg32) weights[15],
            options(nostack, preserves_flags));
    }
}
