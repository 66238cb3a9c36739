//! Tests that need a CUDA device: a harness that reports those that cannot run as ignored, with the reason. libtest would count
//! them as passed.

use libtest_mimic::{Arguments, Completion, Trial};
use pat_rs::Engine;
use std::process::ExitCode;

/// The number of devices that a machine has to have: a test that wants no more of them and cannot run fails.
pub const REQUIRE_GPU: &str = "PAT_REQUIRE_GPU";

/// A test function and its name.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTest {
    name: &'static str,
    devices: usize,
    run: fn(&Engine),
}

impl DeviceTest {
    /// A test on device 0.
    pub fn new(name: &'static str, run: fn(&Engine)) -> Self {
        Self { name, devices: 1, run }
    }

    /// The same, where there are at least so many devices.
    pub fn on_devices(self, devices: usize) -> Self {
        Self { devices, ..self }
    }

    /// The same, on the CPU: it always runs.
    pub fn on_the_cpu(self) -> Self {
        self.on_devices(0)
    }

    fn complete(self, required_devices: usize) -> Result<Completion, String> {
        // The last one first: what is left is device 0, or the first reason why there are not enough.
        let opened = (0..self.devices).rev().map(Engine::cuda).reduce(|further, nearer| further.and(nearer));
        match opened.unwrap_or_else(|| Ok(Engine::cpu())) {
            Ok(engine) => (self.run)(&engine),
            Err(reason) if self.devices <= required_devices => {
                return Err(format!("{REQUIRE_GPU} is {required_devices}, but: {reason}"));
            }
            Err(reason) => return Ok(Completion::ignored_with(reason)),
        }
        Ok(Completion::Completed)
    }
}

/// Names a test function to [`main`].
#[macro_export]
macro_rules! device_test {
    ($test:ident) => {
        $crate::device_tests::DeviceTest::new(stringify!($test), $test)
    };
}

/// Runs the tests as libtest would, one at a time unless `--test-threads` says otherwise: they time and fill one device.
pub fn main(tests: impl IntoIterator<Item = DeviceTest>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let required = std::env::var(REQUIRE_GPU).map_or(0, |devices| {
        devices.parse().unwrap_or_else(|_| panic!("{REQUIRE_GPU}: got {devices:?}, expected a number of devices"))
    });
    let trial =
        |test: DeviceTest| Trial::ignorable_test(test.name, move || test.complete(required).map_err(Into::into));
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit_code()
}
