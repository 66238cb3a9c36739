//! The table. Behind each row, where its parameters are from; what a source leaves open is chosen here.

use super::{Also, Contexts, Mix, Row, Tolerance, Values};
use pat_rs::Dtype::{Bf16, E4m3, E5m2, F16};
use pat_workloads::PoolLayout::{Hnd, Interleaved, Nhd};

const THOUSANDTH: Tolerance = Tolerance { relative: 1e-3, absolute: 1e-3 };
const HUNDREDTH: Tolerance = Tolerance { relative: 1e-2, absolute: 1e-2 };

/// What most rows have in common.
const PLAIN: Row = Row {
    name: "",
    contexts: Contexts::Uniform(&[]),
    sequences: &[1],
    query_tokens: &[1],
    page_sizes: &[16],
    heads: &[(32, 8)],
    head_dims: &[128],
    dtypes: &[(F16, F16)],
    layouts: &[Nhd],
    soft_caps: &[None],
    windows: &[None],
    sinks: &[false],
    values: Values::Drawn,
    also: Also::Nothing,
    f16: THOUSANDTH,
    bf16: HUNDREDTH,
};

/// The shapes of FlashInfer's tests/attention/test_batch_attention.py.
const ANY_LENGTHS: Row = Row {
    page_sizes: &[1, 8, 16],
    heads: &[(1, 1), (4, 1), (7, 1), (8, 1), (4, 4), (16, 4), (28, 4), (32, 4)],
    head_dims: &[64, 128, 256],
    dtypes: &[(Bf16, Bf16), (F16, F16)],
    layouts: &[Hnd, Nhd],
    soft_caps: &[None, Some(50.0)],
    f16: HUNDREDTH,
    ..PLAIN
};

const fn mix(parts: &'static [(u32, u32, u32)]) -> Mix {
    Mix { parts, repeated: 1, shared: None }
}

/// The rows.
pub const ROWS: &[Row] = &[
    // FlashInfer, tests/attention/test_shared_prefix_kernels.py; its appended queries see what comes after them, ours do not.
    Row {
        name: "behind a shared prefix",
        contexts: Contexts::Behind(&[128, 512, 2048], &[37, 17]),
        sequences: &[12, 17],
        query_tokens: &[1, 5, 17],
        page_sizes: &[1, 16],
        heads: &[(8, 8), (16, 16)],
        head_dims: &[128, 256],
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_batch_decode_kernels.py.
    Row {
        name: "batches of paged decode",
        contexts: Contexts::Uniform(&[54, 97, 512, 2048, 16384]),
        sequences: &[12, 17, 128],
        page_sizes: &[1, 8, 16],
        heads: &[(4, 4), (32, 4)],
        head_dims: &[128, 256, 512],
        dtypes: &[(F16, F16), (F16, E4m3)],
        ..PLAIN
    },
    // The same file, several query tokens; there in CUDA graphs, as here in gpu_graphs and gpu_steps.
    Row {
        name: "as many query tokens in every sequence",
        contexts: Contexts::Uniform(&[54, 2048, 16384]),
        sequences: &[4, 8],
        query_tokens: &[2, 3],
        page_sizes: &[1, 8, 16],
        heads: &[(8, 2), (16, 2), (32, 8), (64, 8)],
        f16: HUNDREDTH,
        ..PLAIN
    },
    // The same file, logits that are large negative numbers.
    Row {
        name: "scores far below zero",
        contexts: Contexts::Uniform(&[54, 512, 2048]),
        sequences: &[1, 12],
        page_sizes: &[1, 16],
        heads: &[(4, 4), (32, 4)],
        head_dims: &[64, 128, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        values: Values::FarBelowZero,
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_tensor_cores_decode.py, one sequence.
    Row {
        name: "one sequence",
        contexts: Contexts::Uniform(&[54, 128, 999, 32789]),
        heads: &[(4, 4), (16, 4), (32, 4), (8, 8), (32, 8), (64, 8)],
        head_dims: &[64, 128, 256],
        layouts: &[Hnd, Nhd],
        ..PLAIN
    },
    // The same file, batches.
    Row {
        name: "groups of 1, 4 and 8",
        contexts: Contexts::Uniform(&[54, 97, 512]),
        sequences: &[12, 17],
        page_sizes: &[1, 8, 16],
        heads: &[(4, 4), (16, 4), (32, 4)],
        head_dims: &[128, 256],
        layouts: &[Hnd, Nhd],
        ..PLAIN
    },
    // The same file and test_batch_invariant_fa2.py: chunks of 2,048 tokens, and sequences that are not split.
    Row {
        name: "the same bits in any batch",
        contexts: Contexts::Uniform(&[4096, 8192, 5000]),
        sequences: &[5, 12],
        query_tokens: &[1, 4],
        page_sizes: &[1, 8, 16],
        heads: &[(4, 4), (16, 4), (32, 4)],
        head_dims: &[128, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        also: Also::FirstAlone(4, &[2048, 8192]),
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_batch_attention.py, what it does not draw. Its factor of V is one of 8-bit V here.
    Row {
        name: "long and short sequences together",
        contexts: Contexts::Mixes(&[
            mix(&[(77, 2048, 1)]),
            mix(&[(264, 600, 1), (128, 5000, 3)]),
            mix(&[(100, 1024, 1), (8, 8192, 17)]),
        ]),
        ..ANY_LENGTHS
    },
    // The same file, lengths that it draws.
    Row {
        name: "lengths at random",
        contexts: Contexts::Between(&[(1, 256), (200, 2048), (1, 8192)]),
        sequences: &[7, 64, 256],
        query_tokens: &[1, 3],
        ..ANY_LENGTHS
    },
    // FlashInfer, tests/attention/test_decode_fp8_calibration_scale.py.
    Row {
        name: "8-bit K and V with factors",
        contexts: Contexts::Uniform(&[54, 97]),
        sequences: &[12, 17],
        page_sizes: &[1, 8, 16],
        heads: &[(4, 4), (32, 4)],
        head_dims: &[64, 128],
        dtypes: &[(F16, E4m3), (F16, E5m2), (Bf16, E4m3), (Bf16, E5m2)],
        layouts: &[Hnd, Nhd],
        values: Values::Scaled,
        f16: Tolerance { relative: 2e-1, absolute: 1e-2 },
        bf16: Tolerance { relative: 2e-1, absolute: 1e-2 },
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_sliding_window.py: 33 and 533 tokens to the left of the row's own.
    Row {
        name: "sliding windows",
        contexts: Contexts::Uniform(&[1, 3, 99, 199, 1999]),
        sequences: &[1, 3, 13, 32],
        page_sizes: &[1, 16],
        heads: &[(4, 1), (8, 4)],
        head_dims: &[64, 96, 128, 192, 256, 512],
        windows: &[Some(34), Some(534)],
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_logits_cap.py, which has no batches.
    Row {
        name: "soft caps",
        contexts: Contexts::Uniform(&[1, 17, 81, 987, 4096]),
        sequences: &[1, 3],
        heads: &[(4, 4), (32, 8)],
        head_dims: &[64, 128, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        soft_caps: &[Some(1.0), Some(30.0), Some(50.0)],
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_attention_sink.py.
    Row {
        name: "attention sinks",
        contexts: Contexts::Uniform(&[1, 4, 16, 128, 999]),
        sequences: &[1, 4, 16],
        query_tokens: &[1, 4],
        page_sizes: &[1, 16],
        heads: &[(32, 8), (32, 32)],
        head_dims: &[64, 128],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        windows: &[None, Some(128)],
        sinks: &[true],
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_non_contiguous_decode.py.
    Row {
        name: "rows with gaps between them",
        contexts: Contexts::Uniform(&[54, 97]),
        sequences: &[1, 19, 99],
        page_sizes: &[1, 5],
        heads: &[(4, 4), (32, 4)],
        head_dims: &[64, 128, 256],
        layouts: &[Interleaved, Nhd],
        also: Also::Gaps,
        ..PLAIN
    },
    // FlashInfer, tests/attention/test_trtllm_gen_attention_decode.py, without 4 bits.
    Row {
        name: "drafts with windows and sinks",
        contexts: Contexts::Between(&[(1, 110), (100, 2048)]),
        sequences: &[4, 128, 256],
        query_tokens: &[1, 2, 3, 4, 5],
        page_sizes: &[16, 32, 64],
        heads: &[(2, 2), (10, 2), (16, 2), (4, 4), (20, 4), (32, 4)],
        dtypes: &[(F16, F16), (Bf16, Bf16), (F16, E4m3), (Bf16, E4m3)],
        layouts: &[Hnd],
        windows: &[None, Some(127)],
        sinks: &[false, true],
        f16: HUNDREDTH,
        ..PLAIN
    },
    // vLLM, tests/kernels/attention/test_cascade_flash_attn.py; head dim 192 with values of 128, which is what models have.
    Row {
        name: "cascades",
        contexts: Contexts::Mixes(&[
            Mix {
                parts: &[(1, 871, 129), (1, 280, 18), (1, 988, 37), (1, 2304, 1023), (1, 257, 1)],
                repeated: 1,
                shared: Some(256),
            },
            Mix { parts: &[(1, 1023, 1), (1, 879, 1), (1, 778, 1), (1, 1777, 1)], repeated: 100, shared: Some(512) },
        ]),
        heads: &[(4, 4), (8, 2), (16, 2)],
        head_dims: &[128, 192, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        soft_caps: &[None, Some(50.0)],
        f16: HUNDREDTH,
        ..PLAIN
    },
    // Hydragen's tests.
    Row {
        name: "trees by levels",
        contexts: Contexts::Levels(&[
            &[&[1], &[10]],
            &[&[3], &[6, 6]],
            &[&[3], &[6, 7]],
            &[&[7, 7], &[9, 10, 11, 4], &[129, 2, 3, 4, 5, 6, 7, 128]],
            &[&[16384], &[1, 128, 256]],
        ]),
        page_sizes: &[1, 16],
        heads: &[(8, 1), (8, 8)],
        head_dims: &[64, 128],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        f16: Tolerance { relative: 5e-3, absolute: 2e-3 },
        bf16: HUNDREDTH,
        ..PLAIN
    },
    // PAT, test/test.py.
    Row {
        name: "PAT's trees",
        contexts: Contexts::Trees(&[
            "1,2,4,16,32,64,128,256,512_3072,1024,32,32,32,32,32,32,32",
            "1,2,4,16,32,64,256_4096,32,128,128,32,256,512",
            "1,2,4,16,32,64,128,256,512_3072,1024,512,256,128,32,256,512,32",
            "1,2,4,16,32,64,128,256,1024_512,32,128,128,32,256,512,32,32",
            "1,2,4,16,32,64,128,512_512,32,128,128,32,256,512,256",
            "1,2,4,16,32,64,128_512,32,128,128,32,256,512",
            "4_4096",
            "4,16_4096,256",
            "1,8_640,32",
            "1,4,16_32,256,32",
            "1,2,4,8,16,32,64_32,512,32,256,32,32,32",
            "1,4,256_32,256,32",
            "1,16,32_2048,1024,256",
            "1,10_4096,416",
        ]),
        page_sizes: &[32],
        heads: &[(64, 8)],
        f16: Tolerance { relative: 0.0, absolute: 1e-2 },
        ..PLAIN
    },
    // FlashAttention, hopper/test_flash_attn.py, decode from a paged cache; its bound is one like the numerics rule.
    Row {
        name: "pages of 1, 4 and 128",
        contexts: Contexts::Between(&[(1, 128), (100, 339), (1000, 1025), (799, 2048)]),
        sequences: &[1, 9],
        query_tokens: &[1, 8, 64],
        page_sizes: &[1, 4, 128],
        heads: &[(6, 6), (6, 2), (6, 1)],
        head_dims: &[64, 96, 128, 192, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        soft_caps: &[None, Some(15.0)],
        windows: &[None, Some(65)],
        f16: HUNDREDTH,
        ..PLAIN
    },
    // What the notes on peers recommend beside these grids.
    Row {
        name: "every group and page size, shared or copied",
        contexts: Contexts::Between(&[(1, 64), (60, 500), (1, 3000)]),
        sequences: &[5, 24],
        page_sizes: &[1, 8, 16, 32, 64],
        heads: &[(2, 2), (4, 2), (6, 2), (8, 2), (10, 2), (12, 2), (14, 2), (16, 2), (32, 2)],
        head_dims: &[64, 128, 256],
        dtypes: &[(F16, F16), (Bf16, Bf16)],
        layouts: &[Hnd, Nhd, Interleaved],
        also: Also::Copies,
        ..PLAIN
    },
];
