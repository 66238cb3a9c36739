//! One CUDA device: its primary context, its profile, its loaded kernels.

use super::driver::{self, Kernel, Stream, failed};
use super::ptx;
use crate::profile::{Datasheet, H200_DATASHEET};
use crate::{DeviceProfile, Error, Result};
use cudarc::driver::sys::{CUDA_VERSION, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream};
use pat_abi::{Arch, KernelSpec};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Oldest driver that has every entry point used here: CUDA 12.0 (cuLaunchKernelEx, cuTensorMapEncodeTiled). Bindings of
/// CUDA 13, which only a build with the feature `yield-cuda-linking` can have, read event times by an entry point of 12.8.
const MIN_DRIVER_VERSION: i32 = if CUDA_VERSION < 13_000 { 12_000 } else { 12_080 };

/// A device and the kernels loaded on it. Clones share both.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Arc<CudaContext>,
    name: String,
    /// Major * 10 + minor.
    compute_capability: u32,
    /// By entry name. A kernel is compiled by the driver when a plan first names it.
    kernels: Mutex<HashMap<&'static str, Arc<Kernel>>>,
}

impl CudaDevice {
    /// Retains the primary context of device `ordinal` (the context torch, candle and the CUDA runtime use).
    ///
    /// # Errors
    /// No driver, a driver older than CUDA 12.0, no device, no device of that number, or one older than compute
    /// capability 8.0.
    pub fn new(ordinal: usize) -> Result<Self> {
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
        let context =
            CudaContext::new(ordinal).map_err(failed(format!("retaining the context of device {ordinal}")))?;
        let name = context.name().map_err(failed("cuDeviceGetName"))?;
        let (major, minor) = context.compute_capability().map_err(failed("cuDeviceGetAttribute"))?;
        let compute_capability = (major * 10 + minor).unsigned_abs();
        if compute_capability < 80 {
            return Err(unavailable(format!(
                "device {ordinal} ({name}) has compute capability {major}.{minor}, the kernels need 8.0 or later"
            )));
        }
        Ok(Self { inner: Arc::new(Inner { context, name, compute_capability, kernels: Mutex::default() }) })
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
            sm_count: self.sm_count()?,
            sm_clock_khz: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
            memory_clock_khz: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
            memory_bus_bits: self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
            l2_bytes: self.l2_bytes()?,
        };
        Ok(measured.profile())
    }

    /// Streaming multiprocessors.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn sm_count(&self) -> Result<u32> {
        self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
    }

    /// L2 capacity in bytes.
    ///
    /// # Errors
    /// The driver cannot be asked.
    pub fn l2_bytes(&self) -> Result<u64> {
        self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).map(u64::from)
    }

    fn attribute(&self, which: Attribute) -> Result<u32> {
        self.context().attribute(which).map(i32::unsigned_abs).map_err(failed("cuDeviceGetAttribute"))
    }

    /// A new stream that does not synchronise with the default stream.
    ///
    /// # Errors
    /// The driver cannot create it.
    pub fn new_stream(&self) -> Result<Stream> {
        self.context().new_stream().map(Stream::new).map_err(failed("cuStreamCreate"))
    }

    /// The default stream.
    pub fn default_stream(&self) -> Stream {
        Stream::new(self.context().default_stream())
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
        Ok(Stream::new(stream))
    }

    /// A `CUstream` of another library (torch's `current_stream().cuda_stream`), as an integer.
    ///
    /// # Safety
    /// The handle names a stream of this device's primary context (or is 0, 1 or 2: the default streams), and its owner
    /// keeps it alive as long as the returned value or a clone of it is used.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn stream_from_raw(&self, handle: u64) -> Stream {
        // SAFETY: passed on.
        unsafe { Stream::from_raw(self.context(), handle) }
    }

    /// The loaded kernel, compiled now if this is its first use.
    pub(super) fn kernel(&self, spec: &'static KernelSpec) -> Result<Arc<Kernel>> {
        // A panic elsewhere leaves the map as it was before or after an insertion: both are fine.
        let mut kernels = self.inner.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(spec.entry) {
            return Ok(kernel.clone());
        }
        if spec.arch == Arch::Sm90a && self.inner.compute_capability != 90 {
            return Err(Error::PlanMismatch {
                what: "the device".into(),
                plan: format!("{}, which runs on compute capability 9.0 only", spec.entry),
                call: format!("{} with {}", self.inner.name, self.inner.compute_capability),
            });
        }
        let start = std::time::Instant::now();
        let kernel = Arc::new(Kernel::load(
            self.context(),
            spec,
            ptx::cut(ptx::text(spec.arch), spec.entry)?,
            self.sm_count()?,
        )?);
        tracing::debug!(entry = spec.entry, load_ms = start.elapsed().as_secs_f64() * 1e3, "kernel loaded");
        kernels.insert(spec.entry, kernel.clone());
        Ok(kernel)
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
        let scaled = DeviceProfile::scaled(
            &self.name,
            Datasheet {
                compute_capability: self.compute_capability,
                sm_count: self.sm_count,
                sm_clock_mhz,
                dram_bytes_per_us,
                l2_bytes: self.l2_bytes,
            },
        );
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
        assert_eq!(a100.sm_count, 108);
        for sm_clock_khz in [1_410_000, 0] {
            let silent = Facts { sm_clock_khz, memory_clock_khz: 0, ..facts("some vGPU", 80) }.profile();
            assert!(silent.hbm_bytes_per_us > 1e6, "{silent:?}");
            silent.validate().unwrap();
        }
    }
}
