//! `merge_states`.

use crate::device::{self, Device};
use crate::errors::{Integer, Result, invalid, wrong_type};
use crate::foreign;
use crate::operands::{Span, check_distinct_rows, row_strides};
use crate::tensor::{Element, Tensor};
use crate::torch;
use pat_rs::RowStrides;
use pat_rs::cuda::DeviceState;
use pyo3::prelude::*;

/// Merges attention over two disjoint sets of tokens into attention over all of them, by the log-sum-exps.
///
/// On CUDA it enqueues one launch on torch's current stream.
///
/// Args:
///     out_a, out_b: outputs, ``[rows, heads, head_dim]``, float16 or bfloat16.
///     lse_a, lse_b: log-sum-exps, float32 ``[rows, heads]``, natural logarithm; -inf where there are no tokens, whatever the
///         output is there.
///     out, lse: memory for the result, by default new; may be ``out_a`` and ``lse_a``, or ``out_b`` and ``lse_b``.
///     stream: handle of a CUDA stream, instead of torch's current one.
///
/// Returns:
///     ``(out, lse)``; 0 and -inf where neither has tokens.
///
/// Raises:
///     TypeError: another element type, or no tensor.
///     ValueError: a shape, stride, device or address that is not accepted; the message names the argument, and nothing has
///         been written.
///     CudaError: the driver refuses the launch.
#[pyfunction]
#[pyo3(signature = (out_a: "torch.Tensor", lse_a: "torch.Tensor", out_b: "torch.Tensor", lse_b: "torch.Tensor", out: "torch.Tensor | None" = None, lse: "torch.Tensor | None" = None, *, stream: "SupportsIndex | None" = None) -> "tuple[torch.Tensor, torch.Tensor]")]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub(crate) fn merge_states<'py>(
    py: Python<'py>,
    out_a: &Bound<'py, PyAny>,
    lse_a: &Bound<'py, PyAny>,
    out_b: &Bound<'py, PyAny>,
    lse_b: &Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
    lse: Option<Bound<'py, PyAny>>,
    stream: Option<Integer>,
) -> Result<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let stream = stream.map(|stream| stream.unsigned("stream")).transpose()?;
    let first = Tensor::read("out_a", out_a, stream)?;
    let handle = torch::stream_of(py, first.device, stream)?;
    let read = |name, object: &Bound<'py, PyAny>| Tensor::read(name, object, Some(handle.raw()));
    let (out, read_out) = match out {
        Some(out) => {
            let read_out = read("out", &out)?;
            (out, read_out)
        }
        None => {
            let out = torch::empty_like(out_a)?;
            let read_out = Tensor::read_own("out", &out)?;
            (out, read_out)
        }
    };
    let (lse, read_lse) = match lse {
        Some(lse) => {
            let read_lse = read("lse", &lse)?;
            (lse, read_lse)
        }
        None => {
            let lse = torch::empty_lse(out_a, &first)?;
            let read_lse = Tensor::read_own("lse", &lse)?;
            (lse, read_lse)
        }
    };
    let mut states = [
        State { out: first, lse: read("lse_a", lse_a)? },
        State { out: read("out_b", out_b)?, lse: read("lse_b", lse_b)? },
        State { out: read_out, lse: read_lse },
    ];
    Tensor::settle(states.iter_mut().flat_map(|State { out, lse }| [out, lse]))?;
    let sizes = check(&states)?;
    let [a, b, merged] = &states;
    match a.out.device {
        Device::Cpu => match a.out.element {
            Element::Bf16 => foreign::merge_host::<half::bf16>(sizes, [a, b], merged)?,
            _ => foreign::merge_host::<half::f16>(sizes, [a, b], merged)?,
        },
        Device::Cuda(ordinal) => {
            let engine = device::engine(ordinal)?;
            let stream = foreign::stream(engine.device(), handle)?;
            let [a, b, merged] = [a.on_device()?, b.on_device()?, merged.on_device()?];
            engine.merge_states(sizes, states[0].dtype(), [&a, &b], &merged, &stream)?;
        }
    }
    Ok((out, lse))
}

/// One state's tensors.
pub(crate) struct State<'py> {
    pub(crate) out: Tensor<'py>,
    pub(crate) lse: Tensor<'py>,
}

impl State<'_> {
    fn dtype(&self) -> pat_rs::Dtype {
        match self.out.element {
            Element::Bf16 => pat_rs::Dtype::Bf16,
            _ => pat_rs::Dtype::F16,
        }
    }

    pub(crate) fn out_strides(&self) -> RowStrides {
        RowStrides { sequence: self.out.strides[0], head: self.out.strides[1] }
    }

    pub(crate) fn lse_strides(&self) -> RowStrides {
        RowStrides { sequence: self.lse.strides[0], head: self.lse.strides[1] }
    }

    fn on_device(&self) -> Result<DeviceState> {
        Ok(DeviceState {
            out: foreign::device_span(Span::of(&self.out)?),
            out_strides: self.out_strides(),
            lse: foreign::device_span(Span::of(&self.lse)?),
            lse_strides: self.lse_strides(),
        })
    }
}

/// Checks everything; the sizes are rows, heads and head dimension.
fn check(states: &[State<'_>; 3]) -> Result<(u32, u32, u32)> {
    let first = &states[0].out;
    if !matches!(first.element, Element::F16 | Element::Bf16) {
        return Err(wrong_type(first.name, format!("a tensor of {}", first.element), "float16 or bfloat16"));
    }
    if first.rank != 3 {
        return Err(invalid(first.name, format!("shape {}", first.shape()), "[rows, heads, head_dim]"));
    }
    let size = |dim: usize| {
        u32::try_from(first.sizes[dim])
            .map_err(|_| invalid(first.name, format!("shape {}", first.shape()), "sizes below 2^32"))
    };
    let (rows, heads, head_dim) = (size(0)?, size(1)?, size(2)?);
    for State { out, lse } in states {
        out.expect_element(&first.element)?;
        lse.expect_element(&Element::F32)?;
        for tensor in [out, lse] {
            tensor.expect_device(first.device, "as out_a")?;
            if tensor.sizes[0] != first.sizes[0] {
                let expected = format!("out_a's {rows} rows");
                return Err(invalid(tensor.name, format!("shape {}", tensor.shape()), expected));
            }
        }
        row_strides(out, rows, heads, Some(i64::from(head_dim)))?;
        row_strides(lse, rows, heads, None)?;
    }
    let [a, b, merged] = states;
    for tensor in [&merged.out, &merged.lse] {
        tensor.expect_writable()?;
        check_distinct_rows(tensor)?;
    }
    // The result may be one of the states. Anything else would be read after it was written.
    for (written, read) in [(&merged.out, [&a.out, &b.out]), (&merged.lse, [&a.lse, &b.lse])] {
        for other in read {
            let is_same = written.address == other.address && written.strides == other.strides;
            if !is_same && Span::of(written)?.overlaps(Span::of(other)?) {
                return Err(invalid(
                    written.name,
                    format!("part of the memory of {}", other.name),
                    "all or nothing of it",
                ));
            }
        }
    }
    for (written, read) in [(&merged.out, [&a.lse, &b.lse, &merged.lse]), (&merged.lse, [&a.out, &b.out, &merged.out])]
    {
        if let Some(other) = read.into_iter().find(
            |other| matches!((Span::of(written), Span::of(other)), (Ok(written), Ok(other)) if written.overlaps(other)),
        ) {
            return Err(invalid(written.name, format!("memory of {}", other.name), "memory of its own"));
        }
    }
    Ok((rows, heads, head_dim))
}
