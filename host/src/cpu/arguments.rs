//! Checks of the executor's arguments, before anything is written.

use super::{Element, HostTensors};
use crate::{Error, KvStrides, Plan, Result, RowStrides};

/// See [`super::run`] for the errors.
pub(super) fn check<T: Element>(
    plan: &Plan,
    tensors: &HostTensors<'_, T>,
    out_len: usize,
    lse_len: Option<usize>,
) -> Result<()> {
    let shape = plan.shape();
    if T::DTYPE != shape.dtype() {
        return Err(Error::PlanMismatch {
            what: "the element type".into(),
            plan: format!("{:?}", shape.dtype()),
            call: format!("{:?}", T::DTYPE),
        });
    }
    if !tensors.softmax_scale.is_finite() {
        return Err(Error::invalid("softmax_scale", tensors.softmax_scale, "a finite number"));
    }
    let (sequences, q_heads) = (plan.sequence_count(), shape.q_heads());
    let row_extents =
        |strides: RowStrides| [("sequence", sequences, strides.sequence), ("head", q_heads, strides.head)];
    let kv_extents = |strides: KvStrides| {
        [
            ("page", plan.num_pages(), strides.page),
            ("token", plan.page_size(), strides.token),
            ("head", shape.kv_heads(), strides.head),
        ]
    };
    check_extents("q", tensors.q.len(), &row_extents(tensors.q_strides), shape.head_dim())?;
    check_extents("out", out_len, &row_extents(tensors.out_strides), shape.head_dim())?;
    check_extents("k", tensors.k.len(), &kv_extents(tensors.k_strides), shape.head_dim())?;
    check_extents("v", tensors.v.len(), &kv_extents(tensors.v_strides), shape.head_dim())?;
    lse_len.map_or(Ok(()), |len| check_extents("lse", len, &row_extents(tensors.lse_strides), 1))
}

/// Whether a slice of `len` elements holds every (index, …, `0..innermost`) of the dimensions `(name, count, stride)`.
pub(super) fn check_extents(argument: &str, len: usize, dimensions: &[(&str, u32, i64)], innermost: u32) -> Result<()> {
    if let Some((name, _, stride)) = dimensions.iter().find(|(_, _, stride)| *stride < 0) {
        return Err(Error::invalid(format!("{argument}_strides.{name}"), stride, "0 or more elements"));
    }
    if dimensions.iter().any(|&(_, count, _)| count == 0) {
        return Ok(());
    }
    let last: i128 = dimensions.iter().map(|&(_, count, stride)| i128::from(count - 1) * i128::from(stride)).sum();
    let needed = last + i128::from(innermost);
    if (len as i128) < needed {
        return Err(Error::invalid(
            argument,
            format!("{len} elements"),
            format!("at least {needed} for its strides {dimensions:?} (dimension, count, stride)"),
        ));
    }
    Ok(())
}
