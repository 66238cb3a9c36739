"""The CUDA executor from Python: ragged forests against torch in float32, streams, graphs, bound runs, refusals."""

import gc

import pytest
import torch

from support import Batch, caches, queries, random_forest, reference, tolerance

import prefix_attn as pa

DEVICE = "cuda:0"
#         q_heads, kv_heads, head_dim, page_size, layout
SHAPES = [
    (8, 2, 64, 16, "NHD"),
    (32, 8, 128, 16, "HND"),
    (32, 32, 128, 32, "NHD"),
    (16, 1, 128, 64, "HND"),
    (10, 2, 128, 7, "NHD"),
    (14, 2, 64, 1, "HND"),
    (8, 8, 64, 24, "NHD"),
    (64, 8, 128, 16, "NHD"),
    (12, 4, 64, 128, "HND"),
    (5, 1, 128, 32, "NHD"),
]
FORESTS_PER_SHAPE = 50


def problem(seed, q_heads, kv_heads, head_dim, page_size, layout, dtype):
    batch = random_forest(seed, page_size)
    k, v = caches(batch, dtype, layout, seed, kv_heads, head_dim, DEVICE)
    return batch, queries(len(batch.lengths), dtype, seed + 1, q_heads, head_dim, DEVICE), k, v


def check(batch, q, k, v, layout, out, lse):
    expected, expected_lse = reference(batch, q, k, v, layout, dtype=torch.float32)
    torch.testing.assert_close(out.float(), expected, atol=tolerance(q.dtype), rtol=0)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("case", range(len(SHAPES)))
def test_500_ragged_forests_equal_torch_in_float32(case, no_tf32):
    q_heads, kv_heads, head_dim, page_size, layout = SHAPES[case]
    for dtype in (torch.float16, torch.bfloat16):
        planner = pa.Planner(pa.AttentionShape(q_heads, kv_heads, head_dim, dtype), DEVICE)
        for seed in range(case * 1000, case * 1000 + FORESTS_PER_SHAPE // 2):
            batch, q, k, v = problem(seed, q_heads, kv_heads, head_dim, page_size, layout, dtype)
            plan = planner.plan(batch.padded, batch.lengths, page_size, batch.num_pages)
            out, lse = pa.run(plan, q, k, v, return_lse=True, kv_layout=layout)
            check(batch, q, k, v, layout, out, lse)


@pytest.mark.parametrize("mode", ["flat", "per-node", "packed", "fixed-chunk:64"])
def test_modes_equal_torch(mode, no_tf32):
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE, mode=mode)
    for seed in range(10):
        batch, q, k, v = problem(seed, 32, 8, 128, 16, "NHD", torch.float16)
        plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
        check(batch, q, k, v, "NHD", *pa.run(plan, q, k, v, return_lse=True))


def test_strided_tensors_and_spare_rows(no_tf32):
    batch, q, k, v = problem(4, 8, 2, 64, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    rows = len(batch.lengths)
    qkv = torch.zeros((rows + 2, 3, 8, 64), dtype=torch.float16, device=DEVICE)
    qkv[:rows, 1] = q
    memory = torch.full((rows + 2, 2, 8, 64), 7.0, dtype=torch.float16, device=DEVICE)
    lse = torch.full((8, rows + 2), 7.0, device=DEVICE).t()
    both = torch.cat([k, v], dim=-1)
    assert pa.run(plan, qkv[:, 1], both[..., :64], both[..., 64:], memory[:, 1], lse) is not None
    check(batch, q, k, v, "NHD", memory[:rows, 1], lse[:rows])
    assert (memory[:, 0] == 7).all() and (memory[rows:] == 7).all() and (lse[rows:] == 7).all()


def independent_stream():
    """A stream on which torch's own work overtakes the default stream's: some share a queue of the device with it."""
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    for _ in range(8):
        side, done = torch.cuda.Stream(), torch.cuda.Event()
        torch.cuda._sleep(500_000_000)
        with torch.cuda.stream(side):
            torch.cuda._sleep(1)
            done.record()
        done.synchronize()
        overtook = not torch.cuda.default_stream().query()
        torch.cuda.synchronize()
        if overtook:
            return side
    raise AssertionError("torch's own work does not overtake the default stream here")


class Sides:
    """A plan for a side stream: run there before, so that torch and the planner have memory of that stream for the next one."""

    def __init__(self):
        batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
        self.batch, self.q, self.k, self.v = batch, q, k, v
        self.planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
        self.side, self.done = independent_stream(), torch.cuda.Event()
        self.late_q = torch.zeros_like(q)
        with torch.cuda.stream(self.side):
            self.run(self.plan())
        torch.cuda.synchronize()
        self.late_q.zero_()
        torch.cuda.synchronize()

    def plan(self):
        return self.planner.plan(self.batch.block_tables, self.batch.lengths, 16, self.batch.num_pages)

    def run(self, plan):
        """Q arrives late on the side stream: a run that did not wait for its own stream would read zeros."""
        torch.cuda._sleep(20_000_000)
        self.late_q.copy_(self.q)
        out, lse = pa.run(plan, self.late_q, self.k, self.v, return_lse=True)
        self.done.record()
        return out, lse

    def check(self, out, lse):
        check(self.batch, self.q, self.k, self.v, "NHD", out, lse)


def test_a_side_stream_waits_for_itself_and_not_for_the_default_stream(no_tf32):
    sides = Sides()
    plan = sides.plan()
    torch.cuda._sleep(4_000_000_000)
    with torch.cuda.stream(sides.side):
        output = sides.run(plan)
    sides.done.synchronize()
    assert not torch.cuda.default_stream().query(), "the run waited for the default stream, which sleeps for some seconds"
    torch.cuda.synchronize()
    sides.check(*output)


def test_a_side_stream_waits_for_the_stream_of_the_upload(no_tf32):
    sides = Sides()
    plan = sides.plan()
    torch.cuda._sleep(1_000_000_000)
    pa.run(plan, torch.zeros_like(sides.q), sides.k, sides.v)
    with torch.cuda.stream(sides.side):
        output = sides.run(plan)
    assert not sides.done.query(), "the run did not wait for the plan's upload, which is behind a sleep"
    sides.done.synchronize()
    sides.check(*output)


def test_a_stream_by_its_handle(no_tf32):
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    side, out = torch.cuda.Stream(), torch.zeros_like(q)
    torch.cuda.synchronize()
    pa.run(plan, q, k, v, out, stream=side.cuda_stream)
    side.synchronize()
    check(batch, q, k, v, "NHD", out, None)


def test_streams_in_turn_share_a_plan(no_tf32):
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    torch.cuda.synchronize()
    outputs = []
    for _ in range(20):
        for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                outputs.append(pa.run(plan, q, k, v))
    torch.cuda.synchronize()
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    check(batch, q, k, v, "NHD", outputs[0], None)


def test_many_steps_in_a_row_reuse_memory(no_tf32):
    """Plans come and go while their runs are still enqueued; the memory of one is the next one's."""
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    steps = [problem(seed, 32, 8, 128, 16, "NHD", torch.float16) for seed in range(30)]
    outputs = []
    for batch, q, k, v in steps * 3:
        plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
        outputs.append(pa.run(plan, q, k, v))
        del plan
    for (batch, q, k, v), out in zip(steps * 3, outputs):
        check(batch, q, k, v, "NHD", out, None)


def test_advance_reaches_the_device(no_tf32):
    planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), DEVICE)
    batch, q, k, v = problem(12, 8, 2, 64, 16, "NHD", torch.float16)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    for _ in range(30):
        full = [len(ids) * 16 for ids in batch.block_tables]
        batch.lengths = [min(length + 1, most) if length else 0 for length, most in zip(batch.lengths, full)]
        planner.advance(plan, batch.block_tables, batch.lengths)
        out, lse = pa.run(plan, q, k, v, return_lse=True)
        check(batch, q, k, v, "NHD", out, lse)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(192, 128), (16, 64)])
def test_8_bit_caches_of_two_head_dims_are_written_as_on_the_cpu(dtype, kv_dtype, dims):
    new = [torch.randn(50, 2, dim).to(dtype) for dim in dims]
    slots = torch.randperm(80)[:50] - 10
    written = []
    for device in ("cpu", DEVICE):
        stored = [torch.full((5, 16, 2, dim), 0x55, dtype=torch.uint8, device=device) for dim in dims]
        scales = dict(k_scale=torch.tensor([0.5, 3.0], device=device), v_scale=0.37)
        pa.append_kv(*(rows.to(device) for rows in new), *stored, slots.to(device), kv_dtype=kv_dtype, **scales)
        written.append([cache.cpu() for cache in stored])
    assert all(torch.equal(*pair) for pair in zip(*written))
    assert all((cache != 0x55).any() for cache in written[1])


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_8_bit_caches_are_written_as_on_the_cpu_and_read(dtype, kv_dtype, no_tf32):
    """All 65,536 numbers are rounded to the CPU's codes; a forest over such caches is what it is over their numbers."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 2, 64)
    slots = torch.randperm(len(numbers))
    written = []
    for device in ("cpu", DEVICE):
        caches_ = [torch.full((len(numbers) // 16, 16, 2, 64), 0x55, dtype=torch.uint8, device=device) for _ in range(2)]
        scales = dict(k_scale=0.37, v_scale=torch.tensor([1.0, 3e-3], device=device))
        new = numbers.to(device)
        pa.append_kv(new, new, *caches_, slots.to(device), kv_dtype=kv_dtype, **scales)
        written.append([cache.cpu() for cache in caches_])
    assert all(torch.equal(*pair) for pair in zip(*written))

    batch, q, k, v = problem(31, 8, 2, 64, 16, "NHD", dtype)
    stored = [torch.zeros(k.shape, dtype=kv_dtype, device=DEVICE) for _ in range(2)]
    slots = torch.arange(k.shape[0] * 16, device=DEVICE)
    scales = dict(k_scale=torch.tensor([0.25, 0.5], device=DEVICE), v_scale=0.5)
    pa.append_kv(k.flatten(0, 1), v.flatten(0, 1), *stored, slots, **scales)
    shape = pa.AttentionShape(8, 2, 64, dtype, kv_dtype=kv_dtype)
    plan = pa.Planner(shape, DEVICE).plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    out, lse = pa.run(plan, q, *stored, return_lse=True, **scales)
    read = (stored[0].float() * scales["k_scale"][:, None]).to(dtype), (stored[1].float() * 0.5).to(dtype)
    check(batch, q, *read, "NHD", out, lse)


class Engine:
    """What a serving engine holds: capacity, buffers, one workspace, two bound layers."""

    def __init__(self, rows=32, num_pages=256, device=DEVICE):
        shape = pa.AttentionShape(32, 8, 128, torch.bfloat16)
        self.rows, self.num_pages = rows, num_pages
        self.planner = pa.Planner(shape, device, capacity=pa.Capacity(rows, rows * 64, device))
        self.buffers = pa.PlanBuffers(self.planner, 16, num_pages)
        self.workspace = pa.Workspace.for_planner(self.planner)
        self.layers = []
        for seed in range(2):
            batch = Batch([], [], 16, num_pages)
            k, v = caches(batch, torch.bfloat16, "NHD", seed, 8, 128, device)
            q = queries(rows, torch.bfloat16, seed + 7, 32, 128, device)
            out, lse = torch.zeros_like(q), torch.zeros((rows, 32), device=device)
            bound = self.buffers.bind(k, v, q, out, lse, workspace=self.workspace)
            self.layers.append((q, k, v, out, lse, bound))

    def step(self, seed):
        batch = random_forest(seed)
        batch.block_tables = [[page % self.num_pages for page in ids] for ids in batch.block_tables]
        batch.num_pages = self.num_pages
        return batch, self.planner.plan(batch.block_tables, batch.lengths, 16, self.num_pages)

    def check(self, batch):
        rows = len(batch.lengths)
        for q, k, v, out, lse, _ in self.layers:
            check(batch, q[:rows], k, v, "NHD", out[:rows], lse[:rows])


def test_bound_runs_serve_every_upload(no_tf32):
    engine = Engine()
    for seed in range(10):
        batch, plan = engine.step(seed)
        engine.buffers.upload(plan)
        for *_, bound in engine.layers:
            bound.run()
        engine.check(batch)


def test_run_ptr_takes_other_memory(no_tf32):
    engine = Engine()
    batch, plan = engine.step(3)
    engine.buffers.upload(plan)
    q, k, v, _, lse, bound = engine.layers[0]
    other_q, out = torch.roll(q, 1, 0).contiguous(), torch.zeros_like(q)
    bound.run_ptr(other_q.data_ptr(), out.data_ptr())
    rows = len(batch.lengths)
    check(batch, other_q[:rows], k, v, "NHD", out[:rows], lse[:rows])
    for bad in (0, q.data_ptr() + 8):
        with pytest.raises(ValueError, match="multiple of 16"):
            bound.run_ptr(bad, out.data_ptr())


@pytest.mark.parametrize("replay_on_side_stream", [False, True])
def test_a_torch_graph_with_plans_refreshed_between_replays(replay_on_side_stream, no_tf32):
    engine = Engine()
    batch, plan = engine.step(0)
    engine.buffers.upload(plan)
    for *_, bound in engine.layers:
        bound.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for *_, bound in engine.layers:
            bound.run()
    stream = torch.cuda.Stream() if replay_on_side_stream else torch.cuda.default_stream()
    for seed in range(1, 20):
        batch, plan = engine.step(seed)
        for *_, out, _, _ in engine.layers:
            out.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            engine.buffers.upload(plan)
            graph.replay()
        torch.cuda.synchronize()
        engine.check(batch)
    # Everything but the graph and the tensors goes: what was captured stays.
    layers = engine.layers
    tensors = [layer[:5] for layer in layers]
    expected = [out.clone() for *_, out, _ in tensors]
    engine.layers = layers = None
    del engine.buffers, engine.workspace, engine.planner, bound
    gc.collect()
    torch.cuda.empty_cache()
    filler = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, was) for (*_, out, _), was in zip(tensors, expected)) and filler


def test_a_plan_without_fixed_geometry_is_not_captured():
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    out = pa.run(plan, q, k, v)
    torch.cuda.synchronize()
    before = out.clone()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ValueError, match="captur"), torch.cuda.graph(graph):
        pa.run(plan, q, k, v, out)
    torch.cuda.synchronize()
    assert torch.equal(pa.run(plan, q, k, v), before)


@pytest.mark.parametrize("name", [0, 1, 2, 3, 4], ids=["q", "k", "v", "out", "lse"])
def test_resized_tensors_are_noticed(name):
    engine = Engine()
    _, plan = engine.step(1)
    engine.buffers.upload(plan)
    tensor = engine.layers[0][name]
    tensor.resize_([4 * tensor.shape[0], *tensor.shape[1:]])
    with pytest.raises(ValueError, match="resized"):
        engine.layers[0][-1].run()


def test_plan_async_overlaps_with_runs(no_tf32):
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    steps = [problem(seed, 32, 8, 128, 16, "NHD", torch.float16) for seed in range(20)]
    ahead = lambda step: planner.plan_async(step[0].padded, step[0].lengths, 16, step[0].num_pages)  # noqa: E731
    future, outputs = ahead(steps[0]), []
    for index, (batch, q, k, v) in enumerate(steps):
        plan = future.result()
        if index + 1 < len(steps):
            future = ahead(steps[index + 1])
        outputs.append(pa.run(plan, q, k, v))
    for (batch, q, k, v), out in zip(steps, outputs):
        check(batch, q, k, v, "NHD", out, None)


REFUSALS = [
    ("q", "a tensor on cpu", dict(q=lambda t: t.cpu())),
    ("k_cache", "a tensor on cpu", dict(k_cache=lambda t: t.cpu())),
    ("out", "a tensor on cpu", dict(out=lambda t: t.cpu())),
    ("q", "address", dict(q=lambda t: torch.empty(t.numel() + 4, dtype=t.dtype, device=DEVICE)[4:].view(t.shape))),
    ("out", "memory of q", dict(out=lambda t: "q")),
    ("workspace", "one on cpu", dict(workspace=lambda _: pa.Workspace(1 << 20, "cpu"))),
    ("workspace", "bytes", dict(workspace=lambda _: pa.Workspace(16, DEVICE))),
]


@pytest.mark.parametrize("argument, text, change", REFUSALS, ids=[f"{r[0]}-{i}" for i, r in enumerate(REFUSALS)])
def test_a_run_refuses(argument, text, change):
    tokens = 16 * 1024
    tables = [list(range(1024))]
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    plan = planner.plan(tables, [tokens], 16, 1024)
    cache = torch.zeros((1024, 16, 8, 128), dtype=torch.float16, device=DEVICE)
    q = queries(1, torch.float16, 0, 32, 128, DEVICE)
    arguments = dict(q=q, k_cache=cache, v_cache=cache, out=torch.full_like(q, 7.0), workspace=None)
    for name, make in change.items():
        arguments[name] = make(arguments[name])
        if isinstance(arguments[name], str):
            arguments[name] = arguments["q"]
    with pytest.raises(ValueError) as raised:
        pa.run(plan, **arguments)
    assert str(raised.value).startswith(argument) and text in str(raised.value)
    torch.cuda.synchronize()


def test_tables_on_the_device_are_refused():
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    tables = torch.zeros((1, 1), dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="^block_tables: got a tensor on cuda:0, expected host memory"):
        planner.plan(tables, [1], 16, 1)
    with pytest.raises(ValueError, match="^lengths: got a tensor on cuda:0"):
        planner.plan([[0]], tables[0], 16, 1)


def test_a_cpu_plan_refuses_device_tensors():
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), "cpu")
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    with pytest.raises(ValueError, match="^q: got a tensor on cuda:0, expected one on cpu"):
        pa.run(plan, q, k, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (64, 512), (8, 24)])
def test_append_kv_equals_the_cpu(dtype, layout, dims):
    batch = Batch([], [], 16, 40)
    k, v = caches(batch, dtype, layout, 0, 4, dims[0], value_head_dim=dims[1])
    new = [torch.randn(100, 4, dim).to(dtype) for dim in dims]
    slots = torch.randperm(40 * 16)[:100] - 20
    on_device = [tensor.to(DEVICE) for tensor in (*new, k, v, slots)]
    pa.append_kv(*new, k, v, slots, kv_layout=layout)
    # Beyond the cache: refused on the CPU, skipped on the device.
    on_device[4][0] = 41 * 16
    pa.append_kv(*new, k, v, torch.where(torch.arange(100) == 0, -1, slots), kv_layout=layout)
    pa.append_kv(*on_device, kv_layout=layout)
    skipped = slots[0].item()
    for cache, got, rows in zip((k, v), on_device[2:4], new):
        if skipped >= 0:
            at = cache[skipped // 16, skipped % 16] if layout == "NHD" else cache[skipped // 16, :, skipped % 16]
            was = got[skipped // 16, skipped % 16] if layout == "NHD" else got[skipped // 16, :, skipped % 16]
            assert torch.equal(at, rows[0])
            at.copy_(was)
        assert torch.equal(got.cpu().nan_to_num(), cache.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_merge_states_equals_the_cpu(dtype, head_dim):
    rows, heads = 300, 7
    states = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        out = torch.randn((rows, heads, head_dim), generator=generator).to(dtype)
        lse = 20 * torch.randn((rows, heads), generator=generator)
        empty = torch.rand((rows, heads), generator=generator) < 0.2
        lse[empty] = float("-inf")
        out[empty] = float("nan")
        states += [out, lse]
    expected, expected_lse = pa.merge_states(*states)
    on_device = [tensor.to(DEVICE) for tensor in states]
    got, got_lse = pa.merge_states(*on_device)
    # Two units in the last place, of the smallest numbers too.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().float(), expected.float(), atol=2 * smallest, rtol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(got_lse.cpu(), expected_lse, atol=1e-5, rtol=1e-5)
    pa.merge_states(*on_device, on_device[0], on_device[1])
    assert torch.equal(on_device[0], got) and torch.equal(on_device[1], got_lse)


def test_the_operator_under_compile_on_the_device(no_tf32):
    from prefix_attn import torch_op

    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    slot = torch_op.PlanSlot(planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages))
    layer = torch.compile(lambda q, k, v: torch_op.decode(q, k, v, slot) + 0, fullgraph=True, backend="aot_eager")
    check(batch, q, k, v, "NHD", layer(q, k, v), None)


class Producer:
    """A library of its own, for what is asked of it: DLPack alone, as cupy and jax have it."""

    def __init__(self, tensor):
        self.tensor, self.streams = tensor, []

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **others):
        self.streams.append(stream)
        return self.tensor.__dlpack__(stream=stream, **others)


def test_producers_of_dlpack_on_the_device(no_tf32):
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2], device=DEVICE)
    others = [Producer(tensor) for tensor in (q, k, v, out, lse)]
    assert pa.run(plan, *others) is others[3]
    check(batch, q, k, v, "NHD", out, lse)
    # Their streams wait for the one of the run: 1 is the protocol's name of the default stream.
    assert [other.streams for other in others] == [[1]] * 5
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    pa.run(plan, *others, stream=side.cuda_stream)
    side.synchronize()
    check(batch, q, k, v, "NHD", out, lse)
    assert [other.streams[1] for other in others] == [side.cuda_stream] * 5
    with torch.cuda.stream(side):
        pa.run(plan, *others)
    side.synchronize()
    assert [other.streams[2] for other in others] == [side.cuda_stream] * 5, "torch's current stream is the run's"
    with pytest.raises(ValueError, match="^out: got None"):
        pa.run(plan, *others[:3])


def two_devices(no_tf32):
    other = f"cuda:{torch.cuda.device_count() - 1}"
    shape = pa.AttentionShape(32, 8, 128, torch.float16)
    batch, q, k, v = problem(6, 32, 8, 128, 16, "NHD", torch.float16)
    planners = [pa.Planner(shape, device) for device in (DEVICE, other)]
    plans = [p.plan(batch.block_tables, batch.lengths, 16, batch.num_pages) for p in planners]
    moved = [tensor.to(other) for tensor in (q, k, v)]
    for _ in range(5):
        here, there = pa.run(plans[0], q, k, v), pa.run(plans[1], *moved)
        check(batch, q, k, v, "NHD", here, None)
        assert str(there.device) == other and torch.equal(there.cpu(), here.cpu())
    with pytest.raises(ValueError, match=f"^q: got a tensor on {other}"):
        pa.run(plans[0], *moved)
    with pytest.raises(ValueError, match=f"^k_cache: got a tensor on {DEVICE}"):
        pa.run(plans[1], moved[0], k, moved[2])
    with pytest.raises(ValueError, match="^workspace: got one on"):
        pa.run(plans[0], q, k, v, workspace=pa.Workspace(1 << 20, other))
    stream = torch.cuda.Stream(other)
    with pytest.raises(ValueError, match="^stream: got 0x[0-9a-f]+, a stream of another device"):
        pa.run(plans[0], q, k, v, stream=stream.cuda_stream)
    there = pa.run(plans[1], *moved, stream=stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(there.cpu(), here.cpu())


def bound_runs_and_graphs_on_the_other_device(no_tf32):
    other = f"cuda:{torch.cuda.device_count() - 1}"
    engines = [Engine(device=DEVICE), Engine(device=other)]
    for seed in range(5):
        for engine in engines:
            batch, plan = engine.step(seed)
            engine.buffers.upload(plan)
            for *_, bound in engine.layers:
                bound.run()
            engine.check(batch)
    far = engines[1]
    with torch.cuda.device(other):
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures is one of the device that was current at the first capture of the process.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(other)):
            for *_, bound in far.layers:
                bound.run()
    for seed in range(5, 10):
        batch, plan = far.step(seed)
        far.buffers.upload(plan)
        with torch.cuda.device(other):
            graph.replay()
        far.check(batch)


def torch_keeps_its_current_device(no_tf32):
    """The device of torch's thread is the driver's current context, which our calls on another device must give back."""
    other = f"cuda:{torch.cuda.device_count() - 1}"
    torch.cuda.set_device(DEVICE)
    far = Engine(device=other)
    batch, plan = far.step(3)

    def after(what):
        assert torch.cuda.current_device() == 0, what
        assert str(torch.zeros(1, device="cuda").device) == DEVICE, what

    after("making planner, buffers and workspace")
    far.buffers.upload(plan)
    after("upload")
    far.layers[0][-1].run()
    after("a bound run")
    q, k, v, out, lse, _ = far.layers[0]
    rows = len(batch.lengths)
    assert torch.equal(pa.run(plan, q[:rows], k, v), out[:rows])
    after("a run")
    pa.merge_states(out, lse, out, lse)
    after("merge_states")
    pa.append_kv(k[0, :2].clone(), v[0, :2].clone(), k, v, torch.zeros(2, dtype=torch.int64, device=other) - 1)
    after("append_kv")
    del far.buffers, far.workspace, far.layers, plan
    gc.collect()
    after("all of it gone")


# With one device there are no such tests, instead of some that are skipped.
if torch.cuda.device_count() > 1:
    test_two_devices = two_devices
    test_bound_runs_and_graphs_on_the_other_device = bound_runs_and_graphs_on_the_other_device
    test_torch_keeps_its_current_device = torch_keeps_its_current_device
