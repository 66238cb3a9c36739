//! Query trees on the CPU, in interpreted PTX and on a device, against the f64 oracle. `PAT_GPU_FORESTS` sets how many forests a device
//! gets (default 400), `PAT_GPU_SEED` which.

use half::{bf16, f16};
use pat_rs::{DeviceProfile, Engine};
use pat_tests::device_test;
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::trees::agree;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::process::ExitCode;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

fn check_trees(executor: &impl Executor, profile: &DeviceProfile, forests: u64, seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for index in 0..forests as usize {
        if index.is_multiple_of(2) {
            agree::<f16>(executor, profile, &mut rng, index);
        } else {
            agree::<bf16>(executor, profile, &mut rng, index);
        }
    }
    println!("{forests} forests with query trees on {}", executor.name());
}

fn on_the_cpu(engine: &Engine) {
    check_trees(engine, &DeviceProfile::h200(), 120, 2);
}

fn in_interpreted_ptx(_: &Engine) {
    check_trees(&Interpreter, &DeviceProfile::h200(), 24, 3);
}

fn on_a_device(engine: &Engine) {
    let profile = engine.profile().unwrap();
    check_trees(engine, &profile, from_env("PAT_GPU_FORESTS", 400), from_env("PAT_GPU_SEED", 1));
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(on_the_cpu).on_the_cpu(),
        device_test!(in_interpreted_ptx).on_the_cpu(),
        device_test!(on_a_device),
    ])
}
