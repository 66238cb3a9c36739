//! The C program that runs on a device. Without one it is compiled, and reported as ignored, with the reason.

mod programs;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use programs::{compile_and_run, text};
use std::process::ExitCode;

/// What the program ends with where there is no device.
const NO_DEVICE: i32 = 77;

fn device_and_cpu_agree() -> Result<Completion, Failed> {
    let output = compile_and_run("cc", "-std=c11", "examples/device.c", "libpat_capi.so");
    match output.status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(NO_DEVICE) if std::env::var("PAT_REQUIRE_GPU").is_ok_and(|devices| devices != "0") => {
            Err(format!("PAT_REQUIRE_GPU is set, but: {}", text(&output).trim()).into())
        }
        Some(NO_DEVICE) => Ok(Completion::ignored_with(text(&output).trim())),
        _ => Err(format!("{}\n{}", output.status, text(&output)).into()),
    }
}

fn main() -> ExitCode {
    let trial = Trial::ignorable_test("device_and_cpu_agree", device_and_cpu_agree);
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
