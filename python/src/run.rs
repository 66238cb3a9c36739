//! `run`: one layer of one decode step.

use crate::device::Device;
use crate::errors::{Integer, Result, argument, expect};
use crate::operands::{Facts, KvLayout, Operands, Tensors};
use crate::plan::PyPlan;
use crate::resident;
use crate::scores::Scores;
use crate::tensor::Tensor;
use crate::torch;
use crate::workspace::PyWorkspace;
use pyo3::prelude::*;

/// Decode attention of one layer: for row b, query head h and KV head g = h / (q_heads / kv_heads),
/// ``out[b, h] = sum_t softmax_t(scale * q[b, h] . k[t, g]) v[t, g]`` over the tokens that the plan's block table of b names.
///
/// On CUDA it enqueues on torch's current stream and the host waits for nothing; the first run of a plan uploads it. A run on
/// another stream than that one waits, on the device, for what that stream has been given. On the CPU it computes with all
/// threads before it returns, and holds the interpreter's lock meanwhile: for tests and tools.
///
/// Args:
///     plan: of :meth:`Planner.plan`.
///     q: ``[rows, q_heads, head_dim]``, at least the plan's rows; what is behind them is not touched.
///     k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]`` ("NHD") or ``[pages, kv_heads, page_size, head_dim]``
///         ("HND"), with any strides in front of a contiguous last dimension; v_cache may lie inside k_cache's rows. 8-bit caches
///         may be given as uint8.
///     out: memory for the output, as q; by default new.
///     lse: memory for the log-sum-exps, float32 ``[rows, q_heads]``, natural logarithm.
///     scale: factor on the scores; by default ``head_dim ** -0.5``. Scores beyond float32's range can give NaN.
///     softcap: caps the scaled scores: ``softcap * tanh(score / softcap)``; the planner must know that there is a cap.
///     sinks: float32 ``[q_heads]``: for each query head one more score, neither scaled nor capped, that adds to the
///         denominator and has no value. The log-sum-exps contain it: rows of length 0 get 0 and the sink.
///         A sink that is NaN or +inf gives NaN.
///     k_scale, v_scale: what the elements of 8-bit caches are multiplied with: a number, or float32 ``[kv_heads]``. Numbers in
///         device memory are not looked at; others are finite and above 0.
///     return_lse: return ``(out, lse)``; lse is new where it is not given.
///     kv_layout: order of the dimensions of the caches.
///     workspace: memory for partial results; by default the plan has its own.
///     stream: handle of a CUDA stream of the device's primary context, to use instead of torch's current one; it has to live
///         until the call returns.
///
/// Tensors are torch's, or any DLPack producer's (numpy, cupy, jax; then ``out`` must be given). Device addresses are
/// multiples of 16 bytes, strides multiples of 8 elements (16 of 8-bit caches).
///
/// Returns:
///     out, or ``(out, lse)``. Rows of length 0 get 0 and -inf, or their sink.
///
/// Raises:
///     TypeError: another element type, or no tensor.
///     ValueError: a shape, stride, device, address or value that is not accepted. The message names the argument; nothing
///         has been written.
///     CudaError: the driver refuses a launch.
#[pyfunction]
#[pyo3(signature = (plan: "Plan", q: "torch.Tensor", k_cache: "torch.Tensor", v_cache: "torch.Tensor", out: "torch.Tensor | None" = None, lse: "torch.Tensor | None" = None, *, scale: "float | None" = None, softcap: "float | None" = None, sinks: "torch.Tensor | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, return_lse: "bool" = false, kv_layout: "str" = "NHD", workspace: "Workspace | None" = None, stream = None) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]")]
#[expect(clippy::too_many_arguments, reason = "the Python signature")]
pub(crate) fn run<'py>(
    py: Python<'py>,
    plan: &Bound<'py, PyAny>,
    q: &Bound<'py, PyAny>,
    k_cache: &Bound<'py, PyAny>,
    v_cache: &Bound<'py, PyAny>,
    out: Option<Bound<'py, PyAny>>,
    lse: Option<Bound<'py, PyAny>>,
    scale: Option<&Bound<'py, PyAny>>,
    softcap: Option<&Bound<'py, PyAny>>,
    sinks: Option<&Bound<'py, PyAny>>,
    k_scale: Option<&Bound<'py, PyAny>>,
    v_scale: Option<&Bound<'py, PyAny>>,
    #[pyo3(from_py_with = argument::return_lse)] return_lse: bool,
    #[pyo3(from_py_with = argument::kv_layout)] kv_layout: &str,
    workspace: Option<&Bound<'py, PyAny>>,
    stream: Option<Integer>,
) -> Result<Bound<'py, PyAny>> {
    let plan = expect::<PyPlan>("plan", plan)?.get();
    let workspace = workspace.map(|workspace| expect::<PyWorkspace>("workspace", workspace)).transpose()?;
    let layout = KvLayout::parse(kv_layout)?;
    let stream = stream.map(|stream| stream.unsigned("stream")).transpose()?;
    let (scores, [k_scale, v_scale]) = Scores::read(scale, softcap)?.with_kv_scales(k_scale, v_scale)?;
    let read_q = Tensor::read("q", q, stream)?;
    let handle = torch::stream_of(py, read_q.device, stream)?;
    let read = |name, object: &Bound<'py, PyAny>| Tensor::read(name, object, Some(handle.raw()));
    let (k, v) = (read("k_cache", k_cache)?, read("v_cache", v_cache)?);
    let (out, read_out) = match out {
        Some(out) => {
            let read_out = read("out", &out)?;
            (out, read_out)
        }
        None => {
            let out = torch::empty_out(q, &read_q, &v)?;
            let read_out = Tensor::read_own("out", &out)?;
            (out, read_out)
        }
    };
    let (lse, read_lse) = match lse {
        None if return_lse && read_q.rank >= 2 => {
            let lse = torch::empty_lse(q, &read_q)?;
            let read_lse = Tensor::read_own("lse", &lse)?;
            (Some(lse), Some(read_lse))
        }
        lse => {
            let read_lse = lse.as_ref().map(|lse| read("lse", lse)).transpose()?;
            (lse, read_lse)
        }
    };
    let mut tensors = Tensors {
        q: read_q,
        k,
        v,
        out: read_out,
        lse: read_lse,
        sinks: sinks.map(|sinks| read("sinks", sinks)).transpose()?,
        k_scale: k_scale.map(|scale| read("k_scale", scale)).transpose()?,
        v_scale: v_scale.map(|scale| read("v_scale", scale)).transpose()?,
    };
    tensors.settle()?;
    let mut state = plan.lock();
    let facts = Facts::of(&state.plan, plan.device);
    let operands = Operands::new(&facts, &tensors, layout, scores)?;
    match operands.device {
        Device::Cpu => operands.run_host(&state.plan, &tensors)?,
        Device::Cuda(ordinal) => {
            operands.check_outputs_are_apart()?;
            let workspace = workspace.map(|workspace| workspace.get().on_cuda(ordinal)).transpose()?;
            let state = &mut *state;
            resident::run(&mut state.resident, plan.pool(), &state.plan, &operands, (ordinal, workspace, handle))?;
        }
    }
    match lse {
        Some(lse) if return_lse => Ok((out, lse).into_pyobject(py)?.into_any()),
        _ => Ok(out),
    }
}
