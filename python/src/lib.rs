//! `prefix_attn._native`: the Python package's extension module. The package itself, `python/prefix_attn`, re-exports it.

mod apart;
mod append;
mod buffers;
mod calibrate;
mod capacity;
mod device;
mod doctor;
mod errors;
mod foreign;
mod fork;
mod merge;
mod operands;
mod plan;
mod planner;
mod profile;
mod resident;
mod run;
mod scores;
mod shape;
mod support;
mod tables;
mod tensor;
mod torch;
mod workspace;

use pyo3::prelude::*;

/// The compiled part of prefix_attn.
// The wheel is one of the stable ABI, which free-threaded builds of Python do not load; one that does gets its lock back.
#[pymodule(gil_used = true)]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(py: Python<'_>) -> PyResult<()> {
        super::fork::register(py)
    }

    #[pymodule_export]
    use super::append::append_kv;
    #[pymodule_export]
    use super::buffers::{PyBoundRun, PyPlanBuffers};
    #[pymodule_export]
    use super::calibrate::calibrate;
    #[pymodule_export]
    use super::capacity::PyCapacity;
    #[pymodule_export]
    use super::doctor::doctor;
    #[pymodule_export]
    use super::merge::merge_states;
    #[pymodule_export]
    use super::plan::PyPlan;
    #[pymodule_export]
    use super::planner::{PyPlanFuture, PyPlanner};
    #[pymodule_export]
    use super::profile::PyProfile;
    #[pymodule_export]
    use super::run::run;
    #[pymodule_export]
    use super::shape::PyShape;
    #[pymodule_export]
    use super::support::supports;
    #[pymodule_export]
    use super::workspace::PyWorkspace;
}
