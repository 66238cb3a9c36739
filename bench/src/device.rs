//! One batch on a CUDA device: tensors drawn there, the answer checked, then timed.
//!
//! Protocol: before each cold call a buffer several times the L2 is *read* (a memset would leave dirty lines whose
//! write-back is then measured too); CUDA events stand around the run alone; medians. Planning and upload are measured by
//! themselves.

use crate::statistics::{median, quartiles};
use pat_rs::cuda::bench_support::{FillSpec, HostTimes, L2Flush, TimingEvent, fill, host_times};
use pat_rs::cuda::{
    BoundRun, CudaEngine, DeviceBuffer, Graph, LaunchGeometry, PlanBuffers, RunArgs, Stream, Workspace,
};
use pat_rs::{AttentionShape, Element, KvStrides, Plan, Problem, Result, RowStrides};
use pat_workloads::tensors::sinks;
use pat_workloads::{NumericsReport, Oracle, OwnedBatch, check};
use std::time::Instant;

use pat_abi::generator::Tensor;

/// Seed of the generator for all measured tensors.
pub const SEED: u32 = 1;

/// How often to call.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Calls before the first timed one.
    pub warm_ups: u32,
    /// Timed calls of each kind.
    pub timed: u32,
}

/// Times of one plan, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Median with a cold L2.
    pub cold_us: f64,
    /// First and third quartile of the same calls.
    pub cold_us_quartiles: [f64; 2],
    /// Median of calls behind each other, each synchronised.
    pub warm_us: f64,
    /// One call of a graph of [`Times::GRAPH_RUNS`] runs.
    pub graph_us: f64,
    /// Median of plan uploads, host side and copy.
    pub upload_us: f64,
    /// First run: kernels are compiled by the driver.
    pub first_run_us: f64,
}

impl Times {
    /// Runs per captured graph.
    pub const GRAPH_RUNS: u32 = 10;
}

/// A batch with its tensors in device memory.
#[derive(Debug)]
pub struct DeviceCase<'a> {
    engine: &'a CudaEngine,
    batch: &'a OwnedBatch,
    problem: Problem,
    stream: Stream,
    q: DeviceBuffer,
    k: DeviceBuffer,
    v: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
}

impl<'a> DeviceCase<'a> {
    /// Allocates and draws the tensors, [`sinks`] among them where the problem has some.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(engine: &'a CudaEngine, batch: &'a OwnedBatch, problem: Problem) -> Result<Self> {
        let shape = problem.shape();
        let device = engine.device();
        let stream = device.new_stream()?;
        let rows = batch.lengths.len();
        let row_elements = shape.q_heads() as usize * shape.head_dim() as usize;
        let pool_elements =
            batch.num_pages as usize * batch.page_size as usize * shape.kv_heads() as usize * shape.head_dim() as usize;
        let pool_bytes = pool_elements * shape.kv_dtype().bytes() as usize;
        let case = Self {
            engine,
            batch,
            problem,
            q: DeviceBuffer::zeroed(device, rows * row_elements * 2)?,
            k: DeviceBuffer::zeroed(device, pool_bytes)?,
            v: DeviceBuffer::zeroed(device, pool_bytes)?,
            out: DeviceBuffer::zeroed(device, rows * row_elements * 2)?,
            lse: DeviceBuffer::zeroed(device, rows * shape.q_heads() as usize * 4)?,
            sinks: sinks(&problem).map(|sinks| DeviceBuffer::from_slice(device, &sinks)).transpose()?,
            stream,
        };
        let spec = |tensor, pages, tokens, heads| FillSpec {
            tensor,
            seed: SEED,
            dtype: if tensor == Tensor::Q { shape.dtype() } else { shape.kv_dtype() },
            pages,
            tokens,
            heads,
            head_dim: shape.head_dim(),
            strides: KvStrides::nhd(tokens, heads, shape.head_dim()),
        };
        let (pages, page_size) = (batch.num_pages, batch.page_size);
        fill(device, case.q.span(), spec(Tensor::Q, rows as u32, 1, shape.q_heads()), &case.stream)?;
        fill(device, case.k.span(), spec(Tensor::K, pages, page_size, shape.kv_heads()), &case.stream)?;
        fill(device, case.v.span(), spec(Tensor::V, pages, page_size, shape.kv_heads()), &case.stream)?;
        case.stream.synchronize()?;
        Ok(case)
    }

    fn args(&self) -> RunArgs {
        let spans = (self.q.span(), self.k.span(), self.v.span(), self.out.span());
        let (num_pages, rows) = (self.batch.num_pages, self.batch.lengths.len() as u32);
        let args = RunArgs::new(self.problem, num_pages, rows, spans)
            .with_lse(self.lse.span(), RowStrides::lse(self.problem.shape().q_heads()));
        self.sinks.iter().fold(args, |args, sinks| args.with_sinks(sinks.span()))
    }

    /// Runs the plan into poisoned outputs and compares with the oracle.
    ///
    /// # Errors
    /// The driver's, or those of the run.
    pub fn verify<T: Element>(&mut self, plan: &Plan, oracle: &Oracle) -> Result<NumericsReport> {
        self.out.fill(0xff)?;
        self.lse.fill(0xff)?;
        let workspace = Workspace::with_capacity(self.engine.device(), Workspace::bytes_for(plan))?;
        let buffers = self.engine.upload(plan, &self.stream)?;
        self.engine.run(&buffers, &self.args(), &workspace, &self.stream)?;
        self.stream.synchronize()?;
        let shape = self.problem.shape();
        let rows = self.batch.lengths.len() * shape.q_heads() as usize;
        let mut out = vec![T::zeroed(); rows * shape.head_dim() as usize];
        let mut lse = vec![0f32; rows];
        self.out.read(0, &mut out)?;
        self.lse.read(0, &mut lse)?;
        Ok(check(oracle, shape.q_heads(), &out, Some(&lse)))
    }

    /// Uploads the plan and allocates what its runs need.
    ///
    /// # Errors
    /// The driver's.
    pub fn prepare(&self, plan: &Plan) -> Result<PreparedCase<'_>> {
        let device = self.engine.device();
        // Fixed, to this plan's: the launches are those of an exact geometry, and a graph may hold them.
        let geometry = LaunchGeometry::of(plan);
        let mut buffers = PlanBuffers::with_fixed_geometry(device, plan.bytes().len(), geometry)?;
        buffers.upload(plan, &self.stream)?;
        let workspace = Workspace::with_capacity(device, Workspace::bytes_for(plan))?;
        Ok(PreparedCase {
            case: self,
            run: self.engine.bind(&buffers, &self.args(), &workspace)?,
            buffers,
            workspace,
            start: TimingEvent::new(device)?,
            end: TimingEvent::new(device)?,
        })
    }

    /// Times the plan. `flush` makes the L2 cold.
    ///
    /// # Errors
    /// The driver's, or those of the run.
    pub fn time(&self, plan: &Plan, flush: &L2Flush, repeats: Repeats) -> Result<Times> {
        let stream = &self.stream;
        stream.synchronize()?;
        let first = Instant::now();
        let mut prepared = self.prepare(plan)?;
        prepared.enqueue()?;
        stream.synchronize()?;
        let first_run_us = first.elapsed().as_secs_f64() * 1e6;

        let mut cold_times = prepared.times_us(Some(flush), repeats)?;
        let warm_us = median(&mut prepared.times_us(None, repeats)?);
        let mut graph = Graph::capture(vec![prepared.run.clone(); Times::GRAPH_RUNS as usize])?;
        let mut graph_times = Vec::new();
        for _ in 0..5 {
            let graph_us = prepared.elapsed_us(|| graph.replay(prepared.buffers.uploaded()?, stream))?;
            graph_times.push(graph_us / f64::from(Times::GRAPH_RUNS));
        }
        let mut upload_times = Vec::new();
        for _ in 0..9 {
            let begin = Instant::now();
            prepared.buffers.upload(plan, stream)?;
            stream.synchronize()?;
            upload_times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        Ok(Times {
            cold_us: median(&mut cold_times),
            cold_us_quartiles: quartiles(&mut cold_times),
            warm_us,
            graph_us: median(&mut graph_times),
            upload_us: median(&mut upload_times),
            first_run_us,
        })
    }
}

/// An uploaded plan, ready to be run and timed.
#[derive(Debug)]
pub struct PreparedCase<'a> {
    case: &'a DeviceCase<'a>,
    run: BoundRun,
    buffers: PlanBuffers,
    workspace: Workspace,
    start: TimingEvent,
    end: TimingEvent,
}

impl PreparedCase<'_> {
    fn enqueue(&self) -> Result<()> {
        self.run.run(self.buffers.uploaded()?, &self.case.stream)
    }

    /// GPU time of one run in microseconds, after evicting the L2 if `flush` is given.
    ///
    /// # Errors
    /// The driver's, or those of the run.
    pub fn run_us(&self, flush: Option<&L2Flush>) -> Result<f64> {
        flush.map_or(Ok(()), |flush| flush.enqueue(&self.case.stream))?;
        self.elapsed_us(|| self.enqueue())
    }

    /// [`Self::run_us`] of each timed run, after those that warm up.
    ///
    /// # Errors
    /// As [`Self::run_us`].
    pub fn times_us(&self, flush: Option<&L2Flush>, repeats: Repeats) -> Result<Vec<f64>> {
        (0..repeats.warm_ups).try_for_each(|_| self.run_us(flush).map(drop))?;
        (0..repeats.timed).map(|_| self.run_us(flush)).collect()
    }

    /// Host times of runs, and of the bare driver calls they make.
    ///
    /// # Errors
    /// As [`Self::run_us`].
    pub fn host_times(&self, calls: u32) -> Result<HostTimes> {
        host_times(&self.run, self.buffers.uploaded()?, &self.case.stream, calls)
    }

    /// Host time of one call that binds and runs.
    ///
    /// # Errors
    /// As [`Self::run_us`].
    pub fn bind_and_run_us(&self, calls: u32) -> Result<Vec<f64>> {
        let case = self.case;
        let mut times = Vec::new();
        for _ in 0..calls {
            case.stream.synchronize()?;
            let begin = Instant::now();
            case.engine.run(&self.buffers, &case.args(), &self.workspace, &case.stream)?;
            times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    }

    /// GPU time of what `enqueue` puts into the stream.
    fn elapsed_us(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<f64> {
        let stream = &self.case.stream;
        self.start.record(stream)?;
        enqueue()?;
        self.end.record(stream)?;
        stream.synchronize()?;
        self.end.elapsed_us_since(&self.start)
    }
}

/// `1/sqrt(head_dim)`.
pub fn softmax_scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim() as f32).sqrt()
}
