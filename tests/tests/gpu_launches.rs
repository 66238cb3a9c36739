//! What launches own and in which order they happen: streams, threads, devices, drop order, graphs of ours and of others, and the
//! entry points for memory and streams of other libraries. Every output is held against the oracle, or against one that was.

use cudarc::driver::result::ctx;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use half::f16;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::cuda::{
    BoundRun, CudaDevice, CudaEngine, DeviceBuffer, DeviceSpan, Graph, LaunchGeometry, PlanBuffers, RunArgs, Stream,
    Workspace,
};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, Dtype, Engine, Plan, PlanOptions, Planner};
use pat_tests::on_device::{OnDevice, plan, read_output};
use pat_tests::{Case, Output, device_test, judge, strided};
use pat_workloads::{OwnedBatch, PoolLayout};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const SEED: u32 = 5;
/// Reads of the L2 flush that keep a stream busy for some milliseconds.
const DELAY_READS: u32 = 30;

/// Five sequences that share their first pages, one of them long enough to be cut.
fn long_case() -> Case {
    let page_size = 16;
    let table = |own: std::ops::Range<u32>| (0..20).chain(own).collect::<Vec<u32>>();
    let block_tables = vec![table(20..24), table(24..90), table(90..91), table(91..91), (92..130).collect()];
    let lengths = block_tables.iter().map(|t: &Vec<u32>| t.len() as u32 * page_size - 3).collect();
    Case {
        batch: OwnedBatch { page_size, num_pages: 131, lengths, block_tables },
        shape: AttentionShape::new(16, 2, 128, Dtype::F16).unwrap(),
        layout: PoolLayout::ALL[0],
    }
}

/// The same pool and rows at another step: other lengths, so other plans and answers.
fn short_case() -> Case {
    let long = long_case();
    let lengths = long.batch.lengths.iter().enumerate().map(|(row, length)| length / (row as u32 + 2)).collect();
    Case { batch: OwnedBatch { lengths, ..long.batch }, ..long }
}

/// Two steps over the same memory, and what they give.
struct Steps {
    engine: CudaEngine,
    memory: OnDevice<f16>,
    plans: [Plan; 2],
    expected: [Output<f16>; 2],
    workspace: Workspace,
}

impl Steps {
    fn new(engine: &Engine) -> Self {
        let engine = engine.as_cuda().unwrap().clone();
        let device = *engine.device();
        let mut memory = OnDevice::<f16>::new(long_case(), &engine, SEED).unwrap();
        let cases = [long_case(), short_case()];
        // Short chunks: there is something to merge.
        let options = options_of_steps();
        let plans = cases.each_ref().map(|case| plan(case, &engine, options.clone()).unwrap());
        assert!(plans.iter().all(|plan| plan.header().merge_count > 0), "nothing is merged");
        let slots = plans.iter().map(|plan| plan.header().slot_count).max().unwrap();
        let workspace = Workspace::with_capacity(&device, Workspace::bytes_for_slots(cases[0].shape, slots)).unwrap();
        let stream = device.new_stream().unwrap();
        let expected = [0, 1].map(|step| {
            memory.poison().unwrap();
            let buffers = engine.upload(&plans[step], &stream).unwrap();
            engine.run(&buffers, &memory.args(), &workspace, &stream).unwrap();
            let output = memory.output().unwrap();
            let report = judge(&cases[step], &output, SEED).unwrap();
            assert!(report.passed, "step {step}: {report:?}");
            output
        });
        assert!(expected[0] != expected[1], "the steps do not differ");
        Self { engine, memory, plans, expected, workspace }
    }

    fn device(&self) -> CudaDevice {
        *self.engine.device()
    }

    /// Buffers for both steps.
    fn fixed_buffers(&self) -> PlanBuffers {
        let geometry = LaunchGeometry::of(&self.plans[0]).union(LaunchGeometry::of(&self.plans[1]));
        let bytes = self.plans.iter().map(|plan| plan.bytes().len()).max().unwrap();
        PlanBuffers::with_fixed_geometry(&self.device(), bytes, geometry).unwrap()
    }

    /// Fixed buffers with the first step in them, and a run bound to them.
    fn bound(&self, stream: &Stream) -> (PlanBuffers, BoundRun) {
        let mut buffers = self.fixed_buffers();
        buffers.upload(&self.plans[0], stream).unwrap();
        let run = self.engine.bind(&buffers, &self.memory.args(), &self.workspace).unwrap();
        (buffers, run)
    }

    fn assert_output(&self, step: usize, what: &str) {
        assert!(self.memory.output().unwrap() == self.expected[step], "{what}: not the outputs of step {step}");
    }
}

/// Keeps a stream busy.
struct Delay(L2Flush);

impl Delay {
    fn new(device: CudaDevice) -> Self {
        Self(L2Flush::new(&device).unwrap())
    }

    fn enqueue(&self, stream: &Stream) {
        (0..DELAY_READS).for_each(|_| self.0.enqueue(stream).unwrap());
    }
}

/// The same memory as another library would hand it over.
fn foreign(span: &DeviceSpan) -> DeviceSpan {
    // SAFETY: the callers keep the buffer that the span is of until the device has finished.
    unsafe { DeviceSpan::from_raw(span.address(), span.bytes()) }
}

fn foreign_args(mut args: RunArgs) -> RunArgs {
    for span in [&mut args.q, &mut args.k, &mut args.v, &mut args.out] {
        *span = foreign(span);
    }
    args.lse = args.lse.map(|(span, strides)| (foreign(&span), strides));
    args
}

fn raw_stream(device: CudaDevice, handle: u64) -> Stream {
    // SAFETY: the callers keep the stream alive, and replay on the stream of the uploads.
    unsafe { device.stream_from_raw(handle) }.unwrap()
}

fn memory_and_streams_of_others_are_taken(engine: &Engine) {
    let mut steps = Steps::new(engine);
    let device = steps.device();
    let own = device.new_stream().unwrap();
    let memory = DeviceBuffer::zeroed(&device, steps.workspace.span().bytes() as usize).unwrap();
    let workspace = Workspace::from_span(foreign(&memory.span()));
    let streams = [
        raw_stream(device, own.handle()),
        raw_stream(device, 0),
        device.stream_from_cudarc(device.context().new_stream().unwrap()).unwrap(),
        device.default_stream(),
    ];
    for (index, stream) in streams.iter().enumerate() {
        steps.memory.poison().unwrap();
        let buffers = steps.engine.upload(&steps.plans[0], stream).unwrap();
        steps.engine.run(&buffers, &foreign_args(steps.memory.args()), &workspace, stream).unwrap();
        steps.assert_output(0, &format!("stream {index}"));
    }
    // SAFETY: nothing is done with it.
    let refused = unsafe { device.stream_from_raw(2) }.unwrap_err().to_string();
    assert!(refused.contains("handle"), "{refused}");
}

fn q_and_o_may_move_between_runs(engine: &Engine) {
    let mut steps = Steps::new(engine);
    let device = steps.device();
    let stream = device.new_stream().unwrap();
    let (buffers, run) = steps.bound(&stream);
    let mut q = vec![f16::ZERO; steps.memory.q.bytes() as usize / 2];
    steps.memory.q.read(0, &mut q).unwrap();
    // Only the moved Q has the queries.
    let moved_q = DeviceBuffer::from_slice(&device, &q).unwrap();
    steps.memory.q.fill(0xff).unwrap();
    steps.memory.poison().unwrap();
    let moved_out = DeviceBuffer::zeroed(&device, steps.memory.out.bytes() as usize).unwrap();
    let (q, out) = (moved_q.span().address(), moved_out.span().address());
    let uploaded = buffers.uploaded().unwrap();
    // SAFETY: both buffers have the sizes of those the run was bound with, and outlive it.
    unsafe { run.run_with(uploaded, q, out, &stream) }.unwrap();
    let moved = read_output::<f16>(&moved_out, &steps.memory.lse).unwrap();
    assert!(moved == steps.expected[0], "the moved outputs");
    let bound: Output<f16> = steps.memory.output().unwrap();
    assert!(bound.out.iter().all(|x| x.is_nan()), "the output that the run was bound with was written");
    for (name, q, out) in [("q_address", q + 2, out), ("q_address", 0, out), ("out_address", q, out + 8)] {
        // SAFETY: refused.
        let refused = unsafe { run.run_with(uploaded, q, out, &stream) }.unwrap_err().to_string();
        assert!(refused.contains(name), "{refused}");
    }
}

fn a_run_on_another_stream_waits_for_the_upload(engine: &Engine) {
    let steps = Steps::new(engine);
    let device = steps.device();
    let (uploads, runs) = (device.new_stream().unwrap(), device.new_stream().unwrap());
    let (mut buffers, run) = steps.bound(&uploads);
    let delay = Delay::new(device);
    for round in 0..8 {
        let step = round % 2;
        // A kernel stands right in front of the run, having read the plan that the upload replaces.
        run.run(buffers.uploaded().unwrap(), &runs).unwrap();
        delay.enqueue(&uploads);
        let uploaded = buffers.upload(&steps.plans[step], &uploads).unwrap();
        run.run(uploaded, &runs).unwrap();
        runs.synchronize().unwrap();
        steps.assert_output(step, &format!("round {round}"));
    }
}

fn an_upload_waits_for_runs_on_other_streams(engine: &Engine) {
    let steps = Steps::new(engine);
    let device = steps.device();
    let streams = [device.new_stream().unwrap(), device.new_stream().unwrap()];
    let (mut buffers, run) = steps.bound(&streams[0]);
    let delay = Delay::new(device);
    for round in 0..8 {
        let (step, [uploads, runs]) = (round % 2, [&streams[round / 2 % 2], &streams[1 - round / 2 % 2]]);
        // The run is on another stream than its upload and the next one, or on the first upload's and not on the next one's.
        let uploaded = buffers.upload(&steps.plans[step], uploads).unwrap();
        delay.enqueue(runs);
        run.run(uploaded, runs).unwrap();
        buffers.upload(&steps.plans[1 - step], if round < 4 { uploads } else { runs }).unwrap();
        steps.assert_output(step, &format!("round {round}"));
        let uploaded = buffers.upload(&steps.plans[step], runs).unwrap();
        delay.enqueue(runs);
        run.run(uploaded, runs).unwrap();
        buffers.upload(&steps.plans[1 - step], uploads).unwrap();
        steps.assert_output(step, &format!("round {round}, the upload moved"));
    }
}

/// Layers of a step: each reads the queries that the one before has written over its own, and shares its partials.
fn a_run_waits_for_the_one_before(engine: &Engine) {
    const LAYERS: usize = 24;
    let cuda = engine.as_cuda().unwrap();
    let device = *cuda.device();
    let mut memory = OnDevice::<f16>::new(long_case(), cuda, SEED).unwrap();
    let case = long_case();
    // Steep softmaxes: what a layer gives depends on what the one before gave, however many there were.
    let problem = case.batch.problem(case.shape).with_scale(64.0 / 128f32.sqrt());
    let mut queries = vec![f16::ZERO; memory.q.bytes() as usize / 2];
    memory.q.read(0, &mut queries).unwrap();
    let mut there = memory.args();
    there.problem = problem;
    let mut back = there.clone();
    (back.q, back.out) = (there.out.clone(), there.q.clone());
    let (profile, rows) = (engine.profile().unwrap(), case.batch.rows());
    for variant in profile.variants(&problem) {
        for mode in [PlanMode::Auto, PlanMode::FixedChunk { tokens: 64 }] {
            let options = PlanOptions::from(mode).with_variants([variant]);
            let view = case.batch.view(&rows).unwrap();
            let plan = Planner::new(problem, profile.clone(), options).unwrap().plan(&view).unwrap();
            let mut buffers =
                PlanBuffers::with_fixed_geometry(&device, plan.bytes().len(), LaunchGeometry::of(&plan)).unwrap();
            let workspace = Workspace::with_capacity(&device, Workspace::bytes_for(&plan)).unwrap();
            let stream = device.new_stream().unwrap();
            buffers.upload(&plan, &stream).unwrap();
            let layers = [&there, &back].map(|args| cuda.bind(&buffers, args, &workspace).unwrap());
            let layers: Vec<&BoundRun> = layers.iter().cycle().take(LAYERS).collect();
            let mut graph = Graph::capture(layers.iter().map(|&run| run.clone()).collect()).unwrap();
            let uploaded = buffers.uploaded().unwrap();
            let mut step = |run: &mut dyn FnMut()| {
                memory.q.write(0, &queries).unwrap();
                memory.poison().unwrap();
                run();
                stream.synchronize().unwrap();
                let mut last = queries.clone();
                memory.q.read(0, &mut last).unwrap();
                (last, memory.output().unwrap())
            };
            let expected = [LAYERS - 2, LAYERS].map(|count| {
                step(&mut || {
                    for run in &layers[..count] {
                        run.run(uploaded, &stream).unwrap();
                        stream.synchronize().unwrap();
                    }
                })
            });
            assert!(expected[0] != expected[1], "{variant:?}, {mode:?}: the layers came to a standstill");
            for round in 0..20 {
                let launched = step(&mut || layers.iter().for_each(|run| run.run(uploaded, &stream).unwrap()));
                assert!(launched == expected[1], "{variant:?}, {mode:?}, round {round}: launched one behind the other");
                let replayed = step(&mut || graph.replay(uploaded, &stream).unwrap());
                assert!(replayed == expected[1], "{variant:?}, {mode:?}, round {round}: a graph");
            }
        }
    }
}

fn threads_with_engines_of_their_own_do_not_meet(engine: &Engine) {
    // All of them may be the first to want a kernel.
    let worker = |thread: usize| {
        let engine = Engine::cuda(0).unwrap();
        let steps = Steps::new(&engine);
        let stream = steps.device().new_stream().unwrap();
        let (mut buffers, run) = steps.bound(&stream);
        for round in 0..25 {
            let step = (round + thread) % 2;
            let uploaded = buffers.upload(&steps.plans[step], &stream).unwrap();
            run.run(uploaded, &stream).unwrap();
            stream.synchronize().unwrap();
            steps.assert_output(step, &format!("thread {thread}, round {round}"));
        }
    };
    assert_eq!(engine.as_cuda().unwrap().device(), Engine::cuda(0).unwrap().as_cuda().unwrap().device());
    std::thread::scope(|scope| {
        (0..4).for_each(|thread| drop(scope.spawn(move || worker(thread))));
    });
}

fn the_current_context_of_a_thread_stays_what_it_was(_: &Engine) {
    // torch takes the current device from it.
    let worker = || {
        assert_eq!(ctx::get_current().unwrap(), None, "a new thread");
        let engine = Engine::cuda(0).unwrap();
        let steps = Steps::new(&engine);
        let [stream, other] = [(); 2].map(|()| steps.device().new_stream().unwrap());
        let (mut buffers, run) = steps.bound(&stream);
        run.run(buffers.uploaded().unwrap(), &other).unwrap();
        let mut graph = Graph::capture(vec![run.clone()]).unwrap();
        graph.replay(buffers.upload(&steps.plans[1], &stream).unwrap(), &other).unwrap();
        other.synchronize().unwrap();
        steps.assert_output(1, "a graph");
        drop((graph, run, buffers, stream, other, steps, engine));
        assert_eq!(ctx::get_current().unwrap(), None, "after all work and drops");
    };
    std::thread::scope(|scope| drop(scope.spawn(worker)));
}

fn runs_and_graphs_move_to_other_threads(engine: &Engine) {
    let steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    let (mut buffers, run) = steps.bound(&stream);
    let mut graph = Graph::capture(vec![run.clone(), run.clone()]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for step in [1, 0, 1] {
                let uploaded = buffers.upload(&steps.plans[step], &stream).unwrap();
                graph.replay(uploaded, &stream).unwrap();
                stream.synchronize().unwrap();
                steps.assert_output(step, "a graph in another thread");
            }
            let other = steps.device().new_stream().unwrap();
            let uploaded = buffers.upload(&steps.plans[0], &stream).unwrap();
            graph.replay(uploaded, &other).unwrap();
            buffers.upload(&steps.plans[1], &stream).unwrap();
            steps.assert_output(0, "a graph on another stream than the upload");
            run.run(buffers.uploaded().unwrap(), &other).unwrap();
            steps.assert_output(1, "a run in another thread");
        });
    });
}

fn a_bound_run_allocates_nothing(engine: &Engine) {
    let steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    let (buffers, run) = steps.bound(&stream);
    let uploaded = buffers.uploaded().unwrap();
    let raw = stream.handle();
    let counted = allocation_counter::measure(|| {
        for _ in 0..10 {
            run.run(uploaded, &raw_stream(steps.device(), raw)).unwrap();
        }
    });
    assert_eq!(counted.count_total, 0, "{counted:?}");
    steps.assert_output(0, "counted runs");
}

/// Allocations that take the place of what was freed, full of NaN.
fn occupy(device: CudaDevice, like: &[u64]) -> Vec<DeviceBuffer> {
    let nan = |&bytes: &u64| DeviceBuffer::from_slice(&device, &vec![0xffu8; bytes as usize]).unwrap();
    like.iter().chain(like).map(nan).collect()
}

fn nothing_that_is_in_use_is_freed(engine: &Engine) {
    let Steps { engine, memory, plans, expected, workspace } = Steps::new(engine);
    let device = *engine.device();
    let stream = device.new_stream().unwrap();
    let delay = Delay::new(device);
    let buffers = engine.upload(&plans[0], &stream).unwrap();
    let run = engine.bind(&buffers, &memory.args(), &workspace).unwrap();
    let OnDevice { q, kv, out, lse, .. } = memory;
    let sizes = [q.bytes(), kv.bytes(), workspace.span().bytes(), buffers.capacity_bytes() as u64];
    // The run is all that holds them.
    drop((q, kv, workspace, engine));
    let _others = occupy(device, &sizes);
    delay.enqueue(&stream);
    run.run(buffers.uploaded().unwrap(), &stream).unwrap();
    // It is still waiting when everything goes.
    drop((run, buffers, stream));
    let _others = occupy(device, &sizes);
    assert!(read_output::<f16>(&out, &lse).unwrap() == expected[0], "a run whose memory was dropped");
}

fn a_graph_owns_what_it_replays(engine: &Engine) {
    let steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    let (mut buffers, run) = steps.bound(&stream);
    let mut graph = Graph::capture(vec![run]).unwrap();
    let Steps { engine, memory, plans, expected, workspace } = steps;
    let device = *engine.device();
    let OnDevice { q, kv, mut out, mut lse, .. } = memory;
    let sizes = [q.bytes(), kv.bytes(), workspace.span().bytes()];
    drop((q, kv, workspace, engine));
    let _others = occupy(device, &sizes);
    for step in [0, 1, 0] {
        out.fill(0xff).unwrap();
        lse.fill(0xff).unwrap();
        let uploaded = buffers.upload(&plans[step], &stream).unwrap();
        graph.replay(uploaded, &stream).unwrap();
        assert!(read_output::<f16>(&out, &lse).unwrap() == expected[step], "step {step}");
    }
    let uploaded = buffers.upload(&plans[1], &stream).unwrap();
    graph.replay(uploaded, &stream).unwrap();
    drop((graph, buffers));
    assert!(read_output::<f16>(&out, &lse).unwrap() == expected[1], "a graph that was dropped under way");
}

fn runs_take_the_plan_they_were_bound_to(engine: &Engine) {
    let mut steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    steps.memory.poison().unwrap();
    let mut exact = steps.engine.upload(&steps.plans[0], &stream).unwrap();
    let run = steps.engine.bind(&exact, &steps.memory.args(), &steps.workspace).unwrap();
    let (fixed, other) = steps.bound(&stream);
    let refused = |result: pat_rs::Result<()>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    };
    refused(run.run(fixed.uploaded().unwrap(), &stream), "other buffers");
    refused(other.run(exact.uploaded().unwrap(), &stream), "other buffers");
    refused(Graph::capture(vec![run.clone()]).map(drop), "exact geometry");
    refused(Graph::capture(vec![other.clone(), steps.bound(&stream).1]).map(drop), "runs[1]");
    refused(Graph::capture(Vec::new()).map(drop), "runs");
    // The same plan again is another generation's buffer content, but the same plan.
    let uploaded = exact.upload(&steps.plans[0], &stream).unwrap();
    assert_eq!(uploaded.generation(), steps.plans[0].generation());
    let uploaded = exact.upload(&steps.plans[1], &stream).unwrap();
    refused(run.run(uploaded, &stream), "the plan uploaded last");
    refused(uploaded.expect(steps.plans[0].generation()).map(drop), "the plan uploaded last");
    let bits = |output: Output<f16>| output.out.iter().all(|x| x.to_bits() == 0xffff);
    assert!(bits(steps.memory.output().unwrap()), "something was launched");
}

fn fixed_buffers_refuse_other_models(engine: &Engine) {
    let steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    let (mut buffers, run) = steps.bound(&stream);
    let options = options_of_steps();
    let other = |change: &dyn Fn(&mut Case)| {
        let mut case = short_case();
        change(&mut case);
        plan(&case, &steps.engine, options.clone()).unwrap()
    };
    let pool = other(&|case| case.batch.num_pages += 1);
    let pages = other(&|case| case.batch.page_size = 32);
    let shape = other(&|case| case.shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap());
    for (plan, what) in [(&pool, "num_pages"), (&pages, "page_size"), (&shape, "shape")] {
        let error = buffers.upload(plan, &stream).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    // The former plan stays.
    run.run(buffers.uploaded().unwrap(), &stream).unwrap();
    steps.assert_output(0, "after refusals");
}

fn log_sum_exps_may_be_left_out_of_a_merge(engine: &Engine) {
    let mut steps = Steps::new(engine);
    let stream = steps.device().new_stream().unwrap();
    let (mut buffers, _) = steps.bound(&stream);
    let mut args = steps.memory.args();
    args.lse = None;
    let run = steps.engine.bind(&buffers, &args, &steps.workspace).unwrap();
    for step in [0, 1] {
        steps.memory.poison().unwrap();
        run.run(buffers.upload(&steps.plans[step], &stream).unwrap(), &stream).unwrap();
        let output: Output<f16> = steps.memory.output().unwrap();
        assert!(output.out == steps.expected[step].out, "step {step}");
        assert!(output.lse.iter().all(|x| x.to_bits() == u32::MAX), "step {step}: log-sum-exps were written");
    }
}

fn strides_of_q_o_and_lse_are_followed(engine: &Engine) {
    for case in [long_case(), short_case()] {
        for mode in [PlanMode::Auto, PlanMode::FixedChunk { tokens: 64 }] {
            for variant in engine.profile().unwrap().variants(&case.batch.problem(case.shape)) {
                strided::check::<f16>(engine, &case, PlanOptions::from(mode).with_variants([variant]), SEED);
            }
        }
    }
}

fn a_graph_that_others_capture_keeps_its_runs(engine: &Engine) {
    let steps = Steps::new(engine);
    let device = steps.device();
    let theirs = device.context().new_stream().unwrap();
    let stream = raw_stream(device, theirs.cu_stream() as u64);
    let mut buffers = steps.fixed_buffers();
    buffers.upload(&steps.plans[0], &stream).unwrap();
    let exact = steps.engine.upload(&steps.plans[0], &stream).unwrap();
    let exact_run = steps.engine.bind(&exact, &steps.memory.args(), &steps.workspace).unwrap();
    let held = Arc::new(());
    let mut args = steps.memory.args();
    args.q = args.q.with_owner(held.clone());
    let run = steps.engine.bind(&buffers, &args, &steps.workspace).unwrap();
    drop(args);

    theirs.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let refused = exact_run.run(exact.uploaded().unwrap(), &stream).unwrap_err().to_string();
    assert!(refused.contains("exact geometry"), "{refused}");
    let safe = device.stream_from_cudarc(theirs.clone()).unwrap();
    let refused = run.run(buffers.uploaded().unwrap(), &safe).unwrap_err().to_string();
    assert!(refused.contains("stream_from_raw"), "{refused}");
    let refused = buffers.upload(&steps.plans[1], &stream).unwrap_err().to_string();
    assert!(refused.contains("captured"), "{refused}");
    let other = device.new_stream().unwrap();
    let refused = run.run(buffers.uploaded().unwrap(), &other).unwrap_err().to_string();
    assert!(refused.contains("capture"), "{refused}");
    run.run(buffers.uploaded().unwrap(), &stream).unwrap();
    let graph = theirs.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");

    drop((run, exact_run, exact));
    let Steps { engine, memory, plans, expected, workspace } = steps;
    let OnDevice { q, kv, mut out, mut lse, case, .. } = memory;
    let sizes = [q.bytes(), kv.bytes(), workspace.span().bytes()];
    drop((q, kv, workspace));
    let _others = occupy(device, &sizes);
    for step in [0, 1, 0] {
        out.fill(0xff).unwrap();
        lse.fill(0xff).unwrap();
        buffers.upload(&plans[step], &stream).unwrap();
        graph.launch().unwrap();
        stream.synchronize().unwrap();
        assert!(read_output::<f16>(&out, &lse).unwrap() == expected[step], "step {step}");
    }
    assert_eq!(Arc::strong_count(&held), 2, "the graph does not hold the owner");
    drop(graph);
    // The driver lets go on a thread of its own; what it let go of is dropped by the next bind or upload.
    let begin = Instant::now();
    while Arc::strong_count(&held) > 1 && begin.elapsed() < Duration::from_secs(10) {
        buffers.upload(&plan(&case, &engine, options_of_steps()).unwrap(), &stream).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(Arc::strong_count(&held), 1, "the graph is gone and its run is still held");
}

fn options_of_steps() -> PlanOptions {
    PlanMode::FixedChunk { tokens: 64 }.into()
}

fn others_may_work_while_a_stream_is_captured(engine: &Engine) {
    let steps = Steps::new(engine);
    let device = steps.device();
    let theirs = device.context().new_stream().unwrap();
    let stream = raw_stream(device, theirs.cu_stream() as u64);
    let (mut buffers, run) = steps.bound(&stream);
    // torch's mode, in which an allocation by another thread spoils the capture.
    theirs.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    run.run(buffers.uploaded().unwrap(), &stream).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let stream = device.new_stream().unwrap();
            let memory = DeviceBuffer::from_slice(&device, &[1u8; 1000]).unwrap();
            let (mut buffers, run) = steps.bound(&stream);
            for step in [1, 0, 1] {
                run.run(buffers.upload(&steps.plans[step], &stream).unwrap(), &stream).unwrap();
            }
            stream.synchronize().unwrap();
            drop((memory, buffers, run));
        });
    });
    let graph = theirs.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph");
    steps.assert_output(1, "what the other thread ran");
    buffers.upload(&steps.plans[0], &stream).unwrap();
    graph.launch().unwrap();
    stream.synchronize().unwrap();
    steps.assert_output(0, "the graph");
}

fn memory_and_streams_of_another_device_are_refused(engine: &Engine) {
    let steps = Steps::new(engine);
    let elsewhere = Engine::cuda(1).unwrap();
    let far = Steps::new(&elsewhere);
    let (stream, far_stream) = (steps.device().new_stream().unwrap(), far.device().new_stream().unwrap());
    let (mut buffers, run) = steps.bound(&stream);
    let (far_buffers, _) = far.bound(&far_stream);
    let refused = |result: pat_rs::Result<()>, name: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("device 1") && error.contains("device 0"), "{name}: {error}");
    };
    let (args, far_args) = (steps.memory.args(), far.memory.args());
    refused(steps.engine.bind(&far_buffers, &args, &steps.workspace).map(drop), "plan");
    refused(steps.engine.bind(&buffers, &args, &far.workspace).map(drop), "workspace");
    let bind = |name: &str, change: &dyn Fn(&mut RunArgs)| {
        let mut args = args.clone();
        change(&mut args);
        refused(steps.engine.bind(&buffers, &args, &steps.workspace).map(drop), name);
    };
    bind("q", &|args| args.q = far_args.q.clone());
    bind("k", &|args| args.k = far_args.k.clone());
    bind("v", &|args| args.v = far_args.v.clone());
    bind("out", &|args| args.out = far_args.out.clone());
    bind("lse", &|args| args.lse = far_args.lse.clone());
    refused(run.run(buffers.uploaded().unwrap(), &far_stream), "stream");
    let mut graph = Graph::capture(vec![run.clone()]).unwrap();
    refused(graph.replay(buffers.uploaded().unwrap(), &far_stream), "stream");
    refused(buffers.upload(&steps.plans[0], &far_stream).map(drop), "stream");
    run.run(buffers.uploaded().unwrap(), &stream).unwrap();
    steps.assert_output(0, "after refusals");
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(memory_and_streams_of_others_are_taken),
        device_test!(q_and_o_may_move_between_runs),
        device_test!(a_run_on_another_stream_waits_for_the_upload),
        device_test!(an_upload_waits_for_runs_on_other_streams),
        device_test!(a_run_waits_for_the_one_before),
        device_test!(threads_with_engines_of_their_own_do_not_meet),
        device_test!(the_current_context_of_a_thread_stays_what_it_was),
        device_test!(runs_and_graphs_move_to_other_threads),
        device_test!(a_bound_run_allocates_nothing),
        device_test!(nothing_that_is_in_use_is_freed),
        device_test!(a_graph_owns_what_it_replays),
        device_test!(runs_take_the_plan_they_were_bound_to),
        device_test!(fixed_buffers_refuse_other_models),
        device_test!(log_sum_exps_may_be_left_out_of_a_merge),
        device_test!(strides_of_q_o_and_lse_are_followed),
        device_test!(a_graph_that_others_capture_keeps_its_runs),
        device_test!(others_may_work_while_a_stream_is_captured),
        device_test!(memory_and_streams_of_another_device_are_refused).on_devices(2),
    ])
}
