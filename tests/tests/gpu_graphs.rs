//! One captured graph, many plans: whatever a planner with a [`PlanCapacity`] makes is uploaded into the same buffers and
//! replayed, every answer held against the oracle. Skipped, with the reason, where no device can be used.

use half::f16;
use pat_abi::generator::Tensor;
use pat_rs::cuda::bench_support::{FillSpec, fill};
use pat_rs::cuda::{CudaEngine, DeviceBuffer, Graph, PlanBuffers, RunArgs, Stream, Uploaded, Workspace};
use pat_rs::plan::{PlanCapacity, PlanChange, PlanMode};
use pat_rs::{AttentionShape, Dtype, Engine, Error, KvStrides, PlanOptions, Planner, Problem, RowStrides, TileVariant};
use pat_tests::softmax_scale;
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RaggedGroups, RowSample, Tensors, check};

const SEED: u32 = 5;
const PAGE_SIZE: u32 = 16;
const POOL_PAGES: u32 = 1200;
const ROWS: u32 = 32;

fn problem() -> Problem {
    Problem::new(shape(), PAGE_SIZE)
}

fn shape() -> AttentionShape {
    AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape")
}

fn ragged(sequences: u32, groups: u32, shared_pages: u32, private_pages: u32, seed: u64) -> OwnedBatch {
    let spec = RaggedGroups { sequences, groups, shared_pages, private_pages, page_size: PAGE_SIZE, seed };
    let batch = spec.batch();
    assert!(batch.num_pages <= POOL_PAGES, "{} pages", batch.num_pages);
    OwnedBatch { num_pages: POOL_PAGES, ..batch }
}

/// Other lengths, other forests, padding, fewer rows, none at all.
fn batches() -> Vec<OwnedBatch> {
    let full = ragged(ROWS, 2, 12, 8, 1);
    let mut padded = ragged(ROWS, 4, 20, 6, 2);
    padded.lengths.iter_mut().step_by(3).for_each(|length| *length = 0);
    // One long sequence among short ones: it is cut, and merged.
    let mut long = ragged(5, 5, 0, 3, 3);
    long.lengths[2] = POOL_PAGES / 2 * PAGE_SIZE - 3;
    long.block_tables[2] = (POOL_PAGES / 2..POOL_PAGES).collect();
    let equal = OwnedBatch { lengths: vec![200; 8], block_tables: vec![(100..113).collect(); 8], ..long.clone() };
    let empty = OwnedBatch { lengths: vec![0; 7], block_tables: vec![Vec::new(); 7], ..long.clone() };
    vec![full, padded, long, ragged(ROWS, ROWS, 0, 15, 4), equal, empty, ragged(1, 1, 0, 30, 5)]
}

/// Large enough for all of them.
fn capacity(engine: &Engine) -> PlanCapacity {
    PlanCapacity::for_batches(ROWS, 1 << 12, &engine.profile().expect("the driver tells"))
}

/// Q of all rows and the pool; NaN where none of `batches` has a token.
fn tensors(batches: &[OwnedBatch]) -> Tensors<f16> {
    let all = OwnedBatch {
        page_size: PAGE_SIZE,
        num_pages: POOL_PAGES,
        lengths: batches.iter().flat_map(|batch| batch.lengths.clone()).collect(),
        block_tables: batches.iter().flat_map(|batch| batch.block_tables.clone()).collect(),
    };
    Tensors::draw(&all, shape(), PoolLayout::Nhd, SEED).expect("valid batches")
}

/// What the captured graph reads and writes.
struct Memory {
    q: DeviceBuffer,
    kv: DeviceBuffer,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    tensors: Tensors<f16>,
}

/// Outputs of all rows.
#[derive(Clone, Debug, PartialEq)]
struct Outputs {
    out: Vec<u16>,
    lse: Vec<u32>,
}

impl Memory {
    fn new(engine: &CudaEngine, batches: &[OwnedBatch]) -> Self {
        let (device, tensors) = (engine.device(), tensors(batches));
        let row_elements = (shape().q_heads() * shape().head_dim()) as usize;
        Self {
            q: DeviceBuffer::from_slice(device, &tensors.q[..ROWS as usize * row_elements]).unwrap(),
            kv: DeviceBuffer::from_slice(device, &tensors.kv).unwrap(),
            out: DeviceBuffer::zeroed(device, ROWS as usize * row_elements * 2).unwrap(),
            lse: DeviceBuffer::zeroed(device, (ROWS * shape().q_heads()) as usize * 4).unwrap(),
            tensors,
        }
    }

    fn args(&self) -> RunArgs {
        let v = self.kv.span().skip(2 * self.tensors.v_begin as u64).unwrap();
        RunArgs::new(problem(), POOL_PAGES, ROWS, (self.q.span(), self.kv.span(), v, self.out.span()))
            .with_kv_strides(self.tensors.kv_strides, self.tensors.kv_strides)
            .with_lse(self.lse.span(), RowStrides::lse(shape().q_heads()))
    }

    /// Puts something into the outputs that no plan computes: by a kernel, since the graph goes on borrowing them.
    fn poison(&self, engine: &CudaEngine, stream: &Stream) {
        for buffer in [&self.out, &self.lse] {
            let head_dim = 64;
            let pages = buffer.bytes() as u32 / 2 / head_dim;
            let spec = FillSpec {
                tensor: Tensor::Q,
                seed: SEED + 1,
                dtype: Dtype::F16,
                pages,
                tokens: 1,
                heads: 1,
                head_dim,
                strides: KvStrides::nhd(1, 1, head_dim),
            };
            fill(engine.device(), buffer.span(), spec, stream).unwrap();
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
fn verify(batch: &OwnedBatch, outputs: &Outputs, poison: &Outputs, what: &str) {
    let oracle =
        Oracle::compute::<f16>(batch, shape(), SEED, softmax_scale(shape()), RowSample::for_batch(batch, shape()))
            .expect("a valid batch");
    let out: Vec<f16> = outputs.out.iter().map(|&bits| f16::from_bits(bits)).collect();
    let lse: Vec<f32> = outputs.lse.iter().map(|&bits| f32::from_bits(bits)).collect();
    let report = check(&oracle, shape().q_heads(), &out, Some(&lse));
    assert!(report.passed, "{what}: {report:?}");
    let heads = batch.lengths.len() * shape().q_heads() as usize;
    assert_eq!(outputs.lse[heads..], poison.lse[heads..], "{what}: log-sum-exps behind the plan's rows");
    let elements = heads * shape().head_dim() as usize;
    assert!(outputs.out[elements..] == poison.out[elements..], "{what}: outputs behind the plan's rows");
}

fn serve(engine: &Engine, options: &PlanOptions) {
    let cuda = engine.as_cuda().unwrap();
    let (batches, capacity) = (batches(), capacity(engine));
    let memory = Memory::new(cuda, &batches);
    let planner = || Planner::new(problem(), engine.profile().unwrap(), options.clone()).unwrap();
    let mut bounded = planner().with_capacity(capacity).unwrap();
    let mut buffers = PlanBuffers::for_capacity(cuda.device(), &capacity, &bounded.tile_variants()).unwrap();
    let workspace = Workspace::with_capacity(cuda.device(), capacity.partial_bytes(shape())).unwrap();
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
        verify(batch, &outputs, &poison, what);
        outputs
    };
    for round in 0..2 {
        for (index, batch) in batches.iter().enumerate() {
            let rows = batch.rows();
            bounded.plan_into(&batch.view(&rows).unwrap(), &mut plan).unwrap();
            let uploaded = buffers.upload(&plan, &stream).unwrap();
            replay(&format!("round {round}, batch {index}, {options:?}"), batch, uploaded);
        }
    }

    // A decode step within the last pages: the same plan with other lengths.
    let mut step = batches[0].clone();
    let shorter = |length: u32| if length % PAGE_SIZE == 1 { length } else { length - 1 };
    step.lengths.iter_mut().for_each(|length| *length = shorter(*length));
    let (before, after) = (batches[0].rows(), step.rows());
    bounded.plan_into(&batches[0].view(&before).unwrap(), &mut plan).unwrap();
    let change = bounded.advance(&step.view(&after).unwrap(), None, &mut plan).unwrap();
    assert!(change == PlanChange::Lengths || change == PlanChange::Forest, "{change:?}");
    let uploaded = buffers.upload(&plan, &stream).unwrap();
    let last = replay("advanced", &step, uploaded);

    // What exceeds the capacity is refused by the planner; a plan made without it, by the buffers. Neither changes what the
    // graph computes.
    let more = ragged(ROWS + 1, 3, 4, 4, 6);
    let rows = more.rows();
    let refused = bounded.plan_into(&more.view(&rows).unwrap(), &mut plan).unwrap_err();
    assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused}");
    let unbounded = planner().plan(&more.view(&rows).unwrap()).unwrap();
    let refused = buffers.upload(&unbounded, &stream).unwrap_err();
    assert!(matches!(refused, Error::PlanMismatch { .. }) && refused.to_string().contains("sequences"), "{refused}");
    assert_eq!(replay("after refusals", &step, buffers.uploaded().unwrap()), last);
}

#[test]
fn a_graph_serves_every_plan_within_its_capacity() {
    match Engine::cuda(0) {
        Ok(engine) => {
            // Several variants: several launches in one graph, empty ones among them.
            let several = vec![TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma64];
            for mode in [PlanMode::Auto, PlanMode::Packed] {
                serve(&engine, &mode.into());
                serve(&engine, &PlanOptions::from(mode).with_variants(several.clone()));
            }
        }
        Err(reason) => eprintln!("skipped a_graph_serves_every_plan_within_its_capacity: {reason}"),
    }
}
