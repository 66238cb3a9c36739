//! `doctor`.

use crate::errors::Result;
use pat_rs::cuda::{CudaDevice, check_embedded_ptx};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

/// What this machine can run, and what is wrong where something is.
///
/// Returns:
///     ``version``; ``cpu_threads``; ``kernels``: kernels in the package, or what is wrong with them; ``cuda``: the version of
///     CUDA that the driver supports, or why CUDA cannot be used; ``devices``: name, compute capability, SMs and profile of
///     each; ``healthy``: whether nothing is broken (a machine without a GPU is a healthy one).
#[pyfunction]
#[pyo3(signature = () -> "dict[str, object]")]
pub(crate) fn doctor(py: Python<'_>) -> Result<Bound<'_, PyDict>> {
    let report = PyDict::new(py);
    report.set_item("version", env!("CARGO_PKG_VERSION"))?;
    report.set_item("cpu_threads", std::thread::available_parallelism().map_or(1, usize::from))?;
    let mut healthy = true;
    match check_embedded_ptx() {
        Ok(kernels) => report.set_item("kernels", kernels)?,
        Err(error) => {
            healthy = false;
            report.set_item("kernels", error.to_string())?;
        }
    }
    let devices = PyList::empty(py);
    match CudaDevice::new(0) {
        Err(error) => report.set_item("cuda", error.to_string())?,
        Ok(first) => {
            let (major, minor) = first.driver_cuda_version()?;
            report.set_item("cuda", format!("{major}.{minor}"))?;
            let mut next = Ok(first);
            while let Ok(device) = next {
                let entry = PyDict::new(py);
                entry.set_item("name", device.name())?;
                entry.set_item("compute_capability", device.compute_capability())?;
                entry.set_item("sm_count", device.sm_count())?;
                entry.set_item("profile", device.profile()?.name)?;
                devices.append(entry)?;
                next = CudaDevice::new(devices.len());
            }
        }
    }
    report.set_item("devices", devices)?;
    report.set_item("healthy", healthy)?;
    Ok(report)
}
