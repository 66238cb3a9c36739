//! Every driver call that the library makes, failing once; of those that serving makes, at each place where they are made: an
//! error that names the call, no memory lost, and an engine that works as before. Needs the feature `fault-injection`.

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::f16;
use pat_rs::cuda::bench_support::{L2Flush, TimingEvent};
use pat_rs::cuda::faults::Fault;
use pat_rs::cuda::{CudaEngine, DeviceBuffer, Graph, LaunchGeometry, PlanBuffers, Workspace};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, Dtype, Engine, Plan, Problem, TileVariant};
use pat_tests::on_device::OnDevice;
use pat_tests::{Case, Output, device_test, judge};
use pat_workloads::{OwnedBatch, PoolLayout};
use std::process::{Command, ExitCode};

const SEED: u32 = 5;
/// Device memory that the driver keeps for itself may vary by so much, in bytes.
const SLACK_BYTES: usize = 8 << 20;

/// Of the calls that load a kernel only the first: kernels are loaded once per process, so that no later one is made again.
const CALLS: [&str; 18] = [
    "cuModuleLoad",
    "cuTensorMapEncode",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemAlloc",
    "cuMemHostAlloc",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync",
    "cuMemcpyDtoH",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuStreamCreate",
    "cuStreamIsCapturing",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuThreadExchangeStreamCaptureMode",
    "cuLaunchKernel",
];
const GRAPH_CALLS: [&str; 4] = ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch"];

fn case() -> Case {
    let page_size = 16;
    let table = |own: std::ops::Range<u32>| (0..8).chain(own).collect::<Vec<u32>>();
    let block_tables = vec![table(8..12), table(12..30), table(30..30)];
    let lengths = block_tables.iter().map(|t: &Vec<u32>| t.len() as u32 * page_size - 3).collect();
    Case {
        batch: OwnedBatch { page_size, num_pages: 31, lengths, block_tables },
        shape: AttentionShape::new(16, 2, 128, Dtype::F16).unwrap(),
        layout: PoolLayout::ALL[0],
    }
}

/// All that an engine does with a plan: memory, uploads and runs on two streams, a graph.
fn serve(engine: &CudaEngine, plan: &Plan) -> pat_rs::Result<Output<f16>> {
    let device = engine.device();
    let memory = OnDevice::<f16>::new(case(), engine, SEED)?;
    let (stream, other) = (device.new_stream()?, device.new_stream()?);
    let mut buffers = PlanBuffers::with_fixed_geometry(device, plan.bytes().len(), LaunchGeometry::of(plan))?;
    let workspace = Workspace::with_capacity(device, Workspace::bytes_for(plan))?;
    let run = engine.bind(&buffers, &memory.args(), &workspace)?;
    // Three uploads: the third waits for the first.
    for stream in [&stream, &other, &stream] {
        run.run(buffers.upload(plan, stream)?, stream)?;
    }
    run.run(buffers.uploaded()?, &other)?;
    let mut graph = Graph::capture(vec![run])?;
    graph.replay(buffers.uploaded()?, &stream)?;
    stream.synchronize()?;
    memory.output()
}

fn free_bytes(engine: &CudaEngine) -> usize {
    engine.device().context().mem_get_info().unwrap().0
}

fn a_driver_call_that_fails_is_an_error_and_nothing_is_lost(engine: &Engine) {
    let engine = engine.as_cuda().unwrap();
    let options = PlanMode::FixedChunk { tokens: 64 }.into();
    let plan = pat_tests::on_device::plan(&case(), engine, options).unwrap();
    let mut expected: Option<Output<f16>> = None;
    let mut free: Option<usize> = None;
    let mut faults = 0;
    for call in CALLS.into_iter().chain(GRAPH_CALLS) {
        let mut before = 0;
        loop {
            let fault = Fault::arm(call, before);
            let result = serve(engine, &plan);
            let has_happened = fault.has_happened();
            drop(fault);
            if !has_happened {
                result.unwrap_or_else(|error| panic!("{call} was not made to fail, and yet: {error}"));
                break;
            }
            let error =
                result.err().unwrap_or_else(|| panic!("{call} failed, behind {before} others, and nobody said so"));
            assert!(error.to_string().contains(call), "{call}: {error}");
            let output = serve(engine, &plan).unwrap_or_else(|error| panic!("after {call} had failed: {error}"));
            let report = judge(&case(), &output, SEED).unwrap();
            assert!(report.passed, "after {call}: {report:?}");
            let expected = expected.get_or_insert_with(|| output.clone());
            assert!(*expected == output, "after {call}: other bits");
            // The first rounds load kernels.
            if call == "cuTensorMapEncode" || free.is_some() {
                let free_now = free_bytes(engine);
                let free_first = *free.get_or_insert(free_now);
                assert!(free_now + SLACK_BYTES >= free_first, "{call}: {free_first} bytes were free, now {free_now}");
            }
            before += 1;
            faults += 1;
            assert!(before < 500, "{call} goes on failing");
        }
        assert!(before > 0, "{call} is never made");
    }
    eprintln!("{faults} faults");
}

fn a_measurement_that_fails_is_an_error(engine: &Engine) {
    let engine = engine.as_cuda().unwrap();
    let fault = Fault::arm("cuMemAlloc", 0);
    let error = L2Flush::new(engine.device()).unwrap_err().to_string();
    assert!(fault.has_happened() && error.contains("cuMemAlloc"), "{error}");
    drop(fault);
    let stream = engine.device().new_stream().unwrap();
    let flush = L2Flush::new(engine.device()).unwrap();
    flush.enqueue(&stream).unwrap();
    stream.synchronize().unwrap();
}

/// What is called outside of serving: each call fails once, then what was asked works.
fn other_calls_that_fail_are_errors(engine: &Engine) {
    let engine = engine.as_cuda().unwrap();
    let device = *engine.device();
    let fails = |call: &str, ask: &mut dyn FnMut() -> pat_rs::Result<()>| {
        let fault = Fault::arm(call, 0);
        let error = ask().expect_err(call).to_string();
        assert!(fault.has_happened() && error.contains(call), "{call}: {error}");
        drop(fault);
        ask().unwrap_or_else(|error| panic!("after {call} had failed: {error}"));
    };
    // Kernels that nothing has loaded yet, one for each call that loading makes.
    let problem = Problem::new(AttentionShape::new(8, 2, 64, Dtype::Bf16).unwrap(), 16);
    for (call, variant) in [
        ("cuModuleLoad", TileVariant::Mma16),
        ("cuModuleGetFunction", TileVariant::Mma32),
        ("cuFuncSetAttribute", TileVariant::Mma64),
    ] {
        fails(call, &mut || engine.prepare_variants(&problem, &[variant]));
    }
    fails("cuDeviceGetAttribute", &mut || device.profile().map(drop));
    fails("cuDriverGetVersion", &mut || device.driver_cuda_version().map(drop));
    let mut buffer = DeviceBuffer::zeroed(&device, 64).unwrap();
    fails("cuMemsetD8", &mut || buffer.fill(1));
    fails("cuMemcpyHtoD", &mut || buffer.write(32, &[2u8; 32]));
    let mut bytes = [0u8; 64];
    buffer.read(0, &mut bytes).unwrap();
    assert!(bytes[..32] == [1; 32] && bytes[32..] == [2; 32], "{bytes:?}");
    let stream = device.new_stream().unwrap();
    let [start, end] = [(); 2].map(|()| TimingEvent::new(&device).unwrap());
    start.record(&stream).unwrap();
    end.record(&stream).unwrap();
    fails("cuEventElapsedTime", &mut || end.elapsed_us_since(&start).map(drop));
}

/// A run that another library captures: where it cannot be kept alive it is not in the graph either.
fn a_capture_by_others_whose_calls_fail_is_an_error(engine: &Engine) {
    let engine = engine.as_cuda().unwrap();
    let device = *engine.device();
    let plan = pat_tests::on_device::plan(&case(), engine, PlanMode::FixedChunk { tokens: 64 }.into()).unwrap();
    for call in ["cuGetProcAddress", "cuStreamGetCaptureInfo", "cuUserObjectCreate", "cuGraphRetainUserObject"] {
        let mut memory = OnDevice::<f16>::new(case(), engine, SEED).unwrap();
        let theirs = device.context().new_stream().unwrap();
        // SAFETY: the stream lives until the end of the loop's body.
        let stream = unsafe { device.stream_from_raw(theirs.cu_stream() as u64) }.unwrap();
        let geometry = LaunchGeometry::of(&plan);
        let mut buffers = PlanBuffers::with_fixed_geometry(&device, plan.bytes().len(), geometry).unwrap();
        let workspace = Workspace::with_capacity(&device, Workspace::bytes_for(&plan)).unwrap();
        buffers.upload(&plan, &stream).unwrap();
        let run = engine.bind(&buffers, &memory.args(), &workspace).unwrap();
        theirs.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let fault = Fault::arm(call, 0);
        let error = run.run(buffers.uploaded().unwrap(), &stream).expect_err(call).to_string();
        assert!(fault.has_happened() && error.contains(call), "{call}: {error}");
        drop(fault);
        run.run(buffers.uploaded().unwrap(), &stream).unwrap();
        let graph = theirs.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");
        memory.poison().unwrap();
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        let report = judge(&case(), &memory.output().unwrap(), SEED).unwrap();
        assert!(report.passed, "after {call}: {report:?}");
    }
}

/// Tells [`main`] which call fails when a process opens the device.
const FIRST_CALL: &str = "PAT_TEST_FIRST_CALL_FAILS";

/// Opens the device twice, in a process that has not done so: the call fails, then it does not.
fn open_with_a_fault(call: &str) -> ExitCode {
    let fault = Fault::arm(call, 0);
    let error = CudaEngine::new(0).map(drop).expect_err(call).to_string();
    assert!(fault.has_happened() && error.contains(call), "{call}: {error}");
    drop(fault);
    CudaEngine::new(0).unwrap_or_else(|error| panic!("after {call} had failed: {error}"));
    ExitCode::SUCCESS
}

fn a_device_whose_opening_fails_can_be_opened_again(_: &Engine) {
    let program = std::env::current_exe().unwrap();
    for call in
        ["cuDriverGetVersion", "cuCtxSetCurrent", "cuDevicePrimaryCtxRetain", "cuDeviceGetName", "cuDeviceGetAttribute"]
    {
        let output = Command::new(&program).env(FIRST_CALL, call).output().unwrap();
        assert!(output.status.success(), "{call}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A failed copy leaves no plan; fixed buffers still take plans for their model only.
fn a_failed_upload_leaves_fixed_buffers_as_strict_as_before(engine: &Engine) {
    let engine = engine.as_cuda().unwrap();
    let plan = |case: &Case| pat_tests::on_device::plan(case, engine, Default::default()).unwrap();
    let own = plan(&case());
    let mut bigger_pool = case();
    bigger_pool.batch.num_pages += 1;
    let other = plan(&bigger_pool);
    let stream = engine.device().new_stream().unwrap();
    let bytes = own.bytes().len().max(other.bytes().len());
    let geometry = LaunchGeometry::of(&own).union(LaunchGeometry::of(&other));
    let mut buffers = PlanBuffers::with_fixed_geometry(engine.device(), bytes, geometry).unwrap();
    buffers.upload(&own, &stream).unwrap();
    let fault = Fault::arm("cuMemcpyHtoDAsync", 0);
    let error = buffers.upload(&own, &stream).unwrap_err().to_string();
    assert!(fault.has_happened() && error.contains("cuMemcpyHtoDAsync"), "{error}");
    drop(fault);
    assert!(buffers.uploaded().is_err(), "a plan that was not copied");
    let error = buffers.upload(&other, &stream).unwrap_err().to_string();
    assert!(error.contains("num_pages"), "{error}");
    buffers.upload(&own, &stream).unwrap();
}

fn main() -> ExitCode {
    if let Ok(call) = std::env::var(FIRST_CALL) {
        return open_with_a_fault(&call);
    }
    pat_tests::device_tests::main([
        device_test!(a_driver_call_that_fails_is_an_error_and_nothing_is_lost),
        device_test!(a_measurement_that_fails_is_an_error),
        device_test!(other_calls_that_fail_are_errors),
        device_test!(a_capture_by_others_whose_calls_fail_is_an_error),
        device_test!(a_device_whose_opening_fails_can_be_opened_again),
        device_test!(a_failed_upload_leaves_fixed_buffers_as_strict_as_before),
    ])
}
