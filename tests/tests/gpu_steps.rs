//! One captured graph serves 500 decode steps of a batch that lives: sequences join, leave and grow, and every step's answer is
//! held against the oracle; once for each thing that the kernels can do beyond plain attention. `PAT_GPU_STEPS` sets how many steps.
//! In CI a few of the same steps run on the CPU executor.

use half::{bf16, f16};
use pat_abi::generator::Tensor;
use pat_rs::cpu::{E4m3, E5m2};
use pat_rs::cuda::{CudaEngine, DeviceBuffer, DeviceKvScale, Graph, PlanBuffers, RunArgs, Stream, Workspace};
use pat_rs::plan::{PlanCapacity, PlanMode};
use pat_rs::{
    AttentionShape, DecodeBatch, Dtype, Element, Engine, HostTensors, KvElement, KvScale, Plan, PlanOptions, Planner,
    Problem, QueryTokens, Reach, RowStrides, TileVariant,
};
use pat_tests::on_device::{poison, read_output};
use pat_tests::trees::{Parents, draw_trees, slices, written_out};
use pat_tests::walk::{Limits, Walk};
use pat_tests::{Output, device_test};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::process::ExitCode;

const SEED: u32 = 23;
/// Tokens of the pool.
const POOL_TOKENS: u32 = 6144;
const SEQUENCES: usize = 10;
const MAX_TOKENS: u32 = 300;
/// Query tokens of all sequences.
const MAX_ROWS: u32 = 160;
/// Of three (row, KV head) pairs one is compared at each step, another at the next.
const TURNS: usize = 3;

/// The rows that sequences have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Queries {
    /// One each.
    Last,
    /// Up to five, as many as drafts are verified.
    Drafts,
    /// Trees of up to 16.
    Trees,
}

/// What is computed, and how.
#[derive(Clone, Debug)]
struct Setting {
    problem: Problem,
    queries: Queries,
    layout: PoolLayout,
    options: PlanOptions,
    /// Factor of K's elements by head, and of V's; powers of 2, so that 16 bits hold the products.
    scales: [fn(u32) -> f32; 2],
    by_head: bool,
}

impl Setting {
    /// One query token, in NHD pools without factors.
    fn new(problem: Problem) -> Self {
        let (queries, layout, options) = (Queries::Last, PoolLayout::Nhd, PlanOptions::default());
        Self { problem, queries, layout, options, scales: [|_| 1.0; 2], by_head: false }
    }

    fn sinks(&self) -> Option<Vec<f32>> {
        let sinks = || (0..self.problem.shape().q_heads()).map(|head| head as f32 * 0.7 % 5.0 - 2.0).collect();
        self.problem.has_sinks().then(sinks)
    }

    /// Factors of K and V, one by KV head.
    fn factors(&self) -> [Vec<f32>; 2] {
        self.scales.map(|scale| (0..self.problem.shape().kv_heads()).map(scale).collect())
    }
}

/// The rows of a step, and what each sees where the problem does not say.
struct Step {
    rows: OwnedBatch,
    visible: Option<Vec<Vec<u32>>>,
}

/// Plans the walk's sequences as they are now.
fn plan_step(planner: &mut Planner, queries: Queries, walk: &OwnedBatch, rng: &mut StdRng, plan: &mut Plan) -> Step {
    let tables = walk.rows();
    let view = walk.view(&tables).expect("a valid batch");
    let mut advance = |batch: &DecodeBatch<'_>| planner.advance(batch, None, plan).expect("within the capacity");
    match queries {
        Queries::Last => {
            advance(&view);
            Step { rows: walk.clone(), visible: None }
        }
        Queries::Drafts => {
            let counts: Vec<u32> = walk.lengths.iter().map(|length| rng.random_range(1..=5).min(*length)).collect();
            let queries = QueryTokens::ragged(&view, &counts).expect("as many as there are");
            let batch = queries.batch();
            advance(&batch);
            let rows = 0..batch.sequence_count();
            let lengths = rows.clone().map(|row| batch.length(row)).collect();
            let block_tables = rows.map(|row| batch.pages(row).to_vec()).collect();
            Step { rows: OwnedBatch { lengths, block_tables, ..*walk }, visible: None }
        }
        Queries::Trees => {
            let trees: Parents = draw_trees(rng, walk);
            let queries = QueryTokens::trees(&view, &slices(&trees)).expect("trees");
            advance(&queries.batch());
            let (rows, visible) = written_out(walk, &trees, planner.problem().visibility().reach);
            Step { rows, visible: Some(visible) }
        }
    }
}

/// Q of the most rows, and all of the pool: in 16 bits what the pool's elements stand for.
struct Data<T, C> {
    setting: Setting,
    tensors: Tensors<T>,
    pool: Vec<C>,
}

impl<T: Element, C: KvElement> Data<T, C> {
    fn new(setting: Setting) -> Self {
        let page_size = setting.problem.page_size();
        let num_pages = POOL_TOKENS / page_size;
        let mut lengths = vec![0; MAX_ROWS as usize];
        let mut block_tables = vec![Vec::new(); MAX_ROWS as usize];
        lengths[0] = num_pages * page_size;
        block_tables[0] = (0..num_pages).collect();
        let all = OwnedBatch { page_size, num_pages, lengths, block_tables };
        let shape = setting.problem.shape().with_kv_dtype(T::DTYPE);
        let mut tensors = Tensors::<T>::draw(&all, shape, setting.layout, SEED).expect("a valid batch");
        let [k, v] = setting.scales;
        let pool = tensors.narrow(|tensor, head| if tensor == Tensor::K { k(head) } else { v(head) });
        Self { setting, tensors, pool }
    }

    /// Holds the rows of a step against the oracle.
    fn verify(&self, step: &Step, index: usize, output: &Output<T>) {
        let (problem, sinks) = (self.setting.problem, self.setting.sinks());
        let shape = problem.shape();
        let mut sample = RowSample::for_batch(&step.rows, shape);
        let mut place = 0..;
        sample.pairs.retain(|_| place.next().is_some_and(|place: usize| place % TURNS == index % TURNS));
        let asked = (problem, sinks.as_deref());
        let oracle = match &step.visible {
            None => Oracle::of_problem_tensors(&step.rows, &self.tensors, asked, sample),
            Some(visible) => Oracle::compute_visible::<T>(&step.rows, asked, visible, SEED, sample),
        };
        let heads = step.rows.lengths.len() * shape.q_heads() as usize;
        let out = &output.out[..heads * shape.v_head_dim() as usize];
        let report = check(&oracle.expect("a valid batch"), shape.q_heads(), out, Some(&output.lse[..heads]));
        assert!(report.passed, "step {index}, {:?}: {report:?}\n{:?}", self.setting, step.rows);
    }

    fn host(&self) -> HostTensors<'_, T, C> {
        let v = &self.pool[self.tensors.v_begin..];
        HostTensors::new(self.setting.problem, &self.tensors.q, &self.pool, v)
            .with_kv_strides(self.tensors.k_strides, self.tensors.v_strides)
    }
}

/// Device memory that the captured graph reads and writes.
struct Memory {
    q: DeviceBuffer,
    pool: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    sinks: Option<DeviceBuffer>,
    factors: [DeviceBuffer; 2],
}

impl Memory {
    fn new<T: Element, C: KvElement>(cuda: &CudaEngine, data: &Data<T, C>) -> Self {
        let (device, shape) = (cuda.device(), data.setting.problem.shape());
        let floats = |values: &[f32]| DeviceBuffer::from_slice(device, values).unwrap();
        Self {
            q: DeviceBuffer::from_slice(device, &data.tensors.q).unwrap(),
            pool: DeviceBuffer::from_slice(device, &data.pool).unwrap(),
            out: DeviceBuffer::zeroed(device, (MAX_ROWS * shape.q_heads() * shape.v_head_dim()) as usize * 2).unwrap(),
            lse: DeviceBuffer::zeroed(device, (MAX_ROWS * shape.q_heads()) as usize * 4).unwrap(),
            sinks: data.setting.sinks().map(|sinks| floats(&sinks)),
            factors: data.setting.factors().map(|factors| floats(&factors)),
        }
    }

    fn args<T: Element, C: KvElement>(&self, data: &Data<T, C>) -> RunArgs {
        let Setting { problem, .. } = data.setting;
        let shape = problem.shape();
        let v = self.pool.span().skip((data.tensors.v_begin * size_of::<C>()) as u64).unwrap();
        let tensors = (self.q.span(), self.pool.span(), v, self.out.span());
        let args = RunArgs::new(problem, POOL_TOKENS / problem.page_size(), MAX_ROWS, tensors)
            .with_kv_strides(data.tensors.k_strides, data.tensors.v_strides)
            .with_lse(self.lse.span(), RowStrides::lse(shape.q_heads()));
        let args = self.sinks.iter().fold(args, |args, sinks| args.with_sinks(sinks.span()));
        let [k, v] = if data.setting.by_head {
            [0, 1].map(|tensor: usize| DeviceKvScale::Heads(self.factors[tensor].span()))
        } else {
            data.setting.factors().map(|factors| DeviceKvScale::Tensor(factors[0]))
        };
        if shape.kv_dtype() == shape.dtype() { args } else { args.with_kv_scales(k, v) }
    }

    fn poison(&self, cuda: &CudaEngine, stream: &Stream) {
        for buffer in [&self.out, &self.lse] {
            poison(cuda, buffer, SEED + 1, stream).unwrap();
        }
    }
}

/// The walk and what else is drawn; a step in which all sequences have left is no step.
fn next_batch(walk: &mut Walk) -> OwnedBatch {
    loop {
        walk.step();
        if walk.batch.lengths.iter().any(|length| *length > 0) {
            return walk.batch.clone();
        }
    }
}

fn walk(setting: &Setting) -> (Walk, StdRng) {
    let page_size = setting.problem.page_size();
    let limits = Limits { num_pages: POOL_TOKENS / page_size, sequences: SEQUENCES, tokens: MAX_TOKENS };
    (Walk::new(7, &[page_size], limits), StdRng::seed_from_u64(9))
}

fn on_the_device<T: Element, C: KvElement>(engine: &Engine, setting: Setting) {
    let steps = std::env::var("PAT_GPU_STEPS").map_or(500, |steps| steps.parse().expect("a number of steps"));
    let cuda = engine.as_cuda().unwrap();
    let profile = engine.profile().unwrap();
    let data = Data::<T, C>::new(setting);
    let memory = Memory::new(cuda, &data);
    let Setting { problem, queries, options, .. } = &data.setting;
    let capacity = PlanCapacity::for_batches(MAX_ROWS, 1 << 15, &profile);
    let planner = Planner::new(*problem, profile, options.clone()).unwrap();
    let mut planner = planner.with_capacity(capacity).unwrap();
    let stream = cuda.device().new_stream().unwrap();
    memory.poison(cuda, &stream);
    stream.synchronize().unwrap();
    let poisoned = read_output::<T>(&memory.out, &memory.lse).unwrap();

    let (mut walk, mut rng) = walk(&data.setting);
    let mut plan = planner.plan(&walk.batch.view(&walk.batch.rows()).unwrap()).unwrap();
    let mut buffers = PlanBuffers::for_capacity(cuda.device(), &capacity, &planner.tile_variants()).unwrap();
    buffers.upload(&plan, &stream).unwrap();
    let workspace = Workspace::with_capacity(cuda.device(), capacity.partial_bytes(problem.shape())).unwrap();
    let run = cuda.bind(&buffers, &memory.args(&data), &workspace).unwrap();
    let mut graph = Graph::capture(vec![run]).unwrap();
    for index in 0..steps {
        let batch = next_batch(&mut walk);
        let step = plan_step(&mut planner, *queries, &batch, &mut rng, &mut plan);
        memory.poison(cuda, &stream);
        graph.replay(buffers.upload(&plan, &stream).unwrap(), &stream).unwrap();
        stream.synchronize().unwrap();
        let output = read_output::<T>(&memory.out, &memory.lse).unwrap();
        data.verify(&step, index, &output);
        let heads = step.rows.lengths.len() * problem.shape().q_heads() as usize;
        let elements = heads * problem.shape().v_head_dim() as usize;
        let behind = |output: &Output<T>| -> (Vec<u32>, Vec<u16>) {
            let out = bytemuck::cast_slice(&output.out[elements..]).to_vec();
            (bytemuck::cast_slice(&output.lse[heads..]).to_vec(), out)
        };
        assert!(behind(&output) == behind(&poisoned), "step {index}, {:?}: behind the plan's rows", data.setting);
    }
    assert!(steps < 200 || walk.events.joined >= 10 && walk.events.left >= 10, "{:?}", walk.events);
}

fn on_the_cpu<T: Element, C: KvElement>(setting: Setting) {
    let data = Data::<T, C>::new(setting);
    let Setting { problem, queries, options, by_head, .. } = &data.setting;
    let profile = pat_rs::DeviceProfile::h200();
    let mut planner = Planner::new(*problem, profile, options.clone()).unwrap();
    let (mut walk, mut rng) = walk(&data.setting);
    let mut plan = planner.plan(&walk.batch.view(&walk.batch.rows()).unwrap()).unwrap();
    let (sinks, [k, v]) = (data.setting.sinks(), data.setting.factors());
    let of = |factors| if *by_head { KvScale::Heads(factors) } else { KvScale::Tensor(factors[0]) };
    let mut host = data.host().with_kv_scales(of(&k), of(&v));
    host.sinks = sinks.as_deref();
    for index in 0..6 {
        let batch = next_batch(&mut walk);
        let step = plan_step(&mut planner, *queries, &batch, &mut rng, &mut plan);
        let mut output =
            Output { out: data.tensors.nan_out(), lse: vec![0.0; host.q.len() / host.q_strides.head as usize] };
        pat_rs::cpu::run(&plan, &host, &mut output.out, Some(&mut output.lse)).unwrap();
        data.verify(&step, index, &output);
    }
}

/// A setting by its name, and the types that it is of.
macro_rules! settings {
    ($($name:ident, $t:ty, $c:ty: $setting:expr;)*) => {
        $(
            fn $name(engine: &Engine) {
                on_the_device::<$t, $c>(engine, $setting);
            }
        )*

        fn a_few_steps_on_the_cpu(_: &Engine) {
            $(on_the_cpu::<$t, $c>($setting);)*
        }

        fn main() -> ExitCode {
            pat_tests::device_tests::main([
                device_test!(a_few_steps_on_the_cpu).on_the_cpu(),
                $(device_test!($name),)*
            ])
        }
    };
}

fn problem(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: Dtype, page_size: u32) -> Problem {
    Problem::new(AttentionShape::new(q_heads, kv_heads, head_dim, dtype).expect("a valid shape"), page_size)
}

fn eight_bit(kv_dtype: Dtype, problem: Problem) -> Problem {
    Problem::new(problem.shape().with_kv_dtype(kv_dtype), problem.page_size())
}

fn values_of_128(problem: Problem) -> Problem {
    Problem::new(problem.shape().with_v_head_dim(128).expect("a valid shape"), problem.page_size())
}

/// Of heads, one after the other.
fn halves(head: u32) -> f32 {
    [0.5, 2.0][head as usize % 2]
}

settings! {
    plain, f16, f16: Setting::new(problem(8, 2, 128, Dtype::F16, 16));
    pages_of_one_token, bf16, bf16: Setting::new(problem(8, 2, 128, Dtype::Bf16, 1));
    fixed_chunks, f16, f16: Setting {
        options: PlanMode::FixedChunk { tokens: 64 }.into(),
        ..Setting::new(problem(8, 2, 128, Dtype::F16, 16))
    };
    e4m3, f16, E4m3: Setting {
        scales: [halves, |_| 0.25],
        by_head: true,
        ..Setting::new(eight_bit(Dtype::E4m3, problem(8, 2, 128, Dtype::F16, 16)))
    };
    e4m3_wgmma, bf16, E4m3: Setting {
        options: PlanOptions::default().with_variants([TileVariant::Wgmma64]),
        scales: [halves, |_| 0.25],
        by_head: true,
        ..Setting::new(eight_bit(Dtype::E4m3, problem(8, 2, 128, Dtype::Bf16, 16)))
    };
    e5m2_wgmma, f16, E5m2: Setting {
        options: PlanOptions::default().with_variants([TileVariant::Wgmma64]),
        scales: [|_| 2.0, |_| 0.5],
        layout: PoolLayout::Hnd,
        ..Setting::new(eight_bit(Dtype::E5m2, problem(8, 2, 64, Dtype::F16, 32)))
    };
    e5m2_capped, bf16, E5m2: Setting {
        scales: [|_| 2.0, |_| 0.5],
        layout: PoolLayout::Hnd,
        ..Setting::new(eight_bit(Dtype::E5m2, problem(12, 2, 64, Dtype::Bf16, 16)).with_soft_cap(20.0))
    };
    e4m3_in_a_window_with_sinks, bf16, E4m3: Setting {
        scales: [|_| 0.5, halves],
        by_head: true,
        layout: PoolLayout::Interleaved,
        ..Setting::new(eight_bit(Dtype::E4m3, problem(16, 2, 128, Dtype::Bf16, 32)).with_window(70).with_sinks())
    };
    e4m3_drafts, bf16, E4m3: Setting {
        queries: Queries::Drafts,
        ..Setting::new(eight_bit(Dtype::E4m3, problem(8, 2, 64, Dtype::Bf16, 16)).with_query_tokens(5))
    };
    window_with_sinks, bf16, bf16: Setting::new(problem(16, 2, 64, Dtype::Bf16, 16).with_window(48).with_sinks());
    chunks, f16, f16: Setting::new(problem(10, 2, 128, Dtype::F16, 16).with_reach(Reach::Chunk(64)));
    capped_window_of_256, bf16, bf16: Setting {
        layout: PoolLayout::Hnd,
        ..Setting::new(problem(8, 4, 256, Dtype::Bf16, 16).with_soft_cap(50.0).with_window(100))
    };
    head_dim_256, f16, f16: Setting::new(problem(8, 2, 256, Dtype::F16, 32));
    head_dim_256_wgmma, bf16, bf16: Setting {
        options: PlanOptions::default().with_variants([TileVariant::Wgmma64]),
        ..Setting::new(problem(8, 2, 256, Dtype::Bf16, 16).with_sinks())
    };
    head_dim_96, f16, f16: Setting::new(problem(8, 8, 96, Dtype::F16, 16));
    head_dim_192_values_128, bf16, bf16: Setting::new(
        values_of_128(problem(16, 2, 192, Dtype::Bf16, 16)).with_window(33).with_sinks()
    );
    head_dim_512, bf16, bf16: Setting::new(problem(8, 1, 512, Dtype::Bf16, 16));
    group_in_parts, f16, f16: Setting::new(problem(150, 1, 64, Dtype::F16, 16).with_sinks());
    drafts, bf16, bf16: Setting {
        queries: Queries::Drafts,
        ..Setting::new(problem(8, 2, 128, Dtype::Bf16, 16).with_query_tokens(5).with_window(64))
    };
    trees, f16, f16: Setting {
        queries: Queries::Trees,
        ..Setting::new(problem(8, 2, 128, Dtype::F16, 16).with_query_tree(16))
    };
    trees_in_a_window, bf16, bf16: Setting {
        queries: Queries::Trees,
        layout: PoolLayout::Interleaved,
        ..Setting::new(problem(16, 2, 64, Dtype::Bf16, 8).with_query_tree(16).with_window(50))
    };
}
