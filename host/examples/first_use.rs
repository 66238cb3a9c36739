//! How long the driver takes to compile kernels when they are first needed: those of each tile variant, head dimension and type of
//! K and V, each with its merge kernel, plain and with the features that are compiled in.
//! `CUDA_CACHE_DISABLE=1 cargo run --release -p pat-rs --example first_use [SECONDS]`, on a machine with a GPU; without the
//! variable the driver may find what it has compiled before. After so many seconds, 600 unless given, no kernel is begun.

use pat_abi::{Family, KERNELS};
use pat_rs::cuda::CudaEngine;
use pat_rs::{AttentionShape, Dtype, Problem, supports};
use std::time::Instant;

const PAGE_SIZE: u32 = 16;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let limit: f64 = std::env::args().nth(1).map_or(Ok(600.0), |seconds| seconds.parse())?;
    let engine = CudaEngine::new(0)?;
    let device = engine.device();
    let is_cached = std::env::var("CUDA_CACHE_DISABLE").map_or(true, |value| value != "1");
    println!("{}, {}", device.name(), if is_cached { "with the driver's cache" } else { "without a cache" });
    println!("| kernel | head dim | K and V | plain, ms | soft cap | window | both |");
    println!("|---|---|---|---|---|---|---|");
    let begin = Instant::now();
    let mut slowest: f64 = 0.0;
    let (mut compiled, mut left) = (0, 0);
    // The newest first; the other 16-bit type has the same kernels.
    for kernel in KERNELS.iter().rev() {
        let Family::Forward(variant) = kernel.family else { continue };
        if kernel.dtype != Dtype::F16 || !kernel.arch.runs_on(device.compute_capability()) {
            continue;
        }
        let shape = AttentionShape::new(8, 1, kernel.head_dim, kernel.dtype)?
            .with_v_head_dim(kernel.v_head_dim)?
            .with_kv_dtype(kernel.kv_dtype);
        let plain = Problem::new(shape, PAGE_SIZE);
        let mut times = Vec::new();
        for problem in
            [plain, plain.with_soft_cap(30.0), plain.with_window(100), plain.with_soft_cap(30.0).with_window(100)]
        {
            if supports(&problem, None, Some(device.compute_capability())).is_err()
                || !device.profile()?.variants(&problem).contains(&variant)
            {
                times.push("-".to_owned());
            } else if begin.elapsed().as_secs_f64() > limit {
                left += 1;
                times.push("no time".to_owned());
            } else {
                let called = Instant::now();
                engine.prepare_variants(&problem, &[variant])?;
                let ms = called.elapsed().as_secs_f64() * 1e3;
                (slowest, compiled) = (slowest.max(ms), compiled + 1);
                times.push(format!("{ms:.0}"));
            }
        }
        let (head_dim, kv_dtype) = (kernel.head_dim, kernel.kv_dtype.name());
        println!("| {} | {head_dim} | {kv_dtype} | {} |", variant.name(), times.join(" | "));
    }
    println!("{compiled} compiled, {left} left, slowest {slowest:.0} ms");
    Ok(())
}
