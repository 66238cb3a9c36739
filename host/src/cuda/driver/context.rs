//! The library, the current context of a thread, and what a thread may call while some stream is captured.

use super::call::{DriverCall, attempt};
use crate::Result;
use crate::cuda::CudaDevice;
use cudarc::driver::{DriverError, result, sys};

/// Whether libcuda can be loaded. To be asked before any other call: cudarc panics where it is absent.
pub(crate) fn library_is_present() -> bool {
    // cudarc has such a check, but not in a tree where another crate makes it link libcuda. These names are among its own.
    let names = if cfg!(windows) { ["nvcuda.dll", "cuda.dll"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loads libcuda by its system names and looks at nothing in it; its initialisers are the driver's own.
    names.into_iter().any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

/// The CUDA version the driver supports: 1000 * major + 10 * minor.
pub(crate) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one integer; allowed before `cuInit`. The library is present (checked by `CudaDevice::new`).
    attempt(DriverCall::DriverGetVersion, || unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
    Ok(version)
}

/// Makes the device's primary context this thread's current one, as long as the result lives.
pub(crate) fn make_current(device: CudaDevice) -> Result<CurrentContext> {
    attempt(DriverCall::CtxSetCurrent, || try_make_current(device))
}

/// As [`make_current`], for what is being dropped.
pub(crate) fn try_make_current(device: CudaDevice) -> std::result::Result<CurrentContext, DriverError> {
    let wanted = device.context().cu_ctx();
    let kept = CurrentContext::keep()?;
    if kept.former != wanted {
        // SAFETY: a `CudaDevice` retains its primary context as long as the process runs.
        unsafe { result::ctx::set_current(wanted) }?;
    }
    Ok(kept)
}

/// What was this thread's current context is so again when this is dropped. The CUDA runtime, and with it torch, takes the
/// current device from it.
#[must_use]
pub(crate) struct CurrentContext {
    /// Null where there was none.
    former: sys::CUcontext,
}

impl CurrentContext {
    /// For calls of cudarc that make a context current on their own.
    pub(crate) fn keep() -> std::result::Result<Self, DriverError> {
        Ok(Self { former: result::ctx::get_current()?.unwrap_or(std::ptr::null_mut()) })
    }
}

impl Drop for CurrentContext {
    fn drop(&mut self) {
        if result::ctx::get_current().is_ok_and(|current| current.unwrap_or(std::ptr::null_mut()) != self.former) {
            // SAFETY: it was current when this was made, in this thread (raw pointers are not `Send`); whoever made it current
            // keeps it. Null is no context.
            let _ = unsafe { result::ctx::set_current(self.former) };
        }
    }
}

/// Lets this thread allocate, free and wait for events while another thread captures a stream in the driver's strictest mode
/// (torch's default), which would otherwise refuse the call and spoil that capture. None of these calls touches a stream.
pub(crate) struct WhileOthersCapture {
    former: sys::CUstreamCaptureMode,
}

impl WhileOthersCapture {
    pub(crate) fn enter() -> Result<Self> {
        attempt(DriverCall::ThreadExchangeStreamCaptureMode, Self::try_enter)
    }

    /// As [`Self::enter`], for what is being dropped.
    pub(crate) fn try_enter() -> std::result::Result<Self, DriverError> {
        exchange(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).map(|former| Self { former })
    }
}

impl Drop for WhileOthersCapture {
    fn drop(&mut self) {
        // It cannot fail for a mode that the driver itself gave.
        let _ = exchange(self.former);
    }
}

fn exchange(mut mode: sys::CUstreamCaptureMode) -> std::result::Result<sys::CUstreamCaptureMode, DriverError> {
    // SAFETY: reads and writes the one integer, and a setting of the calling thread.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
    Ok(mode)
}

/// Waits for everything that was enqueued on the device.
pub(crate) fn synchronize(device: CudaDevice) -> Result<()> {
    let _current = make_current(device)?;
    attempt(DriverCall::CtxSynchronize, result::ctx::synchronize)
}
