//! What is asked of torch itself: its current stream, and memory for results. torch is never imported for it.

use crate::device::Device;
use crate::errors::{Result, invalid};
use crate::foreign::TorchExchange;
use crate::tensor::{Tensor, is_torch, torch_is_imported};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// The handle of the stream that torch's operations on a device go to now; the legacy default stream without torch.
pub(crate) fn current_stream(py: Python<'_>, ordinal: usize) -> Result<u64> {
    static IN_USE: PyOnceLock<()> = PyOnceLock::new();
    if IN_USE.get(py).is_none() {
        if !torch_is_imported(py)? {
            return Ok(0);
        }
        let _ = IN_USE.set(py, ());
    }
    if let Some(exchange) = TorchExchange::get(py)? {
        return exchange.current_stream(py, ordinal);
    }
    let stream =
        py.import(intern!(py, "torch"))?.getattr(intern!(py, "cuda"))?.call_method1("current_stream", (ordinal,))?;
    Ok(stream.getattr("cuda_stream")?.extract()?)
}

/// Memory like a tensor's, in torch's caching allocator. (The quickest of torch's calls for it, hot caches and cold.)
pub(crate) fn empty_like<'py>(q: &Bound<'py, PyAny>) -> Result<Bound<'py, PyAny>> {
    static EMPTY_LIKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = q.py();
    if !is_torch(q)? {
        return Err(invalid("out", "None", "memory for the output, where q is no torch tensor"));
    }
    Ok(EMPTY_LIKE.import(py, "torch", "empty_like")?.call1((q,))?)
}

/// Memory for the output beside q, whose rows are as long as those of a cache's values.
pub(crate) fn empty_out<'py>(
    q: &Bound<'py, PyAny>,
    read: &Tensor<'py>,
    values: &Tensor<'py>,
) -> Result<Bound<'py, PyAny>> {
    let elements = |tensor: &Tensor<'_>| tensor.sizes[..tensor.rank].last().copied();
    match (&read.sizes[..read.rank], elements(values)) {
        (&[rows, heads, head_dim], Some(v_head_dim)) if head_dim != v_head_dim && is_torch(q)? => {
            Ok(q.call_method1(intern!(q.py(), "new_empty"), ((rows, heads, v_head_dim),))?)
        }
        _ => empty_like(q),
    }
}

/// Memory for LSE, `[rows, q_heads]` of float32, beside q.
pub(crate) fn empty_lse<'py>(q: &Bound<'py, PyAny>, read: &Tensor<'py>) -> Result<Bound<'py, PyAny>> {
    let py = q.py();
    if !is_torch(q)? {
        return Err(invalid("lse", "None", "memory for the LSE, where q is no torch tensor"));
    }
    let torch = py.import(intern!(py, "torch"))?;
    let options = PyDict::new(py);
    options.set_item("dtype", torch.getattr("float32")?)?;
    options.set_item("device", q.getattr("device")?)?;
    Ok(torch.call_method("empty", ((read.sizes[0], read.sizes[1]),), Some(&options))?)
}

/// The handle of a call's stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Handle {
    /// torch's current stream of the tensors' device.
    Current(u64),
    /// One that the caller names, which may be any.
    Named(u64),
}

impl Handle {
    pub(crate) fn raw(self) -> u64 {
        match self {
            Self::Current(handle) | Self::Named(handle) => handle,
        }
    }
}

/// The stream of a call: the one that was named, else the current one. 0 on the CPU.
pub(crate) fn stream_of(py: Python<'_>, device: Device, named: Option<u64>) -> Result<Handle> {
    match (device, named) {
        (Device::Cpu, None) => Ok(Handle::Current(0)),
        (Device::Cpu, Some(stream)) => Err(invalid("stream", stream, "None for tensors on the CPU")),
        (Device::Cuda(_), Some(stream)) => Ok(Handle::Named(stream)),
        (Device::Cuda(ordinal), None) => Ok(Handle::Current(current_stream(py, ordinal)?)),
    }
}
