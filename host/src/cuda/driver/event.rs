//! Points in a stream.

use super::call::{DriverCall, attempt};
use super::context::{WhileOthersCapture, make_current};
use super::stream::Stream;
use crate::cuda::CudaDevice;
use crate::{Error, Result};
use cudarc::driver::{CudaEvent, DriverError, result, sys};

/// An event of one device.
#[derive(Debug)]
pub(crate) struct Event {
    device: CudaDevice,
    event: CudaEvent,
}

impl Event {
    /// An event for ordering streams.
    pub(crate) fn new(device: CudaDevice) -> Result<Self> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event whose time can be read.
    pub(crate) fn with_time(device: CudaDevice) -> Result<Self> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(device: CudaDevice, flags: sys::CUevent_flags) -> Result<Self> {
        let event = attempt(DriverCall::EventCreate, || device.context().new_event(Some(flags)))?;
        Ok(Self { device, event })
    }

    pub(crate) fn device(&self) -> CudaDevice {
        self.device
    }

    /// Marks the stream's present end.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.device)?;
        // SAFETY: the event lives as long as `self`; the stream is alive and of the same context (`enter`).
        attempt(DriverCall::EventRecord, || unsafe { result::event::record(self.event.cu_event(), current.raw()) })
    }

    /// What `stream` is given from now on starts after this event.
    pub(crate) fn hold_back(&self, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.device)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as in `record`.
        attempt(DriverCall::StreamWaitEvent, || unsafe {
            result::stream::wait_event(current.raw(), self.event.cu_event(), flags)
        })
    }

    /// The host waits for the event; at once where it was never recorded.
    pub(crate) fn synchronize(&self) -> Result<()> {
        make_current(self.device)?;
        let _allowed = WhileOthersCapture::enter()?;
        attempt(DriverCall::EventSynchronize, || self.try_synchronize())
    }

    /// As [`Self::synchronize`], for what is being dropped. The context is current.
    pub(crate) fn try_synchronize(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the event lives as long as `self`, and no capture of ours records it.
        unsafe { result::event::synchronize(self.event.cu_event()) }
    }

    /// GPU time from `start` to this event, in microseconds; waits for both. Both come from [`Self::with_time`].
    pub(crate) fn elapsed_us_since(&self, start: &Self) -> Result<f64> {
        if self.device != start.device {
            return Err(Error::invalid("start", start.device.name(), self.device.name()));
        }
        self.synchronize()?;
        start.synchronize()?;
        // SAFETY: both events live and are of the current context.
        let elapsed_ms = attempt(DriverCall::EventElapsedTime, || unsafe {
            result::event::elapsed(start.event.cu_event(), self.event.cu_event())
        })?;
        Ok(f64::from(elapsed_ms) * 1e3)
    }
}
