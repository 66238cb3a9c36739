//! Streams: our own, another library's, the default one.

use super::call::{DriverCall, attempt};
use super::context::{CurrentContext, WhileOthersCapture, make_current, try_make_current};
use crate::cuda::CudaDevice;
use crate::{Error, Result};
use cudarc::driver::{CudaStream, result, sys};
use std::sync::Arc;

/// A stream work is enqueued on: owned, another library's, or the default stream. Clones name the same stream.
#[derive(Clone, Debug)]
pub struct Stream {
    device: CudaDevice,
    /// The `CUstream`.
    handle: u64,
    origin: Origin,
}

#[derive(Clone, Debug)]
enum Origin {
    /// Created here, destroyed with the last clone.
    Own {
        _owner: Arc<OwnStream>,
    },
    /// cudarc destroys it with the last reference.
    Cudarc {
        _owner: Arc<CudaStream>,
    },
    /// The caller keeps it alive.
    Raw,
    Default,
}

#[derive(Debug)]
struct OwnStream {
    device: CudaDevice,
    handle: u64,
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Ok(_current) = try_make_current(self.device) {
            // SAFETY: created in `Stream::create`, destroyed only here; work that is under way goes on to its end.
            let _ = unsafe { result::stream::destroy(raw(self.handle)) };
        }
    }
}

/// What a stream is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CaptureStatus {
    /// Work runs.
    None,
    /// Work is recorded into a graph.
    Capturing,
    /// A capture has failed and was not ended yet.
    Invalidated,
}

impl Stream {
    pub(crate) fn create(device: CudaDevice) -> Result<Self> {
        let _current = make_current(device)?;
        let _allowed = WhileOthersCapture::enter()?;
        let created =
            attempt(DriverCall::StreamCreate, || result::stream::create(result::stream::StreamKind::NonBlocking))?;
        let handle = created.expose_provenance() as u64;
        Ok(Self { device, handle, origin: Origin::Own { _owner: Arc::new(OwnStream { device, handle }) } })
    }

    pub(crate) fn default_of(device: CudaDevice) -> Self {
        Self { device, handle: 0, origin: Origin::Default }
    }

    pub(crate) fn from_cudarc(device: CudaDevice, stream: Arc<CudaStream>) -> Self {
        let handle = stream.cu_stream().expose_provenance() as u64;
        Self { device, handle, origin: Origin::Cudarc { _owner: stream } }
    }

    /// The caller vouches for the handle: `CudaDevice::stream_from_raw`.
    pub(crate) fn borrowed(device: CudaDevice, handle: u64) -> Self {
        Self { device, handle, origin: Origin::Raw }
    }

    /// Refuses another library's stream that is not of this device's primary context.
    pub(crate) fn check_context(&self) -> Result<()> {
        // 0 and 1 name the default stream of whatever context is current.
        if self.handle <= 1 {
            return Ok(());
        }
        let _current = make_current(self.device)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: whoever made this vouches that the handle names a live stream; the call writes one pointer.
        attempt(DriverCall::StreamGetCtx, || unsafe { sys::cuStreamGetCtx(raw(self.handle), &mut context) }.result())?;
        if context == self.device.context().cu_ctx() {
            return Ok(());
        }
        let (got, ordinal) =
            (format!("{:#x}, a stream of another device or context", self.handle), self.device.ordinal());
        Err(Error::invalid("stream", got, format!("one of the primary context of device {ordinal}")))
    }

    /// The `CUstream`, as an integer.
    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// The device it belongs to.
    pub fn device(&self) -> CudaDevice {
        self.device
    }

    /// Waits until everything enqueued so far has finished.
    ///
    /// # Errors
    /// An enqueued operation failed, or the stream is captured.
    pub fn synchronize(&self) -> Result<()> {
        let current = self.enter(self.device)?;
        let _allowed = WhileOthersCapture::enter()?;
        // SAFETY: the stream is alive: owned, or vouched for by the caller.
        attempt(DriverCall::StreamSynchronize, || unsafe { result::stream::synchronize(current.raw()) })
    }

    /// Whether graphs that somebody else captures from this stream may hold runs: their replays are ordered by whoever vouched
    /// for the handle.
    pub(crate) fn may_be_captured_by_others(&self) -> bool {
        matches!(self.origin, Origin::Raw)
    }

    /// Whether both are one stream, so that work on one stays in order with work on the other.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.handle == other.handle && self.device == other.device
    }

    /// The stream with its context current, for calls about memory, events and kernels of `device`.
    pub(crate) fn enter(&self, device: CudaDevice) -> Result<CurrentStream<'_>> {
        if self.device != device {
            return Err(Error::invalid(
                "stream",
                format!("one of device {}", self.device.ordinal()),
                format!("one of device {}", device.ordinal()),
            ));
        }
        Ok(CurrentStream { stream: self, _context: make_current(device)? })
    }
}

/// A live stream whose context is this thread's current one, as long as this lives.
pub(crate) struct CurrentStream<'a> {
    stream: &'a Stream,
    _context: CurrentContext,
}

impl CurrentStream<'_> {
    pub(super) fn raw(&self) -> sys::CUstream {
        raw(self.stream.handle)
    }

    /// Asks the driver. For the default stream it is an error while another stream, which it would wait for, is captured.
    pub(crate) fn capture_status(&self) -> Result<CaptureStatus> {
        // SAFETY: the stream is alive and of the current context.
        let status = attempt(DriverCall::StreamIsCapturing, || unsafe { result::stream::is_capturing(self.raw()) })?;
        Ok(match status {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => CaptureStatus::None,
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => CaptureStatus::Capturing,
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED => CaptureStatus::Invalidated,
        })
    }
}

fn raw(handle: u64) -> sys::CUstream {
    std::ptr::with_exposed_provenance_mut(handle as usize)
}
