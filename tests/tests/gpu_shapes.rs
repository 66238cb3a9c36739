//! Page sizes and pools that random forests do not have: pages of 2 to 1,056 tokens, K and V of more than 2^31 elements each,
//! whose page ids are far apart. On a device, against the f64 oracle; page sizes in interpreted PTX, too.

use half::{bf16, f16};
use pat_abi::Arch;
use pat_rs::cpu::E4m3;
use pat_rs::cuda::{DeviceBuffer, RunArgs, Workspace};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, Dtype, Element, Engine, HostTensors, KvElement, KvStrides, PlanOptions, Planner, Problem,
    RowStrides, TileVariant,
};
use pat_tests::device_test;
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::forests::far_apart;
use pat_tests::invariants::modes;
use pat_tests::on_device::read_output;
use pat_workloads::{Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check};
use std::process::ExitCode;

const SEED: u32 = 31;

/// The tensors of a batch: Q, and K and V as they are stored, which 16 bits hold exactly.
struct Data<T, C> {
    batch: OwnedBatch,
    problem: Problem,
    tensors: Tensors<T>,
    codes: Vec<C>,
    oracle: Oracle,
}

impl<T: Element, C: KvElement> Data<T, C> {
    fn new(batch: OwnedBatch, (q_heads, kv_heads, head_dim): (u32, u32, u32), layout: PoolLayout) -> Self {
        let plain = AttentionShape::new(q_heads, kv_heads, head_dim, T::DTYPE).expect("a valid shape");
        let mut tensors = Tensors::<T>::draw(&batch, plain, layout, SEED).expect("a valid batch");
        let codes = tensors.narrow(|_, _| 1.0);
        let problem = Problem::new(plain.with_kv_dtype(C::DTYPE), batch.page_size);
        let sample = RowSample::for_batch(&batch, plain);
        let oracle = Oracle::of_problem_tensors(&batch, &tensors, (problem, None), sample).expect("a valid batch");
        Self { batch, problem, tensors, codes, oracle }
    }

    fn verify(&self, out: &[T], lse: &[f32], what: &str) {
        let report = check(&self.oracle, self.problem.shape().q_heads(), out, Some(lse));
        assert!(report.passed, "{what}, {:?}: {report:?}", self.problem);
    }
}

fn page_size<T: Element, C: KvElement>(executor: &impl Executor, heads: (u32, u32, u32), page_size: u32) {
    batch_in_pages::<T, C>(executor, heads, far_apart(page_size, 15), &modes(page_size));
}

/// By default, and through each wgmma kernel that the device has.
fn batch_in_pages<T: Element, C: KvElement>(
    executor: &impl Executor,
    heads: (u32, u32, u32),
    batch: OwnedBatch,
    modes: &[PlanMode],
) {
    let data = Data::<T, C>::new(batch, heads, PoolLayout::Nhd);
    let rows = data.batch.rows();
    let view = data.batch.view(&rows).expect("valid");
    let profile = executor.profile().expect("it can be asked");
    let of_tma = profile.variants(&data.problem).into_iter().filter(|variant| variant.arch() == Arch::Sm90a);
    let choices: Vec<_> = [None].into_iter().chain(of_tma.map(Some)).collect();
    for (mode, variant) in modes.iter().flat_map(|&mode| choices.iter().map(move |&choice| (mode, choice))) {
        let mut options = PlanOptions::from(mode);
        if let Some(variant) = variant {
            options = options.with_variants([variant]);
        }
        let mut planner = Planner::new(data.problem, profile.clone(), options).expect("supported");
        let plan = planner.plan(&view).expect("a plan");
        let host = HostTensors::new(data.problem, &data.tensors.q, &data.codes, &data.codes[data.tensors.v_begin..])
            .with_kv_strides(data.tensors.k_strides, data.tensors.v_strides);
        let mut out = data.tensors.nan_out();
        let mut lse = vec![f32::NAN; data.batch.lengths.len() * heads.0 as usize];
        executor.run_host(&plan, &host, &mut out, Some(&mut lse)).expect("a run");
        data.verify(&out, &lse, &format!("{}, {mode:?}, {variant:?}", executor.name()));
    }
}

fn page_sizes_of_engines(engine: &Engine) {
    // 784 and 1056: hybrid models, whose attention pages are as large as their linear layers' states.
    for pages in [2, 8, 24, 48, 784, 1056] {
        page_size::<bf16, bf16>(engine, (8, 2, 128), pages);
        page_size::<f16, f16>(engine, (6, 1, 256), pages);
        page_size::<bf16, E4m3>(engine, (8, 2, 64), pages);
    }
}

/// A page that two sequences share, and one that is theirs alone each; one token, and none.
fn two_of_one_page(page_size: u32) -> OwnedBatch {
    let lengths = vec![page_size + page_size / 2 + 3, 2 * page_size - 7, 1, 0];
    OwnedBatch { page_size, num_pages: 6, lengths, block_tables: vec![vec![4, 0], vec![4, 2], vec![5], vec![]] }
}

fn page_sizes_in_interpreted_ptx(_: &Engine) {
    for (index, page_size) in [8, 24, 48, 784, 1056].into_iter().enumerate() {
        let batch = || if page_size < 64 { far_apart(page_size, 15) } else { two_of_one_page(page_size) };
        let modes = &[PlanMode::Packed, PlanMode::Flat][index % 2..][..1];
        batch_in_pages::<f16, f16>(&Interpreter, (4, 1, 64), batch(), modes);
        batch_in_pages::<bf16, bf16>(&Interpreter, (3, 1, 128), batch(), modes);
        batch_in_pages::<f16, f16>(&Interpreter, (2, 1, 256), batch(), modes);
        batch_in_pages::<bf16, E4m3>(&Interpreter, (4, 1, 64), batch(), modes);
        batch_in_pages::<f16, E4m3>(&Interpreter, (4, 1, 128), batch(), modes);
    }
}

/// K and V in one buffer: V begins behind 4 GiB, and where elements have 16 bits pages of K do, too.
fn large_pool<T: Element, C: KvElement>(engine: &Engine, page_size: u32, layout: PoolLayout, variant: TileVariant) {
    let heads = (8, 2, 128);
    let page_elements = (page_size * heads.1 * heads.2) as usize;
    let num_pages = (1usize << 31).div_ceil(page_elements) as u32 + 100;
    let sparse = far_apart(page_size, num_pages);
    let data = Data::<T, C>::new(sparse.compacted(), heads, layout);
    let shape = data.problem.shape();
    let [k_strides, v_strides]: [KvStrides; 2] = layout.strides(shape, page_size);

    let cuda = engine.as_cuda().unwrap();
    let device = cuda.device();
    let v_begin = num_pages as usize * page_elements * size_of::<C>();
    let mut pool = DeviceBuffer::zeroed(device, 2 * v_begin).unwrap();
    let mut furthest = 0;
    for (table, compact) in sparse.block_tables.iter().zip(&data.batch.block_tables) {
        for (&page, &small) in table.iter().zip(compact) {
            let begin = page as usize * page_elements;
            furthest = furthest.max(begin + page_elements);
            let codes = &data.codes[small as usize * page_elements..];
            pool.write(begin * size_of::<C>(), &codes[..page_elements]).unwrap();
            let codes = &codes[data.tensors.v_begin..];
            pool.write(v_begin + begin * size_of::<C>(), &codes[..page_elements]).unwrap();
        }
    }
    assert!(furthest > 1 << 31);

    let row_count = sparse.lengths.len() as u32;
    let q = DeviceBuffer::from_slice(device, &data.tensors.q).unwrap();
    let mut out = DeviceBuffer::zeroed(device, data.tensors.q.len() * 2).unwrap();
    let mut lse = DeviceBuffer::zeroed(device, (row_count * heads.0) as usize * 4).unwrap();
    let v = pool.span().skip(v_begin as u64).unwrap();
    let args = RunArgs::new(data.problem, num_pages, row_count, (q.span(), pool.span(), v, out.span()))
        .with_kv_strides(k_strides, v_strides)
        .with_lse(lse.span(), RowStrides::lse(heads.0));
    let stream = device.new_stream().unwrap();
    let rows = sparse.rows();
    for mode in modes(page_size) {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let mut planner = Planner::new(data.problem, engine.profile().unwrap(), options).unwrap();
        let plan = planner.plan(&sparse.view(&rows).unwrap()).unwrap();
        for buffer in [&mut out, &mut lse] {
            buffer.fill(0xff).unwrap();
        }
        let workspace = Workspace::with_capacity(device, Workspace::bytes_for(&plan)).unwrap();
        cuda.run(&cuda.upload(&plan, &stream).unwrap(), &args, &workspace, &stream).unwrap();
        stream.synchronize().unwrap();
        let output = read_output::<T>(&out, &lse).unwrap();
        data.verify(&output.out, &output.lse, &format!("{num_pages} pages, {layout:?}, {variant:?}, {mode:?}"));
    }
}

fn pools_of_more_than_2_to_the_31_elements(engine: &Engine) {
    let can = |variant| {
        let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
        engine.profile().unwrap().variants(&Problem::new(shape, 16)).contains(&variant)
    };
    for variant in [TileVariant::Wgmma64, TileVariant::Wgmma128, TileVariant::Mma16, TileVariant::Mma64] {
        if can(variant) {
            large_pool::<f16, f16>(engine, 16, PoolLayout::Nhd, variant);
            large_pool::<f16, f16>(engine, 64, PoolLayout::Hnd, variant);
        }
    }
    large_pool::<bf16, bf16>(engine, 1, PoolLayout::Nhd, TileVariant::Mma64);
    large_pool::<f16, f16>(engine, 784, PoolLayout::Hnd, TileVariant::Mma32);
    large_pool::<bf16, E4m3>(engine, 16, PoolLayout::Nhd, TileVariant::Mma16);
    if can(TileVariant::Wgmma64) {
        large_pool::<bf16, E4m3>(engine, 16, PoolLayout::Nhd, TileVariant::Wgmma64);
    }
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(page_sizes_in_interpreted_ptx).on_the_cpu(),
        device_test!(page_sizes_of_engines),
        device_test!(pools_of_more_than_2_to_the_31_elements),
    ])
}
