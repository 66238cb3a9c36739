//! Every call into the CUDA driver that is `unsafe`, and nothing else.
//!
//! What makes these calls sound is decided elsewhere and carried by types: a [`PreparedRun`] exists only after all
//! arguments were checked, a [`DeviceSpan`] only for memory somebody vouches for, a [`Kernel`] only for an entry of the
//! manifest, whose parameter types the manifest's family fixes.
#![allow(unsafe_code, reason = "the border to the driver")]

use super::args::{DeviceSpan, PreparedRun};
use super::bench_support::{CheckedFill, L2Flush};
use super::device::CudaDevice;
use super::tensor_map::TensorMapSpec;
use crate::{Dtype, Error, Result};
use bytemuck::{NoUninit, Pod};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, PinnedHostSlice, result, sys};
use pat_abi::{Arch, Family, KernelSpec};
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

/// An encoded tensor map: 128 bytes, aligned as the driver wants it.
pub(super) type TensorMap = sys::CUtensorMap;

/// Turns a driver error into ours, naming the call.
pub(super) fn failed(call: impl Into<String>) -> impl FnOnce(DriverError) -> Error {
    move |error| Error::Cuda { call: call.into(), reason: describe(error) }
}

pub(super) fn describe(error: DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("driver error {:?}", error.0),
    }
}

/// Whether libcuda can be loaded. To be asked before any other call: cudarc panics where it is absent.
pub(super) fn library_is_present() -> bool {
    // cudarc has such a check, but not in a tree where another crate makes it link libcuda. These names are among its own.
    let names = if cfg!(windows) { ["nvcuda.dll", "cuda.dll"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loads libcuda by its system names and looks at nothing in it; its initialisers are the driver's own.
    names.into_iter().any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

/// The CUDA version the driver supports: 1000 * major + 10 * minor.
pub(super) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one integer; allowed before `cuInit`. The library is present (checked by `CudaDevice::new`).
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    Ok(version)
}

/// One loaded kernel; unloads its module when dropped.
#[derive(Debug)]
pub(super) struct Kernel {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    spec: &'static KernelSpec,
    /// Largest useful grid: persistent kernels step through their work with the CTAs that fit the device.
    max_grid: u32,
}

// SAFETY: the handles are process-wide names of driver objects; the driver's module and launch calls are thread-safe, and
// every use binds the context to the calling thread first.
unsafe impl Send for Kernel {}
// SAFETY: as above; no method changes the handles.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Compiles a module of one kernel (see `ptx::cut`) for the device.
    pub(super) fn load(
        context: &Arc<CudaContext>,
        spec: &'static KernelSpec,
        ptx: String,
        sm_count: u32,
    ) -> Result<Self> {
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let image = CString::new(ptx).map_err(|e| Error::invalid("ptx", e, "text without a NUL byte"))?;
        let name = CString::new(spec.entry).map_err(|e| Error::invalid("entry", e, "text without a NUL byte"))?;
        let mut log = vec![0u8; 16 * 1024];
        let mut options =
            [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(log.len())];
        let mut module = std::ptr::null_mut();
        // SAFETY: `image` is NUL-terminated; `options` and `values` have the two entries announced, and the log buffer
        // has the length announced; all outlive the call. The context is current.
        let loaded = unsafe {
            sys::cuModuleLoadDataEx(
                &mut module,
                image.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        loaded.result().map_err(|error| {
            let log = String::from_utf8_lossy(&log);
            let log = log.trim_end_matches('\0').trim();
            let reason = if log.is_empty() { describe(error) } else { format!("{}: {log}", describe(error)) };
            Error::Cuda { call: format!("compiling kernel {}", spec.entry), reason }
        })?;
        // From here on dropping `kernel` unloads the module.
        let max_grid = match spec.family {
            Family::Forward(variant) if variant.is_persistent() => sm_count * spec.min_ctas_per_sm,
            // Its CTAs step through the rows, too.
            Family::Merge => sm_count * spec.min_ctas_per_sm,
            _ => u32::MAX,
        };
        let mut kernel = Self { context: context.clone(), module, function: std::ptr::null_mut(), spec, max_grid };
        // SAFETY: the module has just been loaded and is owned by `kernel`.
        kernel.function = unsafe { result::module::get_function(module, name) }
            .map_err(failed(format!("looking up {} in its module", spec.entry)))?;
        if spec.smem_bytes > 0 {
            // SAFETY: the function belongs to the module loaded above.
            unsafe {
                result::function::set_function_attribute(
                    kernel.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    spec.smem_bytes as i32,
                )
            }
            .map_err(failed(format!("giving {} {} bytes of shared memory", spec.entry, spec.smem_bytes)))?;
        }
        Ok(kernel)
    }

    /// # Safety
    /// `params` point to values of the types that the kernel takes, in order, and every address in them is valid for
    /// what the kernel does with it until it has finished.
    unsafe fn launch(&self, grid: u32, params: &mut [*mut c_void], programmatic: bool, stream: &Stream) -> Result<()> {
        let grid = grid.min(self.max_grid);
        if grid == 0 {
            return Ok(());
        }
        same_context(&self.context, &stream.inner)?;
        self.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.spec.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.spec.smem_bytes,
            hStream: stream.inner.cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(programmatic),
        };
        // SAFETY: the function's module is loaded as long as `self` lives; the parameters are the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, self.function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed(format!("launching {} with {grid} CTAs", self.spec.entry)))
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // A context that can no longer be bound has taken its modules with it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: loaded in `load`, unloaded only here.
            let unloaded = unsafe { result::module::unload(self.module) };
            self.context.record_err(unloaded);
        }
    }
}

/// Launches a forward kernel over its share of a prepared run.
pub(super) fn launch_forward(kernel: &Kernel, run: &PreparedRun, maps: &[TensorMap], stream: &Stream) -> Result<()> {
    let Family::Forward(variant) = kernel.spec.family else {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a forward kernel"));
    };
    if maps.len() != kernel.spec.tensor_maps as usize {
        return Err(Error::invalid("tensor maps", maps.len(), format!("{}", kernel.spec.tensor_maps)));
    }
    let mut params = parameter_pointers(&run.forward, maps);
    let grid = run.forward_grids[variant.index()];
    // SAFETY: the manifest says that this family takes ForwardParams and `tensor_maps` maps. `run` was checked against
    // the memory its addresses name, and the plan it points to was validated against the pool when it was made.
    unsafe { kernel.launch(grid, &mut params.0[..params.1], false, stream) }
}

/// Launches a merge kernel. The sm_90a ones wait (`griddepcontrol.wait`) for the launch before them on their own, so that
/// theirs may overlap its end; the others must not start before it has finished.
pub(super) fn launch_merge(kernel: &Kernel, run: &PreparedRun, stream: &Stream) -> Result<()> {
    if kernel.spec.family != Family::Merge {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a merge kernel"));
    }
    let programmatic = kernel.spec.arch == Arch::Sm90a;
    let grid = run.merge_rows as u32;
    let mut params = [(&raw const run.merge).cast_mut().cast::<c_void>()];
    // SAFETY: merge kernels take MergeParams alone; the driver reads, never writes, parameters. Addresses as in
    // `launch_forward`. The grid fits: `RunArgs::prepare` keeps `merge_rows` below 2^31.
    unsafe { kernel.launch(grid, &mut params, programmatic, stream) }
}

/// Launches a fill kernel.
pub(super) fn launch_fill(kernel: &Kernel, fill: &CheckedFill, ctas: u32, stream: &Stream) -> Result<()> {
    if kernel.spec.family != Family::Fill {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a fill kernel"));
    }
    let mut params = [(&raw const fill.0).cast_mut().cast::<c_void>()];
    // SAFETY: fill kernels take FillParams alone; `CheckedFill` says that the target holds what they write.
    unsafe { kernel.launch(ctas, &mut params, false, stream) }
}

/// Launches the L2 flush.
pub(super) fn launch_flush(kernel: &Kernel, flush: &L2Flush, ctas: u32, stream: &Stream) -> Result<()> {
    if kernel.spec.family != Family::Flush {
        return Err(Error::invalid("kernel", kernel.spec.entry, "the flush kernel"));
    }
    let record = flush.params();
    let mut params = [(&raw const record).cast_mut().cast::<c_void>()];
    // SAFETY: the flush kernel takes FlushParams alone; `L2Flush` owns both buffers, with one sum per CTA, and freeing
    // them waits for the device.
    unsafe { kernel.launch(ctas, &mut params, false, stream) }
}

/// The parameter pointers of a kernel that takes one record and up to two tensor maps, on the stack.
fn parameter_pointers<P: NoUninit>(record: &P, maps: &[TensorMap]) -> ([*mut c_void; 3], usize) {
    let mut params = [std::ptr::null_mut(); 3];
    params[0] = (&raw const *record).cast_mut().cast();
    for (slot, map) in params[1..].iter_mut().zip(maps) {
        *slot = (&raw const *map).cast_mut().cast();
    }
    (params, 1 + maps.len())
}

/// Encodes a tensor map: 128-byte swizzle, no L2 promotion (measured to be slower), zeros out of range.
pub(super) fn encode_tensor_map(spec: &TensorMapSpec) -> Result<TensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let dtype = match spec.dtype {
        Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    // SAFETY: the arrays have the lengths that rank 4 asks for (4 dims, 3 strides, 4 box and element strides). The
    // address is only recorded here.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            dtype,
            4,
            std::ptr::without_provenance_mut(spec.address as usize),
            spec.dims.as_ptr(),
            spec.strides_bytes.as_ptr(),
            spec.box_dims.as_ptr(),
            [1u32; 4].as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed(format!("cuTensorMapEncodeTiled of {spec:?}")))?;
    Ok(map)
}

/// A stream work is enqueued on: owned, borrowed from another library, or the default stream.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: Arc<CudaStream>,
}

impl Stream {
    pub(super) fn new(inner: Arc<CudaStream>) -> Self {
        Self { inner }
    }

    /// Wraps a stream handle of another library.
    ///
    /// # Safety
    /// As [`CudaDevice::stream_from_raw`].
    pub(super) unsafe fn from_raw(context: &Arc<CudaContext>, handle: u64) -> Self {
        let handle = std::ptr::with_exposed_provenance_mut::<sys::CUstream_st>(handle as usize);
        // SAFETY: the caller's promise.
        Self { inner: unsafe { context.wrap_borrowed_stream(handle) } }
    }

    /// Waits until everything enqueued so far has finished.
    ///
    /// # Errors
    /// An enqueued operation failed.
    pub fn synchronize(&self) -> Result<()> {
        self.inner.synchronize().map_err(failed("cuStreamSynchronize"))
    }

    /// The cudarc stream.
    pub fn cudarc(&self) -> &Arc<CudaStream> {
        &self.inner
    }

    /// Records what `enqueue` puts on this stream, without running it. Load the kernels first
    /// ([`CudaEngine::prepare`](super::CudaEngine::prepare)); plans are uploaded outside. Until
    /// it returns no thread may wait for the whole device, as copies to and from a [`DeviceBuffer`] do.
    ///
    /// # Errors
    /// The stream cannot be captured (the default stream), `enqueue` fails, or nothing was enqueued.
    pub fn capture<'a, F: FnOnce() -> Result<()> + 'a>(&self, enqueue: F) -> Result<Graph<'a>> {
        // Thread-local: other threads of the program may go on allocating meanwhile.
        self.inner
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(failed("cuStreamBeginCapture"))?;
        let enqueued = enqueue();
        let graph = self.inner.end_capture(sys::CUgraphInstantiate_flags(0));
        enqueued?;
        let graph = graph.map_err(failed("cuStreamEndCapture"))?.ok_or_else(|| Error::Cuda {
            call: "cuStreamEndCapture".into(),
            reason: "nothing was enqueued on the captured stream".into(),
        })?;
        Ok(Graph { graph, borrows: PhantomData })
    }
}

/// A captured run. It borrows what it captured: the memory must stay where it is.
pub struct Graph<'a> {
    graph: CudaGraph,
    borrows: PhantomData<&'a ()>,
}

impl std::fmt::Debug for Graph<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Graph<'_> {
    /// Enqueues the captured work on the stream it was captured from.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub fn replay(&self) -> Result<()> {
        self.graph.launch().map_err(failed("cuGraphLaunch"))
    }
}

/// Owned device memory, for tests and tools; engines bring their own ([`DeviceSpan::from_raw`]).
///
/// Copies wait for the whole device before and after, so that no stream needs to be named.
#[derive(Debug)]
pub struct DeviceBuffer {
    context: Arc<CudaContext>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// Allocates `bytes` bytes (at least 1) and clears them.
    ///
    /// # Errors
    /// The device has not that much memory left.
    pub fn zeroed(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let context = device.context().clone();
        context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        let bytes = bytes.max(1);
        // SAFETY: the context is current; the size is not 0. The memory is cleared below before anyone can read it.
        let address =
            unsafe { result::malloc_sync(bytes) }.map_err(failed(format!("allocating {bytes} bytes on the device")))?;
        let mut buffer = Self { context, address, bytes };
        buffer.fill(0)?;
        Ok(buffer)
    }

    /// Allocates room for `values` and copies them there.
    ///
    /// # Errors
    /// As [`Self::zeroed`]; also when the copy fails.
    pub fn from_slice<T: NoUninit>(device: &CudaDevice, values: &[T]) -> Result<Self> {
        let mut buffer = Self::zeroed(device, size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The memory, for [`RunArgs`](super::RunArgs).
    pub fn span(&self) -> DeviceSpan<'_> {
        DeviceSpan::borrowed(self.address, self.bytes as u64)
    }

    /// Sets every byte to `value` (0xff makes NaNs of all float types).
    ///
    /// # Errors
    /// The driver call fails, or earlier work on the device did.
    pub fn fill(&mut self, value: u8) -> Result<()> {
        self.idle()?;
        // SAFETY: the range is this allocation; nothing on the device uses it (waited above).
        unsafe { result::memset_d8_sync(self.address, value, self.bytes) }.map_err(failed("cuMemsetD8"))?;
        self.idle()
    }

    /// Copies `values` to `offset_bytes`.
    ///
    /// # Errors
    /// They do not fit; the driver call fails, or earlier work on the device did.
    pub fn write<T: NoUninit>(&mut self, offset_bytes: usize, values: &[T]) -> Result<()> {
        self.check_range(offset_bytes, size_of_val(values))?;
        if values.is_empty() {
            return Ok(());
        }
        self.idle()?;
        // SAFETY: the range was checked; nothing on the device uses the memory (waited above).
        unsafe { result::memcpy_htod_sync(self.address + offset_bytes as u64, bytemuck::cast_slice::<T, u8>(values)) }
            .map_err(failed("cuMemcpyHtoD"))?;
        // A small copy from pageable memory may return while it is still in flight, unseen by other streams.
        self.idle()
    }

    /// Copies from `offset_bytes` into `values`.
    ///
    /// # Errors
    /// They reach beyond the end; the driver call fails, or earlier work on the device did.
    pub fn read<T: Pod>(&self, offset_bytes: usize, values: &mut [T]) -> Result<()> {
        self.check_range(offset_bytes, size_of_val(values))?;
        if values.is_empty() {
            return Ok(());
        }
        self.idle()?;
        let bytes = bytemuck::cast_slice_mut::<T, u8>(values);
        // SAFETY: the range was checked; nothing on the device writes the memory (waited above).
        unsafe { result::memcpy_dtoh_sync(bytes, self.address + offset_bytes as u64) }.map_err(failed("cuMemcpyDtoH"))
    }

    fn check_range(&self, offset_bytes: usize, bytes: usize) -> Result<()> {
        if offset_bytes.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(Error::invalid(
                "values",
                format!("{bytes} bytes at offset {offset_bytes}"),
                format!("a range within {} bytes", self.bytes),
            ));
        }
        Ok(())
    }

    fn idle(&self) -> Result<()> {
        self.context.synchronize().map_err(failed("cuCtxSynchronize"))
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // Work that still uses the memory must finish first.
            self.context.record_err(self.context.synchronize());
            // SAFETY: allocated in `zeroed`, freed only here; no work is in flight.
            let freed = unsafe { result::free_sync(self.address) };
            self.context.record_err(freed);
        }
    }
}

/// Two pinned host buffers that take turns, so that the host can write the next plan while the last one is copied.
pub(super) struct StagingRing {
    slots: [(PinnedHostSlice<u8>, CudaEvent); 2],
    next: usize,
}

impl std::fmt::Debug for StagingRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagingRing").field("next", &self.next).finish_non_exhaustive()
    }
}

impl StagingRing {
    pub(super) fn new(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let slot = || -> Result<(PinnedHostSlice<u8>, CudaEvent)> {
            let context = device.context();
            // SAFETY: the bytes are written below before anything reads them.
            let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }
                .map_err(failed(format!("allocating {bytes} bytes of pinned host memory")))?;
            let start = memory.as_mut_ptr().map_err(failed("cuEventSynchronize"))?;
            // SAFETY: `start` is the beginning of `bytes` bytes that nothing else refers to.
            unsafe { start.write_bytes(0, bytes) };
            Ok((memory, context.new_event(None).map_err(failed("cuEventCreate"))?))
        };
        Ok(Self { slots: [slot()?, slot()?], next: 0 })
    }

    /// Enqueues the copy of `bytes` to the start of `target`.
    pub(super) fn upload(&mut self, bytes: &[u8], target: &DeviceBuffer, stream: &Stream) -> Result<()> {
        same_context(&target.context, &stream.inner)?;
        target.check_range(0, bytes.len())?;
        let (memory, copied) = &mut self.slots[self.next];
        copied.synchronize().map_err(failed("cuEventSynchronize"))?;
        let staged = memory.as_mut_slice().map_err(failed("cuEventSynchronize"))?;
        let staged = &mut staged[..bytes.len()];
        staged.copy_from_slice(bytes);
        target.context.bind_to_thread().map_err(failed("cuCtxSetCurrent"))?;
        // SAFETY: both ranges hold `bytes.len()` bytes (target checked above, staging as large as the target); the
        // staging bytes are not touched again before `copied` has been waited for.
        unsafe { result::memcpy_htod_async(target.address, staged, stream.inner.cu_stream()) }
            .map_err(failed("cuMemcpyHtoDAsync"))?;
        copied.record(&stream.inner).map_err(failed("cuEventRecord"))?;
        self.next = 1 - self.next;
        Ok(())
    }
}

impl Drop for StagingRing {
    fn drop(&mut self) {
        // The pinned memory must outlive the copies that read it.
        for (memory, copied) in &self.slots {
            memory.context().record_err(copied.synchronize());
        }
    }
}

fn same_context(context: &Arc<CudaContext>, stream: &CudaStream) -> Result<()> {
    if context.cu_ctx() == stream.context().cu_ctx() {
        return Ok(());
    }
    Err(Error::invalid(
        "stream",
        format!("one of device {}", stream.context().ordinal()),
        format!("one of device {}'s primary context", context.ordinal()),
    ))
}
