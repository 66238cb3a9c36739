//! One captured graph, many plans: whatever a planner with a [`PlanCapacity`] makes is uploaded into the same buffers and
//! replayed, every answer held against the oracle.

use half::{bf16, f16};
use pat_rs::cuda::{CudaEngine, DeviceBuffer, Graph, PlanBuffers, RunArgs, Stream, Uploaded, Workspace};
use pat_rs::plan::{PlanCapacity, PlanChange, PlanMode};
use pat_rs::{AttentionShape, Dtype, Element, Engine, Error, PlanOptions, Planner, Problem, RowStrides, TileVariant};
use pat_tests::on_device::poison;
use pat_tests::{device_test, softmax_scale};
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RaggedGroups, RowSample, Tensors, check};
use std::process::ExitCode;

const SEED: u32 = 5;
const POOL_PAGES: u32 = 1200;
const ROWS: u32 = 32;

/// A model's shape and its pages.
#[derive(Clone, Copy, Debug)]
struct Setting {
    shape: AttentionShape,
    page_size: u32,
}

impl Setting {
    fn new(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: Dtype, page_size: u32) -> Self {
        Self { shape: AttentionShape::new(q_heads, kv_heads, head_dim, dtype).expect("a valid shape"), page_size }
    }
}

fn ragged(page_size: u32, sequences: u32, groups: u32, shared_pages: u32, private_pages: u32, seed: u64) -> OwnedBatch {
    let spec = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size, seed };
    let batch = spec.batch();
    assert!(batch.num_pages <= POOL_PAGES, "{} pages", batch.num_pages);
    OwnedBatch { num_pages: POOL_PAGES, ..batch }
}

/// Other lengths, other forests, padding, fewer rows, none at all.
fn batches(page_size: u32) -> Vec<OwnedBatch> {
    let ragged = |sequences, groups, shared, private, seed| ragged(page_size, sequences, groups, shared, private, seed);
    let full = ragged(ROWS, 2, 12, 8, 1);
    let mut padded = ragged(ROWS, 4, 20, 6, 2);
    padded.lengths.iter_mut().step_by(3).for_each(|length| *length = 0);
    // One long sequence among short ones: it is cut, and merged.
    let mut long = ragged(5, 5, 0, 3, 3);
    long.lengths[2] = POOL_PAGES / 2 * page_size - page_size.min(3);
    long.block_tables[2] = (POOL_PAGES / 2..POOL_PAGES).collect();
    let equal = OwnedBatch {
        lengths: vec![13 * page_size - page_size / 2; 8],
        block_tables: vec![(100..113).collect(); 8],
        ..long.clone()
    };
    let empty = OwnedBatch { lengths: vec![0; 7], block_tables: vec![Vec::new(); 7], ..long.clone() };
    vec![full, padded, long, ragged(ROWS, ROWS, 0, 15, 4), equal, empty, ragged(1, 1, 0, 30, 5)]
}

/// Large enough for all of them.
fn capacity(engine: &Engine) -> PlanCapacity {
    PlanCapacity::for_batches(ROWS, 1 << 12, &engine.profile().expect("the driver tells"))
}

/// Q of all rows and the pool; NaN where none of `batches` has a token.
fn tensors<T: Element>(setting: Setting, batches: &[OwnedBatch]) -> Tensors<T> {
    let all = OwnedBatch {
        page_size: setting.page_size,
        num_pages: POOL_PAGES,
        lengths: batches.iter().flat_map(|batch| batch.lengths.clone()).collect(),
        block_tables: batches.iter().flat_map(|batch| batch.block_tables.clone()).collect(),
    };
    Tensors::draw(&all, setting.shape, PoolLayout::Nhd, SEED).expect("valid batches")
}

/// What the captured graph reads and writes.
struct Memory<T> {
    setting: Setting,
    q: DeviceBuffer,
    kv: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    tensors: Tensors<T>,
}

/// Outputs of all rows.
#[derive(Clone, Debug, PartialEq)]
struct Outputs {
    out: Vec<u16>,
    lse: Vec<u32>,
}

impl<T: Element> Memory<T> {
    fn new(engine: &CudaEngine, setting: Setting, batches: &[OwnedBatch]) -> Self {
        let (device, tensors, shape) = (engine.device(), tensors::<T>(setting, batches), setting.shape);
        let row_elements = (shape.q_heads() * shape.head_dim()) as usize;
        Self {
            setting,
            q: DeviceBuffer::from_slice(device, &tensors.q[..ROWS as usize * row_elements]).unwrap(),
            kv: DeviceBuffer::from_slice(device, &tensors.kv).unwrap(),
            out: DeviceBuffer::zeroed(device, ROWS as usize * row_elements * 2).unwrap(),
            lse: DeviceBuffer::zeroed(device, (ROWS * shape.q_heads()) as usize * 4).unwrap(),
            tensors,
        }
    }

    fn args(&self) -> RunArgs {
        let Setting { shape, page_size } = self.setting;
        let v = self.kv.span().skip(2 * self.tensors.v_begin as u64).unwrap();
        let tensors = (self.q.span(), self.kv.span(), v, self.out.span());
        RunArgs::new(Problem::new(shape, page_size), POOL_PAGES, ROWS, tensors)
            .with_kv_strides(self.tensors.k_strides, self.tensors.v_strides)
            .with_lse(self.lse.span(), RowStrides::lse(shape.q_heads()))
    }

    /// Puts something into the outputs that no plan computes: by a kernel, since the graph goes on borrowing them.
    fn poison(&self, engine: &CudaEngine, stream: &Stream) {
        for buffer in [&self.out, &self.lse] {
            poison(engine, buffer, SEED + 1, stream).unwrap();
        }
    }

    fn outputs(&self) -> Outputs {
        let mut outputs =
            Outputs { out: vec![0; self.out.bytes() as usize / 2], lse: vec![0; self.lse.bytes() as usize / 4] };
        self.out.read(0, &mut outputs.out).unwrap();
        self.lse.read(0, &mut outputs.lse).unwrap();
        outputs
    }
}

/// Holds the rows of the batch against the oracle, and all others to what was there before.
fn verify<T: Element>(shape: AttentionShape, batch: &OwnedBatch, outputs: &Outputs, poison: &Outputs, what: &str) {
    let sample = RowSample::for_batch(batch, shape);
    let oracle = Oracle::compute::<T>(batch, shape, SEED, softmax_scale(shape), sample).expect("a valid batch");
    let out: &[T] = bytemuck::cast_slice(&outputs.out);
    let lse: &[f32] = bytemuck::cast_slice(&outputs.lse);
    let rows = batch.lengths.len() * shape.q_heads() as usize;
    let report = check(&oracle, shape.q_heads(), &out[..rows * shape.head_dim() as usize], Some(&lse[..rows]));
    assert!(report.passed, "{what}: {report:?}");
    let heads = batch.lengths.len() * shape.q_heads() as usize;
    assert_eq!(outputs.lse[heads..], poison.lse[heads..], "{what}: log-sum-exps behind the plan's rows");
    let elements = heads * shape.head_dim() as usize;
    assert!(outputs.out[elements..] == poison.out[elements..], "{what}: outputs behind the plan's rows");
}

fn serve<T: Element>(engine: &Engine, setting: Setting, options: &PlanOptions) {
    let Setting { shape, page_size } = setting;
    let cuda = engine.as_cuda().unwrap();
    let (batches, capacity) = (batches(page_size), capacity(engine));
    let memory = Memory::<T>::new(cuda, setting, &batches);
    let problem = Problem::new(shape, page_size);
    let planner = || Planner::new(problem, engine.profile().unwrap(), options.clone()).unwrap();
    let mut bounded = planner().with_capacity(capacity).unwrap();
    let mut buffers = PlanBuffers::for_capacity(cuda.device(), &capacity, &bounded.tile_variants()).unwrap();
    let workspace = Workspace::with_capacity(cuda.device(), capacity.partial_bytes(shape)).unwrap();
    let stream = cuda.device().new_stream().unwrap();
    memory.poison(cuda, &stream);
    stream.synchronize().unwrap();
    let poison = memory.outputs();

    let rows = batches[0].rows();
    let mut plan = bounded.plan(&batches[0].view(&rows).unwrap()).unwrap();
    buffers.upload(&plan, &stream).unwrap();
    let run = cuda.bind(&buffers, &memory.args(), &workspace).unwrap();
    let mut graph = Graph::capture(vec![run]).unwrap();
    let mut replay = |what: &str, batch: &OwnedBatch, uploaded: Uploaded<'_>| {
        memory.poison(cuda, &stream);
        graph.replay(uploaded, &stream).unwrap();
        stream.synchronize().unwrap();
        let outputs = memory.outputs();
        verify::<T>(shape, batch, &outputs, &poison, what);
        outputs
    };
    for round in 0..2 {
        for (index, batch) in batches.iter().enumerate() {
            let rows = batch.rows();
            bounded.plan_into(&batch.view(&rows).unwrap(), &mut plan).unwrap();
            let uploaded = buffers.upload(&plan, &stream).unwrap();
            replay(&format!("round {round}, batch {index}, {setting:?}, {options:?}"), batch, uploaded);
        }
    }

    // A decode step within the last pages: the same plan with other lengths.
    let mut step = batches[0].clone();
    let shorter = |length: u32| if length == 0 || length % page_size == 1 % page_size { length } else { length - 1 };
    step.lengths.iter_mut().for_each(|length| *length = shorter(*length));
    let (before, after) = (batches[0].rows(), step.rows());
    bounded.plan_into(&batches[0].view(&before).unwrap(), &mut plan).unwrap();
    let change = bounded.advance(&step.view(&after).unwrap(), None, &mut plan).unwrap();
    let expected = if page_size == 1 { PlanChange::Nothing } else { PlanChange::Lengths };
    assert_eq!(change, expected, "{setting:?}");
    let uploaded = buffers.upload(&plan, &stream).unwrap();
    let last = replay("advanced", &step, uploaded);

    // What exceeds the capacity is refused by the planner; a plan made without it, by the buffers. Neither changes what the
    // graph computes.
    let more = ragged(page_size, ROWS + 1, 3, 4, 4, 6);
    let rows = more.rows();
    let refused = bounded.plan_into(&more.view(&rows).unwrap(), &mut plan).unwrap_err();
    assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused}");
    let unbounded = planner().plan(&more.view(&rows).unwrap()).unwrap();
    let refused = buffers.upload(&unbounded, &stream).unwrap_err();
    assert!(matches!(refused, Error::PlanMismatch { .. }) && refused.to_string().contains("sequences"), "{refused}");
    assert_eq!(replay("after refusals", &step, buffers.uploaded().unwrap()), last);
}

fn a_graph_serves_every_plan_within_its_capacity(engine: &Engine) {
    // Several variants: several launches in one graph, empty ones among them.
    let several = vec![TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma64];
    let setting = Setting::new(32, 8, 128, Dtype::F16, 16);
    for mode in [PlanMode::Auto, PlanMode::Packed] {
        serve::<f16>(engine, setting, &mode.into());
        serve::<f16>(engine, setting, &PlanOptions::from(mode).with_variants(several.clone()));
    }
}

fn graphs_serve_other_models_and_pages(engine: &Engine) {
    let options = PlanOptions::default();
    serve::<bf16>(engine, Setting::new(32, 8, 128, Dtype::Bf16, 64), &options);
    serve::<f16>(engine, Setting::new(16, 2, 64, Dtype::F16, 32), &options);
    serve::<bf16>(engine, Setting::new(8, 8, 64, Dtype::Bf16, 16), &options);
    // One token per page, and pages that TMA would have to fill up: the kernels without tensor maps. Pages in which tiles begin.
    serve::<f16>(engine, Setting::new(8, 1, 128, Dtype::F16, 1), &options);
    serve::<bf16>(engine, Setting::new(12, 4, 64, Dtype::Bf16, 24), &options);
    serve::<bf16>(engine, Setting::new(12, 4, 64, Dtype::Bf16, 48), &options);
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(a_graph_serves_every_plan_within_its_capacity),
        device_test!(graphs_serve_other_models_and_pages),
    ])
}
