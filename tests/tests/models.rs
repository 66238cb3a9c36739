//! A test for each public model that has a name (`pat models`), on the CPU executor.

use pat_rs::Engine;
use pat_tests::for_each_model;
use pat_tests::models::{REFUSED, agree};
use pat_workloads::{MODELS, models};

/// A test of the same name for each of the models.
macro_rules! tests_of {
    ($($test:ident: $model:literal,)*) => {
        $(
            #[test]
            fn $test() {
                agree(&Engine::cpu(), $model);
            }
        )*

        const TESTED: &[&str] = &[$($model),*];
    };
}

for_each_model!(tests_of);

#[test]
fn every_model_has_a_test() {
    let names: Vec<_> = MODELS.iter().map(|model| model.name).collect();
    assert_eq!(names, TESTED);
    for (name, _) in REFUSED {
        models::layer(name).expect("a layer of the table");
    }
}
