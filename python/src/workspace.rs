//! `Workspace`: memory for partial results.

use crate::device::{self, Device};
use crate::errors::{Integer, Result, expect, invalid};
use crate::planner::PyPlanner;
use pat_rs::cuda::Workspace;
use pyo3::prelude::*;

/// Device memory for partial results. One serves all layers that run in the order of a stream; runs that may overlap need one
/// each.
///
/// Args:
///     bytes: its size. :meth:`for_planner` computes it.
///     device: where, for example ``"cuda:0"``. On the CPU none is needed, and nothing is allocated.
///
/// Raises:
///     CudaError: the driver cannot allocate.
#[pyclass(frozen, module = "prefix_attn", name = "Workspace")]
#[derive(Debug)]
pub(crate) struct PyWorkspace {
    pub(crate) device: Device,
    pub(crate) memory: Option<Workspace>,
    bytes: u64,
}

#[pymethods]
impl PyWorkspace {
    #[new]
    #[pyo3(signature = (bytes, device: "torch.device | str"))]
    fn new(bytes: Integer, device: &Bound<'_, PyAny>) -> Result<Self> {
        Self::with_bytes(bytes.unsigned("bytes")?, Device::parse("device", device)?)
    }

    /// Memory for every plan of a planner with a capacity, on the planner's device.
    ///
    /// Raises:
    ///     ValueError: the planner has no capacity, or no device (it was made from a profile).
    ///     CudaError: the driver cannot allocate.
    #[staticmethod]
    #[pyo3(signature = (planner: "Planner"))]
    fn for_planner(planner: &Bound<'_, PyAny>) -> Result<Self> {
        let planner = expect::<PyPlanner>("planner", planner)?.get();
        let (capacity, device) = (planner.fixed_capacity()?, planner.fixed_device()?);
        Self::with_bytes(capacity.partial_bytes(planner.shape.inner), device)
    }

    /// Its size in bytes.
    #[getter]
    fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where it is: ``"cpu"`` or ``"cuda:N"``.
    #[getter]
    fn device(&self) -> String {
        self.device.to_string()
    }

    fn __repr__(&self) -> String {
        format!("Workspace(bytes={}, device=\"{}\")", self.bytes, self.device)
    }
}

impl PyWorkspace {
    pub(crate) fn with_bytes(bytes: u64, device: Device) -> Result<Self> {
        let memory = match device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => Some(Workspace::with_capacity(device::engine(ordinal)?.device(), bytes)?),
        };
        Ok(Self { device, memory, bytes })
    }

    /// The memory for a run on CUDA device `ordinal`.
    pub(crate) fn on_cuda(&self, ordinal: usize) -> Result<&Workspace> {
        self.memory.as_ref().filter(|_| self.device == Device::Cuda(ordinal)).ok_or_else(|| {
            invalid("workspace", format!("one on {}", self.device), format!("one on cuda:{ordinal}, where the run is"))
        })
    }
}
