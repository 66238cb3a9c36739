//! Decode steps by the hundred thousand on a device: sequences join, leave, are evicted, their pages are replaced; graphs are
//! made anew; four threads, two by two on one engine, each with one model after the other. Every so many steps the outputs are
//! held against the oracle, and in the end no device memory may be missing: nothing else may use the device meanwhile.
//!
//! `soak [STEPS [SECONDS [CHECK_EVERY]]]`: steps of all threads together (100,000), the time it may take (240), how often is
//! checked (500). Ends with an error where an output is wrong, memory is lost, or the steps do not fit in the time.

use half::{bf16, f16};
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::cuda::{BoundRun, CudaEngine, DeviceBuffer, Graph, PlanBuffers, RunArgs, Stream, Workspace};
use pat_rs::plan::{PlanCapacity, PlanChange};
use pat_rs::{
    AttentionShape, DecodeBatch, DeviceProfile, Dtype, Element, KvElement, Plan, PlanOptions, Planner, Problem,
    QueryTokens, RowStrides,
};
use pat_tests::query_rows::written_out;
use pat_tests::walk::{Events, Limits, Walk, changed_rows};
use pat_workloads::tensors::sinks;
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const SEED: u32 = 5;
const LIMITS: Limits = Limits { num_pages: 512, sequences: 24, tokens: 700 };
/// Steps between two graphs.
const GRAPH_STEPS: u64 = 300;
/// Most steps with each model before memory is counted for the first time: by then kernels are compiled.
const WARM_UP_STEPS: u64 = 400;
/// Device memory that the driver keeps for itself may vary by so much, in bytes.
const SLACK_BYTES: usize = 8 << 20;

/// Threads, and models that are served at a time.
const THREADS: usize = 4;

/// A model: its attention and its pages.
#[derive(Clone, Copy, Debug)]
struct Model {
    problem: Problem,
    layout: PoolLayout,
    /// Whether the planner may use every kernel that serves the problem, those that it does not choose by itself among them.
    all_variants: bool,
}

/// Four models at a time: plain ones, those of scores and of what is visible, those of other head dimensions and groups, those
/// with several query tokens.
fn models() -> Fallible<[[Model; THREADS]; 4]> {
    let plain = |q_heads, kv_heads, head_dim, dtype, page_size, layout| -> Fallible<Model> {
        let shape = AttentionShape::new(q_heads, kv_heads, head_dim, dtype)?;
        Ok(Model { problem: Problem::new(shape, page_size), layout, all_variants: false })
    };
    let with = |model: Model, change: fn(Problem) -> Problem| Model { problem: change(model.problem), ..model };
    let of_shape = |model: Model, shape: AttentionShape| Model {
        problem: Problem::new(shape, model.problem.page_size()),
        ..model
    };
    let eight_bit = |model: Model, dtype| of_shape(model, model.problem.shape().with_kv_dtype(dtype));
    let (f16, bf16) = (Dtype::F16, Dtype::Bf16);
    let (nhd, hnd, interleaved) = (PoolLayout::Nhd, PoolLayout::Hnd, PoolLayout::Interleaved);
    let wide = plain(8, 2, 256, bf16, 16, nhd)?;
    let latent = plain(8, 2, 192, bf16, 16, hnd)?;
    Ok([
        [
            plain(16, 2, 128, f16, 16, nhd)?,
            plain(8, 2, 64, bf16, 32, hnd)?,
            plain(8, 8, 128, bf16, 16, interleaved)?,
            plain(12, 4, 64, f16, 24, nhd)?,
        ],
        [
            eight_bit(plain(16, 2, 128, f16, 16, nhd)?, Dtype::E4m3),
            with(eight_bit(plain(8, 2, 64, bf16, 32, hnd)?, Dtype::E5m2), |problem| problem.with_window(128)),
            with(plain(8, 2, 64, bf16, 16, interleaved)?, |problem| problem.with_window(100).with_sinks()),
            with(plain(12, 4, 128, f16, 24, nhd)?, |problem| problem.with_chunk(256).with_soft_cap(30.0)),
        ],
        [
            Model { all_variants: true, ..wide },
            plain(4, 2, 96, f16, 16, interleaved)?,
            of_shape(latent, latent.problem.shape().with_v_head_dim(128)?),
            plain(144, 1, 64, f16, 16, nhd)?,
        ],
        [
            with(plain(16, 2, 128, f16, 16, nhd)?, |problem| problem.with_query_tokens(4)),
            with(eight_bit(plain(8, 2, 128, bf16, 16, hnd)?, Dtype::E4m3), |problem| problem.with_query_tokens(3)),
            with(plain(8, 2, 64, bf16, 32, nhd)?, |problem| problem.with_query_tokens(2).with_window(200)),
            plain(4, 1, 512, f16, 16, nhd)?,
        ],
    ])
}

/// What a thread has done.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    steps: u64,
    checks: u64,
    graphs: u64,
    uploads: u64,
    /// Steps planned from scratch.
    forests: u64,
    worst_ratio: f64,
    events: Events,
}

/// Memory of a thread, for any batch within the limits.
struct Memory<T, C> {
    q: DeviceBuffer,
    kv: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
    host_sinks: Option<Vec<f32>>,
    tensors: Tensors<T, C>,
}

/// Rows of the largest batch.
fn most_rows(problem: &Problem) -> usize {
    LIMITS.sequences * problem.visibility().query_tokens as usize
}

impl<T: Element, C: KvElement> Memory<T, C> {
    fn new(engine: &CudaEngine, model: Model) -> Fallible<Self> {
        let (problem, shape) = (model.problem, model.problem.shape());
        // Every page of the pool is full of the first row's tokens, so that none is NaN; Q has all rows.
        let rows = most_rows(&problem);
        let mut all = OwnedBatch {
            page_size: problem.page_size(),
            num_pages: LIMITS.num_pages,
            lengths: vec![0; rows],
            block_tables: vec![Vec::new(); rows],
        };
        all.lengths[0] = LIMITS.num_pages * problem.page_size();
        all.block_tables[0] = (0..LIMITS.num_pages).collect();
        let tensors = Tensors::<T, C>::draw_stored(&all, shape, model.layout, SEED)?;
        let device = engine.device();
        let host_sinks = sinks(&problem);
        Ok(Self {
            q: DeviceBuffer::from_slice(device, &tensors.q)?,
            kv: DeviceBuffer::from_slice(device, &tensors.kv)?,
            out: DeviceBuffer::zeroed(device, tensors.nan_out().len() * size_of::<T>())?,
            lse: DeviceBuffer::zeroed(device, rows * shape.q_heads() as usize * 4)?,
            sinks: host_sinks.as_deref().map(|sinks| DeviceBuffer::from_slice(device, sinks)).transpose()?,
            host_sinks,
            tensors,
        })
    }

    fn args(&self, model: Model) -> Fallible<RunArgs> {
        let problem = model.problem;
        let v = self.kv.span().skip((self.tensors.v_begin * size_of::<C>()) as u64)?;
        let tensors = (self.q.span(), self.kv.span(), v, self.out.span());
        let args = RunArgs::new(problem, LIMITS.num_pages, most_rows(&problem) as u32, tensors)
            .with_kv_strides(self.tensors.k_strides, self.tensors.v_strides)
            .with_lse(self.lse.span(), RowStrides::lse(problem.shape().q_heads()));
        Ok(match &self.sinks {
            Some(sinks) => args.with_sinks(sinks.span()),
            None => args,
        })
    }
}

/// A thread's engine, model, batch and plan.
struct Server<T, C> {
    engine: CudaEngine,
    model: Model,
    memory: Memory<T, C>,
    walk: Walk,
    planner: Planner,
    plan: Plan,
    capacity: PlanCapacity,
    workspace: Workspace,
    streams: [Stream; 2],
    done: Done,
}

/// What a graph is made of, and it.
struct Captured {
    buffers: PlanBuffers,
    run: BoundRun,
    graph: Graph,
}

/// As many query tokens of each sequence as the problem has, or as there are tokens.
fn query_tokens(batch: &OwnedBatch, problem: &Problem) -> Vec<u32> {
    let most = problem.visibility().query_tokens;
    batch.lengths.iter().map(|&length| if length == 0 { most } else { most.min(length) }).collect()
}

/// Calls `plan` with the rows of a batch's query tokens.
fn of_queries<R>(
    batch: &OwnedBatch,
    problem: &Problem,
    plan: impl FnOnce(&DecodeBatch<'_>) -> pat_rs::Result<R>,
) -> pat_rs::Result<R> {
    let rows = batch.rows();
    let view = batch.view(&rows)?;
    if problem.visibility().query_tokens == 1 {
        return plan(&view);
    }
    plan(&QueryTokens::ragged(&view, &query_tokens(batch, problem))?.batch())
}

impl<T: Element, C: KvElement> Server<T, C> {
    fn new(engine: &CudaEngine, profile: &DeviceProfile, model: Model, seed: u64) -> Fallible<Self> {
        let (device, problem) = (engine.device(), model.problem);
        let page_size = problem.page_size();
        let walk = Walk::new(seed, &[page_size], LIMITS);
        let rows = most_rows(&problem) as u32;
        let most_pages = rows * (LIMITS.tokens.div_ceil(page_size) + 1);
        let capacity = PlanCapacity::for_batches(rows, most_pages, profile);
        let mut options = PlanOptions::default();
        if model.all_variants {
            options = options.with_variants(profile.variants(&problem));
        }
        let mut planner = Planner::new(problem, profile.clone(), options)?.with_capacity(capacity)?;
        let plan = of_queries(&walk.batch, &problem, |batch| planner.plan(batch))?;
        Ok(Self {
            memory: Memory::new(engine, model)?,
            workspace: Workspace::with_capacity(device, capacity.partial_bytes(problem.shape()))?,
            streams: [device.new_stream()?, device.new_stream()?],
            engine: engine.clone(),
            model,
            walk,
            planner,
            plan,
            capacity,
            done: Done::default(),
        })
    }

    fn capture(&mut self) -> Fallible<Captured> {
        let mut buffers =
            PlanBuffers::for_capacity(self.engine.device(), &self.capacity, &self.planner.tile_variants())?;
        buffers.upload(&self.plan, &self.streams[0])?;
        let run = self.engine.bind(&buffers, &self.memory.args(self.model)?, &self.workspace)?;
        let graph = Graph::capture(vec![run.clone()])?;
        self.done.graphs += 1;
        Ok(Captured { buffers, run, graph })
    }

    /// A decode step: plan, upload, run or replay.
    fn step(&mut self, captured: &mut Captured) -> Fallible<()> {
        let before = self.walk.batch.clone();
        self.walk.step();
        let problem = self.model.problem;
        // Every other time the caller says which rows it has changed.
        let is_told = problem.visibility().query_tokens == 1 && self.done.steps.is_multiple_of(2);
        let hint = is_told.then(|| changed_rows(&before, &self.walk.batch));
        let advance = |batch: &DecodeBatch<'_>| self.planner.advance(batch, hint.as_deref(), &mut self.plan);
        let change = of_queries(&self.walk.batch, &problem, advance)?;
        self.done.forests += u64::from(change == PlanChange::Forest);
        // Now and then on another stream than the step before.
        let stream = &self.streams[usize::from(self.done.steps.is_multiple_of(7))];
        let uploaded = if change == PlanChange::Nothing {
            captured.buffers.uploaded()?
        } else {
            self.done.uploads += 1;
            captured.buffers.upload(&self.plan, stream)?
        };
        if self.done.steps.is_multiple_of(5) {
            captured.run.run(uploaded, stream)?;
        } else {
            captured.graph.replay(uploaded, stream)?;
        }
        self.done.steps += 1;
        Ok(())
    }

    /// Holds a step's outputs against the oracle, all of them.
    fn check(&mut self, captured: &mut Captured) -> Fallible<()> {
        self.streams.iter().try_for_each(Stream::synchronize)?;
        self.memory.out.fill(0xff)?;
        self.memory.lse.fill(0xff)?;
        self.step(captured)?;
        self.streams.iter().try_for_each(Stream::synchronize)?;
        let (problem, shape) = (self.model.problem, self.model.problem.shape());
        let batch = written_out(&self.walk.batch, &query_tokens(&self.walk.batch, &problem));
        let mut out = self.memory.tensors.nan_out();
        let mut lse = vec![0f32; most_rows(&problem) * shape.q_heads() as usize];
        self.memory.out.read(0, &mut out)?;
        self.memory.lse.read(0, &mut lse)?;
        let sample = RowSample::for_batch(&batch, shape);
        let asked = (problem, self.memory.host_sinks.as_deref());
        let oracle = Oracle::compute_stored::<T, C>(&batch, asked, SEED, sample)?;
        let report = check(&oracle, shape.q_heads(), &out, Some(&lse));
        let behind = batch.lengths.len() * (shape.q_heads() * shape.v_head_dim()) as usize;
        let is_untouched = bytemuck::cast_slice::<T, u16>(&out[behind..]).iter().all(|&bits| bits == 0xffff);
        if !report.passed || !is_untouched {
            return Err(format!(
                "step {}: rows behind untouched {is_untouched}, {report:?}\n{batch:?}",
                self.done.steps
            )
            .into());
        }
        self.done.checks += 1;
        self.done.worst_ratio = self.done.worst_ratio.max(report.worst_row_ratio);
        Ok(())
    }

    fn serve(mut self, steps: u64, check_every: u64, until: Instant) -> Fallible<Done> {
        let mut captured = self.capture()?;
        while self.done.steps < steps && Instant::now() < until {
            if self.done.steps % GRAPH_STEPS == GRAPH_STEPS - 1 {
                captured = self.capture()?;
            }
            if self.done.steps % check_every == check_every - 1 {
                self.check(&mut captured)?;
            } else {
                self.step(&mut captured)?;
            }
        }
        self.check(&mut captured)?;
        self.done.events = self.walk.events;
        Ok(self.done)
    }
}

/// Serves a model for a while.
fn serve(
    engine: &CudaEngine,
    profile: &DeviceProfile,
    model: Model,
    seed: u64,
    (steps, check_every, until): (u64, u64, Instant),
) -> Fallible<Done> {
    macro_rules! of_types {
        ($t:ty, $c:ty) => {
            Server::<$t, $c>::new(engine, profile, model, seed)?.serve(steps, check_every, until)
        };
    }
    let shape = model.problem.shape();
    match (shape.dtype(), shape.kv_dtype()) {
        (Dtype::Bf16, Dtype::E4m3) => of_types!(bf16, E4m3),
        (Dtype::Bf16, Dtype::E5m2) => of_types!(bf16, E5m2),
        (Dtype::Bf16, _) => of_types!(bf16, bf16),
        (_, Dtype::E4m3) => of_types!(f16, E4m3),
        _ => of_types!(f16, f16),
    }
}

/// Four threads on two engines, one model after the other; what has been done with each.
fn soak(steps_each: u64, check_every: u64, until: Instant, seed: u64) -> Fallible<Vec<Done>> {
    let engines = [CudaEngine::new(0)?, CudaEngine::new(0)?];
    let profile = engines[0].device().profile()?;
    let models = models()?;
    let worker = |thread: usize| -> Fallible<Vec<Done>> {
        let serve_one = |(turn, of_turn): (usize, &[Model; THREADS])| {
            let (model, seed) = (of_turn[thread], seed + (turn * THREADS + thread) as u64);
            serve(&engines[thread / 2], &profile, model, seed, (steps_each, check_every, until))
                .map_err(|error| format!("thread {thread}, {model:?}: {error}").into())
        };
        models.iter().enumerate().map(serve_one).collect()
    };
    let done: Fallible<Vec<Vec<Done>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || worker(thread))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread has panicked")?).collect()
    });
    Ok(done?.concat())
}

fn free_bytes() -> Fallible<usize> {
    Ok(CudaEngine::new(0)?.device().context().mem_get_info()?.0)
}

fn run() -> Fallible<()> {
    let numbers = std::env::args().skip(1).map(|text| text.parse()).collect::<Result<Vec<u64>, _>>()?;
    let number = |index: usize, default| numbers.get(index).copied().unwrap_or(default);
    let (steps, seconds, check_every) = (number(0, 100_000), number(1, 240), number(2, 500).max(1));
    let begin = Instant::now();
    let until = begin + Duration::from_secs(seconds);
    let steps_each = steps.div_ceil((THREADS * models()?.len()) as u64);
    soak(WARM_UP_STEPS.min(steps_each), check_every, until, 1000)?;
    let before = free_bytes()?;
    let done = soak(steps_each, check_every, until, 1)?;
    let after = free_bytes()?;
    let sum = |of: fn(&Done) -> u64| done.iter().map(of).sum::<u64>();
    println!("device: {}", CudaEngine::new(0)?.device().name());
    println!(
        "steps {}, checked against the oracle {}, seconds {:.1}",
        sum(|d| d.steps),
        sum(|d| d.checks),
        begin.elapsed().as_secs_f64()
    );
    println!(
        "graphs {}, uploads {}, steps planned from scratch {}",
        sum(|d| d.graphs),
        sum(|d| d.uploads),
        sum(|d| d.forests)
    );
    println!(
        "joined {}, left {}, evicted {}, pages replaced {}",
        sum(|d| d.events.joined),
        sum(|d| d.events.left),
        sum(|d| d.events.evicted),
        sum(|d| d.events.pages_replaced)
    );
    println!("worst row at {:.3} of its allowance", done.iter().map(|d| d.worst_ratio).fold(0.0, f64::max));
    println!("free device memory: {before} bytes before, {after} after");
    if after + SLACK_BYTES < before {
        return Err(format!("{} bytes of device memory are missing", before - after).into());
    }
    let made = sum(|d| d.steps);
    if made < steps {
        return Err(format!("{made} of {steps} steps in {seconds} s").into());
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("soak: passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("soak: FAILED: {error}");
            ExitCode::FAILURE
        }
    }
}
