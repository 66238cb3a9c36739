//! `pat doctor`: what this machine can run. Needs no toolchain and no repository: the executable may be all there is.

use crate::output;
use anyhow::Result;
use pat_rs::cuda::{CudaEngine, check_embedded_ptx};
use pat_rs::{AttentionShape, Dtype, Problem, TileVariant};
use std::time::Instant;

/// How a check ended. Only [`State::Fail`] makes the exit status 1: a machine without a GPU is a healthy one.
enum State {
    Ok,
    Absent,
    Fail,
}

pub(crate) fn run() -> Result<bool> {
    let mut healthy = true;
    let mut line = |state: State, name: &str, text: String, advice: Option<&str>| -> Result<()> {
        let mark = match state {
            State::Ok => "ok",
            State::Absent => "none",
            State::Fail => {
                healthy = false;
                "FAIL"
            }
        };
        output::print(format_args!("{mark:<4}  {name:<18} {text}"))?;
        if let Some(advice) = advice {
            output::print(format_args!("{:25}{advice}", ""))?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    line(State::Ok, "CPU executor", format!("{threads} threads"), None)?;
    match check_embedded_ptx() {
        Ok(kernels) => line(State::Ok, "embedded PTX", format!("all {kernels} kernels of the manifest"), None)?,
        Err(error) => line(
            State::Fail,
            "embedded PTX",
            error.to_string(),
            Some("repair: in the repository, run `cargo xtask build-ptx` and build pat again"),
        )?,
    }
    match CudaEngine::new(0) {
        Err(error) => line(
            State::Absent,
            "CUDA",
            error.to_string(),
            Some("without it, everything but `pat calibrate` works on the CPU"),
        )?,
        Ok(engine) => {
            let device = engine.device();
            let (major, minor) = device.driver_cuda_version()?;
            line(State::Ok, "CUDA driver", format!("supports CUDA {major}.{minor}"), None)?;
            let capability = device.compute_capability();
            line(
                State::Ok,
                "CUDA device",
                format!("{}, compute capability {}.{}", device.name(), capability / 10, capability % 10),
                None,
            )?;
            let profile = device.profile()?;
            line(State::Ok, "cost model", format!("profile {}", profile.name), None)?;
            for variant in profile.variants(&problem()?) {
                let begin = Instant::now();
                match load(&engine, variant) {
                    Ok(()) => {
                        let text = format!("loaded in {:.0} ms", begin.elapsed().as_secs_f64() * 1e3);
                        line(State::Ok, variant.name(), text, None)?;
                    }
                    Err(error) => line(
                        State::Fail,
                        variant.name(),
                        error.to_string(),
                        Some("repair: update the NVIDIA driver; if it is the newest, report this line"),
                    )?,
                }
            }
        }
    }
    Ok(healthy)
}

/// Tokens per page: every tile variant can read such pages.
const PAGE_SIZE: u32 = 32;

fn problem() -> pat_rs::Result<Problem> {
    Ok(Problem::new(AttentionShape::new(32, 8, 128, Dtype::F16)?, PAGE_SIZE))
}

/// Has the driver compile the kernels of a tile variant.
fn load(engine: &CudaEngine, variant: TileVariant) -> pat_rs::Result<()> {
    engine.prepare_variants(&problem()?, &[variant])
}
