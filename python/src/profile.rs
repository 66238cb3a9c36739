//! `DeviceProfile`.

use crate::device::{self, Device};
use crate::errors::{Result, argument, invalid};
use pyo3::prelude::*;

/// What the planner's cost model knows of a device.
#[pyclass(frozen, eq, module = "prefix_attn", name = "DeviceProfile")]
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PyProfile {
    pub(crate) inner: pat_rs::DeviceProfile,
}

#[pymethods]
impl PyProfile {
    /// The profile of a CUDA device of this machine, by default of the current one: measured where the device is known, else scaled from one that is. For
    /// ``"cpu"`` it is the H200's: the plan that is executed there is the one that a GPU would get.
    ///
    /// Raises:
    ///     CudaUnavailable: there is no such device, or no driver.
    #[staticmethod]
    #[pyo3(signature = (device: "torch.device | str | None" = None) -> "DeviceProfile")]
    fn detect(py: Python<'_>, device: Option<&Bound<'_, PyAny>>) -> Result<Self> {
        Self::of(Device::parse_or_current(py, device)?)
    }

    /// The profile of a known device.
    ///
    /// Args:
    ///     name: ``"a100-40"``, ``"a100-80"``, ``"h100-sxm"``, ``"h100-pcie"``, ``"h200"``, or the driver's name of one.
    ///
    /// Raises:
    ///     ValueError: the name is none of these; the message lists them.
    #[staticmethod]
    #[pyo3(signature = (name: "str"))]
    fn named(#[pyo3(from_py_with = argument::name)] name: &str) -> Result<Self> {
        Ok(Self { inner: pat_rs::DeviceProfile::by_name(name)? })
    }

    /// A profile that was written by :meth:`to_json` or by ``pat calibrate --output``.
    ///
    /// Raises:
    ///     ValueError: the text is no profile, or its numbers are those of no device.
    #[staticmethod]
    #[pyo3(signature = (text: "str"))]
    fn from_json(#[pyo3(from_py_with = argument::text)] text: &str) -> Result<Self> {
        let inner: pat_rs::DeviceProfile =
            serde_json::from_str(text).map_err(|error| invalid("text", error, "a device profile as JSON"))?;
        inner.validate()?;
        Ok(Self { inner })
    }

    /// The profile as JSON.
    fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(&self.inner).map_err(|error| invalid("profile", error, "finite numbers"))
    }

    /// The driver's name of the device.
    #[getter]
    fn name(&self) -> &str {
        &self.inner.name
    }

    /// Streaming multiprocessors.
    #[getter]
    fn sm_count(&self) -> u32 {
        self.inner.sm_count
    }

    /// Compute capability, major * 10 + minor.
    #[getter]
    fn compute_capability(&self) -> u32 {
        self.inner.compute_capability
    }

    fn __repr__(&self) -> String {
        format!("DeviceProfile(name=\"{}\", sm_count={})", self.name(), self.sm_count())
    }
}

impl PyProfile {
    /// The profile to plan with for a device.
    pub(crate) fn of(device: Device) -> Result<Self> {
        let inner = match device {
            Device::Cpu => pat_rs::DeviceProfile::h200(),
            Device::Cuda(ordinal) => device::engine(ordinal)?.device().profile()?,
        };
        Ok(Self { inner })
    }
}
