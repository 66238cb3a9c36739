//! `calibrate`.

use crate::device::{self, Device};
use crate::errors::{Result, invalid};
use crate::profile::PyProfile;
use pat_bench::calibrate::{fit, measure, probes};
use pyo3::prelude::*;

/// Measures the terms of the planner's cost model on a CUDA device, as ``pat calibrate`` does. Takes some seconds to a minute, in
/// which nothing else should run on the device.
///
/// Args:
///     device: for example ``"cuda:0"``; by default the current CUDA device.
///
/// Returns:
///     A profile for :class:`Planner`; :meth:`DeviceProfile.to_json` keeps it.
///
/// Raises:
///     ValueError: the device is no CUDA device, or the times contradict the cost model.
///     CudaError: the driver fails, or the device has too little memory.
///     CudaUnavailable: there is no such device.
#[pyfunction]
#[pyo3(signature = (device: "torch.device | str | None" = None) -> "DeviceProfile")]
pub(crate) fn calibrate(py: Python<'_>, device: Option<&Bound<'_, PyAny>>) -> Result<PyProfile> {
    let Device::Cuda(ordinal) = Device::parse_or_current(py, device)? else {
        return Err(invalid("device", "cpu", "a CUDA device: the CPU executor has no cost model"));
    };
    let engine = device::engine(ordinal)?;
    let inner = py.detach(|| {
        let built_in = engine.device().profile()?;
        let samples = measure(&engine, &probes(&built_in)?, |_| {})?;
        fit(&built_in, &samples)
    })?;
    Ok(PyProfile { inner })
}
