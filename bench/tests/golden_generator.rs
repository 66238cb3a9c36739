//! `bench/peers` draws the same tensors in array operations: both sides are held against one file.

use half::{bf16, f16};
use pat_abi::generator::{Tensor, element, row_key};
use serde_json::{Value, json};
use std::path::Path;

/// Rows whose coordinates reach every bit that the hash must carry, and the whole of a small pool for the order of its axes.
fn golden() -> Value {
    const DIMS: [u32; 12] = [0, 1, 2, 3, 5, 8, 31, 32, 63, 64, 100, 127];
    let rows: Vec<Value> = [
        (1, Tensor::Q, 0, 0, 0),
        (1, Tensor::K, 0, 0, 0),
        (1, Tensor::V, 17, 31, 7),
        (0, Tensor::K, 32_767, 15, 31),
        (7, Tensor::Q, 1023, 0, 63),
        (0x8000_0000, Tensor::V, 1 << 20, 63, 1),
        (u32::MAX, Tensor::K, i32::MAX as u32, 65_535, 127),
    ]
    .into_iter()
    .map(|(seed, tensor, page, token, head)| {
        let key = row_key(seed, tensor as u32, page, token, head);
        let values = DIMS.map(|dim| element(key, dim));
        json!({
            "seed": seed, "tensor": tensor as u32, "page": page, "token": token, "head": head, "dims": DIMS,
            "f16_bits": values.map(|value| f16::from_f32(value).to_bits()),
            "bf16_bits": values.map(|value| bf16::from_f32(value).to_bits()),
        })
    })
    .collect();
    let (seed, pages, tokens, heads, head_dim) = (1, 3, 2, 2, 4);
    let mut bits = Vec::new();
    for page in 0..pages {
        for token in 0..tokens {
            for head in 0..heads {
                let key = row_key(seed, Tensor::K as u32, page, token, head);
                bits.extend((0..head_dim).map(|dim| f16::from_f32(element(key, dim)).to_bits()));
            }
        }
    }
    let pool = json!({
        "seed": seed, "tensor": Tensor::K as u32, "pages": pages, "tokens": tokens, "heads": heads, "head_dim": head_dim,
        "f16_bits": bits,
    });
    json!({ "rows": rows, "pool": pool })
}

#[test]
fn the_golden_file_is_what_the_generator_draws() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/golden_generator.json");
    let golden = golden();
    if std::env::var_os("PAT_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, golden.to_string() + "\n").expect("a writable file");
    }
    let text = std::fs::read_to_string(&path).expect("the golden file");
    let written: Value = serde_json::from_str(&text).expect("JSON");
    assert!(written == golden, "PAT_WRITE_GOLDEN=1 writes it anew; bench/peers/generator.py must follow");
}
