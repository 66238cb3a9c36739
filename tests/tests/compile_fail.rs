//! What safe code cannot do with launches: each program in `compile_fail/` must be refused by the compiler, for the reason in the
//! `.stderr` beside it. With a later compiler that words it otherwise, `TRYBUILD=overwrite` writes the reasons anew: read the diff.

use pat_rs::cuda::{BoundRun, CudaDevice, CudaEngine, DeviceBuffer, DeviceSpan, Graph, PlanBuffers, Stream, Workspace};

#[test]
fn safe_code_cannot_separate_a_plan_from_its_run() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}

#[test]
fn launches_may_move_to_other_threads() {
    fn holds<T: Send + Sync + 'static>() -> usize {
        size_of::<T>()
    }
    let sizes = [
        holds::<BoundRun>(),
        holds::<Graph>(),
        holds::<PlanBuffers>(),
        holds::<CudaEngine>(),
        holds::<CudaDevice>(),
        holds::<Stream>(),
        holds::<Workspace>(),
        holds::<DeviceSpan>(),
        holds::<DeviceBuffer>(),
    ];
    assert!(sizes.iter().all(|&size| size > 0));
}
