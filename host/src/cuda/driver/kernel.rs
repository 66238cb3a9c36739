//! Kernels: compiling, launching, and the tensor maps they take.

use super::call::{DriverCall, attempt_for};
use super::context::{WhileOthersCapture, make_current, try_make_current};
use super::stream::CurrentStream;
use crate::cuda::CudaDevice;
use crate::cuda::args::{ForwardLaunches, PreparedRun};
use crate::cuda::bench_support::{CheckedFill, L2Flush};
use crate::cuda::row_ops::{CheckedAppend, CheckedMergeStates};
use crate::cuda::tensor_map::TensorMapSpec;
use crate::{Dtype, Error, Result};
use bytemuck::NoUninit;
use cudarc::driver::{result, sys};
use pat_abi::{Family, KernelSpec, ScaledForwardParams, TileVariant};
use std::ffi::{CString, c_void};

/// An encoded tensor map: 128 bytes, aligned as the driver wants it.
pub(crate) type TensorMap = sys::CUtensorMap;

/// One loaded kernel. Those of a [`CudaDevice`] stay loaded as long as the process runs.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: CudaDevice,
    module: sys::CUmodule,
    function: sys::CUfunction,
    spec: &'static KernelSpec,
    /// Largest useful grid: persistent kernels step through their work with the CTAs that fit the device.
    max_grid: u32,
}

// SAFETY: the handles are process-wide names of driver objects; the driver's module and launch calls are thread-safe, and
// every use has the context current on the calling thread.
unsafe impl Send for Kernel {}
// SAFETY: as above; no method changes the handles.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Whether it reads K and V by tensor maps.
    pub(crate) fn takes_tensor_maps(&self) -> bool {
        self.spec.tensor_maps > 0
    }

    /// Compiles a module of one kernel (see `ptx::cut`) for the device.
    pub(crate) fn load(device: CudaDevice, spec: &'static KernelSpec, ptx: String, sm_count: u32) -> Result<Self> {
        let _current = make_current(device)?;
        let _allowed = WhileOthersCapture::enter()?;
        let image = CString::new(ptx).map_err(|e| Error::invalid("ptx", e, "text without a NUL byte"))?;
        let name = CString::new(spec.entry).map_err(|e| Error::invalid("entry", e, "text without a NUL byte"))?;
        let mut log = vec![0u8; 16 * 1024];
        let mut options =
            [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), std::ptr::without_provenance_mut(log.len())];
        let mut module = std::ptr::null_mut();
        let loaded = attempt_for(
            DriverCall::ModuleLoad,
            || spec.entry.into(),
            || {
                // SAFETY: `image` is NUL-terminated; `options` and `values` have the two entries announced, and the log buffer
                // has the length announced; all outlive the call. The context is current.
                unsafe {
                    sys::cuModuleLoadDataEx(
                        &mut module,
                        image.as_ptr().cast(),
                        options.len() as u32,
                        options.as_mut_ptr(),
                        values.as_mut_ptr(),
                    )
                }
                .result()
            },
        );
        loaded.map_err(|error| with_log(error, &log))?;
        // From here on dropping `kernel` unloads the module.
        let max_grid = max_grid(spec, sm_count);
        let mut kernel = Self { device, module, function: std::ptr::null_mut(), spec, max_grid };
        // SAFETY: the module has just been loaded and is owned by `kernel`.
        kernel.function = attempt_for(
            DriverCall::ModuleGetFunction,
            || spec.entry.into(),
            || unsafe { result::module::get_function(module, name) },
        )?;
        if spec.smem_bytes > 0 {
            let about = || format!("{} bytes of shared memory for {}", spec.smem_bytes, spec.entry);
            // SAFETY: the function belongs to the module loaded above.
            attempt_for(DriverCall::FuncSetAttribute, about, || unsafe {
                result::function::set_function_attribute(
                    kernel.function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    spec.smem_bytes as i32,
                )
            })?;
        }
        Ok(kernel)
    }

    /// # Safety
    /// `params` point to values of the types that the kernel takes, in order, and every address in them is valid for
    /// what the kernel does with it until it has finished. The stream is one of the kernel's device. Where `programmatic`, every
    /// thread of the kernel waits (`griddepcontrol.wait`) before it writes or ends, and reads the plan alone before that.
    unsafe fn launch(
        &self,
        grid: u32,
        params: &mut [*mut c_void],
        programmatic: bool,
        stream: &CurrentStream<'_>,
    ) -> Result<()> {
        if grid == 0 {
            return Ok(());
        }
        let mut attribute = overlapping();
        let config = self.configuration(grid, &mut attribute, programmatic, stream);
        let about = || format!("{} with {grid} CTAs", self.spec.entry);
        attempt_for(DriverCall::LaunchKernel, about, || {
            // SAFETY: the function's module is loaded as long as `self` lives; the parameters are the caller's promise.
            unsafe { sys::cuLaunchKernelEx(&config, self.function, params.as_mut_ptr(), std::ptr::null_mut()) }.result()
        })
    }

    /// CTAs that a forward launch of so much work has.
    fn grid_of(&self, launches: &ForwardLaunches, variant: TileVariant) -> u32 {
        let (pieces, ctas) = (launches.grids[variant.index()], launches.ctas[variant.index()]);
        if ctas > self.max_grid { pieces.min(ctas) } else { self.useful(pieces) }
    }

    /// Of so many CTAs those that are of use.
    fn useful(&self, ctas: u32) -> u32 {
        ctas.min(self.max_grid)
    }

    fn configuration(
        &self,
        grid: u32,
        attribute: *mut sys::CUlaunchAttribute,
        programmatic: bool,
        stream: &CurrentStream<'_>,
    ) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: grid,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.spec.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.spec.smem_bytes,
            hStream: stream.raw(),
            attrs: attribute,
            numAttrs: u32::from(programmatic),
        }
    }
}

/// Largest useful grid of a kernel on a device of `sm_count` multiprocessors.
pub(crate) fn max_grid(spec: &KernelSpec, sm_count: u32) -> u32 {
    match spec.family {
        Family::Forward(variant) if variant.is_persistent() => sm_count * spec.min_ctas_per_sm,
        // Its CTAs step through the rows, too.
        Family::Merge => sm_count * spec.min_ctas_per_sm,
        _ => u32::MAX,
    }
}

/// Lets a launch begin while the one before it drains: of kernels that wait (`griddepcontrol.wait`) before they touch what
/// kernels write.
fn overlapping() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        if let Ok(_current) = try_make_current(self.device) {
            // SAFETY: loaded in `load`, unloaded only here: a kernel that a device keeps is never dropped, so that this one
            // was never launched.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// What the driver's compiler said behind what the driver said.
fn with_log(error: Error, log: &[u8]) -> Error {
    let log = String::from_utf8_lossy(log);
    match (error, log.trim_end_matches('\0').trim()) {
        (Error::Cuda { call, reason }, log) if !log.is_empty() => {
            Error::Cuda { call, reason: format!("{reason}: {log}") }
        }
        (error, _) => error,
    }
}

/// Launches a forward kernel over its share of a prepared run's launches, once for each part of a group.
pub(crate) fn launch_forward(
    kernel: &Kernel,
    launches: &ForwardLaunches,
    maps: &[TensorMap],
    stream: &CurrentStream<'_>,
) -> Result<()> {
    let Family::Forward(variant) = kernel.spec.family else {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a forward kernel"));
    };
    let Some(maps) = maps.get(..kernel.spec.tensor_maps as usize) else {
        return Err(Error::invalid("tensor maps", maps.len(), format!("{}", kernel.spec.tensor_maps)));
    };
    let grid = kernel.grid_of(launches, variant);
    launches.of_variant(variant).try_for_each(|forward| {
        let mut params = parameter_pointers(&forward, maps);
        // SAFETY: the manifest says that this family takes ForwardParams and `tensor_maps` maps. The run was checked against
        // the memory its addresses name, and the plan it points to was validated against the pool when it was made. Kernel and
        // stream are of the bound run's device.
        unsafe { kernel.launch(grid, &mut params.0[..params.1], kernel.spec.waits(), stream) }
    })
}

/// Launches a merge kernel.
pub(crate) fn launch_merge(kernel: &Kernel, run: &PreparedRun, stream: &CurrentStream<'_>) -> Result<()> {
    if kernel.spec.family != Family::Merge {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a merge kernel"));
    }
    let grid = run.merge_rows as u32;
    let mut params = [(&raw const run.merge).cast_mut().cast::<c_void>()];
    // SAFETY: merge kernels take MergeParams alone; the driver reads, never writes, parameters. Addresses as in
    // `launch_forward`. The grid fits: `RunArgs::prepare` keeps `merge_rows` below 2^31.
    unsafe { kernel.launch(kernel.useful(grid), &mut params, kernel.spec.waits(), stream) }
}

/// Launches a fill kernel.
pub(crate) fn launch_fill(kernel: &Kernel, fill: &CheckedFill, ctas: u32, stream: &CurrentStream<'_>) -> Result<()> {
    if kernel.spec.family != Family::Fill {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a fill kernel"));
    }
    let mut params = [(&raw const fill.0).cast_mut().cast::<c_void>()];
    // SAFETY: fill kernels take FillParams alone; `CheckedFill` says that the target holds what they write.
    unsafe { kernel.launch(kernel.useful(ctas), &mut params, false, stream) }
}

/// Launches the L2 flush.
pub(crate) fn launch_flush(kernel: &Kernel, flush: &L2Flush, ctas: u32, stream: &CurrentStream<'_>) -> Result<()> {
    if kernel.spec.family != Family::Flush {
        return Err(Error::invalid("kernel", kernel.spec.entry, "the flush kernel"));
    }
    let record = flush.params();
    let mut params = [(&raw const record).cast_mut().cast::<c_void>()];
    // SAFETY: the flush kernel takes FlushParams alone; `L2Flush` owns both buffers, with one sum per CTA, and freeing
    // them waits for the device.
    unsafe { kernel.launch(kernel.useful(ctas), &mut params, false, stream) }
}

/// Launches an append kernel.
pub(crate) fn launch_append(kernel: &Kernel, append: &CheckedAppend, stream: &CurrentStream<'_>) -> Result<()> {
    if *kernel.spec != *append.kernel {
        return Err(Error::invalid("kernel", kernel.spec.entry, append.kernel.entry));
    }
    let mut params = [(&raw const append.params).cast_mut().cast::<c_void>()];
    // SAFETY: the kernels take ScaledAppendParams or AppendParams, its first part, alone; `CheckedAppend` says that the tensors
    // hold what its kernel reads and writes, and slots beyond the cache are skipped.
    unsafe { kernel.launch(kernel.useful(append.ctas), &mut params, false, stream) }
}

/// Launches a kernel that merges attention states.
pub(crate) fn launch_merge_states(
    kernel: &Kernel,
    merge: &CheckedMergeStates,
    stream: &CurrentStream<'_>,
) -> Result<()> {
    if kernel.spec.family != Family::MergeStates {
        return Err(Error::invalid("kernel", kernel.spec.entry, "a kernel that merges states"));
    }
    let mut params = [(&raw const merge.0).cast_mut().cast::<c_void>()];
    // SAFETY: the kernels take MergeStatesParams alone; `CheckedMergeStates` says that the states hold what they access.
    unsafe { kernel.launch(kernel.useful(merge.1), &mut params, false, stream) }
}

/// The driver call of one launch, made ready ahead: a measurement compares runs with the bare calls.
pub(crate) struct BareLaunch<'a> {
    kernel: &'a Kernel,
    config: sys::CUlaunchConfig,
    /// `config` points to it.
    _attribute: Box<sys::CUlaunchAttribute>,
    /// `params` points to it, of a forward kernel.
    _forward: Option<Box<ScaledForwardParams>>,
    params: [*mut c_void; 3],
}

impl<'a> BareLaunch<'a> {
    /// One for each part of a group.
    pub(crate) fn forward(
        kernel: &'a Kernel,
        launches: &'a ForwardLaunches,
        maps: &'a [TensorMap],
        stream: &CurrentStream<'_>,
    ) -> Vec<Self> {
        let Family::Forward(variant) = kernel.spec.family else { return Vec::new() };
        let Some(maps) = maps.get(..kernel.spec.tensor_maps as usize) else { return Vec::new() };
        let launch = |forward| {
            let forward = Box::new(forward);
            let (params, _) = parameter_pointers(&*forward, maps);
            let bare = Self::new(kernel, kernel.grid_of(launches, variant), params, kernel.spec.waits(), stream);
            Self { _forward: Some(forward), ..bare }
        };
        launches.of_variant(variant).map(launch).collect()
    }

    pub(crate) fn merge(kernel: &'a Kernel, run: &'a PreparedRun, stream: &CurrentStream<'_>) -> Option<Self> {
        let (params, _) = parameter_pointers(&run.merge, &[]);
        (kernel.spec.family == Family::Merge)
            .then(|| Self::new(kernel, kernel.useful(run.merge_rows as u32), params, kernel.spec.waits(), stream))
    }

    fn new(
        kernel: &'a Kernel,
        grid: u32,
        params: [*mut c_void; 3],
        programmatic: bool,
        stream: &CurrentStream<'_>,
    ) -> Self {
        let mut attribute = Box::new(overlapping());
        let config = kernel.configuration(grid, &mut *attribute, programmatic, stream);
        Self { kernel, config, _attribute: attribute, _forward: None, params }
    }

    /// Nothing but the call. The stream it was made for is alive and its context current.
    pub(crate) fn enqueue(&mut self) -> std::result::Result<(), cudarc::driver::DriverError> {
        // SAFETY: as in `launch_forward` and `launch_merge`, whose parameters these are; they live as long as `'a`.
        unsafe {
            sys::cuLaunchKernelEx(&self.config, self.kernel.function, self.params.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
    }
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

/// Encodes the tensor maps of K and V: 128-byte swizzle of rows so long, no L2 promotion (measured to be slower), zeros out of range.
pub(crate) fn encode_tensor_maps(device: CudaDevice, [k, v]: &[TensorMapSpec; 2]) -> Result<[TensorMap; 2]> {
    // It uses no device, but the driver refuses it without a context.
    let _current = make_current(device)?;
    Ok([encode_tensor_map(k)?, encode_tensor_map(v)?])
}

fn encode_tensor_map(spec: &TensorMapSpec) -> Result<TensorMap> {
    let mut map = sys::CUtensorMap { opaque: [0; 16] };
    let dtype = match spec.dtype {
        Dtype::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Dtype::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        other if other.bytes() == 1 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        other => return Err(Error::invalid("kv_dtype", other.name(), "f16, bf16 or 8 bits (tensor maps)")),
    };
    let swizzle = if spec.is_swizzled() {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B
    } else {
        sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE
    };
    attempt_for(
        DriverCall::TensorMapEncode,
        || format!("{spec:?}"),
        || {
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
                    swizzle,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            }
            .result()
        },
    )?;
    Ok(map)
}
