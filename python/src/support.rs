//! `supports`.

use crate::errors::{Integer, Result, argument, expect, in_python, invalid};
use crate::planner::read_reach;
use crate::scores::read_number;
use crate::shape::{PyShape, parse_stored};
use pat_rs::Problem;
use pyo3::prelude::*;

/// Whether the kernels compute a model's attention. Asks no device.
///
/// Args:
///     shape: heads, head dimension and type.
///     page_size: tokens per page.
///     window: tokens that a sliding window leaves, if the model has one.
///     chunk: tokens of a chunk, if the model has chunked attention (Llama 4) instead.
///     softcap: the cap of scores, if the model has one.
///     sinks: whether it has attention sinks.
///     kv_dtype: the type of the KV cache, where it is not that of Q.
///     query_tokens: query tokens of each sequence; by default 1.
///     query_tree: whether its query tokens may form a tree.
///     alibi: whether it has linear position biases.
///     value_head_dim: elements per head of V, where they are not those of K.
///
/// Returns:
///     None if it can, else the reason why not.
#[pyfunction]
#[pyo3(signature = (shape: "AttentionShape", page_size, *, window: "SupportsIndex | None" = None, softcap: "float | None" = None, sinks: "bool" = false, kv_dtype: "torch.dtype | str | None" = None, query_tokens = None, alibi: "bool" = false, value_head_dim: "SupportsIndex | None" = None, chunk: "SupportsIndex | None" = None, query_tree: "bool" = false) -> "str | None")]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub(crate) fn supports(
    shape: &Bound<'_, PyAny>,
    page_size: Integer,
    window: Option<Integer>,
    softcap: Option<&Bound<'_, PyAny>>,
    #[pyo3(from_py_with = argument::sinks)] sinks: bool,
    kv_dtype: Option<&Bound<'_, PyAny>>,
    query_tokens: Option<Integer>,
    #[pyo3(from_py_with = argument::alibi)] alibi: bool,
    value_head_dim: Option<Integer>,
    chunk: Option<Integer>,
    #[pyo3(from_py_with = argument::query_tree)] query_tree: bool,
) -> Result<Option<String>> {
    let shape = expect::<PyShape>("shape", shape)?.get();
    let (page_size, query_tokens) =
        (page_size.count("page_size", 1)?, query_tokens.map_or(Ok(1), |tokens| tokens.count("query_tokens", 1))?);
    if query_tokens == 0 {
        return Err(invalid("query_tokens", 0, "at least 1"));
    }
    let mut inner = shape.inner;
    if let Some(head_dim) = value_head_dim {
        inner = inner.with_v_head_dim(head_dim.count("value_head_dim", 1)?)?;
    }
    if let Some(dtype) = kv_dtype {
        inner = inner.with_kv_dtype(parse_stored("kv_dtype", dtype)?);
    }
    // More than any context has is as good as all of it.
    let [window, chunk] = [window, chunk].map(|tokens| tokens.map(|tokens| tokens.at_most(u32::MAX)));
    let reach = read_reach(window, chunk)?;
    let mut problem = Problem::new(inner, page_size).with_query_tokens(query_tokens).with_reach(reach);
    if let Some(cap) = softcap {
        problem = problem.with_soft_cap(read_number("softcap", cap)? as f32);
    }
    if query_tree {
        problem = problem.with_query_tree(query_tokens);
    }
    if sinks {
        problem = problem.with_sinks();
    }
    if alibi {
        problem = problem.with_alibi();
    }
    Ok(pat_rs::supports(&problem, None, None).err().map(|reason| in_python(&reason.to_string())))
}
