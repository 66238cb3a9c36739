//! The CUDA engine on a device: against the CPU executor and the oracle, on streams, in graphs, with bad arguments.

use half::{bf16, f16};
use pat_rs::cpu::{CacheLayout, E4m3, E5m2, NewRows, append_rounded_rows, append_rows};
use pat_rs::cuda::{
    AppendArgs, DeviceBuffer, DeviceKvScale, DeviceSpan, Graph, LaunchGeometry, PlanBuffers, Workspace, bench_support,
};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, Dtype, Element, Engine, Error, KvElement, KvScale, KvStrides, PlanOptions, Problem, RowStrides,
    TileVariant,
};
use pat_tests::on_device::{OnDevice, plan};
use pat_tests::{Case, Output, device_test, judge, random_case, run_cpu, softmax_scale};
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::Cell;
use std::process::ExitCode;

const SEED: u32 = 5;

fn run_host<T: Element>(case: &Case, engine: &Engine, options: PlanOptions) -> Output<T> {
    let tensors = Tensors::<T>::draw(&case.batch, case.shape, case.layout, SEED).unwrap();
    let mut output = Output {
        out: vec![T::from_f32(f32::NAN); tensors.q.len()],
        lse: vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize],
    };
    let plan = plan(case, engine.as_cuda().unwrap(), options).unwrap();
    engine
        .run_host(&plan, &tensors.host(softmax_scale(case.shape)), &mut output.out, Some(&mut output.lse))
        .unwrap_or_else(|error| panic!("{error}: {case:?}"));
    output
}

/// Sequences that share a prefix, one that is a prefix of another, one alone, one empty.
fn shared_prefix_case(dtype: Dtype, page_size: u32) -> Case {
    let table = |own: std::ops::Range<u32>| (0..4).chain(own).collect::<Vec<u32>>();
    let block_tables = vec![table(4..6), table(6..8), table(8..9), table(9..9), (9..17).collect(), Vec::new()];
    let lengths = block_tables.iter().map(|t: &Vec<u32>| (t.len() as u32 * page_size).saturating_sub(3)).collect();
    Case {
        batch: OwnedBatch { page_size, num_pages: 18, lengths, block_tables },
        shape: AttentionShape::new(16, 2, 128, dtype).unwrap(),
        layout: PoolLayout::ALL[0],
    }
}

fn assert_agrees<T: Element>(case: &Case, output: &Output<T>, what: &str) {
    let report = judge(case, output, SEED).unwrap();
    assert!(report.passed, "{what}: {report:?}\n{case:?}");
}

fn every_variant_agrees<T: Element>(engine: &Engine) {
    let case = shared_prefix_case(T::DTYPE, 16);
    for variant in engine.profile().unwrap().variants(&case.batch.problem(case.shape)) {
        if pat_abi::manifest::find(pat_abi::Family::Forward(variant), T::DTYPE, case.shape.head_dim()).is_none() {
            continue;
        }
        for mode in [PlanMode::Flat, PlanMode::PerNode, PlanMode::FixedChunk { tokens: 32 }] {
            let options = PlanOptions::from(mode).with_variants([variant]);
            assert_agrees(&case, &run_host::<T>(&case, engine, options), &format!("{variant:?} {mode:?}"));
        }
    }
}

fn every_variant_agrees_with_the_oracle(engine: &Engine) {
    // Ahead of time, all that a planner may ask for.
    if let Some(cuda) = engine.as_cuda() {
        let problem = Problem::new(shared_prefix_case(Dtype::F16, 16).shape, 16);
        cuda.prepare_variants(&problem, &engine.profile().unwrap().variants(&problem)).unwrap();
    }
    every_variant_agrees::<f16>(engine);
    every_variant_agrees::<bf16>(engine);
}

fn random_forests_agree_with_the_oracle(engine: &Engine) {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for _ in 0..40 {
        let case = random_case(&mut rng, Dtype::F16);
        assert_agrees(&case, &run_host::<f16>(&case, engine, PlanOptions::default()), "random forest");
    }
}

fn both_executors_give_the_same_log_sum_exps(engine: &Engine) {
    let case = shared_prefix_case(Dtype::F16, 32);
    let cpu = run_cpu::<f16>(&case, PlanOptions::default(), SEED).unwrap();
    let gpu = run_host::<f16>(&case, engine, PlanOptions::default());
    for (row, (a, b)) in cpu.lse.iter().zip(&gpu.lse).enumerate() {
        assert!(a == b || (a - b).abs() < 1e-4, "row {row}: {a} on the CPU, {b} on the device");
    }
}

/// What mode `fixed-chunk` is for. Few rows are merged by whole CTAs, more by single warps, many by warps that take four at a
/// time: here are batches of each kind, with rows of up to eight partials, of more, and of more than 32.
fn fixed_chunks_give_a_sequence_the_same_bits_in_any_batch(engine: &Engine) {
    let page_size = 16;
    // Chunks of two pages: 36 of them, then 1 to 12, then up to 8.
    let page_counts =
        std::iter::once(71).chain((0..80).map(|row| 1 + row * 7 % 24)).chain((0..220).map(|row| 3 + row % 13));
    let mut begin = 0;
    let block_tables: Vec<Vec<u32>> =
        page_counts.map(|count| (begin..begin + count).inspect(|&page| begin = page + 1).collect()).collect();
    let case = |rows: usize| Case {
        batch: OwnedBatch {
            page_size,
            num_pages: block_tables.iter().map(|table| table.len() as u32).sum(),
            lengths: block_tables[..rows].iter().map(|table| table.len() as u32 * page_size - 5).collect(),
            block_tables: block_tables[..rows].to_vec(),
        },
        shape: AttentionShape::new(16, 2, 128, Dtype::F16).unwrap(),
        layout: PoolLayout::ALL[0],
    };
    let run =
        |rows| run_host::<f16>(&case(rows), engine, PlanOptions::from(PlanMode::FixedChunk { tokens: 2 * page_size }));
    let all = run(block_tables.len());
    assert_agrees(&case(block_tables.len()), &all, "all rows");
    for rows in [1, 2, 33, 34, 60, 81, 140, 200] {
        let output = run(rows);
        assert_eq!(output.out, all.out[..output.out.len()], "{rows} rows");
        assert_eq!(output.lse, all.lse[..output.lse.len()], "{rows} rows");
    }
}

fn a_captured_run_serves_later_plans(engine: &Engine) {
    let memory = OnDevice::<f16>::new(shared_prefix_case(Dtype::F16, 16), engine.as_cuda().unwrap(), SEED).unwrap();
    let cuda = engine.as_cuda().unwrap();
    let stream = cuda.device().new_stream().unwrap();
    let options = |mode| PlanOptions::from(mode).with_variants([TileVariant::Mma16]);
    let plans = [PlanMode::PerNode, PlanMode::Flat, PlanMode::FixedChunk { tokens: 32 }]
        .map(|mode| memory.plan(cuda, options(mode)).unwrap());
    let geometry = plans.iter().map(LaunchGeometry::of).reduce(LaunchGeometry::union).unwrap();
    let bytes = plans.iter().map(|plan| plan.bytes().len()).max().unwrap();
    let mut buffers = PlanBuffers::with_fixed_geometry(cuda.device(), bytes, geometry).unwrap();
    let workspace_bytes = Workspace::bytes_for_slots(memory.case.shape, geometry.max_slots);
    let workspace = Workspace::with_capacity(cuda.device(), workspace_bytes).unwrap();

    // What each plan gives without a graph.
    let expected: Vec<Output<f16>> = plans
        .iter()
        .map(|plan| {
            let exact = cuda.upload(plan, &stream).unwrap();
            cuda.run(&exact, &memory.args(), &workspace, &stream).unwrap();
            stream.synchronize().unwrap();
            memory.output().unwrap()
        })
        .collect();

    buffers.upload(&plans[0], &stream).unwrap();
    let run = cuda.bind(&buffers, &memory.args(), &workspace).unwrap();
    let mut graph = Graph::capture(vec![run]).unwrap();
    for _ in 0..2 {
        for (plan, expected) in plans.iter().zip(&expected) {
            let uploaded = buffers.upload(plan, &stream).unwrap();
            graph.replay(uploaded, &stream).unwrap();
            stream.synchronize().unwrap();
            assert!(&memory.output().unwrap() == expected);
        }
    }
}

fn bad_arguments_are_named_and_nothing_is_launched(engine: &Engine) {
    let cuda = engine.as_cuda().unwrap();
    let memory = OnDevice::<f16>::new(shared_prefix_case(Dtype::F16, 16), cuda, SEED).unwrap();
    let stream = cuda.device().new_stream().unwrap();
    let plan = memory.plan(cuda, PlanOptions::default()).unwrap();
    let workspace = Workspace::with_capacity(cuda.device(), Workspace::bytes_for(&plan)).unwrap();

    let empty = PlanBuffers::with_capacity(cuda.device(), plan.bytes().len()).unwrap();
    let error = cuda.run(&empty, &memory.args(), &workspace, &stream).unwrap_err();
    assert!(matches!(error, Error::PlanMismatch { .. }), "{error}");
    let mut small = PlanBuffers::with_capacity(cuda.device(), 128).unwrap();
    assert!(matches!(small.upload(&plan, &stream).unwrap_err(), Error::PlanMismatch { .. }));

    let buffers = cuda.upload(&plan, &stream).unwrap();
    let (mut misaligned, mut stale, mut short) = (memory.args(), memory.args(), memory.args());
    misaligned.q = memory.q.span().skip(2).unwrap();
    stale.num_pages += 1;
    short.out = memory.out.span().skip(memory.out.bytes()).unwrap();
    let former = memory.plan(cuda, PlanOptions::default()).unwrap().generation();
    let error = buffers.uploaded().unwrap().expect(former).unwrap_err().to_string();
    assert!(error.contains("the plan uploaded last"), "{error}");
    for (args, name) in [(misaligned, "q"), (stale, "num_pages"), (short, "out")] {
        let error = cuda.run(&buffers, &args, &workspace, &stream).unwrap_err().to_string();
        assert!(error.contains(name), "{name}: {error}");
    }
    stream.synchronize().unwrap();
    assert!(memory.output().unwrap().out.iter().all(|&x| x == f16::ZERO), "something was launched");
    assert!(pat_rs::cuda::CudaDevice::new(1 << 20).unwrap_err().to_string().contains("ordinal"));
}

fn the_device_draws_what_the_cpu_draws(engine: &Engine) {
    let cuda = engine.as_cuda().unwrap();
    let (pages, tokens, heads, head_dim) = (5, 16, 2, 128);
    let strides = pat_rs::KvStrides::nhd(tokens, heads, head_dim);
    let count = (pages * tokens * heads * head_dim) as usize;
    let buffer = DeviceBuffer::zeroed(cuda.device(), 2 * count).unwrap();
    let target: DeviceSpan = buffer.span();
    let tensor = pat_abi::generator::Tensor::K;
    let spec =
        bench_support::FillSpec { tensor, seed: SEED, dtype: Dtype::F16, pages, tokens, heads, head_dim, strides };
    let stream = cuda.device().new_stream().unwrap();
    bench_support::fill(cuda.device(), target, spec, &stream).unwrap();
    let flush = bench_support::L2Flush::new(cuda.device()).unwrap();
    let events = [(); 2].map(|()| bench_support::TimingEvent::new(cuda.device()).unwrap());
    events[0].record(&stream).unwrap();
    flush.enqueue(&stream).unwrap();
    events[1].record(&stream).unwrap();
    assert!(events[1].elapsed_us_since(&events[0]).unwrap() > 0.0);
    let mut drawn = vec![f16::ZERO; count];
    buffer.read(0, &mut drawn).unwrap();
    for (row, values) in drawn.chunks_exact(head_dim as usize).enumerate() {
        let (row, head) = (row as u32 / heads, row as u32 % heads);
        let key = pat_abi::generator::row_key(SEED, tensor as u32, row / tokens, row % tokens, head);
        let expected: Vec<f16> =
            (0..head_dim).map(|dim| f16::from_f32(pat_abi::generator::element(key, dim))).collect();
        assert_eq!(values, expected, "row {row}, head {head}");
    }
}

/// Rows that are appended on the device are what `on_cpu` writes.
fn appended<T: Element, C: KvElement>(
    engine: &Engine,
    dims: [u32; 2],
    on_cpu: impl Fn(&NewRows<'_, T>, &CacheLayout, &[Cell<C>]) -> pat_rs::Result<()>,
) {
    let (num_pages, page_size, kv_heads) = (5, 16, 3);
    let slots: Vec<i64> = vec![5, -1, 79, 0, 33, 17, i64::MIN, 40];
    let engine = engine.as_cuda().unwrap();
    let device = engine.device();
    let stream = device.new_stream().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(dims[0]));
    let new = dims.map(|dim| -> Vec<T> {
        (0..slots.len() as u32 * kv_heads * dim).map(|_| T::from_f32(rng.random_range(-9.0..9.0))).collect()
    });
    let cache = |dim| vec![C::from_f32(0.25); (num_pages * page_size * kv_heads * dim) as usize];
    let layout = |head_dim| {
        let strides = KvStrides::nhd(page_size, kv_heads, head_dim);
        CacheLayout { num_pages, page_size, kv_heads, head_dim, strides }
    };
    let on_device = new.each_ref().map(|rows| DeviceBuffer::from_slice(device, rows).unwrap());
    let caches = dims.map(|dim| DeviceBuffer::from_slice(device, &cache(dim)).unwrap());
    let slots_on_device = DeviceBuffer::from_slice(device, &slots).unwrap();
    let args = AppendArgs {
        dtype: T::DTYPE,
        kv_dtype: C::DTYPE,
        k_scale: DeviceKvScale::Tensor(1.0),
        v_scale: DeviceKvScale::Tensor(1.0),
        rows: slots.len() as u32,
        k_new: on_device[0].span(),
        k_new_strides: RowStrides::contiguous(kv_heads, dims[0]),
        v_new: on_device[1].span(),
        v_new_strides: RowStrides::contiguous(kv_heads, dims[1]),
        k_cache: caches[0].span(),
        k_layout: layout(dims[0]),
        v_cache: caches[1].span(),
        v_layout: layout(dims[1]),
        slots: slots_on_device.span(),
    };
    engine.append_kv(&args, &stream).unwrap();
    stream.synchronize().unwrap();
    for ((dim, new), written) in dims.into_iter().zip(&new).zip(&caches) {
        let new: Vec<Cell<T>> = new.iter().copied().map(Cell::new).collect();
        let expected: Vec<Cell<C>> = cache(dim).into_iter().map(Cell::new).collect();
        let strides = RowStrides::contiguous(kv_heads, dim);
        on_cpu(&NewRows { rows: &new, strides, slots: &slots }, &layout(dim), &expected).unwrap();
        let expected: Vec<C> = expected.into_iter().map(Cell::into_inner).collect();
        let mut actual = cache(dim);
        written.read(0, &mut actual).unwrap();
        assert!(bytes_of(&actual) == bytes_of(&expected), "{} by head dims {dims:?}", C::DTYPE.name());
        assert!(bytes_of(&actual) != bytes_of(&cache(dim)), "nothing was written by head dims {dims:?}");
    }
}

fn bytes_of<C: KvElement>(cache: &[C]) -> &[u8] {
    bytemuck::cast_slice(cache)
}

fn new_rows_are_written_as_on_the_cpu(engine: &Engine) {
    let rounded = KvScale::Tensor(1.0);
    for dims in [[64, 64], [192, 128], [128, 256], [16, 512]] {
        appended::<f16, f16>(engine, dims, append_rows);
        appended::<bf16, bf16>(engine, dims, append_rows);
        appended::<f16, E4m3>(engine, dims, |new, layout, cache| append_rounded_rows(new, layout, cache, rounded));
        appended::<bf16, E5m2>(engine, dims, |new, layout, cache| append_rounded_rows(new, layout, cache, rounded));
    }
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(every_variant_agrees_with_the_oracle),
        device_test!(random_forests_agree_with_the_oracle),
        device_test!(both_executors_give_the_same_log_sum_exps),
        device_test!(fixed_chunks_give_a_sequence_the_same_bits_in_any_batch),
        device_test!(a_captured_run_serves_later_plans),
        device_test!(bad_arguments_are_named_and_nothing_is_launched),
        device_test!(the_device_draws_what_the_cpu_draws),
        device_test!(new_rows_are_written_as_on_the_cpu),
    ])
}
