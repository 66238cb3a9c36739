//! `AttentionShape`.

use crate::errors::{Result, invalid};
use pat_rs::Dtype;
use pyo3::prelude::*;

/// Head counts, head dimension and element type of a model's attention; the same for all layers that share plans.
///
/// Args:
///     q_heads: query heads, a positive multiple of ``kv_heads``.
///     kv_heads: KV heads, at least 1.
///     head_dim: elements per head of Q, K and V.
///     dtype: element type of Q, K, V and O: a torch dtype, or ``"float16"`` or ``"bfloat16"``.
///
/// Raises:
///     ValueError: there is no kernel for such a shape; the message names the argument.
#[pyclass(frozen, eq, hash, module = "prefix_attn", name = "AttentionShape")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PyShape {
    pub(crate) inner: pat_rs::AttentionShape,
}

#[pymethods]
impl PyShape {
    #[new]
    #[pyo3(signature = (q_heads, kv_heads, head_dim, dtype: "torch.dtype | str"))]
    fn new(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: &Bound<'_, PyAny>) -> Result<Self> {
        Ok(Self { inner: pat_rs::AttentionShape::new(q_heads, kv_heads, head_dim, parse_dtype("dtype", dtype)?)? })
    }

    /// Query heads.
    #[getter]
    fn q_heads(&self) -> u32 {
        self.inner.q_heads()
    }

    /// KV heads.
    #[getter]
    fn kv_heads(&self) -> u32 {
        self.inner.kv_heads()
    }

    /// Elements per head.
    #[getter]
    fn head_dim(&self) -> u32 {
        self.inner.head_dim()
    }

    /// Element type: ``"float16"`` or ``"bfloat16"``.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.inner.dtype())
    }

    pub(crate) fn __repr__(&self) -> String {
        let (q, kv, dim) = (self.q_heads(), self.kv_heads(), self.head_dim());
        format!("AttentionShape(q_heads={q}, kv_heads={kv}, head_dim={dim}, dtype=\"{}\")", self.dtype())
    }
}

/// The name that torch and numpy have for it.
pub(crate) fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::Bf16 => "bfloat16",
        Dtype::E4m3 => "float8_e4m3fn",
        Dtype::E5m2 => "float8_e5m2",
        other => other.name(),
    }
}

/// A torch or numpy dtype, or its name: one that Q may have.
pub(crate) fn parse_dtype(argument: &str, dtype: &Bound<'_, PyAny>) -> Result<Dtype> {
    match parse_stored(argument, dtype)? {
        known @ (Dtype::F16 | Dtype::Bf16) => Ok(known),
        other => Err(invalid(argument, dtype_name(other), EXPECTED)),
    }
}

const EXPECTED: &str = "float16 or bfloat16, as a torch dtype or a string";

/// Likewise, one that a KV cache may have somewhere.
pub(crate) fn parse_stored(argument: &str, dtype: &Bound<'_, PyAny>) -> Result<Dtype> {
    let text = dtype.str()?;
    let text = text.to_string_lossy();
    match text.strip_prefix("torch.").unwrap_or(&text) {
        "float16" => Ok(Dtype::F16),
        "bfloat16" => Ok(Dtype::Bf16),
        "float8_e4m3fn" => Ok(Dtype::E4m3),
        "float8_e5m2" => Ok(Dtype::E5m2),
        other => Err(invalid(argument, other, EXPECTED)),
    }
}
