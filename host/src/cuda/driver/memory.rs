//! Device memory and pinned host memory.

use super::call::{DriverCall, attempt, attempt_for};
use super::context::{WhileOthersCapture, make_current, synchronize, try_make_current};
use super::event::Event;
use super::stream::Stream;
use crate::cuda::{CudaDevice, DeviceSpan};
use crate::{Error, Result};
use bytemuck::{NoUninit, Pod};
use cudarc::driver::{PinnedHostSlice, result};
use std::sync::Arc;

/// Owned device memory; freed with the last reference.
#[derive(Debug)]
pub(crate) struct Allocation {
    device: CudaDevice,
    address: u64,
    bytes: usize,
}

impl Allocation {
    pub(crate) fn device(&self) -> CudaDevice {
        self.device
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
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
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let Ok(_current) = try_make_current(self.device) else { return };
        let _allowed = WhileOthersCapture::try_enter();
        // `cuMemFree` waits for work that is under way on the device, so that kernels which still use the memory finish first.
        // SAFETY: allocated in `DeviceBuffer::zeroed`, freed only here. Whatever names the address holds a reference: spans,
        // bound runs, and graphs through their runs.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Owned device memory, for tests and tools; engines bring their own ([`DeviceSpan::from_raw`]).
///
/// Its [spans](Self::span) keep the memory alive. Copies wait for the whole device before and after, so that no stream needs to
/// be named; they fail while another library captures a stream.
#[derive(Debug)]
pub struct DeviceBuffer {
    memory: Arc<Allocation>,
}

impl DeviceBuffer {
    /// Allocates `bytes` bytes (at least 1) and clears them.
    ///
    /// # Errors
    /// The device has not that much memory left.
    pub fn zeroed(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let (device, bytes) = (*device, bytes.max(1));
        let _current = make_current(device)?;
        let address = {
            let _allowed = WhileOthersCapture::enter()?;
            // SAFETY: the context is current; the size is not 0. The memory is cleared below before anyone can read it.
            attempt_for(DriverCall::MemAlloc, || format!("{bytes} bytes"), || unsafe { result::malloc_sync(bytes) })?
        };
        let memory = Arc::new(Allocation { device, address, bytes });
        // On a stream of its own: nothing else uses the memory yet, and waiting for the device would spoil others' captures.
        let stream = Stream::create(device)?;
        let current = stream.enter(device)?;
        // SAFETY: the range is this allocation, which lives until the stream has been waited for.
        attempt(DriverCall::MemsetD8Async, || unsafe { result::memset_d8_async(address, 0, bytes, current.raw()) })?;
        stream.synchronize()?;
        Ok(Self { memory })
    }

    /// Allocates room for `values` and copies them there.
    ///
    /// # Errors
    /// As [`Self::zeroed`]; also when the copy fails.
    pub fn from_slice<T: NoUninit>(device: &CudaDevice, values: &[T]) -> Result<Self> {
        let buffer = Self::zeroed(device, size_of_val(values))?;
        let stream = Stream::create(*device)?;
        let current = stream.enter(*device)?;
        let bytes = bytemuck::cast_slice::<T, u8>(values);
        // SAFETY: the range is the whole allocation or nothing; both sides live until the stream has been waited for.
        attempt(DriverCall::MemcpyHtoDAsync, || unsafe {
            result::memcpy_htod_async(buffer.memory.address, bytes, current.raw())
        })?;
        stream.synchronize()?;
        Ok(buffer)
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.memory.bytes as u64
    }

    /// The memory, for [`RunArgs`](crate::cuda::RunArgs). It stays allocated as long as the span, or a run bound to it.
    pub fn span(&self) -> DeviceSpan {
        DeviceSpan::owned(self.memory.device, self.memory.address, self.bytes(), self.memory.clone())
    }

    pub(crate) fn memory(&self) -> &Arc<Allocation> {
        &self.memory
    }

    /// Sets every byte to `value` (0xff makes NaNs of all float types).
    ///
    /// # Errors
    /// The driver call fails, or earlier work on the device did.
    pub fn fill(&mut self, value: u8) -> Result<()> {
        self.while_idle(|memory| {
            // SAFETY: the range is this allocation; nothing on the device uses it (`while_idle`).
            attempt(DriverCall::MemsetD8, || unsafe { result::memset_d8_sync(memory.address, value, memory.bytes) })
        })
    }

    /// Copies `values` to `offset_bytes`.
    ///
    /// # Errors
    /// They do not fit; the driver call fails, or earlier work on the device did.
    pub fn write<T: NoUninit>(&mut self, offset_bytes: usize, values: &[T]) -> Result<()> {
        self.memory.check_range(offset_bytes, size_of_val(values))?;
        if values.is_empty() {
            return Ok(());
        }
        let bytes = bytemuck::cast_slice::<T, u8>(values);
        self.while_idle(|memory| {
            // SAFETY: the range was checked; nothing on the device uses the memory (`while_idle`).
            attempt(DriverCall::MemcpyHtoD, || unsafe {
                result::memcpy_htod_sync(memory.address + offset_bytes as u64, bytes)
            })
        })
    }

    /// Copies from `offset_bytes` into `values`.
    ///
    /// # Errors
    /// They reach beyond the end; the driver call fails, or earlier work on the device did.
    pub fn read<T: Pod>(&self, offset_bytes: usize, values: &mut [T]) -> Result<()> {
        self.memory.check_range(offset_bytes, size_of_val(values))?;
        if values.is_empty() {
            return Ok(());
        }
        let bytes = bytemuck::cast_slice_mut::<T, u8>(values);
        self.while_idle(|memory| {
            // SAFETY: the range was checked; nothing on the device writes the memory (`while_idle`).
            attempt(DriverCall::MemcpyDtoH, || unsafe {
                result::memcpy_dtoh_sync(bytes, memory.address + offset_bytes as u64)
            })
        })
    }

    /// Waits for the device before and after `copy`: a small copy from pageable memory may return while it is still in flight,
    /// unseen by other streams. No graph of ours is captured meanwhile, which such a wait would spoil.
    fn while_idle(&self, copy: impl FnOnce(&Allocation) -> Result<()>) -> Result<()> {
        let device = self.memory.device;
        let _no_capture = device.no_capture();
        let _current = make_current(device)?;
        synchronize(device)?;
        copy(&self.memory)?;
        synchronize(device)
    }
}

/// Two pinned host buffers that take turns, so that the host can write the next plan while the last one is copied.
pub(crate) struct StagingRing {
    slots: Vec<StagingSlot>,
    next: usize,
}

struct StagingSlot {
    memory: PinnedHostSlice<u8>,
    /// Behind the last copy from this slot.
    copied: Event,
}

impl std::fmt::Debug for StagingRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagingRing").field("next", &self.next).finish_non_exhaustive()
    }
}

impl StagingRing {
    pub(crate) fn new(device: CudaDevice, bytes: usize) -> Result<Self> {
        let slot = || -> Result<StagingSlot> {
            let _allowed = WhileOthersCapture::enter()?;
            // SAFETY: the bytes are written below before anything reads them.
            let mut memory = attempt_for(
                DriverCall::MemHostAlloc,
                || format!("{bytes} bytes"),
                || unsafe { device.context().alloc_pinned::<u8>(bytes) },
            )?;
            let start = attempt(DriverCall::EventSynchronize, || memory.as_mut_ptr())?;
            // SAFETY: `start` is the beginning of `bytes` bytes that nothing else refers to.
            unsafe { start.write_bytes(0, bytes) };
            Ok(StagingSlot { memory, copied: Event::new(device)? })
        };
        let _current = make_current(device)?;
        Ok(Self { slots: vec![slot()?, slot()?], next: 0 })
    }

    /// Enqueues the copy of `bytes` to the start of `target`. Waits where the slot is still being read by the copy before the
    /// last one.
    pub(crate) fn upload(&mut self, bytes: &[u8], target: &Allocation, stream: &Stream) -> Result<()> {
        target.check_range(0, bytes.len())?;
        // Before cudarc's slice, which makes the context current on its own.
        let current = stream.enter(target.device)?;
        let _allowed = WhileOthersCapture::enter()?;
        let slot = &mut self.slots[self.next];
        slot.copied.synchronize()?;
        let staged = attempt(DriverCall::EventSynchronize, || slot.memory.as_mut_slice())?;
        let staged = &mut staged[..bytes.len()];
        staged.copy_from_slice(bytes);
        // SAFETY: both ranges hold `bytes.len()` bytes (target checked above, staging as large as the target); the
        // staging bytes are not touched again before `copied` has been waited for.
        attempt(DriverCall::MemcpyHtoDAsync, || unsafe {
            result::memcpy_htod_async(target.address, staged, current.raw())
        })?;
        self.next = 1 - self.next;
        // Without its mark the copy could be overtaken by the next write to the slot.
        slot.copied.record(stream).inspect_err(|_| {
            let _ = stream.synchronize();
        })
    }
}

impl Drop for StagingRing {
    fn drop(&mut self) {
        let _allowed = WhileOthersCapture::try_enter();
        // The pinned memory must outlive the copies that read it.
        for slot in self.slots.drain(..) {
            // Until the slot is gone: cudarc makes the context current to free its memory, and leaves it so.
            let current = try_make_current(slot.copied.device());
            if current.is_ok() {
                let _ = slot.copied.try_synchronize();
            }
            drop(slot);
        }
    }
}
