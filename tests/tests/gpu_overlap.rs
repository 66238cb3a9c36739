//! Forward kernels of Hopper begin while the launch before them ends. Whatever that launch writes (queries, K, V, sinks, factors of
//! 8-bit K and V, rows that are computed once more because of their NaN), they compute with what it has written, and they write
//! nothing before it has read what was there: launched one behind the other and in a graph, behind a kernel that lets them begin at
//! once and writes late, behind copies, and behind the engine's own writers.
//!
//! What is right is what the same run gives where the host waits in between; other tests hold that against the oracle.

use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, result};
use half::{bf16, f16};
use pat_abi::generator::Tensor;
use pat_rs::cpu::{CacheLayout, E4m3, E5m2};
use pat_rs::cuda::{
    AppendArgs, BoundRun, CudaEngine, DeviceBuffer, DeviceKvScale, DeviceState, LaunchGeometry, PlanBuffers, RunArgs,
    Stream, Uploaded, Workspace,
};
use pat_rs::plan::PlanMode;
use pat_rs::{
    AttentionShape, Element, Engine, KvElement, Plan, PlanOptions, Planner, Problem, RowStrides, TileVariant,
};
use pat_tests::device_test;
use pat_workloads::{OwnedBatch, PoolLayout, Tensors};
use std::ffi::{CString, c_void};
use std::process::ExitCode;
use std::sync::Arc;

const SEED: u32 = 41;
const PAGE_SIZE: u32 = 16;
const NUM_PAGES: u32 = 64;
const Q_HEADS: u32 = 16;
const KV_HEADS: u32 = 4;
/// How often each is tried: a race shows now and then.
const ROUNDS: usize = 8;

/// `write_late`: lets the next launch begin, waits for 30 us, then copies: `table` has, for each copy, where from, where to and how
/// many times 16 bytes.
const PTX: &str = "
.version 8.0
.target sm_90
.address_size 64
.visible .entry write_late(.param .u64 table, .param .u32 copies, .param .u32 late_ns)
{
    .reg .pred %p<4>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<12>;
    griddepcontrol.launch_dependents;
    ld.param.u64 %rd1, [table];
    ld.param.u32 %r1, [copies];
    ld.param.u32 %r2, [late_ns];
    cvt.u64.u32 %rd2, %r2;
    mov.u64 %rd3, %globaltimer;
WAIT:
    mov.u64 %rd4, %globaltimer;
    sub.u64 %rd5, %rd4, %rd3;
    setp.lt.u64 %p1, %rd5, %rd2;
    @%p1 bra WAIT;
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.u32 %r3, %r3, %r4, %r5;
    mov.u32 %r5, %nctaid.x;
    mul.lo.u32 %r4, %r4, %r5;
COPY:
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra DONE;
    ld.global.u64 %rd6, [%rd1];
    ld.global.u64 %rd7, [%rd1+8];
    ld.global.u64 %rd8, [%rd1+16];
    cvt.u64.u32 %rd9, %r3;
CHUNK:
    setp.ge.u64 %p3, %rd9, %rd8;
    @%p3 bra NEXT;
    shl.b64 %rd10, %rd9, 4;
    add.u64 %rd11, %rd6, %rd10;
    ld.global.v4.u32 {%r6, %r7, %r8, %r9}, [%rd11];
    add.u64 %rd11, %rd7, %rd10;
    st.global.v4.u32 [%rd11], {%r6, %r7, %r8, %r9};
    cvt.u64.u32 %rd10, %r4;
    add.u64 %rd9, %rd9, %rd10;
    bra CHUNK;
NEXT:
    add.u64 %rd1, %rd1, 24;
    sub.u32 %r1, %r1, 1;
    bra COPY;
DONE:
    ret;
}
";
const LATE_NS: u32 = 30_000;

/// The kernel that writes late; it stays loaded.
struct LateWriter(sys::CUfunction);

impl LateWriter {
    fn load(engine: &CudaEngine) -> Self {
        engine.device().context().bind_to_thread().unwrap();
        let text = CString::new(PTX).unwrap();
        // SAFETY: the text ends with a NUL byte, the context is current, and the module is never unloaded.
        let function = unsafe {
            let module = result::module::load_data(text.as_ptr().cast()).unwrap();
            result::module::get_function(module, CString::new("write_late").unwrap()).unwrap()
        };
        Self(function)
    }

    /// Enqueues the copies of `table`; where it `overlaps`, the launch may begin while the one before it ends.
    fn enqueue(&self, table: &CopyTable, late_ns: u32, overlaps: bool, stream: &CudaStream) {
        stream.context().bind_to_thread().unwrap();
        let (address, copies) = (table.on_device.span().address(), table.copies);
        let mut parameters: [*mut c_void; 3] = [
            (&raw const address).cast_mut().cast(),
            (&raw const copies).cast_mut().cast(),
            (&raw const late_ns).cast_mut().cast(),
        ];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: 4,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: 512,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(overlaps),
        };
        // SAFETY: the parameters are the kernel's, in order. The table's spans are of buffers that live until the device has
        // finished, and are as long as it says.
        unsafe { sys::cuLaunchKernelEx(&config, self.0, parameters.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .unwrap();
    }
}

/// Copies in device memory: where from, where to, and 16-byte words.
struct CopyTable {
    on_device: DeviceBuffer,
    copies: u32,
}

impl CopyTable {
    fn new(engine: &CudaEngine, copies: &[(&DeviceBuffer, &DeviceBuffer)]) -> Self {
        let rows: Vec<u64> = copies
            .iter()
            .flat_map(|(from, to)| {
                assert!(from.bytes() == to.bytes() && from.bytes().is_multiple_of(16), "{} bytes", from.bytes());
                [from.span().address(), to.span().address(), from.bytes() / 16]
            })
            .collect();
        Self { on_device: DeviceBuffer::from_slice(engine.device(), &rows).unwrap(), copies: copies.len() as u32 }
    }
}

/// What a run reads: what is there before, and what is written right before the run.
struct Input {
    live: DeviceBuffer,
    before: Vec<u8>,
    now: DeviceBuffer,
}

impl Input {
    fn new(engine: &CudaEngine, before: &[u8], now: &[u8]) -> Self {
        assert_ne!(before, now);
        let buffer = |bytes| DeviceBuffer::from_slice(engine.device(), bytes).unwrap();
        Self { live: buffer(before), before: before.to_vec(), now: buffer(now) }
    }
}

/// Who writes right before a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Writer {
    /// A kernel that lets the run begin at once.
    Late,
    /// Copies in device memory.
    Copies,
    /// The engine: K and V of each sequence's last token, and states merged into the first row of queries and into the sinks.
    Engine,
}

/// Bits of O and of log-sum-exps: NaN is compared, too.
type Bits = (Vec<u16>, Vec<u32>);

/// A decode step, its memory before and after what is written, and who writes.
struct Scene {
    engine: CudaEngine,
    problem: Problem,
    batch: OwnedBatch,
    /// Queries, K and V, sinks, and of 8-bit K and V their factors.
    inputs: Vec<Input>,
    out: DeviceBuffer,
    lse: DeviceBuffer,
    /// What stood in the outputs when the kernel that writes late read them.
    seen_out: DeviceBuffer,
    seen_lse: DeviceBuffer,
    args: RunArgs,
    append: AppendArgs,
    states: [DeviceState; 3],
    /// What `append` and `states` read.
    _sources: Vec<DeviceBuffer>,
    theirs: Arc<CudaStream>,
    stream: Stream,
}

/// Sequences behind a shared prompt, ends within pages, one alone.
fn batch() -> OwnedBatch {
    let table = |own: std::ops::Range<u32>| (0..12).chain(own).collect::<Vec<u32>>();
    let block_tables = vec![table(12..15), table(15..27), table(27..28), table(28..29), (29..50).collect()];
    let lengths = block_tables.iter().enumerate().map(|(row, t)| t.len() as u32 * PAGE_SIZE - 2 * row as u32 - 1);
    OwnedBatch { page_size: PAGE_SIZE, num_pages: NUM_PAGES, lengths: lengths.collect(), block_tables }
}

/// Where the last token of a sequence is.
fn last_token(batch: &OwnedBatch, sequence: usize) -> (u32, u32) {
    let last = batch.lengths[sequence] - 1;
    (batch.block_tables[sequence][(last / PAGE_SIZE) as usize], last % PAGE_SIZE)
}

impl Scene {
    fn new<T: Element, C: KvElement>(engine: &CudaEngine, head_dim: u32) -> Self {
        let device = *engine.device();
        let batch = batch();
        let shape = AttentionShape::new(Q_HEADS, KV_HEADS, head_dim, T::DTYPE).unwrap().with_kv_dtype(C::DTYPE);
        let problem = Problem::new(shape, PAGE_SIZE).with_sinks();
        let draw = |seed| Tensors::<T, C>::draw_stored(&batch, shape, PoolLayout::Nhd, seed).unwrap();
        let (before, mut now) = (draw(SEED), draw(SEED + 1));
        // Of two sequences a row of V in their last page is NaN: rows that stand in an item with them are computed once more.
        for sequence in [0, 2] {
            let (page, token) = last_token(&batch, sequence);
            let begin = now.row_begin(Tensor::V, page, token, sequence as u32);
            now.kv[begin + 3] = C::from_f32(f32::NAN);
        }
        let floats = |count: u32, of: fn(f32) -> f32| (0..count).map(|index| of(index as f32)).collect::<Vec<f32>>();
        let bytes = |values: &[f32]| bytemuck::cast_slice::<f32, u8>(values).to_vec();
        let mut inputs = vec![
            Input::new(engine, bytemuck::cast_slice(&before.q), bytemuck::cast_slice(&now.q)),
            Input::new(engine, bytemuck::cast_slice(&before.kv), bytemuck::cast_slice(&now.kv)),
            Input::new(
                engine,
                &bytes(&floats(Q_HEADS, |i| i * 0.7 % 5.0)),
                &bytes(&floats(Q_HEADS, |i| 4.0 - i * 0.3)),
            ),
        ];
        let is_eight_bit = C::DTYPE != T::DTYPE;
        if is_eight_bit {
            let factors = |of| bytes(&floats(KV_HEADS, of));
            inputs.push(Input::new(engine, &factors(|i| 0.25 + i), &factors(|i| 2.0 - i / 4.0)));
            inputs.push(Input::new(engine, &factors(|i| 3.0 - i / 2.0), &factors(|i| 0.5 + i)));
        }
        let rows = batch.lengths.len() as u32;
        let buffer = |bytes: u32| DeviceBuffer::zeroed(&device, bytes as usize).unwrap();
        let [out, seen_out] = [(); 2].map(|()| buffer(rows * Q_HEADS * head_dim * 2));
        let [lse, seen_lse] = [(); 2].map(|()| buffer(rows * Q_HEADS * 4));
        let live = |input: usize| inputs[input].live.span();
        let v = live(1).skip((now.v_begin * size_of::<C>()) as u64).unwrap();
        let mut args = RunArgs::new(problem, NUM_PAGES, rows, (live(0), live(1), v.clone(), out.span()))
            .with_kv_strides(now.k_strides, now.v_strides)
            .with_lse(lse.span(), RowStrides::lse(Q_HEADS))
            .with_sinks(live(2));
        if is_eight_bit {
            args = args.with_kv_scales(DeviceKvScale::Heads(live(3)), DeviceKvScale::Heads(live(4)));
        }

        let mut sources = Vec::new();
        let mut source = |bytes: &[u8]| {
            sources.push(DeviceBuffer::from_slice(&device, bytes).unwrap());
            sources.last().unwrap().span()
        };
        let mut new_rows = |tensor| {
            let rows = (0..batch.lengths.len()).flat_map(|sequence| {
                let (page, token) = last_token(&batch, sequence);
                (0..KV_HEADS).flat_map(move |head| (0..head_dim).map(move |column| (page, token, head, column)))
            });
            let element = |(page, token, head, column): (u32, u32, u32, u32)| {
                T::from_f32(now.kv[now.row_begin(tensor, page, token, head) + column as usize].to_f32())
            };
            let rows: Vec<T> = rows.map(element).collect();
            source(bytemuck::cast_slice(&rows))
        };
        let (k_new, v_new) = (new_rows(Tensor::K), new_rows(Tensor::V));
        let slots = (0..batch.lengths.len()).map(|sequence| {
            let (page, token) = last_token(&batch, sequence);
            i64::from(page * PAGE_SIZE + token)
        });
        let slots = source(bytemuck::cast_slice(&slots.collect::<Vec<i64>>()));
        let layout =
            |strides| CacheLayout { num_pages: NUM_PAGES, page_size: PAGE_SIZE, kv_heads: KV_HEADS, head_dim, strides };
        let append = AppendArgs {
            dtype: T::DTYPE,
            kv_dtype: C::DTYPE,
            k_scale: DeviceKvScale::Tensor(1.0),
            v_scale: DeviceKvScale::Tensor(1.0),
            rows,
            k_new,
            k_new_strides: RowStrides::contiguous(KV_HEADS, head_dim),
            v_new,
            v_new_strides: RowStrides::contiguous(KV_HEADS, head_dim),
            k_cache: live(1),
            k_layout: layout(now.k_strides),
            v_cache: v,
            v_layout: layout(now.v_strides),
            slots,
        };
        let state = |out, lse| DeviceState {
            out,
            out_strides: RowStrides::contiguous(Q_HEADS, head_dim),
            lse,
            lse_strides: RowStrides::lse(Q_HEADS),
        };
        let row_elements = (Q_HEADS * head_dim) as usize;
        let [first, second] = [0, 1].map(|row| {
            let lse = floats(Q_HEADS, if row == 0 { |i| 1.0 - i / 8.0 } else { |i| i / 4.0 - 2.0 });
            let out: &[u8] = bytemuck::cast_slice(&now.q[row * row_elements..][..row_elements]);
            state(source(out), source(&bytes(&lse)))
        });
        let states = [first, second, state(live(0), live(2))];
        let theirs = device.context().new_stream().unwrap();
        // SAFETY: the scene keeps the stream.
        let stream = unsafe { device.stream_from_raw(theirs.cu_stream() as u64) }.unwrap();
        let engine = engine.clone();
        let _sources = sources;
        Self {
            engine,
            problem,
            batch,
            inputs,
            out,
            lse,
            seen_out,
            seen_lse,
            args,
            append,
            states,
            _sources,
            theirs,
            stream,
        }
    }

    fn plan(&self, mode: PlanMode, variant: TileVariant) -> Plan {
        let options = PlanOptions::from(mode).with_variants([variant]);
        let rows = self.batch.rows();
        let mut planner = Planner::new(self.problem, self.engine.device().profile().unwrap(), options).unwrap();
        planner.plan(&self.batch.view(&rows).unwrap()).unwrap()
    }

    /// What is there before; outputs are NaN.
    fn restore(&mut self) {
        for input in &mut self.inputs {
            input.live.write(0, &input.before).unwrap();
        }
        self.out.fill(0xff).unwrap();
        self.lse.fill(0xff).unwrap();
    }

    /// The copies that write what is read, behind such that tell what stood in the outputs.
    fn copies(&self) -> CopyTable {
        let outputs = [(&self.out, &self.seen_out), (&self.lse, &self.seen_lse)];
        let written = self.inputs.iter().map(|input| (&input.now, &input.live));
        CopyTable::new(&self.engine, &outputs.into_iter().chain(written).collect::<Vec<_>>())
    }

    fn write(&self, writer: Writer, late: Option<&LateWriter>, table: &CopyTable) {
        match writer {
            Writer::Late => late.expect("a device of Hopper").enqueue(table, LATE_NS, false, &self.theirs),
            Writer::Copies => {
                self.theirs.context().bind_to_thread().unwrap();
                for Input { live, now, .. } in &self.inputs {
                    let [to, from] = [live, now].map(|buffer| buffer.span().address());
                    // SAFETY: both buffers have as many bytes, and live until the device has finished.
                    unsafe { result::memcpy_dtod_async(to, from, live.bytes() as usize, self.theirs.cu_stream()) }
                        .unwrap();
                }
            }
            Writer::Engine => {
                let extent = (1, Q_HEADS, self.problem.shape().head_dim());
                let [first, second, merged] = &self.states;
                self.engine.append_kv(&self.append, &self.stream).unwrap();
                let dtype = self.problem.shape().dtype();
                self.engine.merge_states(extent, dtype, [first, second], merged, &self.stream).unwrap();
            }
        }
    }

    fn bits(&self) -> Bits {
        self.stream.synchronize().unwrap();
        let mut bits = (vec![0; self.out.bytes() as usize / 2], vec![0; self.lse.bytes() as usize / 4]);
        self.out.read(0, &mut bits.0).unwrap();
        self.lse.read(0, &mut bits.1).unwrap();
        bits
    }

    /// The kernel that writes late has read the outputs before the run wrote them.
    fn assert_unwritten(&self, what: &str) {
        let mut seen = vec![0u8; self.seen_out.bytes() as usize + self.seen_lse.bytes() as usize];
        let (out, lse) = seen.split_at_mut(self.seen_out.bytes() as usize);
        self.seen_out.read(0, out).unwrap();
        self.seen_lse.read(0, lse).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0xff), "{what}: outputs were written ahead of the kernel before");
    }

    fn capture(&self, run: &BoundRun, uploaded: Uploaded<'_>, write: impl Fn()) -> CudaGraph {
        self.theirs.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        write();
        run.run(uploaded, &self.stream).unwrap();
        self.theirs.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a graph")
    }

    /// Holds what runs give right behind each writer against what they give where the host waits in between.
    fn check(&mut self, variant: TileVariant, mode: PlanMode, late: Option<&LateWriter>) {
        let device = *self.engine.device();
        let plan = self.plan(mode, variant);
        let geometry = LaunchGeometry::of(&plan);
        let mut buffers = PlanBuffers::with_fixed_geometry(&device, plan.bytes().len(), geometry).unwrap();
        let workspace = Workspace::with_capacity(&device, Workspace::bytes_for(&plan)).unwrap();
        buffers.upload(&plan, &self.stream).unwrap();
        let run = self.engine.bind(&buffers, &self.args, &workspace).unwrap();
        let uploaded = buffers.uploaded().unwrap();
        let table = self.copies();
        self.restore();
        run.run(uploaded, &self.stream).unwrap();
        let stale = self.bits();
        for writer in [Writer::Late, Writer::Copies, Writer::Engine] {
            // Before Hopper no launch begins early.
            if writer == Writer::Late && late.is_none() {
                continue;
            }
            let what = format!("{variant:?}, {mode:?}, {:?}, behind {writer:?}", self.problem);
            self.restore();
            self.write(writer, late, &table);
            self.stream.synchronize().unwrap();
            run.run(uploaded, &self.stream).unwrap();
            let expected = self.bits();
            assert!(expected != stale, "{what}: nothing has changed");
            self.rounds(writer, &expected, &what, |scene| {
                scene.write(writer, late, &table);
                run.run(uploaded, &scene.stream).unwrap();
            });
            let graph = self.capture(&run, uploaded, || self.write(writer, late, &table));
            self.rounds(writer, &expected, &format!("{what}, in a graph"), |_| graph.launch().unwrap());
        }
    }

    /// Holds what `enqueue` writes and runs against what is expected, again and again.
    fn rounds(&mut self, writer: Writer, expected: &Bits, what: &str, enqueue: impl Fn(&Self)) {
        for round in 0..ROUNDS {
            self.restore();
            enqueue(self);
            assert!(self.bits() == *expected, "{what}, round {round}: not the answer to what had been written");
            if writer == Writer::Late {
                self.assert_unwritten(what);
            }
        }
    }
}

fn late_writer(engine: &CudaEngine) -> Option<LateWriter> {
    (engine.device().compute_capability() >= 90).then(|| LateWriter::load(engine))
}

fn scene<T: Element, C: KvElement>(engine: &Engine, head_dim: u32) {
    let cuda = engine.as_cuda().unwrap();
    let late = late_writer(cuda);
    let mut scene = Scene::new::<T, C>(cuda, head_dim);
    for variant in engine.profile().unwrap().variants(&scene.problem) {
        for mode in [PlanMode::Auto, PlanMode::FixedChunk { tokens: 64 }] {
            scene.check(variant, mode, late.as_ref());
        }
    }
}

/// Without this the others would show nothing.
fn a_launch_begins_while_the_one_before_it_ends(engine: &Engine) {
    let cuda = engine.as_cuda().unwrap();
    let Some(late) = late_writer(cuda) else { return };
    let device = *cuda.device();
    let buffer = |byte: u8| DeviceBuffer::from_slice(&device, &[byte; 4096]).unwrap();
    let (mut live, now, mut seen) = (buffer(1), buffer(2), buffer(0));
    let table = |from, to| CopyTable::new(cuda, &[(from, to)]);
    let (writes, looks) = (table(&now, &live), table(&live, &seen));
    let stream = device.context().new_stream().unwrap();
    let (mut early, mut bytes) = (0, [0u8; 4096]);
    for _ in 0..20 {
        live.fill(1).unwrap();
        seen.fill(0).unwrap();
        late.enqueue(&writes, LATE_NS, false, &stream);
        late.enqueue(&looks, 0, true, &stream);
        stream.synchronize().unwrap();
        seen.read(0, &mut bytes).unwrap();
        early += usize::from(bytes.contains(&1));
    }
    eprintln!("{early} of 20 launches had begun before the one before them wrote");
    // Tools that watch launches let none overlap.
    assert!(early > 0 || std::env::var_os("CUDA_INJECTION64_PATH").is_some(), "no launch overlaps another");
}

fn sixteen_bits(engine: &Engine) {
    scene::<f16, f16>(engine, 128);
    scene::<bf16, bf16>(engine, 64);
}

fn wide_heads(engine: &Engine) {
    scene::<f16, f16>(engine, 256);
    scene::<bf16, bf16>(engine, 96);
}

fn eight_bits(engine: &Engine) {
    scene::<f16, E4m3>(engine, 128);
    scene::<bf16, E5m2>(engine, 64);
}

fn main() -> ExitCode {
    pat_tests::device_tests::main([
        device_test!(a_launch_begins_while_the_one_before_it_ends),
        device_test!(sixteen_bits),
        device_test!(wide_heads),
        device_test!(eight_bits),
    ])
}
