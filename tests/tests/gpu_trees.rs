//! Query trees on the CPU, in interpreted PTX and on a device, against the f64 oracle. `PAT_GPU_FORESTS` sets how many forests a device
//! gets (default 400), `PAT_GPU_SEED` which.

use half::{bf16, f16};
use pat_rs::{DeviceProfile, Engine};
use pat_tests::device_test;
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::forests::Forests;
use pat_tests::trees::agree;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::process::ExitCode;

fn check_trees(executor: &impl Executor, profile: &DeviceProfile, forests: Forests) {
    let Forests { count, seed } = forests;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for index in 0..count as usize {
        if index.is_multiple_of(2) {
            agree::<f16>(executor, profile, &mut rng, index);
        } else {
            agree::<bf16>(executor, profile, &mut rng, index);
        }
    }
    println!("{count} forests with query trees on {}", executor.name());
}

fn on_the_cpu(engine: &Engine) {
    check_trees(engine, &DeviceProfile::h200(), Forests { count: 120, seed: 2 });
}

fn in_interpreted_ptx(_: &Engine) {
    check_trees(&Interpreter, &DeviceProfile::h200(), Forests { count: 24, seed: 3 });
}

fn on_a_device(engine: &Engine) {
    let profile = engine.profile().unwrap();
    check_trees(engine, &profile, Forests::of_a_device(400));
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(on_the_cpu).on_the_cpu(),
        device_test!(in_interpreted_ptx).on_the_cpu(),
        device_test!(on_a_device),
    ])
}
