//! The border that foreign pointers cross, and the only file of the package with `unsafe`.
//!
//! What makes it sound: a [`Tensor`] is read from a live Python object that it then holds, its sizes and strides are the
//! producer's own, and Python code, which alone could resize the memory, does not run between reading and use, because the
//! thread stays attached to the interpreter. Device memory is used after that; the engine's contract is torch's own: whoever
//! enqueued work on a stream keeps its tensors until the stream has passed.

use crate::append::Append;
use crate::device::Device;
use crate::errors::{Failure, Result, has, invalid, own_error, type_name, wrong_type};
use crate::merge;
use crate::operands::{Operands, Scale, Span};
use crate::tensor::{Element, MAX_RANK, Tensor, check_rank, imported};
use crate::torch::{self, Handle};
use bytemuck::Pod;
use pat_rs::cpu::{CacheLayout, NewRows, State, append_rounded_rows, append_rows, merge_states};
use pat_rs::cuda::{AppendArgs, BoundRun, CudaDevice, DeviceSpan, Stream, Uploaded};
use pat_rs::{Element as HostElement, HostTensors, KvElement, KvScale, Plan};
use pyo3::exceptions::PyBufferError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyType};
use std::cell::Cell;
use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::slice;

/// The elements of a CPU tensor, from the first to the last one that its strides reach.
pub(crate) fn elements<'a, T: Pod>(tensor: &'a Tensor<'_>, element: &Element) -> Result<&'a [T]> {
    tensor.expect_element(element)?;
    if tensor.device != Device::Cpu {
        let expected = "host memory: a copy from the device would have to wait for it";
        return Err(invalid(tensor.name, format!("a tensor on {}", tensor.device), expected));
    }
    let span = Span::of(tensor)?;
    let elements = span.host_elements::<T>(tensor.name)?;
    if elements == 0 {
        return Ok(&[]);
    }
    // SAFETY: the element type was compared, alignment and length were checked by `host_elements`; the producer's sizes and
    // strides lie inside its memory, which `tensor` holds and nobody writes while this thread is attached.
    Ok(unsafe { slice::from_raw_parts(std::ptr::with_exposed_provenance(span.address as usize), elements) })
}

/// Executes a plan on host memory. `_held` are the tensors that `operands` were taken from: they keep the memory.
pub(crate) fn run_host<T: HostElement, C: KvElement>(
    plan: &Plan,
    operands: &Operands,
    _held: &[&Tensor<'_>],
) -> Result<()> {
    operands.check_outputs_are_apart()?;
    let (q, k, v): (&[T], &[C], &[C]) =
        (input(operands.q, "q")?, input(operands.k, "k_cache")?, input(operands.v, "v_cache")?);
    let mut tensors = HostTensors::new(operands.problem, q, k, v)
        .with_kv_scales(factor(operands.k_scale, "k_scale")?, factor(operands.v_scale, "v_scale")?)
        .with_kv_strides(operands.k_strides, operands.v_strides)
        .with_row_strides(operands.q_strides, operands.out_strides);
    if let Some((_, strides)) = operands.lse {
        tensors.lse_strides = strides;
    }
    if let Some(span) = operands.sinks {
        tensors = tensors.with_sinks(input(span, "sinks")?);
    }
    let out = output::<T>(operands.out, "out")?;
    let lse = operands.lse.map(|(span, _)| output::<f32>(span, "lse")).transpose()?;
    // Their extents are disjoint from each other and from the inputs' (checked above).
    Ok(pat_rs::cpu::run(plan, &tensors, out, lse)?)
}

/// Refuses factors in host memory that no executor takes. `_held` are the tensors that `operands` were taken from.
pub(crate) fn check_host_scales(operands: &Operands, _held: &[&Tensor<'_>]) -> Result<()> {
    operands.check_outputs_are_apart()?;
    let shape = operands.problem.shape();
    let is_eight_bit = shape.kv_dtype().bytes() == 1;
    for (name, scale) in [("k_scale", operands.k_scale), ("v_scale", operands.v_scale)] {
        factor(scale, name)?.check(name, shape.kv_heads(), is_eight_bit)?;
    }
    Ok(())
}

/// As [`input`].
fn factor<'a>(scale: Scale, name: &str) -> Result<KvScale<'a>> {
    Ok(match scale {
        Scale::Tensor(scale) => KvScale::Tensor(scale),
        Scale::Heads(span) => KvScale::Heads(input(span, name)?),
    })
}

/// Called by [`run_host`] and [`check_host_scales`] alone, which hold the tensors while the slice lives.
fn input<'a, E: Pod>(span: Span, name: &str) -> Result<&'a [E]> {
    let elements = span.host_elements::<E>(name)?;
    if elements == 0 {
        return Ok(&[]);
    }
    // SAFETY: alignment and length were checked by `host_elements`; `Operands` has compared the element type; the callers hold
    // the tensors, have checked that no output overlaps them, and stay attached.
    Ok(unsafe { slice::from_raw_parts(std::ptr::with_exposed_provenance(span.address as usize), elements) })
}

/// Called by [`run_host`] alone, after the checks that its comments name.
fn output<'a, T: Pod>(span: Span, name: &str) -> Result<&'a mut [T]> {
    let elements = span.host_elements::<T>(name)?;
    if elements == 0 {
        return Ok(&mut []);
    }
    // SAFETY: as for the inputs; the tensor is writable (`Operands`), and its range meets no other one of the call.
    Ok(unsafe { slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(span.address as usize), elements) })
}

/// The memory of a CPU tensor, which others may share.
fn cells<'a, T: Pod>(tensor: &'a Tensor<'_>) -> Result<&'a [Cell<T>]> {
    let span = Span::of(tensor)?;
    let elements = span.host_elements::<T>(tensor.name)?;
    if elements == 0 {
        return Ok(&[]);
    }
    let start = std::ptr::with_exposed_provenance_mut::<T>(span.address as usize).cast::<Cell<T>>();
    // SAFETY: alignment and length were checked by `host_elements`, element types and writability by the caller of this file's
    // functions; `Cell<T>` lies in memory as `T` does, may be written through several references, and does not leave the
    // thread; `tensor` holds the memory, and this thread stays attached.
    Ok(unsafe { slice::from_raw_parts(start, elements) })
}

/// Writes new rows into caches of their type in host memory. `args` are of these tensors.
pub(crate) fn append_host<T: HostElement>(tensors: &Append<'_>, args: &AppendArgs) -> Result<()> {
    append_each::<T, T>(tensors, args, |rows, layout, cache, _| Ok(append_rows(rows, layout, cache)?))
}

/// Rounds new rows into 8-bit caches in host memory. `args` are of these tensors.
pub(crate) fn append_host_rounded<T: HostElement, C: KvElement>(tensors: &Append<'_>, args: &AppendArgs) -> Result<()> {
    fn factors<'a>(scale: &'a (Scale, Option<Tensor<'_>>)) -> Result<KvScale<'a>> {
        Ok(match scale {
            (Scale::Tensor(scale), _) => KvScale::Tensor(*scale),
            (Scale::Heads(_), None) => KvScale::Heads(&[]),
            (Scale::Heads(_), Some(tensor)) => KvScale::Heads(elements::<f32>(tensor, &Element::F32)?),
        })
    }
    let scales = [factors(&tensors.scales[0])?, factors(&tensors.scales[1])?];
    for (scale, name) in scales.iter().zip(["k_scale", "v_scale"]) {
        scale.check(name, args.k_layout.kv_heads, true)?;
    }
    append_each::<T, C>(tensors, args, |rows, layout, cache, index| {
        Ok(append_rounded_rows(rows, layout, cache, scales[index])?)
    })
}

/// Calls `append` for K, which is 0, and for V, once it is known that neither refuses.
fn append_each<T: HostElement, C: KvElement + Pod>(
    tensors: &Append<'_>,
    args: &AppendArgs,
    append: impl Fn(&NewRows<'_, T>, &CacheLayout, &[Cell<C>], usize) -> Result<()>,
) -> Result<()> {
    let slots = elements::<i64>(&tensors.slots, &Element::I64)?;
    let new = |rows, strides| -> Result<NewRows<'_, T>> { Ok(NewRows { rows: cells(rows)?, strides, slots }) };
    let (k, v) = (new(&tensors.k_new, args.k_new_strides)?, new(&tensors.v_new, args.v_new_strides)?);
    let (k_cache, v_cache) = (cells(&tensors.k_cache)?, cells(&tensors.v_cache)?);
    k.check(&args.k_layout, k_cache)?;
    v.check(&args.v_layout, v_cache)?;
    append(&k, &args.k_layout, k_cache, 0)?;
    append(&v, &args.v_layout, v_cache, 1)
}

/// Merges attention states in host memory.
pub(crate) fn merge_host<T: HostElement>(
    sizes: (u32, u32, u32),
    [a, b]: [&merge::State<'_>; 2],
    merged: &merge::State<'_>,
) -> Result<()> {
    fn state<'a, T: HostElement>(state: &'a merge::State<'_>) -> Result<State<'a, T>> {
        Ok(State {
            out: cells(&state.out)?,
            out_strides: state.out_strides(),
            lse: cells(&state.lse)?,
            lse_strides: state.lse_strides(),
        })
    }
    Ok(merge_states::<T>(sizes, [&state(a)?, &state(b)?], &state(merged)?)?)
}

/// Device memory of a tensor that the caller goes on holding.
pub(crate) fn device_span(span: Span) -> DeviceSpan {
    // SAFETY: the range is the producer's own (`Span::of`). It stays allocated until the work enqueued with it has finished:
    // torch frees memory in the order of the stream it was allocated on, which is the caller's to keep as for every
    // operation of torch; a bound run holds its tensors. `run_ptr` documents that its caller vouches for the addresses.
    unsafe { DeviceSpan::from_raw(span.address, span.bytes) }
}

/// A stream of torch's (or of another library that uses the device's primary context).
pub(crate) fn stream(device: &CudaDevice, handle: Handle) -> Result<Stream> {
    Ok(match handle {
        // SAFETY: torch's streams live as long as the process.
        Handle::Current(handle) => unsafe { device.stream_from_raw(handle) }?,
        // SAFETY: a caller who names a stream keeps it as long as plans that were uploaded on it are used, and replays graphs in
        // the order of uploads (documented at the argument).
        Handle::Named(handle) => unsafe { device.checked_stream_from_raw(handle) }?,
    })
}

/// A bound run with other memory for Q and O.
pub(crate) fn run_with(
    run: &BoundRun,
    uploaded: Uploaded<'_>,
    (q_address, out_address): (u64, u64),
    stream: &Stream,
) -> Result<()> {
    // SAFETY: the caller of `run_ptr` vouches for the addresses, as its documentation says.
    Ok(unsafe { run.run_with(uploaded, q_address, out_address, stream) }?)
}

#[repr(C)]
struct DlDevice {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DlType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor` of dlpack.h.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct DlVersioned {
    major: u32,
    minor: u32,
    manager: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut c_void)>,
    flags: u64,
    tensor: DlTensor,
}

const DL_CUDA: i32 = 2;
const READ_ONLY: u64 = 1;
const IS_COPIED: u64 = 2;
const CAPSULE: &CStr = c"dltensor";
const VERSIONED_CAPSULE: &CStr = c"dltensor_versioned";

/// Reads any producer of DLPack. The capsule is kept unconsumed: dropping it gives the tensor back to its producer.
pub(crate) fn read_dlpack<'py>(name: &'py str, object: &Bound<'py, PyAny>, stream: Option<u64>) -> Result<Tensor<'py>> {
    let py = object.py();
    let expected = "a torch tensor or a producer of DLPack (numpy, cupy, jax)";
    // A class has the methods of its objects.
    if object.is_instance_of::<PyType>() || !has(object, intern!(py, "__dlpack__"))? {
        return Err(wrong_type(name, type_name(object), expected));
    }
    if is_masked(object) {
        let expected = "an array without a mask, which DLPack does not hand over (array.filled(...))";
        return Err(wrong_type(name, format!("a {}", type_name(object)), expected));
    }
    let refuse = |what: String| wrong_type(name, format!("{} {what}", type_name(object)), expected);
    // Producers raise whatever they like.
    let raised = |method: &str, error: PyErr| -> Result<Failure> {
        let error = own_error(py, error)?;
        let what = if error.is_instance_of::<PyBufferError>(py) {
            "of what DLPack cannot describe".into()
        } else {
            format!("whose {method} raised {error}")
        };
        Ok(refuse(what).caused_by(py, error))
    };
    let announced = match object.call_method0(intern!(py, "__dlpack_device__")) {
        Ok(announced) => announced,
        Err(error) => return Err(raised("__dlpack_device__", error)?),
    };
    let Ok((kind, id)) = announced.extract::<(i32, i32)>() else {
        return Err(refuse("whose __dlpack_device__ is no pair of integers".into()));
    };
    let announced = device_of(name, kind, id)?;
    let options = PyDict::new(py);
    if let Device::Cuda(ordinal) = announced {
        let handle = match stream {
            Some(handle) => handle,
            None => torch::current_stream(py, ordinal).map_err(|failure| {
                refuse(format!("on {announced}, of which torch has no stream")).caused_by(py, failure.into())
            })?,
        };
        // The protocol's name of the legacy default stream is 1.
        options.set_item("stream", if handle == 0 { 1 } else { handle })?;
    }
    let unversioned = options.copy()?;
    options.set_item("max_version", (1, 0))?;
    let capsule = object.call_method(intern!(py, "__dlpack__"), (), Some(&options)).or_else(|error| {
        // Producers from before version 1 of the protocol do not know the argument.
        if !error.is_instance_of::<pyo3::exceptions::PyTypeError>(py) {
            return Err(error);
        }
        object.call_method(intern!(py, "__dlpack__"), (), Some(&unversioned))
    });
    let capsule = match capsule {
        Ok(capsule) => capsule,
        Err(error) => return Err(raised("__dlpack__", error)?),
    };
    let Ok(capsule) = capsule.cast::<PyCapsule>() else {
        return Err(refuse("whose __dlpack__ returns no capsule".into()));
    };
    let is_versioned = capsule.is_valid_checked(Some(VERSIONED_CAPSULE));
    let mut is_writable = true;
    let tensor: &DlTensor = if is_versioned {
        let pointer = capsule.pointer_checked(Some(VERSIONED_CAPSULE))?.cast::<DlVersioned>();
        // SAFETY: a capsule of this name holds a `DLManagedTensorVersioned` (the protocol), which lives as long as the
        // unconsumed capsule, which the result holds.
        let managed = unsafe { pointer.as_ref() };
        if managed.major != 1 {
            return Err(invalid(name, format!("DLPack version {}.{}", managed.major, managed.minor), "version 1"));
        }
        if managed.flags & IS_COPIED != 0 {
            return Err(invalid(name, "a copy that DLPack has made", "memory that can be used in place"));
        }
        is_writable = managed.flags & READ_ONLY == 0;
        &managed.tensor
    } else if !capsule.is_valid_checked(Some(CAPSULE)) {
        return Err(refuse("whose capsule was used before, or holds no tensor".into()));
    } else {
        let pointer = capsule.pointer_checked(Some(CAPSULE))?.cast::<DlTensor>();
        // SAFETY: a capsule of this name holds a `DLManagedTensor`, whose first member is the tensor; lifetime as above.
        unsafe { pointer.as_ref() }
    };
    let read = tensor.read(name, is_writable, capsule.as_any())?;
    if read.device != announced {
        return Err(refuse(format!("that says {announced} and gives memory on {}", read.device)));
    }
    Ok(read)
}

/// Whether it is one of numpy's masked arrays.
fn is_masked(object: &Bound<'_, PyAny>) -> bool {
    let py = object.py();
    // Whoever has one has imported them.
    let class = imported(py)
        .and_then(|modules| modules.get_item(intern!(py, "numpy.ma"))?.getattr(intern!(py, "MaskedArray")))
        .ok();
    class.is_some_and(|class| object.is_instance(&class).unwrap_or(false))
}

/// A device in DLPack's terms.
fn device_of(name: &str, kind: i32, id: i32) -> Result<Device> {
    match (kind, usize::try_from(id)) {
        // 1 is the CPU, 3 pinned host memory.
        (1 | 3, _) => Ok(Device::Cpu),
        (DL_CUDA, Ok(ordinal)) => Ok(Device::Cuda(ordinal)),
        _ => Err(invalid(name, format!("memory of DLPack device ({kind}, {id})"), "one on cpu or cuda")),
    }
}

impl DlTensor {
    /// What it says; `owner` keeps the memory.
    fn read<'py>(&self, name: &'py str, is_writable: bool, owner: &Bound<'py, PyAny>) -> Result<Tensor<'py>> {
        let rank = usize::try_from(self.ndim).unwrap_or(usize::MAX);
        check_rank(name, rank)?;
        let device = device_of(name, self.device.kind, self.device.id)?;
        let element = match (self.dtype.code, self.dtype.bits, self.dtype.lanes) {
            (2, 16, 1) => Element::F16,
            (4, 16, 1) => Element::Bf16,
            (2, 32, 1) => Element::F32,
            (0, 32, 1) => Element::I32,
            (0, 64, 1) => Element::I64,
            (1, 8, 1) => Element::U8,
            (10, 8, 1) => Element::E4m3,
            (12, 8, 1) => Element::E5m2,
            (0, bits, 1) => Element::Other(format!("int{bits}")),
            (1, bits, 1) => Element::Other(format!("uint{bits}")),
            (2, bits, 1) => Element::Other(format!("float{bits}")),
            (6, 8, 1) => Element::Other("bool".into()),
            (code, bits, lanes) => Element::Other(format!("DLPack type {code} of {bits} bits in {lanes} lanes")),
        };
        // Nothing lies behind no memory.
        let offset = if self.data.is_null() { 0 } else { self.byte_offset };
        let Some(address) = (self.data as u64).checked_add(offset) else {
            let got = format!("a DLPack tensor {offset} bytes behind address {:#x}", self.data as u64);
            return Err(invalid(name, got, "one whose elements are in memory"));
        };
        let mut read = Tensor {
            name,
            address,
            element,
            device,
            is_writable,
            rank,
            sizes: [0; MAX_RANK],
            strides: [0; MAX_RANK],
            runs_code: true,
            owner: owner.clone(),
        };
        if rank == 0 {
            return Ok(read);
        }
        if self.shape.is_null() {
            return Err(invalid(name, "a DLPack tensor without a shape", "one with as many sizes as dimensions"));
        }
        // SAFETY: `shape` has `ndim` entries (the protocol), which the owner keeps.
        read.sizes[..rank].copy_from_slice(unsafe { slice::from_raw_parts(self.shape, rank) });
        if read.sizes.iter().any(|&size| size < 0) {
            return Err(invalid(name, format!("shape {}", read.shape()), "no size below 0"));
        }
        if self.strides.is_null() {
            // Compact and row-major.
            let mut stride = 1i64;
            for dim in (0..rank).rev() {
                read.strides[dim] = stride;
                stride = stride.saturating_mul(read.sizes[dim].max(1));
            }
        } else {
            // SAFETY: so has `strides` where it is there.
            read.strides[..rank].copy_from_slice(unsafe { slice::from_raw_parts(self.strides, rank) });
        }
        Ok(read)
    }
}

/// The head of `DLPackExchangeAPI`: what a library lets others call without Python in between. torch has it from 2.10 on.
#[repr(C)]
struct DlExchange {
    major: u32,
    minor: u32,
    previous: *mut c_void,
    allocate: *mut c_void,
    managed_from_object: *mut c_void,
    object_from_managed: *mut c_void,
    tensor_from_object: Option<unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> i32>,
    current_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> i32>,
}

/// torch's, whose functions live as long as the process.
#[derive(Clone, Copy)]
pub(crate) struct TorchExchange {
    tensor_from_object: unsafe extern "C" fn(*mut c_void, *mut DlTensor) -> i32,
    current_stream: unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> i32,
}

impl TorchExchange {
    /// Where torch is in use and has it.
    pub(crate) fn get(py: Python<'_>) -> Result<Option<Self>> {
        static EXCHANGE: PyOnceLock<Option<TorchExchange>> = PyOnceLock::new();
        let find = || -> PyResult<Option<Self>> {
            let class = py.import("torch")?.getattr("Tensor")?;
            let Some(capsule) = class.getattr_opt("__dlpack_c_exchange_api__")? else { return Ok(None) };
            let table =
                capsule.cast::<PyCapsule>()?.pointer_checked(Some(c"dlpack_exchange_api"))?.cast::<DlExchange>();
            // SAFETY: a capsule of this name holds such a table, whose head is the same in every version (the protocol).
            let table = unsafe { table.as_ref() };
            Ok(match (table.major, table.tensor_from_object, table.current_stream) {
                (1, Some(tensor_from_object), Some(current_stream)) => {
                    Some(Self { tensor_from_object, current_stream })
                }
                _ => None,
            })
        };
        Ok(*EXCHANGE.get_or_try_init(py, find)?)
    }

    /// Reads a `torch.Tensor`; None where torch cannot say it in DLPack's terms.
    pub(crate) fn read<'py>(self, name: &'py str, tensor: &Bound<'py, PyAny>) -> Result<Option<Tensor<'py>>> {
        let mut read = MaybeUninit::<DlTensor>::uninit();
        // SAFETY: `tensor` is a live `torch.Tensor` (the caller has asked), the thread is attached, and the function writes the
        // whole struct where it returns 0.
        let status = unsafe { (self.tensor_from_object)(tensor.as_ptr().cast(), read.as_mut_ptr()) };
        if status != 0 {
            drop(PyErr::take(tensor.py()));
            return Ok(None);
        }
        // SAFETY: written, as the status says. Its pointers are the tensor's own, which is held while they are read.
        unsafe { read.assume_init() }.read(name, true, tensor).map(Some)
    }

    /// The handle of torch's current stream.
    pub(crate) fn current_stream(self, py: Python<'_>, ordinal: usize) -> Result<u64> {
        let mut stream = std::ptr::null_mut();
        let device = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: the thread is attached, and the function writes one pointer.
        match unsafe { (self.current_stream)(DL_CUDA, device, &mut stream) } {
            0 => Ok(stream.expose_provenance() as u64),
            _ => Err(PyErr::fetch(py).into()),
        }
    }
}

impl Span {
    /// Elements of `T` in host memory, once it is known that they can be addressed as such.
    fn host_elements<T>(self, name: &str) -> std::result::Result<usize, Failure> {
        let elements = self.bytes as usize / size_of::<T>();
        if elements > 0 && (self.address == 0 || !(self.address as usize).is_multiple_of(align_of::<T>())) {
            let expected = format!("an address that is a multiple of {} bytes", align_of::<T>());
            return Err(invalid(name, format!("address {:#x}", self.address), expected));
        }
        Ok(elements)
    }
}
