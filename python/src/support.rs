//! `supports`.

use crate::errors::{Result, invalid};
use crate::shape::PyShape;
use pat_rs::{Features, KvStrides};
use pyo3::prelude::*;

/// Whether the kernels compute a model's attention. Asks no device.
///
/// Args:
///     shape: heads, head dimension and type.
///     page_size: tokens per page.
///     window: tokens that a sliding window leaves, if the model has one.
///     softcap: the cap of scores, if the model has one.
///     sinks: whether it has attention sinks.
///     kv_dtype: the type of the KV cache, where it is not that of Q.
///     query_tokens: query tokens of each sequence.
///     alibi: whether it has linear position biases.
///     value_head_dim: elements per head of V, where they are not those of K.
///
/// Returns:
///     None if it can, else the reason why not.
#[pyfunction]
#[pyo3(signature = (shape: "AttentionShape", page_size, *, window: "int | None" = None, softcap: "float | None" = None, sinks = false, kv_dtype: "torch.dtype | str | None" = None, query_tokens = 1, alibi = false, value_head_dim: "int | None" = None) -> "str | None")]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub(crate) fn supports(
    shape: &Bound<'_, PyShape>,
    page_size: u32,
    window: Option<u64>,
    softcap: Option<f64>,
    sinks: bool,
    kv_dtype: Option<&Bound<'_, PyAny>>,
    query_tokens: u32,
    alibi: bool,
    value_head_dim: Option<u32>,
) -> Result<Option<String>> {
    let shape = shape.get();
    if query_tokens == 0 {
        return Err(invalid("query_tokens", 0, "at least 1"));
    }
    let stored = kv_dtype.map(|dtype| dtype.str()).transpose()?;
    let stored = stored.as_ref().map(|text| text.to_string_lossy());
    let stored = stored.as_deref().map(|text| text.strip_prefix("torch.").unwrap_or(text));
    let own = crate::shape::dtype_name(shape.inner.dtype());
    if let Some(stored) = stored.filter(|stored| *stored != own && !stored.starts_with("float8")) {
        return Ok(Some(format!("a KV cache of {stored} beside queries of {own} is not supported")));
    }
    let features = Features {
        softcap: softcap.is_some(),
        sliding_window: window.is_some(),
        sinks,
        alibi,
        fp8_kv: stored.is_some_and(|stored| stored.starts_with("float8")),
        value_head_dim,
        query_tokens: Some(query_tokens),
    };
    let (kv_heads, head_dim) = (shape.inner.kv_heads(), shape.inner.head_dim());
    let strides = KvStrides::nhd(page_size, kv_heads, head_dim);
    Ok(pat_rs::supports(shape.inner, page_size, strides, strides, features).err().map(|reason| reason.to_string()))
}
