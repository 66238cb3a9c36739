//! On candle's CUDA storage. Without a device the tests are reported as ignored, with the reason.

mod common;

use candle_core::{DType, Device, Tensor};
use libtest_mimic::{Arguments, Completion, Trial};
use pat_candle::{Layer, PlannedStep};
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, PlanOptions, Planner, Problem};
use std::process::ExitCode;

/// On a device with the per-thread default stream, and on one with a stream of its own.
fn on_both_devices(test: fn(&Device)) {
    test(&Device::new_cuda(0).unwrap());
    test(&Device::new_cuda_with_stream(0).unwrap());
}

fn small_step(device: &Device) -> (PlannedStep, Tensor, Tensor) {
    let problem = Problem::new(AttentionShape::new(8, 2, 64, Dtype::F16).unwrap(), 16);
    let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::default()).unwrap();
    let batch = DecodeBatch::from_block_tables(&[&[0]], &[7u32], 16, 1).unwrap();
    let step = PlannedStep::new(planner.plan(&batch).unwrap(), device).unwrap();
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F16, device).unwrap();
    (step, ones(&[1, 8, 64]), ones(&[1, 16, 2, 64]))
}

fn other_devices_and_threads_are_refused() {
    let device = Device::new_cuda(0).unwrap();
    let (step, q, cache) = small_step(&device);
    let attend = |q: &Tensor, step: &PlannedStep| step.attend(q, &cache, &cache, Layer::default());
    let message = attend(&q.to_device(&Device::Cpu).unwrap(), &step).unwrap_err().to_string();
    assert!(message.contains("q: got a tensor on Cpu, expected one on Cuda { gpu_id: 0 }"), "{message}");
    // The handle of the per-thread stream is another stream in another thread.
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| attend(&q, &step).unwrap_err().to_string()).join().unwrap();
        assert!(refused.contains("device: got the per-thread default stream"), "{refused}");
    });
    attend(&q, &step).unwrap();

    let device = Device::new_cuda_with_stream(0).unwrap();
    let (step, q, cache) = small_step(&device);
    let out = std::thread::scope(|scope| {
        scope.spawn(|| step.attend(&q, &cache, &cache, Layer::default()).unwrap()).join().unwrap()
    });
    let values = out.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    assert!(values.iter().all(|value| (value - 1.0).abs() < 1e-3), "{values:?}");
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let required = std::env::var("PAT_REQUIRE_GPU").is_ok_and(|devices| devices != "0");
    let tests: [(&str, fn()); 4] = [
        ("every_layout_is_right", || on_both_devices(common::every_layout_is_right)),
        ("steps_follow_each_other", || on_both_devices(common::steps_follow_each_other)),
        ("bad_tensors_are_refused", || on_both_devices(common::bad_tensors_are_refused)),
        ("other_devices_and_threads_are_refused", other_devices_and_threads_are_refused),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::ignorable_test(name, move || match Device::new_cuda(0) {
            Ok(_) => {
                test();
                Ok(Completion::Completed)
            }
            Err(reason) if required => Err(reason.to_string().into()),
            Err(reason) => Ok(Completion::ignored_with(reason.to_string())),
        })
    };
    libtest_mimic::run(&arguments, tests.map(trial).into()).exit_code()
}
