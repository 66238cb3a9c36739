//! Devices as Python names them, and one engine for each.

use crate::errors::{Result, invalid, wrong_type};
use pat_rs::cuda::CudaEngine;
use pyo3::prelude::*;
use pyo3::types::PyString;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Where tensors are and plans run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    Cpu,
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl Device {
    /// A `torch.device`, or a string like `cpu`, `cuda`, `cuda:1`.
    pub(crate) fn parse(argument: &str, device: &Bound<'_, PyAny>) -> Result<Self> {
        let expected = "cpu, cuda or cuda:N, as a string or a torch.device";
        if !device.is_instance_of::<PyString>() && !device.hasattr("index")? {
            return Err(wrong_type(argument, device.get_type().name()?, expected));
        }
        let text = device.str()?;
        let text = text.to_string_lossy();
        match text.split_once(':').unwrap_or((&text, "")) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", "") => Ok(Self::Cuda(current_cuda_device(device.py()))),
            ("cuda", ordinal) => ordinal.parse().map(Self::Cuda).map_err(|_| invalid(argument, &text, expected)),
            _ => Err(invalid(argument, &text, expected)),
        }
    }

    /// The argument `device`, by default the current CUDA device.
    pub(crate) fn parse_or_current(py: Python<'_>, device: Option<&Bound<'_, PyAny>>) -> Result<Self> {
        device.map_or_else(|| Ok(Self::Cuda(current_cuda_device(py))), |device| Self::parse("device", device))
    }
}

/// torch's current device where torch is in use, else 0.
fn current_cuda_device(py: Python<'_>) -> usize {
    let current = || -> PyResult<usize> {
        let modules = py.import("sys")?.getattr("modules")?;
        modules.get_item("torch")?.getattr("cuda")?.call_method0("current_device")?.extract()
    };
    // Without torch, or where torch sees no device: the engine then says what is wrong with device 0.
    current().unwrap_or(0)
}

/// The engine of a CUDA device, made at its first use and kept as long as the process lives, as torch keeps its contexts.
pub(crate) fn engine(ordinal: usize) -> Result<Arc<CudaEngine>> {
    static ENGINES: Mutex<Option<HashMap<usize, Arc<CudaEngine>>>> = Mutex::new(None);
    // A panic elsewhere leaves the map as it was before or after an insertion.
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    let engines = engines.get_or_insert_default();
    if let Some(engine) = engines.get(&ordinal) {
        return Ok(engine.clone());
    }
    let engine = Arc::new(CudaEngine::new(ordinal)?);
    engines.insert(ordinal, engine.clone());
    Ok(engine)
}
