//! Decode steps by the hundred thousand on a device: sequences join, leave, are evicted, their pages are replaced; graphs are
//! made anew; four threads, each with a model of its own, two by two on one engine. Every so many steps the outputs are held
//! against the oracle, and in the end no device memory may be missing.
//!
//! `soak [STEPS [SECONDS [CHECK_EVERY]]]`: steps of all threads together (100,000), the time it may take (240), how often is
//! checked (500). Ends with an error where an output is wrong, memory is lost, or the steps do not fit in the time.

use half::{bf16, f16};
use pat_rs::cuda::{BoundRun, CudaEngine, DeviceBuffer, Graph, PlanBuffers, RunArgs, Stream, Workspace};
use pat_rs::plan::{PlanCapacity, PlanChange};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Element, Plan, PlanOptions, Planner, Problem, RowStrides};
use pat_tests::softmax_scale;
use pat_tests::walk::{Events, Limits, Walk, changed_rows};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const SEED: u32 = 5;
const LIMITS: Limits = Limits { num_pages: 512, sequences: 24, tokens: 700 };
/// Steps between two graphs.
const GRAPH_STEPS: u64 = 300;
/// Steps before memory is counted for the first time: by then kernels are compiled.
const WARM_UP_STEPS: u64 = 400;
/// Device memory that the driver keeps for itself may vary by so much, in bytes.
const SLACK_BYTES: usize = 8 << 20;

/// A model: its attention and its pages.
#[derive(Clone, Copy, Debug)]
struct Model {
    shape: AttentionShape,
    page_size: u32,
    layout: PoolLayout,
}

fn models() -> Fallible<[Model; 4]> {
    let model = |q_heads, kv_heads, head_dim, dtype, page_size, layout| -> Fallible<Model> {
        Ok(Model { shape: AttentionShape::new(q_heads, kv_heads, head_dim, dtype)?, page_size, layout })
    };
    Ok([
        model(16, 2, 128, Dtype::F16, 16, PoolLayout::Nhd)?,
        model(8, 2, 64, Dtype::Bf16, 32, PoolLayout::Hnd)?,
        model(8, 8, 128, Dtype::Bf16, 16, PoolLayout::Interleaved)?,
        model(12, 4, 64, Dtype::F16, 24, PoolLayout::Nhd)?,
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
struct Memory<T> {
    q: DeviceBuffer,
    kv: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    tensors: Tensors<T>,
}

impl<T: Element> Memory<T> {
    fn new(engine: &CudaEngine, model: Model) -> Fallible<Self> {
        // Every page of the pool is full of the first row's tokens, so that none is NaN; Q has all rows.
        let mut all = OwnedBatch {
            page_size: model.page_size,
            num_pages: LIMITS.num_pages,
            lengths: vec![0; LIMITS.sequences],
            block_tables: vec![Vec::new(); LIMITS.sequences],
        };
        all.lengths[0] = LIMITS.num_pages * model.page_size;
        all.block_tables[0] = (0..LIMITS.num_pages).collect();
        let tensors = Tensors::<T>::draw(&all, model.shape, model.layout, SEED)?;
        let device = engine.device();
        Ok(Self {
            q: DeviceBuffer::from_slice(device, &tensors.q)?,
            kv: DeviceBuffer::from_slice(device, &tensors.kv)?,
            out: DeviceBuffer::zeroed(device, tensors.q.len() * size_of::<T>())?,
            lse: DeviceBuffer::zeroed(device, LIMITS.sequences * model.shape.q_heads() as usize * 4)?,
            tensors,
        })
    }

    fn args(&self, model: Model) -> Fallible<RunArgs> {
        let v = self.kv.span().skip(2 * self.tensors.v_begin as u64)?;
        let tensors = (self.q.span(), self.kv.span(), v, self.out.span());
        let problem = Problem::new(model.shape, model.page_size);
        Ok(RunArgs::new(problem, LIMITS.num_pages, LIMITS.sequences as u32, tensors)
            .with_kv_strides(self.tensors.k_strides, self.tensors.v_strides)
            .with_lse(self.lse.span(), RowStrides::lse(model.shape.q_heads())))
    }
}

/// A thread's engine, model, batch and plan.
struct Server<T> {
    engine: CudaEngine,
    model: Model,
    memory: Memory<T>,
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

impl<T: Element> Server<T> {
    fn new(engine: &CudaEngine, profile: &DeviceProfile, model: Model, seed: u64) -> Fallible<Self> {
        let device = engine.device();
        let walk = Walk::new(seed, &[model.page_size], LIMITS);
        let most_pages = LIMITS.sequences as u32 * (LIMITS.tokens.div_ceil(model.page_size) + 1);
        let capacity = PlanCapacity::for_batches(LIMITS.sequences as u32, most_pages, profile);
        let problem = Problem::new(model.shape, model.page_size);
        let mut planner = Planner::new(problem, profile.clone(), PlanOptions::default())?.with_capacity(capacity)?;
        let rows = walk.batch.rows();
        let plan = planner.plan(&walk.batch.view(&rows)?)?;
        drop(rows);
        Ok(Self {
            memory: Memory::new(engine, model)?,
            workspace: Workspace::with_capacity(device, capacity.partial_bytes(model.shape))?,
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
        let rows = self.walk.batch.rows();
        let view = self.walk.batch.view(&rows)?;
        // Every other time the caller says which rows it has changed.
        let hint = self.done.steps.is_multiple_of(2).then(|| changed_rows(&before, &self.walk.batch));
        let change = self.planner.advance(&view, hint.as_deref(), &mut self.plan)?;
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
        let (batch, shape) = (&self.walk.batch, self.model.shape);
        let mut out = vec![T::zeroed(); self.memory.tensors.q.len()];
        let mut lse = vec![0f32; LIMITS.sequences * shape.q_heads() as usize];
        self.memory.out.read(0, &mut out)?;
        self.memory.lse.read(0, &mut lse)?;
        let sample = RowSample::for_batch(batch, shape);
        let oracle = Oracle::compute::<T>(batch, shape, SEED, softmax_scale(shape), sample)?;
        let report = check(&oracle, shape.q_heads(), &out, Some(&lse));
        let behind = batch.lengths.len() * (shape.q_heads() * shape.head_dim()) as usize;
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

/// Four threads on two engines; what each has done.
fn soak(steps_each: u64, check_every: u64, until: Instant, seed: u64) -> Fallible<Vec<Done>> {
    let engines = [CudaEngine::new(0)?, CudaEngine::new(0)?];
    let profile = engines[0].device().profile()?;
    let worker = |index: usize, model: Model| -> Fallible<Done> {
        let (engine, seed) = (&engines[index / 2], seed + index as u64);
        let done = match model.shape.dtype() {
            Dtype::Bf16 => Server::<bf16>::new(engine, &profile, model, seed)?.serve(steps_each, check_every, until),
            _ => Server::<f16>::new(engine, &profile, model, seed)?.serve(steps_each, check_every, until),
        };
        done.map_err(|error| format!("thread {index}, {model:?}: {error}").into())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            models()?.into_iter().enumerate().map(|(index, model)| scope.spawn(move || worker(index, model))).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread has panicked")?).collect()
    })
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
    soak(WARM_UP_STEPS, check_every, until, 1000)?;
    let before = free_bytes()?;
    let done = soak(steps.div_ceil(4), check_every, until, 1)?;
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
        "joined {}, left {}, pages replaced {}",
        sum(|d| d.events.joined),
        sum(|d| d.events.left),
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
