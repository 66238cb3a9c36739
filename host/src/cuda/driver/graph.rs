//! Graphs: our own, and what a graph that somebody else captures has to keep alive.

use super::call::{DriverCall, attempt};
use super::context::{WhileOthersCapture, make_current, try_make_current};
use super::stream::{CurrentStream, Stream};
use crate::cuda::CudaDevice;
use crate::{Error, Result};
use cudarc::driver::{result, sys};
use std::any::Any;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

/// A graph that can be launched. What its kernels use is its owner's business.
#[derive(Debug)]
pub(crate) struct GraphExec {
    device: CudaDevice,
    exec: sys::CUgraphExec,
}

// SAFETY: the handle is a process-wide name; the driver wants calls on one graph to be serialised, which `&mut self` does.
unsafe impl Send for GraphExec {}
// SAFETY: there is no method that takes a shared reference.
unsafe impl Sync for GraphExec {}

impl GraphExec {
    /// Records what `enqueue` puts on a stream made for the purpose. The capture ends however `enqueue` does.
    pub(crate) fn capture(device: CudaDevice, enqueue: impl FnOnce(&CurrentStream<'_>) -> Result<()>) -> Result<Self> {
        let _current = make_current(device)?;
        let stream = Stream::create(device)?;
        let graph = {
            let _alone = device.capture_alone();
            let capture = Capture::begin(&stream)?;
            let enqueued = stream.enter(device).and_then(|current| enqueue(&current));
            let graph = capture.end();
            enqueued?;
            graph?
        };
        let _allowed = WhileOthersCapture::enter()?;
        // SAFETY: `graph` owns the captured graph, and the context is current.
        let exec = attempt(DriverCall::GraphInstantiate, || unsafe {
            result::graph::instantiate(graph.0, sys::CUgraphInstantiate_flags(0))
        })?;
        Ok(Self { device, exec })
    }

    /// Enqueues the captured work.
    pub(crate) fn launch(&mut self, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.device)?;
        // SAFETY: instantiated in `capture`, destroyed only in `drop`; `&mut self` keeps other threads away.
        attempt(DriverCall::GraphLaunch, || unsafe { result::graph::launch(self.exec, current.raw()) })
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        if let Ok(_current) = try_make_current(self.device) {
            // SAFETY: as in `launch`; the driver lets a launch that is under way finish.
            let _ = unsafe { result::graph::exec_destroy(self.exec) };
        }
    }
}

/// A captured graph; destroyed when dropped.
struct CapturedGraph(sys::CUgraph);

impl Drop for CapturedGraph {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it came from `cuStreamEndCapture` and is destroyed only here.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

/// A stream that is being captured by us. Dropping it, as a panic does, ends the capture.
struct Capture<'a> {
    stream: &'a Stream,
    open: bool,
}

impl<'a> Capture<'a> {
    fn begin(stream: &'a Stream) -> Result<Self> {
        let current = stream.enter(stream.device())?;
        // Thread-local: other threads of the program may go on allocating meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and its context current.
        attempt(DriverCall::StreamBeginCapture, || unsafe { result::stream::begin_capture(current.raw(), mode) })?;
        Ok(Self { stream, open: true })
    }

    fn end(mut self) -> Result<CapturedGraph> {
        let graph = self.end_now();
        // Where it failed, once more when dropped: the driver refuses that if the capture has ended all the same.
        self.open = graph.is_err();
        graph
    }

    fn end_now(&self) -> Result<CapturedGraph> {
        let current = self.stream.enter(self.stream.device())?;
        // SAFETY: as in `begin`; this thread began the capture.
        attempt(DriverCall::StreamEndCapture, || unsafe { result::stream::end_capture(current.raw()) })
            .map(CapturedGraph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            let _ = self.end_now();
        }
    }
}

/// Makes the graph that somebody else is capturing from `stream` keep `owner` alive: as long as the graph, its instances and
/// its clones.
pub(crate) fn retain_in_capture(stream: &CurrentStream<'_>, owner: Arc<dyn Any + Send + Sync>) -> Result<()> {
    let graph = graph_under_capture(stream)?;
    // The driver wants one pointer, an `Arc` of a trait object is two.
    let owner = Box::into_raw(Box::new(owner));
    let mut object = null_mut();
    let flags = sys::CUuserObject_flags::CU_USER_OBJECT_NO_DESTRUCTOR_SYNC as u32;
    let created = attempt(DriverCall::UserObjectCreate, || {
        // SAFETY: `released` takes back exactly the box that `owner` came from, once: when the last reference goes.
        unsafe { sys::cuUserObjectCreate(&mut object, owner.cast(), Some(released), 1, flags) }.result()
    });
    if let Err(error) = created {
        // SAFETY: the driver has not taken it.
        drop(unsafe { Box::from_raw(owner) });
        return Err(error);
    }
    let flags = sys::CUuserObjectRetain_flags::CU_GRAPH_USER_OBJECT_MOVE as u32;
    let retained = attempt(DriverCall::GraphRetainUserObject, || {
        // SAFETY: the graph is under capture and the object has the one reference that is moved into it.
        unsafe { sys::cuGraphRetainUserObject(graph, object, 1, flags) }.result()
    });
    retained.inspect_err(|_| {
        // SAFETY: the reference was not moved; giving it up calls `released`.
        let _ = unsafe { sys::cuUserObjectRelease(object, 1) };
    })
}

/// What graphs have let go of. Their destructors run on a thread of the driver that may not call the driver, so that nothing
/// can be freed there.
static RELEASED: Mutex<Vec<Arc<dyn Any + Send + Sync>>> = Mutex::new(Vec::new());

/// Frees what graphs of other libraries have kept alive and were destroyed since.
pub(crate) fn drop_released() {
    // Taken out first: what is dropped may take the lock itself.
    let released = std::mem::take(&mut *RELEASED.lock().unwrap_or_else(PoisonError::into_inner));
    drop(released);
}

unsafe extern "C" fn released(owner: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `retain_in_capture`, and the driver calls this once.
    let owner = unsafe { Box::from_raw(owner.cast::<Arc<dyn Any + Send + Sync>>()) };
    RELEASED.lock().unwrap_or_else(PoisonError::into_inner).push(*owner);
}

/// The graph that is being captured from a stream. Asked by an entry point of CUDA 12.0: bindings of CUDA 13, which
/// `yield-cuda-linking` may bring, have lost its name, the driver has not.
fn graph_under_capture(stream: &CurrentStream<'_>) -> Result<sys::CUgraph> {
    type GetCaptureInfo = unsafe extern "C" fn(
        sys::CUstream,
        *mut sys::CUstreamCaptureStatus,
        *mut u64,
        *mut sys::CUgraph,
        *mut *const sys::CUgraphNode,
        *mut usize,
    ) -> sys::CUresult;
    let mut entry = null_mut();
    attempt(DriverCall::GetProcAddress, || {
        // SAFETY: the name is NUL-terminated, `entry` receives one pointer, and no status is asked for.
        unsafe { sys::cuGetProcAddress_v2(c"cuStreamGetCaptureInfo".as_ptr(), &mut entry, 12_000, 0, null_mut()) }
            .result()
    })?;
    let missing = || Error::Cuda {
        call: DriverCall::StreamGetCaptureInfo.to_string(),
        reason: "no graph is being captured".into(),
    };
    if entry.is_null() {
        return Err(missing());
    }
    // SAFETY: that is the type of this entry point in CUDA 12.0, the version asked for.
    let get_capture_info = unsafe { std::mem::transmute::<*mut c_void, GetCaptureInfo>(entry) };
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut graph = null_mut();
    attempt(DriverCall::StreamGetCaptureInfo, || {
        // SAFETY: the stream is alive; what is not asked for may be null.
        unsafe { get_capture_info(stream.raw(), &mut status, null_mut(), &mut graph, null_mut(), null_mut()) }.result()
    })?;
    if graph.is_null() { Err(missing()) } else { Ok(graph) }
}
