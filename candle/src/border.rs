//! Where candle's device memory is handed to `pat-rs`: the only file of the crate with `unsafe`.
#![allow(unsafe_code, reason = "device memory of another library enters here")]

use crate::op::PagedDecode;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, Layout};
use pat_rs::cuda::{CudaEngine, DeviceSpan, PlanBuffers, RunArgs, Stream, Workspace};
use pat_rs::{Error, Plan, Result};
use std::thread::{self, ThreadId};

/// Handle of the default stream of whatever thread names it.
const PER_THREAD: u64 = 2;

/// A plan's copy on a device, with memory for its partial results.
#[derive(Debug)]
pub(crate) struct Resident {
    engine: CudaEngine,
    stream: Stream,
    buffers: PlanBuffers,
    workspace: Workspace,
    /// The thread that a per-thread stream is the default stream of.
    thread: Option<ThreadId>,
}

impl Resident {
    pub(crate) fn new(plan: &Plan, device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let engine = CudaEngine::new(stream.context().ordinal())?;
        let stream = engine.device().stream_from_cudarc(stream)?;
        let thread = (stream.handle() == PER_THREAD).then(|| thread::current().id());
        let buffers = engine.upload(plan, &stream)?;
        let workspace = Workspace::with_capacity(engine.device(), Workspace::bytes_for(plan))?;
        Ok(Self { engine, stream, buffers, workspace, thread })
    }

    /// Refuses another thread than that of a per-thread stream: there the same handle is another stream.
    pub(crate) fn check_thread(&self) -> Result<()> {
        match self.thread {
            Some(thread) if thread != thread::current().id() => Err(Error::invalid(
                "device",
                "the per-thread default stream, in another thread than the step was made in",
                "the same thread, or a device of `Device::new_cuda_with_stream`",
            )),
            _ => Ok(()),
        }
    }

    /// Refuses tensors whose stream is not the step's: two candle devices of one GPU have a stream each, and nothing would order
    /// them.
    fn check_stream(&self, argument: &str, device: &CudaDevice) -> Result<()> {
        if device.cuda_stream().cu_stream() as u64 == self.stream.handle() {
            return Ok(());
        }
        let expected = "one of the candle device that the step was made on";
        Err(Error::invalid(argument, "a tensor of another candle device on the same GPU", expected))
    }

    /// Uploads a plan that is not there yet, into larger memory where it has grown out of the former.
    pub(crate) fn hold(&mut self, plan: &Plan) -> Result<()> {
        if self.buffers.uploaded().is_ok_and(|uploaded| uploaded.generation() == plan.generation()) {
            return Ok(());
        }
        let device = self.engine.device();
        let bytes = plan.bytes().len();
        if bytes > self.buffers.capacity_bytes() {
            // Room for the steps to come.
            self.buffers = PlanBuffers::with_capacity(device, 2 * bytes)?;
        }
        let partial_bytes = Workspace::bytes_for(plan);
        if partial_bytes > self.workspace.span().bytes() {
            self.workspace = Workspace::with_capacity(device, 2 * partial_bytes)?;
        }
        self.buffers.upload(plan, &self.stream).map(drop)
    }
}

/// Enqueues a run on the device's stream; the output's memory is candle's.
pub(crate) fn run<T: CudaDType + DeviceRepr>(
    op: &PagedDecode<'_>,
    [q, k, v]: [(&CudaStorage, &Layout); 3],
) -> candle_core::Result<CudaStorage> {
    let strides = op.strides(q.1, k.1, v.1)?;
    let resident = op.step.resident().map_err(candle_core::Error::wrap)?;
    resident.check_thread().map_err(candle_core::Error::wrap)?;
    for (argument, (storage, _)) in [("q", q), ("k_cache", k), ("v_cache", v)] {
        resident.check_stream(argument, &storage.device).map_err(candle_core::Error::wrap)?;
    }
    let device = &q.0.device;
    let stream = device.cuda_stream();
    let elements = op.out_shape().elem_count();
    // SAFETY: the run below writes every element: contiguous rows, as many as the plan has. Where it fails, nobody sees them.
    let mut out = unsafe { device.alloc::<T>(elements)? };
    {
        // The guards order later uses on other streams behind the launches, and are kept until those have been enqueued.
        let (q_address, _q) = q.0.as_cuda_slice::<T>()?.device_ptr(&stream);
        let (k_address, _k) = k.0.as_cuda_slice::<T>()?.device_ptr(&stream);
        let (v_address, _v) = v.0.as_cuda_slice::<T>()?.device_ptr(&stream);
        let (out_address, _out) = out.device_ptr_mut(&stream);
        let span = |address: u64, total: usize, skipped: usize| {
            let (skipped, bytes) = (size_of::<T>() * skipped.min(total), size_of::<T>() * total);
            // SAFETY: the range is candle's allocation from the tensor's first element on, in the device's primary context. The
            // storage outlives the call, its stream is the run's (`check_stream`), and cudarc frees memory in that stream's order. The output is nobody else's yet.
            unsafe { DeviceSpan::from_raw(address + skipped as u64, (bytes - skipped) as u64) }
        };
        let input = |(storage, layout): (&CudaStorage, &Layout), address| -> candle_core::Result<DeviceSpan> {
            Ok(span(address, storage.as_cuda_slice::<T>()?.len(), layout.start_offset()))
        };
        let spans = (input(q, q_address)?, input(k, k_address)?, input(v, v_address)?, span(out_address, elements, 0));
        let plan = op.step.plan();
        let args = RunArgs::new(op.problem, plan.num_pages(), plan.sequence_count(), spans)
            .with_kv_strides(strides.k, strides.v)
            .with_row_strides(strides.q, op.out_strides());
        let uploaded = || resident.buffers.uploaded()?.expect(plan.generation());
        uploaded()
            .and_then(|_| resident.engine.run(&resident.buffers, &args, &resident.workspace, &resident.stream))
            .map_err(candle_core::Error::wrap)?;
    }
    Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
}
