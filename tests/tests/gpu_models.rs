//! A test for each public model that has a name (`pat models`), on a device.

use pat_rs::Engine;
use pat_tests::models::agree;
use pat_tests::{device_test, for_each_model};
use std::process::ExitCode;

/// A test of the same name for each of the models.
macro_rules! tests_of {
    ($($test:ident: $model:literal,)*) => {
        $(
            fn $test(engine: &Engine) {
                agree(engine, $model);
            }
        )*

        fn main() -> ExitCode {
            pat_tests::device_tests::main([$(device_test!($test)),*])
        }
    };
}

for_each_model!(tests_of);
