//! `AttentionShape`.

use crate::errors::{Integer, Result, invalid};
use pat_rs::Dtype;
use pyo3::prelude::*;

/// Head counts, head dimension and element type of a model's attention; the same for all layers that share plans.
///
/// Args:
///     q_heads: query heads, a positive multiple of ``kv_heads``.
///     kv_heads: KV heads, at least 1.
///     head_dim: elements per head of Q and K.
///     dtype: element type of Q and O, and of K and V where they have no other: a torch dtype, or ``"float16"`` or
///         ``"bfloat16"``.
///     kv_dtype: element type of K and V where it is another: ``"float8_e4m3fn"`` or ``"float8_e5m2"``, or torch's.
///     value_head_dim: elements per head of V and O, where they are not those of K.
///
/// Raises:
///     ValueError: a type or a number that no attention has; the message names the argument. Whether there are kernels for a
///         shape, :func:`supports` says.
#[pyclass(frozen, eq, hash, module = "prefix_attn", name = "AttentionShape")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PyShape {
    pub(crate) inner: pat_rs::AttentionShape,
}

#[pymethods]
impl PyShape {
    #[new]
    #[pyo3(signature = (q_heads, kv_heads, head_dim, dtype: "torch.dtype | str", *, kv_dtype: "torch.dtype | str | None" = None, value_head_dim: "SupportsIndex | None" = None))]
    fn new(
        q_heads: Integer,
        kv_heads: Integer,
        head_dim: Integer,
        dtype: &Bound<'_, PyAny>,
        kv_dtype: Option<&Bound<'_, PyAny>>,
        value_head_dim: Option<Integer>,
    ) -> Result<Self> {
        let (q_heads, kv_heads) = (q_heads.count("q_heads", 1)?, kv_heads.count("kv_heads", 1)?);
        let head_dim = head_dim.count("head_dim", 1)?;
        let mut inner = pat_rs::AttentionShape::new(q_heads, kv_heads, head_dim, parse_dtype("dtype", dtype)?)?;
        if let Some(value_head_dim) = value_head_dim {
            inner = inner.with_v_head_dim(value_head_dim.count("value_head_dim", 1)?)?;
        }
        let kv_dtype = kv_dtype.map(|dtype| parse_stored("kv_dtype", dtype)).transpose()?;
        Ok(Self { inner: kv_dtype.map_or(inner, |dtype| inner.with_kv_dtype(dtype)) })
    }

    /// Query heads.
    #[getter]
    fn q_heads(&self) -> u32 {
        self.inner.q_heads()
    }

    /// KV heads, each for ``q_heads / kv_heads`` query heads.
    #[getter]
    fn kv_heads(&self) -> u32 {
        self.inner.kv_heads()
    }

    /// Elements per head of Q and K.
    #[getter]
    fn head_dim(&self) -> u32 {
        self.inner.head_dim()
    }

    /// Elements per head of V and O.
    #[getter]
    fn value_head_dim(&self) -> u32 {
        self.inner.v_head_dim()
    }

    /// Element type: ``"float16"`` or ``"bfloat16"``.
    #[getter]
    fn dtype(&self) -> &'static str {
        dtype_name(self.inner.dtype())
    }

    /// Element type of K and V.
    #[getter]
    fn kv_dtype(&self) -> &'static str {
        dtype_name(self.inner.kv_dtype())
    }

    pub(crate) fn __repr__(&self) -> String {
        let (q, kv, dim, dtype) = (self.q_heads(), self.kv_heads(), self.head_dim(), self.dtype());
        let kv_dtype = if self.inner.kv_dtype() == self.inner.dtype() {
            String::new()
        } else {
            format!(", kv_dtype=\"{}\"", self.kv_dtype())
        };
        let value_head_dim = if self.inner.v_head_dim() == dim {
            String::new()
        } else {
            format!(", value_head_dim={}", self.value_head_dim())
        };
        format!(
            "AttentionShape(q_heads={q}, kv_heads={kv}, head_dim={dim}, dtype=\"{dtype}\"{kv_dtype}{value_head_dim})"
        )
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
    one_of(&[Dtype::F16, Dtype::Bf16], "float16 or bfloat16", argument, dtype)
}

/// Likewise, one that a KV cache may have somewhere.
pub(crate) fn parse_stored(argument: &str, dtype: &Bound<'_, PyAny>) -> Result<Dtype> {
    let names = "float16, bfloat16, float8_e4m3fn or float8_e5m2";
    one_of(&[Dtype::F16, Dtype::Bf16, Dtype::E4m3, Dtype::E5m2], names, argument, dtype)
}

fn one_of(accepted: &[Dtype], names: &str, argument: &str, dtype: &Bound<'_, PyAny>) -> Result<Dtype> {
    let text = dtype.str()?;
    let text = text.to_string_lossy();
    let name = text.strip_prefix("torch.").unwrap_or(&text);
    let known = accepted.iter().copied().find(|dtype| dtype_name(*dtype) == name);
    known.ok_or_else(|| invalid(argument, name, format!("{names}, as a torch dtype or a string")))
}
