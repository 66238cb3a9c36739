//! Points in a stream.

use super::call::{DriverCall, attempt};
use super::context::{WhileOthersCapture, make_current, try_make_current};
use super::stream::Stream;
use crate::cuda::CudaDevice;
use crate::{Error, Result};
use cudarc::driver::{DriverError, result, sys};

/// An event of one device.
#[derive(Debug)]
pub(crate) struct Event {
    device: CudaDevice,
    event: sys::CUevent,
}

// SAFETY: the handle is a process-wide name; the driver's event calls are thread-safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

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
        let _current = make_current(device)?;
        let _allowed = WhileOthersCapture::enter()?;
        let event = attempt(DriverCall::EventCreate, || result::event::create(flags))?;
        Ok(Self { device, event })
    }

    pub(crate) fn device(&self) -> CudaDevice {
        self.device
    }

    /// Marks the stream's present end.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.device)?;
        // SAFETY: the event lives as long as `self`; the stream is alive and of the same context (`enter`).
        attempt(DriverCall::EventRecord, || unsafe { result::event::record(self.event, current.raw()) })
    }

    /// What `stream` is given from now on starts after this event.
    pub(crate) fn hold_back(&self, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.device)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as in `record`.
        attempt(DriverCall::StreamWaitEvent, || unsafe { result::stream::wait_event(current.raw(), self.event, flags) })
    }

    /// The host waits for the event; at once where it was never recorded.
    pub(crate) fn synchronize(&self) -> Result<()> {
        let _current = make_current(self.device)?;
        let _allowed = WhileOthersCapture::enter()?;
        attempt(DriverCall::EventSynchronize, || self.try_synchronize())
    }

    /// As [`Self::synchronize`], for what is being dropped. The context is current.
    pub(crate) fn try_synchronize(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the event lives as long as `self`, and no capture of ours records it.
        unsafe { result::event::synchronize(self.event) }
    }

    /// GPU time from `start` to this event, in microseconds; waits for both. Both come from [`Self::with_time`].
    pub(crate) fn elapsed_us_since(&self, start: &Self) -> Result<f64> {
        if self.device != start.device {
            return Err(Error::invalid("start", start.device.name(), self.device.name()));
        }
        let _current = make_current(self.device)?;
        self.synchronize()?;
        start.synchronize()?;
        // SAFETY: both events live and are of the current context.
        let elapsed_ms =
            attempt(DriverCall::EventElapsedTime, || unsafe { result::event::elapsed(start.event, self.event) })?;
        Ok(f64::from(elapsed_ms) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = try_make_current(self.device) {
            // SAFETY: created in `with_flags`, destroyed only here; the driver keeps it until work that waits for it is done.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}
