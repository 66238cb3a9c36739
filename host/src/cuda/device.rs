//! One CUDA device: its primary context, its profile, its loaded kernels.

use super::driver::{self, CurrentContext, DriverCall, Kernel, Stream, attempt, attempt_for};
use super::ptx;
use crate::profile::{Datasheet, H200_DATASHEET};
use crate::{AttentionShape, DeviceProfile, Error, Result};
use cudarc::driver::sys::{CUDA_VERSION, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};
use pat_abi::{KERNELS, KernelSpec, Switches, TileVariant};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Oldest driver that has every entry point used here: CUDA 12.0 (cuLaunchKernelEx, cuTensorMapEncodeTiled). Bindings of
/// CUDA 13, which only a build with the feature `yield-cuda-linking` can have, read event times by an entry point of 12.8.
const MIN_DRIVER_VERSION: i32 = if CUDA_VERSION < 13_000 { 12_000 } else { 12_080 };

/// A device and the kernels loaded on it: one per process and ordinal, kept as long as the process runs. So no kernel is
/// unloaded under a run or a graph, and each is compiled once.
#[derive(Clone, Copy)]
pub struct CudaDevice {
    inner: &'static Inner,
}

struct Inner {
    context: Arc<CudaContext>,
    name: String,
    /// Major * 10 + minor.
    compute_capability: u32,
    sm_count: u32,
    /// One per entry of the manifest and combination of switches.
    kernels: Vec<[KernelSlot; Switches::ALL.len()]>,
    /// Those that were asked for: the manifest has hundreds, and a run that is not bound asks for its own in every layer.
    found: RwLock<HashMap<KernelQuery, &'static Kernel>>,
    /// Held for writing by a capture of ours, for reading by what waits for the whole device: a wait would spoil the capture.
    capturing: RwLock<()>,
}

/// What a run asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct KernelQuery {
    pub(super) shape: AttentionShape,
    pub(super) role: KernelRole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum KernelRole {
    Forward(TileVariant, Switches),
    /// Behind one of these variants at least: a set of bits.
    Merge(u32),
}

/// A kernel is compiled by the driver when a plan first names it; meanwhile only those wait that want the same one.
#[derive(Default)]
struct KernelSlot {
    kernel: OnceLock<Kernel>,
    compiling: Mutex<()>,
}

/// Where each entry of the manifest stands in it: it has hundreds.
static INDICES: LazyLock<HashMap<&str, usize>> =
    LazyLock::new(|| KERNELS.iter().enumerate().map(|(index, kernel)| (kernel.entry, index)).collect());

/// The devices that were opened.
static OPEN: Mutex<BTreeMap<usize, CudaDevice>> = Mutex::new(BTreeMap::new());

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaDevice({}, {})", self.ordinal(), self.name())
    }
}

impl PartialEq for CudaDevice {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.inner, other.inner)
    }
}

impl Eq for CudaDevice {}

impl CudaDevice {
    /// Retains the primary context of device `ordinal` (the context torch, candle and the CUDA runtime use), at the first
    /// call; later ones give the same device.
    ///
    /// # Errors
    /// No driver, a driver older than CUDA 12.0, no device, no device of that number, or one older than compute
    /// capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
        // A panic elsewhere leaves the map as it was before or after an insertion: both are fine.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = open.get(&ordinal) {
            return Ok(*device);
        }
        let device = Self { inner: Box::leak(Box::new(Inner::open(ordinal)?)) };
        open.insert(ordinal, device);
        Ok(device)
    }
}

impl Inner {
    fn open(ordinal: usize) -> Result<Self> {
        let unavailable = |reason: String| Error::CudaUnavailable { reason };
        if !driver::library_is_present() {
            return Err(unavailable("libcuda is not there: install the NVIDIA driver".into()));
        }
        let version = driver::driver_version()?;
        if version < MIN_DRIVER_VERSION {
            let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
            return Err(unavailable(format!(
                "the driver supports CUDA {}, {} is needed: update the NVIDIA driver",
                text(version),
                text(MIN_DRIVER_VERSION)
            )));
        }
        let count = CudaContext::device_count()
            .map_err(|error| unavailable(format!("the driver found no device: {}", driver::describe(error))))?;
        if count == 0 {
            return Err(unavailable("the driver found no device (is CUDA_VISIBLE_DEVICES set?)".into()));
        }
        if usize::try_from(count).is_ok_and(|count| ordinal >= count) {
            return Err(Error::invalid("ordinal", ordinal, format!("a device from 0 to {}", count - 1)));
        }
        let about = || format!("device {ordinal}");
        let context = {
            // cudarc makes it current.
            let _kept = attempt(DriverCall::CtxSetCurrent, CurrentContext::keep)?;
            attempt_for(DriverCall::DevicePrimaryCtxRetain, about, || CudaContext::new(ordinal))?
        };
        let name = attempt(DriverCall::DeviceGetName, || context.name())?;
        let (major, minor) = attempt(DriverCall::DeviceGetAttribute, || context.compute_capability())?;
        let compute_capability = (major * 10 + minor).unsigned_abs();
        if compute_capability < 80 {
            return Err(unavailable(format!(
                "device {ordinal} ({name}) has compute capability {major}.{minor}, the kernels need 8.0 or later"
            )));
        }
        let sm_count = attribute(&context, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let kernels = KERNELS.iter().map(|_| Default::default()).collect();
        let (found, capturing) = (RwLock::default(), RwLock::new(()));
        Ok(Self { context, name, compute_capability, sm_count, kernels, found, capturing })
    }
}

fn attribute(context: &CudaContext, which: Attribute) -> Result<u32> {
    attempt(DriverCall::DeviceGetAttribute, || context.attribute(which)).map(i32::unsigned_abs)
}

impl CudaDevice {
    /// Its number among the devices that the process sees.
    pub fn ordinal(&self) -> usize {
        self.inner.context.ordinal()
    }

    /// The driver's name of the device.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Compute capability, major * 10 + minor.
    pub fn compute_capability(&self) -> u32 {
        self.inner.compute_capability
    }

    /// The newest CUDA version the driver supports: (major, minor).
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn driver_cuda_version(&self) -> Result<(i32, i32)> {
        driver::driver_version().map(|version| (version / 1000, version % 1000 / 10))
    }

    /// The cudarc context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.inner.context
    }

    /// What the planner needs to know of the device: measured where the device is known, else scaled from one that is.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn profile(&self) -> Result<DeviceProfile> {
        let measured = Facts {
            name: self.inner.name.clone(),
            compute_capability: self.inner.compute_capability,
            sm_count: self.sm_count(),
            sm_clock_khz: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
            memory_clock_khz: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
            memory_bus_bits: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
            l2_bytes: self.l2_bytes()?,
            smem_per_sm_bytes: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
            registers_per_sm: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
            threads_per_sm: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        };
        Ok(measured.profile())
    }

    /// Streaming multiprocessors.
    pub fn sm_count(&self) -> u32 {
        self.inner.sm_count
    }

    /// L2 capacity in bytes.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn l2_bytes(&self) -> Result<u64> {
        self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map(u64::from)
    }

    fn attribute(&self, which: Attribute) -> Result<u32> {
        attribute(self.context(), which)
    }

    /// A new stream that does not synchronise with the default stream.
    ///
    /// # Errors
    /// The driver cannot create it.
    pub fn new_stream(&self) -> Result<Stream> {
        Stream::create(*self)
    }

    /// The default stream.
    pub fn default_stream(&self) -> Stream {
        Stream::default_of(*self)
    }

    /// A cudarc stream of the caller's.
    ///
    /// # Errors
    /// It belongs to another context.
    pub fn stream_from_cudarc(&self, stream: Arc<CudaStream>) -> Result<Stream> {
        if stream.context().cu_ctx() != self.context().cu_ctx() {
            let got = format!("one of device {}", stream.context().ordinal());
            return Err(Error::invalid("stream", got, format!("one of device {}", self.context().ordinal())));
        }
        Ok(Stream::from_cudarc(*self, stream))
    }

    /// A `CUstream` of another library (torch's `current_stream().cuda_stream`), as an integer. Costs nothing, so that it may
    /// be done per call.
    ///
    /// # Safety
    /// The handle names a stream of this device's primary context (or is 0 or 1: the default stream), and its owner keeps it
    /// alive as long as the returned value or a clone of it is used, which [`PlanBuffers`](super::PlanBuffers) do with the
    /// stream of their last upload. Graphs that somebody captures from it with runs in them are replayed in order with
    /// uploads into those runs' buffers: on the stream of the upload, or behind it.
    ///
    /// # Errors
    /// The handle is 2: the driver takes it for another stream in each thread.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn stream_from_raw(&self, handle: u64) -> Result<Stream> {
        if handle == 2 {
            return Err(Error::invalid("handle", handle, "a stream that is the same one in every thread"));
        }
        Ok(Stream::borrowed(*self, handle))
    }

    /// As [`Self::stream_from_raw`], of a stream that may be another device's: asks the driver for its context.
    ///
    /// # Safety
    /// The handle names a live stream of whatever context. If it is of this device's, as for [`Self::stream_from_raw`].
    ///
    /// # Errors
    /// As [`Self::stream_from_raw`]; the stream is not of this device's primary context.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn checked_stream_from_raw(&self, handle: u64) -> Result<Stream> {
        // SAFETY: nothing is enqueued on it before `check_context` has seen that it is of this device's primary context; the
        // caller vouches for the rest.
        let stream = unsafe { self.stream_from_raw(handle) }?;
        stream.check_context()?;
        Ok(stream)
    }

    /// The kernel that `find` names, which is asked once for each query.
    pub(super) fn kernel_for(
        &self,
        query: KernelQuery,
        find: impl FnOnce() -> Result<(&'static KernelSpec, Switches)>,
    ) -> Result<&'static Kernel> {
        // Entries are written whole: what a panic elsewhere leaves is right.
        let found = self.inner.found.read().unwrap_or_else(PoisonError::into_inner).get(&query).copied();
        if let Some(kernel) = found {
            return Ok(kernel);
        }
        let (spec, switches) = find()?;
        let kernel = self.kernel(spec, switches)?;
        self.inner.found.write().unwrap_or_else(PoisonError::into_inner).insert(query, kernel);
        Ok(kernel)
    }

    /// The loaded kernel, compiled now if this is its first use.
    pub(super) fn kernel(&self, spec: &'static KernelSpec, switches: Switches) -> Result<&'static Kernel> {
        let slots = INDICES.get(spec.entry).map(|index| &self.inner.kernels[*index]);
        let slot = slots.and_then(|slots| slots.iter().zip(Switches::ALL).find(|(_, known)| *known == switches));
        let Some((slot, _)) = slot else {
            return Err(Error::invalid("kernel", spec.entry, "an entry of the manifest"));
        };
        if let Some(kernel) = slot.kernel.get() {
            return Ok(kernel);
        }
        // Nothing is behind the lock: a panic elsewhere leaves no kernel, and the next one compiles it.
        let _alone = slot.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = slot.kernel.get() {
            return Ok(kernel);
        }
        let Some(file) = spec.newest_file(self.inner.compute_capability) else {
            return Err(Error::PlanMismatch {
                what: "the device".into(),
                plan: format!("{}, which is for {}", spec.entry, spec.arch.name()),
                call: format!("{} with {}", self.inner.name, self.inner.compute_capability),
            });
        };
        let start = std::time::Instant::now();
        let kernel = Kernel::load(*self, spec, ptx::cut(ptx::text(file), spec.entry, switches)?, self.sm_count())?;
        tracing::debug!(entry = spec.entry, load_ms = start.elapsed().as_secs_f64() * 1e3, "kernel loaded");
        Ok(slot.kernel.get_or_init(|| kernel))
    }

    /// Held by what waits for the whole device.
    pub(super) fn no_capture(&self) -> RwLockReadGuard<'static, ()> {
        self.inner.capturing.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held by a capture of ours.
    pub(super) fn capture_alone(&self) -> RwLockWriteGuard<'static, ()> {
        self.inner.capturing.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the driver says of a device.
struct Facts {
    name: String,
    compute_capability: u32,
    sm_count: u32,
    sm_clock_khz: u32,
    memory_clock_khz: u32,
    memory_bus_bits: u32,
    l2_bytes: u64,
    smem_per_sm_bytes: u32,
    registers_per_sm: u32,
    threads_per_sm: u32,
}

impl Facts {
    /// The profile of a known device, with the SMs that are there; else the H200's rates scaled by the ratio of peaks.
    fn profile(self) -> DeviceProfile {
        if let Ok(known) = DeviceProfile::by_name(&self.name) {
            return DeviceProfile { name: self.name, sm_count: self.sm_count, ..known };
        }
        // Two transfers per clock and pin.
        let dram_bytes_per_us = 2.0 * f64::from(self.memory_clock_khz) * 1e-3 * f64::from(self.memory_bus_bits) / 8.0;
        let h200 = DeviceProfile::h200();
        // Some virtual devices report no clocks.
        let sm_clock_mhz = match self.sm_clock_khz {
            0 => H200_DATASHEET.sm_clock_mhz,
            khz => f64::from(khz) * 1e-3,
        };
        let datasheet = Datasheet {
            compute_capability: self.compute_capability,
            sm_count: self.sm_count,
            sm_clock_mhz,
            dram_bytes_per_us,
            l2_bytes: self.l2_bytes,
        };
        let scaled = DeviceProfile {
            smem_per_sm_bytes: Some(self.smem_per_sm_bytes),
            registers_per_sm: Some(self.registers_per_sm),
            threads_per_sm: Some(self.threads_per_sm),
            ..DeviceProfile::scaled(&self.name, datasheet)
        };
        if dram_bytes_per_us > 0.0 {
            return scaled;
        }
        // Without a memory clock DRAM is scaled like the rest.
        let cores = scaled.l2_bytes_per_us / h200.l2_bytes_per_us;
        DeviceProfile { hbm_bytes_per_us: h200.hbm_bytes_per_us * cores, ..scaled }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(name: &str, compute_capability: u32) -> Facts {
        Facts {
            name: name.into(),
            compute_capability,
            sm_count: 108,
            sm_clock_khz: 1_410_000,
            memory_clock_khz: 1_593_000,
            memory_bus_bits: 5120,
            l2_bytes: 40 << 20,
            smem_per_sm_bytes: 164 << 10,
            registers_per_sm: 1 << 16,
            threads_per_sm: 2048,
        }
    }

    #[test]
    fn a_known_device_has_its_measured_profile() {
        assert_eq!(facts("NVIDIA H200", 90).profile().hbm_bytes_per_us, DeviceProfile::h200().hbm_bytes_per_us);
    }

    #[test]
    fn an_unknown_device_is_scaled() {
        let a100 = facts("NVIDIA A100X", 80).profile();
        // Datasheet: 2.039 TB/s.
        assert!((1.8e6..2.04e6).contains(&a100.hbm_bytes_per_us), "{a100:?}");
        assert_eq!(a100.wgmma_flop_per_us, 0.0);
        assert_eq!((a100.sm_count, a100.limits()), (108, pat_abi::DeviceLimits::of(80)));
        for sm_clock_khz in [1_410_000, 0] {
            let silent = Facts { sm_clock_khz, memory_clock_khz: 0, ..facts("some vGPU", 80) }.profile();
            assert!(silent.hbm_bytes_per_us > 1e6, "{silent:?}");
            silent.validate().unwrap();
        }
    }
}
