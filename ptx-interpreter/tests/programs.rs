//! Small programs: what threads, warps and copies do, and what the interpreter says of those that are wrong.

use half::f16;
use pat_ptx_interpreter::{Access, Error, Fault, GlobalMemory, Kernel, Launch, Param, Result, TensorMap, Unset};

/// Registers and addresses that every program has: its thread in `%r1`, the address of its word of `values` in `%rd3`, of its
/// word of the CTA's shared memory in `%r3`.
fn program(body: &str) -> String {
    format!(
        ".version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry program(
.param .u64 values,
.param .align 64 .b8 map[128]
)
{{
.reg .pred %p<9>;
.reg .b32 %r<99>;
.reg .b64 %rd<9>;
ld.param.b64 %rd1, [values];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
mov.u64 %rd4, memory;
cvt.u32.u64 %r2, %rd4;
shl.b32 %r3, %r1, 2;
add.s32 %r3, %r3, %r2;
{body}
ret;
}}
"
    )
}

/// A tensor of `[1, 1, 16, 64]` 16-bit elements.
fn map(address: u64) -> TensorMap {
    TensorMap {
        address,
        element_bytes: 2,
        dims: [64, 16, 1, 1],
        strides_bytes: [128, 2048, 2048],
        box_dims: [64, 16, 1, 1],
    }
}

/// Runs a program with one word per thread, at first its index; tells the words.
fn run_with(body: &str, threads: u32, unset_shared: Unset) -> Result<Vec<u32>> {
    let kernel = Kernel::parse(&program(body), "program")?;
    let mut memory = GlobalMemory::new();
    let words: Vec<u8> = (0..threads).flat_map(u32::to_le_bytes).collect();
    let address = memory.add("the values", words, Access::ReadWrite);
    let halves: Vec<u8> = (0..16 * 64u16).flat_map(|i| f16::from_f32(f32::from(i % 7)).to_le_bytes()).collect();
    let tensor = memory.add("a tensor", halves, Access::Read);
    let params = [Param::Bytes(&address.to_le_bytes()), Param::TensorMap(map(tensor))];
    let launch = Launch { ctas: 1, threads, shared_bytes: 4096, unset_shared, params: &params };
    kernel.launch(&launch, &mut memory)?;
    let bytes = memory.bytes(address).expect("the values");
    Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

fn run(body: &str, threads: u32) -> Result<Vec<u32>> {
    run_with(body, threads, Unset::Fault)
}

fn message(body: &str, threads: u32) -> String {
    run(body, threads).expect_err(body).to_string()
}

#[test]
fn lanes_go_different_ways_and_meet_again() {
    // Lane i goes around i % 5 times; behind the loop all vote together.
    let words = run(
        "mov.b32 %r5, 0;
        and.b32 %r6, %r1, 3;
        $loop: setp.ge.u32 %p1, %r5, %r6;
        @%p1 bra $behind;
        add.s32 %r5, %r5, 1;
        bra.uni $loop;
        $behind: shfl.sync.bfly.b32 %r7, %r5, 1, 31, -1;
        setp.eq.b32 %p2, %r7, 3;
        vote.sync.ballot.b32 %r8, %p2, -1;
        mad.lo.s32 %r9, %r7, 65536, %r5;
        xor.b32 %r9, %r9, %r8;
        st.global.u32 [%rd3], %r9;",
        32,
    )
    .unwrap();
    for (lane, word) in words.iter().enumerate() {
        let (own, other) = (lane as u32 % 4, (lane as u32 ^ 1) % 4);
        assert_eq!(*word, (other * 65536 + own) ^ 0x4444_4444, "lane {lane}");
    }
}

#[test]
fn guards_choose_lanes() {
    let words = run(
        "setp.lt.u32 %p1, %r1, 5;
        mov.b32 %r5, 7;
        @%p1 mov.b32 %r5, 8;
        @!%p1 st.global.u32 [%rd3], %r5;",
        32,
    )
    .unwrap();
    assert_eq!(words[..7], [0, 1, 2, 3, 4, 7, 7]);
}

#[test]
fn scopes_have_names_of_their_own() {
    let words = run(
        "{ .reg .b32 t; add.s32 t, %r1, 1; mov.b64 %rd5, {t, %r1}; }
        { .reg .b32 t; mov.b64 {_, t}, %rd5; mov.b64 {%r5, _}, %rd5; add.s32 %r5, %r5, t; }
        st.global.u32 [%rd3], %r5;",
        32,
    )
    .unwrap();
    assert!(words.iter().enumerate().all(|(lane, &word)| word == 2 * lane as u32 + 1));
    let error = message("{ .reg .b32 t; mov.b32 t, 1; }\nmov.b32 %r5, t;", 32);
    assert!(error.contains("there is no register t"), "{error}");
}

/// Each thread leaves a word that the thread `32` further reads.
const EXCHANGE: &str = "st.shared.u32 [%r3], %r1;
bar.sync 0;
xor.b32 %r5, %r1, 32;
shl.b32 %r5, %r5, 2;
add.s32 %r5, %r5, %r2;
ld.shared.u32 %r6, [%r5];
st.global.u32 [%rd3], %r6;";

#[test]
fn warps_exchange_words_behind_a_barrier() {
    let words = run(EXCHANGE, 64).unwrap();
    assert!(words.iter().enumerate().all(|(thread, &word)| word == thread as u32 ^ 32));
    let error = message(&EXCHANGE.replace("bar.sync 0;", ""), 64);
    assert!(error.contains("warp 0") && error.contains("which nothing has been written to"), "{error}");
    // Where garbage may be read, the writes race with the reads.
    let garbage = run_with(&EXCHANGE.replace("bar.sync 0;", ""), 64, Unset::Reads(0)).unwrap_err();
    assert!(matches!(garbage, Error::Run { fault: Fault::Race { .. }, .. }), "{garbage}");
}

#[test]
fn lanes_of_a_warp_exchange_words_behind_a_barrier() {
    let in_warp = EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;").replace("%r1, 32", "%r1, 1");
    assert!(run(&in_warp, 64).unwrap().iter().enumerate().all(|(thread, &word)| word == thread as u32 ^ 1));
    let error = message(&in_warp.replace("bar.warp.sync -1;", ""), 64);
    assert!(error.contains("nothing orders behind a write of lane 1 of warp 0"), "{error}");
}

#[test]
fn barriers_that_do_not_gather_all_are_deadlocks() {
    let error = message("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $end;\nbar.sync 1;\n$end: ", 64);
    assert!(error.starts_with("CTA 0: deadlock"), "{error}");
    assert!(error.contains("warp 1, lanes 0xffffffff") && error.contains("(bar.sync 1): for barrier 1"), "{error}");
    // Named barriers of some warps are fine.
    run("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $end;\nbar.sync 1, 32;\n$end: ", 64).unwrap();
    // Warps may come to one from two places, but not where it is aligned.
    let from_two = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $one;\nbarrier.sync 1, 64;\nbra.uni $end;\n$one: barrier.sync 1, 64;\n$end: ";
    run(from_two, 64).unwrap();
    let error = message(&from_two.replace("barrier.sync", "bar.sync"), 64);
    assert!(error.contains("an aligned instruction, and other warps come to another one"), "{error}");
    // Half a warp at an aligned barrier while the other half waits at another.
    let error =
        message("setp.lt.u32 %p1, %r1, 16;\n@%p1 bra $one;\nbar.sync 1;\nbra.uni $end;\n$one: bar.sync 2;\n$end: ", 32);
    assert!(error.contains("deadlock") && error.contains("for the other lanes of the warp"), "{error}");
    let error = message("setp.lt.u32 %p1, %r1, 3;\n@%p1 ret;\nshfl.sync.idx.b32 %r5, %r1, 0, 31, -1;", 32);
    assert!(error.contains("lanes 0x00000007 have exited"), "{error}");
}

#[test]
fn endless_loops_end() {
    let error = run("$loop: bra.uni $loop;", 32).unwrap_err();
    assert!(matches!(error, Error::Run { fault: Fault::Endless(_), .. }), "{error}");
    assert!(matches!(run("trap;", 32).unwrap_err(), Error::Run { fault: Fault::Trap, .. }));
}

#[test]
fn memory_has_limits() {
    let error = message("ld.global.v2.u32 {%r5, %r6}, [%rd3];", 32);
    assert!(error.contains("lane 1") && error.contains("no multiple of 8"), "{error}");
    let error = message("ld.global.u32 %r5, [%rd3+4];", 32);
    assert!(error.contains("lane 31") && error.contains("128 bytes from the start of the values"), "{error}");
    let error = message("st.shared.u32 [%r3+4096], %r1;", 32);
    assert!(error.contains("4 bytes of shared memory at 0x1400; the CTA has 0x400 to 0x1400"), "{error}");
    assert!(error.contains("line 21 (st.shared.u32 [%r3+4096], %r1)"), "{error}");
}

/// Each lane copies 16 bytes, of the values of four lanes; zeros behind 8 of them.
const COPY: &str = "shl.b32 %r5, %r1, 4;
and.b32 %r5, %r5, 127;
cvt.u64.u32 %rd5, %r5;
add.s64 %rd5, %rd5, %rd1;
shl.b32 %r6, %r1, 4;
add.s32 %r6, %r6, %r2;
cp.async.cg.shared.global [%r6], [%rd5], 16, 8;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r6];
add.s32 %r8, %r8, %r9;
add.s32 %r8, %r8, %r10;
st.global.u32 [%rd3], %r8;";

#[test]
fn copies_are_there_when_they_are_waited_for() {
    let words = run(COPY, 32).unwrap();
    assert!(words.iter().enumerate().all(|(lane, &word)| word == lane as u32 * 4 % 32 + 1), "{words:?}");
    for missing in ["cp.async.wait_group 0;", "cp.async.commit_group;"] {
        let error = message(&COPY.replace(missing, ""), 32);
        assert!(error.contains("which an asynchronous copy is still writing"), "{error}");
    }
}

/// Lane 0 of warp 0 asks for a box; warp 1 waits for it, reads a chunk of row `lane / 2` and says what it holds.
const TENSOR: &str = "add.s32 %r4, %r2, 2048;
setp.ne.b32 %p1, %r1, 0;
@%p1 bra $started;
mbarrier.init.shared::cta.b64 [%r4], 1;
fence.mbarrier_init.release.cluster;
$started: bar.sync 0;
setp.gt.u32 %p2, %r1, 31;
@%p2 bra $wait;
@%p1 bra $end;
mov.b64 %rd5, map;
cvta.param.u64 %rd5, %rd5;
mov.b32 %r5, 0;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 2048;
cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd5, {%r5, %r5, %r5, %r5}], [%r4];
bra.uni $end;
$wait: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r4], 0;
@!%p3 bra $wait;
and.b32 %r6, %r1, 15;
shl.b32 %r7, %r6, 7;
and.b32 %r8, %r6, 7;
shl.b32 %r8, %r8, 4;
or.b32 %r7, %r7, %r8;
add.s32 %r7, %r7, %r2;
ld.shared.u32 %r9, [%r7];
st.global.u32 [%rd3], %r9;
$end: ";

#[test]
fn boxes_of_tensors_come_behind_a_barrier() {
    let words = run(TENSOR, 64).unwrap();
    for (thread, &word) in words.iter().enumerate().skip(32) {
        // The first chunk of a row.
        let element = |column: usize| u32::from(f16::from_f32(((thread % 16 * 64 + column) % 7) as f32).to_bits());
        assert_eq!(word, element(0) | element(1) << 16, "thread {thread}");
    }
    let error = message(&TENSOR.replace("[%r4], 2048;", "[%r4], 2064;"), 64);
    assert!(error.contains("0 of 1 arrivals and 16 bytes are missing"), "{error}");
    // A wait whose answer is not looked at may have waited, but orders nothing.
    let error = message(&TENSOR.replace("@!%p3 bra $wait;", ""), 64);
    assert!(error.contains("nothing orders behind a write of lane 0 of warp 0"), "{error}");
    let error = message(&TENSOR.replace("$started: bar.sync 0;", "$started: "), 64);
    assert!(error.contains("the use of a barrier"), "{error}");
    let error = message(&TENSOR.replace("mov.b64 %rd5, map;", "mov.b64 %rd5, 8;"), 64);
    assert!(error.contains("there is no tensor map at 0x8"), "{error}");
}

/// Four warps multiply 64 rows of ones with 16 rows of the tensor, 16 elements of each, and say one column each.
const PRODUCT: &str = "add.s32 %r4, %r2, 2048;
mov.b32 %r5, 0;
setp.ne.b32 %p1, %r1, 0;
@%p1 bra $started;
mbarrier.init.shared::cta.b64 [%r4], 1;
fence.mbarrier_init.release.cluster;
mov.b64 %rd5, map;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 2048;
cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd5, {%r5, %r5, %r5, %r5}], [%r4];
$started: bar.sync 0;
$wait: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r4], 0;
@!%p3 bra $wait;
shr.u32 %r6, %r2, 4;
cvt.u64.u32 %rd6, %r6;
or.b64 %rd6, %rd6, 4611686293305294848;
mov.b32 %r7, 1006648320;
setp.ne.b32 %p4, 0, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%r10, %r11, %r12, %r13, %r14, %r15, %r16, %r17},
    {%r7, %r7, %r7, %r7}, %rd6, %p4, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
st.global.u32 [%rd3], %r15;";

#[test]
fn warpgroups_multiply() {
    let words = run(PRODUCT, 128).unwrap();
    for (thread, &word) in words.iter().enumerate() {
        // Register 5: the second column of the thread's pair in the second block of eight.
        let column = 8 + 2 * (thread % 4) + 1;
        let sum: usize = (0..16).map(|k| (column * 64 + k) % 7).sum();
        assert_eq!(f32::from_bits(word), sum as f32, "thread {thread}");
    }
    let error = message(&PRODUCT.replace("wgmma.fence.sync.aligned;", ""), 128);
    assert!(error.contains("written since the last wgmma.fence"), "{error}");
    for missing in ["wgmma.wait_group.sync.aligned 0;", "wgmma.commit_group.sync.aligned;"] {
        let error = message(&PRODUCT.replace(missing, ""), 128);
        assert!(error.contains("a product under way reads or writes"), "{error}");
    }
    // What was written by other instructions than TMA's is not seen without a fence.
    let written = PRODUCT
        .replace("shr.u32 %r6", "@%p1 bra $written;\nst.shared.u32 [%r3], %r5;\n$written: bar.sync 0;\nshr.u32 %r6");
    let error = message(&written, 128);
    assert!(error.contains("no proxy fence stands behind a write of lane 0 of warp 0"), "{error}");
    run(&written.replace("$written:", "fence.proxy.async.shared::cta;\n$written:"), 128).unwrap();
}

#[test]
fn warpgroups_multiply_rows_in_shared_memory() {
    // The first eight rows of the tensor, again and again: groups of eight rows are 0 bytes apart.
    let product = PRODUCT
        .replace("or.b64 %rd6,", "or.b64 %rd7, %rd6, 4611686018427387904;\nor.b64 %rd6,")
        .replace("{%r7, %r7, %r7, %r7}, %rd6, %p4, 1, 1, 0;", "%rd7, %rd6, %p4, 1, 1, 0, 0;");
    let words = run(&product, 128).unwrap();
    let element = |row: usize, k: usize| (row * 64 + k) % 7;
    for (thread, &word) in words.iter().enumerate() {
        let (row, column) = (thread % 32 / 4, 8 + 2 * (thread % 4) + 1);
        let sum: usize = (0..16).map(|k| element(row, k) * element(column, k)).sum();
        assert_eq!(f32::from_bits(word), sum as f32, "thread {thread}");
    }
    let error = message(&product.replace("%rd7, %rd6, %p4, 1, 1, 0, 0;", "%rd7, %rd6, %p4, 1, 1, 1, 0;"), 128);
    assert!(error.contains("A that is transposed is not known"), "{error}");
}

/// The second warp says by its arrival that it has written; the first one reads what all its lanes have alike.
const TURNS: &str = "setp.ge.u32 %p1, %r1, 32;
@%p1 bra $second;
bar.sync 3, 64;
ld.shared.u32 %r5, [%r2+128];
redux.sync.or.b32 %r5, %r5, -1;
st.global.u32 [%rd3], %r5;
ret;
$second: st.shared.u32 [%r3], %r1;
bar.arrive 3, 64;
st.global.u32 [%rd3], %r1;";

#[test]
fn warps_arrive_for_others() {
    let words = run(TURNS, 64).unwrap();
    assert!(words[..32].iter().all(|&word| word == 32));
    assert!(words[32..].iter().enumerate().all(|(lane, &word)| word == 32 + lane as u32));
    // What is written behind the arrival is not ordered, and who waits for more waits in vain.
    let late = TURNS.replace("bar.arrive 3, 64;\n", "").replace("st.shared", "bar.arrive 3, 64;\nst.shared");
    let late = late.replace("$second: bar", "$second: nothing;\nbar").replace("nothing;\n", "");
    assert!(
        message(&late, 64).contains("races") || message(&late, 64).contains("nothing orders"),
        "{}",
        message(&late, 64)
    );
    assert!(message(&TURNS.replace("3, 64", "3, 96"), 64).contains("barrier 3"));
}

#[test]
fn launches_fit_their_kernels() {
    let kernel = Kernel::parse(&program(""), "program").unwrap();
    let mut memory = GlobalMemory::new();
    let (bytes, map) = ([0; 8], Param::TensorMap(map(1 << 40)));
    let mut refused = |threads: u32, params: &[Param<'_>], expected: &str| {
        let launch = Launch { ctas: 1, threads, shared_bytes: 0, unset_shared: Unset::Fault, params };
        let error = kernel.launch(&launch, &mut memory).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(33, &[Param::Bytes(&bytes), map], "33 threads, not a multiple of 32 up to 1024");
    refused(32, &[Param::Bytes(&bytes)], "1 parameters, not 2");
    refused(32, &[Param::Bytes(&bytes[..4]), map], "parameter 0 has 4 bytes, not 8");
}
