//! A run that was checked once and owns what it uses.

use super::CudaDevice;
use super::args::{ForwardLaunches, PreparedRun, RunArgs};
use super::driver::{self, Allocation, BareLaunch, CaptureStatus, CurrentStream, Kernel, Stream, TensorMap};
use super::plan_buffers::{PlanBuffers, Uploaded, Workspace};
use crate::eligibility::VECTOR_BYTES;
use crate::plan::PlanGeneration;
use crate::{Error, Result};
use pat_abi::{MergeParams, TileVariant};
use std::any::Any;
use std::sync::Arc;

/// One call of the operation, checked and ready to be launched any number of times ([`CudaEngine::bind`]).
///
/// It owns what the launches use: the plan's memory, the workspace, the tensors as far as their spans have owners; kernels stay
/// loaded anyway. Clones share all that. `Send` and `Sync`: any thread may run it on any stream.
///
/// Bound to buffers of exact geometry it serves the plan that was uploaded then; bound to buffers of fixed geometry, every plan
/// that is uploaded into them.
///
/// [`CudaEngine::bind`]: super::CudaEngine::bind
#[derive(Clone, Debug)]
pub struct BoundRun {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: CudaDevice,
    plan_memory: Arc<Allocation>,
    /// Which plan it was bound for; `None` for buffers of fixed geometry.
    generation: Option<PlanGeneration>,
    run: PreparedRun,
    kernels: RunKernels,
    /// Of the tensors and the workspace: held, not looked at.
    _owners: Vec<Arc<dyn Any + Send + Sync>>,
}

/// The kernels of a run, in the order they are launched. Binding allocates nothing for them: engines without bound runs bind in
/// every layer.
#[derive(Debug)]
pub(super) struct RunKernels {
    /// Of K and V, where a kernel takes them.
    pub(super) maps: Option<[TensorMap; 2]>,
    /// For each of [`PreparedRun::forward`].
    pub(super) forward: [[Option<&'static Kernel>; TileVariant::ALL.len()]; 2],
    pub(super) merge: Option<&'static Kernel>,
}

impl RunKernels {
    /// The forward kernels of a run, and of which of its launches each is.
    fn forward_of<'a>(&'a self, run: &'a PreparedRun) -> impl Iterator<Item = (&'static Kernel, &'a ForwardLaunches)> {
        let launches = self.forward.iter().zip(&run.forward);
        launches.flat_map(|(kernels, launches)| kernels.iter().flatten().map(move |kernel| (*kernel, launches)))
    }

    fn maps(&self) -> &[TensorMap] {
        self.maps.as_ref().map_or(&[], |maps| &maps[..])
    }
}

impl BoundRun {
    /// `generation` is the one plan it serves, if it is one.
    pub(super) fn new(
        buffers: &PlanBuffers,
        generation: Option<PlanGeneration>,
        args: &RunArgs,
        workspace: &Workspace,
        run: PreparedRun,
        kernels: RunKernels,
    ) -> Self {
        let spans = args.spans().map(|(_, span)| span).chain([workspace.span()]);
        let inner = Inner {
            device: buffers.device(),
            plan_memory: buffers.memory().clone(),
            generation,
            run,
            kernels,
            _owners: spans.filter_map(|span| span.owner().cloned()).collect(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Enqueues the forward launches of the plan's tile variants and the merge. Allocates nothing, takes no lock and waits for
    /// nothing; outputs are there when the stream has passed. On another stream than the upload's it waits, on the device, for
    /// what that stream has been given, and that stream waits for it.
    ///
    /// A stream that somebody else is capturing ([`CudaDevice::stream_from_raw`]) takes runs bound to buffers of fixed geometry.
    /// The graph then keeps all that the run owns, for as long as the graph and its instances exist.
    ///
    /// # Errors
    /// `uploaded` is of other buffers, or of another plan than the one an exact geometry was bound for; the stream is another
    /// device's, or is captured and the run cannot be; the driver refuses a launch.
    pub fn run(&self, uploaded: Uploaded<'_>, stream: &Stream) -> Result<()> {
        self.check_plan(uploaded)?;
        self.enqueue(uploaded, &self.inner.run, stream)
    }

    /// As [`Self::run`], with Q and O at other addresses: engines have new ones at each step.
    ///
    /// # Errors
    /// As [`Self::run`]; an address is 0 or not a multiple of 16.
    ///
    /// # Safety
    /// At both addresses is memory as [`DeviceSpan::from_raw`](super::DeviceSpan::from_raw) wants it, with the sizes and strides
    /// that the run was bound with. Under a capture it stays allocated as long as the graph.
    #[allow(unsafe_code, reason = "the caller vouches for a raw handle")]
    pub unsafe fn run_with(
        &self,
        uploaded: Uploaded<'_>,
        q_address: u64,
        out_address: u64,
        stream: &Stream,
    ) -> Result<()> {
        self.check_plan(uploaded)?;
        for (name, address) in [("q_address", q_address), ("out_address", out_address)] {
            if address == 0 || !address.is_multiple_of(u64::from(VECTOR_BYTES)) {
                let accepted = format!("a device address that is a multiple of {VECTOR_BYTES} bytes");
                return Err(Error::invalid(name, format!("{address:#x}"), accepted));
            }
        }
        let bound = &self.inner.run;
        let run = PreparedRun {
            forward: bound.forward.map(|launches| launches.with_addresses(q_address, out_address)),
            merge: MergeParams { out: out_address, ..bound.merge },
            ..*bound
        };
        self.enqueue(uploaded, &run, stream)
    }

    /// Whether one launch geometry serves every plan, so that graphs may hold the run.
    pub fn has_fixed_geometry(&self) -> bool {
        self.inner.generation.is_none()
    }

    pub(super) fn device(&self) -> CudaDevice {
        self.inner.device
    }

    pub(super) fn shares_plan_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner.plan_memory, &other.inner.plan_memory)
    }

    /// Refuses an upload that is not what the run was bound to.
    pub(super) fn check_plan(&self, uploaded: Uploaded<'_>) -> Result<()> {
        if !Arc::ptr_eq(&self.inner.plan_memory, uploaded.buffers().memory()) {
            return Err(Error::PlanMismatch {
                what: "the run".into(),
                plan: "uploaded into other buffers".into(),
                call: "bound to buffers of its own".into(),
            });
        }
        match self.inner.generation {
            Some(generation) => uploaded.expect(generation).map(drop),
            None => Ok(()),
        }
    }

    fn enqueue(&self, uploaded: Uploaded<'_>, run: &PreparedRun, stream: &Stream) -> Result<()> {
        let current = stream.enter(self.inner.device)?;
        match current.capture_status()? {
            CaptureStatus::None => uploaded.enqueue_on(stream, || self.launch(run, &current)),
            CaptureStatus::Capturing => {
                self.check_capturable(stream)?;
                // No event: it would be one from outside the capture. Whoever vouched for the stream orders uploads and replays.
                driver::retain_in_capture(&current, self.inner.clone())?;
                self.launch(run, &current)
            }
            CaptureStatus::Invalidated => {
                Err(Error::invalid("stream", "one whose capture has failed", "end that capture first"))
            }
        }
    }

    /// Whether a graph that somebody else captures from `stream` may hold the run.
    fn check_capturable(&self, stream: &Stream) -> Result<()> {
        if !self.has_fixed_geometry() {
            return Err(Error::invalid(
                "plan buffers",
                "an exact geometry, in a capture",
                "a fixed geometry (`PlanBuffers::for_capacity`), which serves later plans, too",
            ));
        }
        if !stream.may_be_captured_by_others() {
            return Err(Error::invalid(
                "stream",
                "one that is captured",
                "`Graph::capture`, or a stream of `CudaDevice::stream_from_raw`, whose caller orders uploads and replays",
            ));
        }
        Ok(())
    }

    /// Enqueues the launches as they were bound, for a graph of ours.
    pub(super) fn launch_bound(&self, stream: &CurrentStream<'_>) -> Result<()> {
        self.launch(&self.inner.run, stream)
    }

    /// The driver calls of a run alone.
    pub(super) fn bare_launches(&self, stream: &CurrentStream<'_>) -> Vec<BareLaunch<'_>> {
        let Inner { run, kernels, .. } = &*self.inner;
        let forward = kernels.forward_of(run);
        let forward =
            forward.flat_map(|(kernel, launches)| BareLaunch::forward(kernel, launches, kernels.maps(), stream));
        forward.chain(kernels.merge.and_then(|kernel| BareLaunch::merge(kernel, run, stream))).collect()
    }

    fn launch(&self, run: &PreparedRun, stream: &CurrentStream<'_>) -> Result<()> {
        let kernels = &self.inner.kernels;
        for (kernel, launches) in kernels.forward_of(run) {
            driver::launch_forward(kernel, launches, kernels.maps(), stream)?;
        }
        kernels.merge.map_or(Ok(()), |kernel| driver::launch_merge(kernel, run, stream))
    }
}
