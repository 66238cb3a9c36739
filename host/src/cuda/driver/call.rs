//! The one place that every driver call passes: it names the call in errors, and lets tests make one fail.

use crate::{Error, Result};
use cudarc::driver::DriverError;
use std::fmt;

/// The driver calls that the host makes, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DriverCall {
    CtxSetCurrent,
    CtxSynchronize,
    DeviceGetAttribute,
    DeviceGetName,
    DevicePrimaryCtxRetain,
    DriverGetVersion,
    EventCreate,
    EventElapsedTime,
    EventRecord,
    EventSynchronize,
    GetProcAddress,
    GraphInstantiate,
    GraphLaunch,
    GraphRetainUserObject,
    LaunchKernel,
    MemAlloc,
    MemHostAlloc,
    MemcpyDtoH,
    MemcpyHtoD,
    MemcpyHtoDAsync,
    MemsetD8,
    MemsetD8Async,
    ModuleGetFunction,
    ModuleLoad,
    FuncSetAttribute,
    StreamBeginCapture,
    StreamCreate,
    StreamEndCapture,
    StreamGetCaptureInfo,
    StreamGetCtx,
    StreamIsCapturing,
    StreamSynchronize,
    StreamWaitEvent,
    TensorMapEncode,
    ThreadExchangeStreamCaptureMode,
    UserObjectCreate,
}

impl fmt::Display for DriverCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cu{self:?}")
    }
}

/// Makes a driver call.
pub(crate) fn attempt<T>(call: DriverCall, make: impl FnOnce() -> std::result::Result<T, DriverError>) -> Result<T> {
    made(call, make).map_err(|error| Error::Cuda { call: call.to_string(), reason: describe(error) })
}

/// Makes a driver call; its error says what it was about.
pub(crate) fn attempt_for<T>(
    call: DriverCall,
    about: impl FnOnce() -> String,
    make: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> Result<T> {
    made(call, make).map_err(|error| Error::Cuda { call: format!("{call} ({})", about()), reason: describe(error) })
}

#[cfg(not(feature = "fault-injection"))]
fn made<T>(
    _call: DriverCall,
    make: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> std::result::Result<T, DriverError> {
    make()
}

#[cfg(feature = "fault-injection")]
fn made<T>(
    call: DriverCall,
    make: impl FnOnce() -> std::result::Result<T, DriverError>,
) -> std::result::Result<T, DriverError> {
    if crate::cuda::faults::is_due(call) {
        return Err(DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_UNKNOWN));
    }
    make()
}

pub(crate) fn describe(error: DriverError) -> String {
    match (error.error_name(), error.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", name.to_string_lossy(), text.to_string_lossy()),
        _ => format!("driver error {:?}", error.0),
    }
}
