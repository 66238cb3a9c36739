"""Every kernel of the package from Python against torch in float64: head dims, 8-bit caches, windows, query tokens and trees,
groups larger than a tile, caps and sinks, pages in runs, fixed chunks; alone and in graphs."""

import random

import pytest
import torch

from support import Batch, caches, draw_trees, queries, random_forest, reference, seen_by, tolerance, written_out

import prefix_attn as pa

DEVICE = "cuda:0"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: By head dim of K and of V, the tile variants that there are.
VARIANTS = {
    (64, 64): ["mma16", "mma32", "mma64", "mma128", "wgmma64", "wgmma128"],
    (96, 96): ["mma16", "mma32", "mma64", "mma128"],
    (128, 128): ["mma16", "mma32", "mma64", "mma128", "wgmma64", "wgmma128"],
    (192, 128): ["mma16", "mma32", "mma64"],
    (256, 256): ["mma16", "mma32", "mma64", "wgmma64"],
    (512, 512): ["mma16", "mma32"],
}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability(DEVICE) == (9, 0)
KERNELS = [(*dims, name) for dims, names in VARIANTS.items() for name in names if HOPPER or not name.startswith("wgmma")]


def deep_forest(seed, page_size=16):
    """Rows that fill the widest tile behind a prefix long enough to be cut, and some that share nothing."""
    rng = random.Random(seed)
    prefix, most = list(range(1500 // page_size)), 300 // page_size
    tables, lengths, next_page = [], [], len(prefix)
    for row in range(40):
        own = rng.randint(1, most)
        tables.append((prefix if row % 8 else []) + list(range(next_page, next_page + own)))
        next_page += own
        lengths.append(len(tables[-1]) * page_size - rng.randint(0, page_size - 1))
    return Batch(tables, lengths, page_size, next_page)


def forests(seed, page_size=7):
    return [random_forest(seed), random_forest(seed + 1, page_size), deep_forest(seed)]


def shape_of(q_heads, kv_heads, dims, dtype, kv_dtype=None):
    value = None if dims[1] == dims[0] else dims[1]
    return pa.AttentionShape(q_heads, kv_heads, dims[0], dtype, kv_dtype=kv_dtype, value_head_dim=value)


def drawn(batch, shape, seed=0, rows=None):
    """q, K and V; 8-bit caches as bytes."""
    dtype = getattr(torch, shape.dtype)
    q = queries(rows or len(batch.lengths), dtype, seed + 1, shape.q_heads, shape.head_dim, DEVICE)
    sizes = dict(kv_heads=shape.kv_heads, head_dim=shape.head_dim, value_head_dim=shape.value_head_dim)
    k, v = caches(batch, dtype, "NHD", seed, **sizes, device=DEVICE)
    if shape.kv_dtype != shape.dtype:
        k, v = (cache.float().to(getattr(torch, shape.kv_dtype)) for cache in (k, v))
    return q, k, v


def check(batch, q, k, v, output, wider=1, **terms):
    out, lse = output
    expected, expected_lse = reference(batch, q, k, v, **terms)
    torch.testing.assert_close(out.double(), expected, atol=wider * tolerance(q.dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-5)


def sinks_of(q_heads):
    return torch.linspace(-4, 6, q_heads, device=DEVICE)


@pytest.mark.parametrize("head_dim, value_head_dim, variant", KERNELS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("with_terms", [False, True], ids=["plain", "cap-sinks"])
def test_kernels_of_16_bit_caches(head_dim, value_head_dim, variant, dtype, with_terms):
    if variant == "wgmma128" and with_terms:
        # No cap there.
        terms = dict(sinks=sinks_of(8))
    else:
        terms = dict(softcap=5.0, sinks=sinks_of(8)) if with_terms else {}
    shape = shape_of(8, 2, (head_dim, value_head_dim), dtype)
    planner = pa.Planner(shape, DEVICE, variants=[variant], softcap=terms.get("softcap"))
    # The tensor maps of wgmma kernels want multiples of 8.
    for batch in forests(head_dim, 24 if variant.startswith("wgmma") else 7):
        plan = planner.plan(batch.padded, batch.lengths, batch.page_size, batch.num_pages)
        q, k, v = drawn(batch, shape)
        check(batch, q, k, v, pa.run(plan, q, k, v, return_lse=True, **terms), **terms)


@pytest.mark.parametrize("variant", ["mma16", "mma32", "mma64"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("by_head", [False, True], ids=["one-factor", "factor-by-head"])
def test_kernels_of_8_bit_caches(variant, head_dim, dtype, kv_dtype, by_head):
    shape = shape_of(8, 2, (head_dim, head_dim), dtype, kv_dtype)
    planner = pa.Planner(shape, DEVICE, variants=[variant])
    factors = (0.75, 2.0)
    if by_head:
        factors = torch.tensor([0.75, 1.5], device=DEVICE), torch.tensor([2.0, 0.3], device=DEVICE)
    for index, batch in enumerate(forests(head_dim)):
        plan = planner.plan(batch.padded, batch.lengths, batch.page_size, batch.num_pages)
        q, k, v = drawn(batch, shape)
        given = [cache.view(torch.uint8) for cache in (k, v)] if index % 2 else [k, v]
        output = pa.run(plan, q, *given, return_lse=True, k_scale=factors[0], v_scale=factors[1])
        wide = [cache.double() * (factor[:, None] if by_head else factor) for cache, factor in zip((k, v), factors)]
        check(batch, q, *wide, output, wider=2)


@pytest.mark.parametrize("dims", VARIANTS)
@pytest.mark.parametrize("reach", ["window", "chunk"])
@pytest.mark.parametrize("tokens", [1, 5, 40, 700])
def test_windows_and_chunks(dims, reach, tokens):
    shape, reach = shape_of(8, 2, dims, "bfloat16"), {reach: tokens}
    assert pa.supports(shape, 16, **reach, softcap=30.0, sinks=True) is None
    terms = dict(softcap=30.0, sinks=sinks_of(8))
    planner = pa.Planner(shape, DEVICE, softcap=30.0, **reach)
    for batch in forests(tokens):
        plan = planner.plan(batch.padded, batch.lengths, batch.page_size, batch.num_pages)
        q, k, v = drawn(batch, shape)
        check(batch, q, k, v, pa.run(plan, q, k, v, return_lse=True, **terms), **terms, **reach)


@pytest.mark.parametrize("dims", VARIANTS)
@pytest.mark.parametrize("q_heads", [64, 128, 192])
def test_groups_as_large_as_tiles_and_larger(dims, q_heads):
    shape = shape_of(q_heads, 1, dims, "float16")
    planner = pa.Planner(shape, DEVICE)
    for batch in forests(q_heads):
        plan = planner.plan(batch.padded, batch.lengths, batch.page_size, batch.num_pages)
        q, k, v = drawn(batch, shape)
        check(batch, q, k, v, pa.run(plan, q, k, v, return_lse=True))


@pytest.mark.parametrize("dims", VARIANTS)
def test_query_tokens(dims):
    shape = shape_of(8, 2, dims, "float16")
    planner = pa.Planner(shape, DEVICE)
    for batch in (random_forest(8), deep_forest(8)):
        counts = [min(length, 1 + row % 5) for row, length in enumerate(batch.lengths)]
        rows = written_out(batch, counts)
        plan = planner.plan(batch.padded, batch.lengths, 16, batch.num_pages, query_tokens=counts)
        assert plan.sequence_count == sum(counts)
        q, k, v = drawn(batch, shape, rows=len(rows.lengths))
        check(rows, q, k, v, pa.run(plan, q, k, v, return_lse=True))


@pytest.mark.parametrize("dims", VARIANTS)
def test_query_trees(dims):
    shape = shape_of(8, 2, dims, "bfloat16")
    planner = pa.Planner(shape, DEVICE, query_tree=True)
    for seed, batch in enumerate((random_forest(9), deep_forest(9))):
        trees = draw_trees(batch, seed)
        rows = written_out(batch, [len(tree) for tree in trees])
        plan = planner.plan(batch.padded, batch.lengths, 16, batch.num_pages, parents=trees)
        q, k, v = drawn(batch, shape, rows=len(rows.lengths))
        check(rows, q, k, v, pa.run(plan, q, k, v, return_lse=True), visible=list(seen_by(batch, trees)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", VARIANTS)
def test_appended_rows_are_what_is_attended_to(dims, dtype):
    """A decode step that is captured: the new rows of K and V, whose slots come with the plan, and attention to them."""
    shape = shape_of(8, 2, dims, dtype)
    planner = pa.Planner(shape, DEVICE, capacity=pa.Capacity(40, 40 * 128, DEVICE))
    batch = deep_forest(12)
    steps = 4
    full = [min(length, len(ids) * 16 - steps) for ids, length in zip(batch.block_tables, batch.lengths)]
    q, k, v = drawn(batch, shape)
    expected_k, expected_v = k.clone(), v.clone()
    rows = len(batch.lengths)
    new = [torch.zeros((rows, 2, dim), dtype=q.dtype, device=DEVICE) for dim in dims]
    slots = torch.full((rows,), -1, device=DEVICE)
    out, lse = torch.zeros((rows, 8, dims[1]), dtype=q.dtype, device=DEVICE), torch.zeros((rows, 8), device=DEVICE)
    buffers = pa.PlanBuffers(planner, 16, batch.num_pages)
    bound = buffers.bind(k, v, q, out, lse, workspace=pa.Workspace.for_planner(planner))

    def step():
        pa.append_kv(*new, k, v, slots)
        bound.run()

    buffers.upload(planner.plan(batch.block_tables, full, 16, batch.num_pages))
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for index in range(steps):
        lengths = [length + index + 1 for length in full]
        at = [ids[(length - 1) // 16] * 16 + (length - 1) % 16 for ids, length in zip(batch.block_tables, lengths)]
        slots.copy_(torch.tensor(at))
        for rows_, cache in zip(new, (expected_k, expected_v)):
            rows_.normal_()
            cache.flatten(0, 1)[slots] = rows_
        buffers.upload(planner.plan(batch.block_tables, lengths, 16, batch.num_pages))
        graph.replay()
        written = Batch(batch.block_tables, lengths, 16, batch.num_pages)
        check(written, q, expected_k, expected_v, (out, lse))


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_8_bit_caches_with_windows_query_tokens_and_trees(kv_dtype):
    shape = shape_of(32, 4, (128, 128), "bfloat16", kv_dtype)
    batch = deep_forest(10)
    sinks = sinks_of(32)
    q, k, v = drawn(batch, shape)
    plan = pa.Planner(shape, DEVICE, window=200).plan(batch.padded, batch.lengths, 16, batch.num_pages)
    output = pa.run(plan, q, k, v, return_lse=True, sinks=sinks)
    check(batch, q, k.double(), v.double(), output, wider=2, sinks=sinks, window=200)

    trees = draw_trees(batch, 10)
    rows = written_out(batch, [len(tree) for tree in trees])
    q, k, v = drawn(batch, shape, rows=len(rows.lengths))
    planner = pa.Planner(shape, DEVICE, query_tree=True)
    plan = planner.plan(batch.padded, batch.lengths, 16, batch.num_pages, parents=trees)
    seen = list(seen_by(batch, trees))
    check(rows, q, k.double(), v.double(), pa.run(plan, q, k, v, return_lse=True), wider=2, visible=seen)

    counts = [len(tree) for tree in trees]
    plan = planner.plan(batch.padded, batch.lengths, 16, batch.num_pages, query_tokens=counts)
    check(rows, q, k.double(), v.double(), pa.run(plan, q, k, v, return_lse=True), wider=2)


@pytest.mark.parametrize("kv_dtype", [None, *FLOAT8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_of_one_token_in_runs(kv_dtype, head_dim):
    shape = shape_of(8, 2, (head_dim, head_dim), "float16", kv_dtype)
    planner = pa.Planner(shape, DEVICE, page_runs=True)
    rng = random.Random(head_dim)
    prompt, lengths = list(range(160)), [rng.randint(176, 300) for _ in range(9)]
    ends = [160 + sum(lengths[: row + 1]) for row in range(len(lengths))]
    tables = [prompt + list(range(end - length, end - 160)) for length, end in zip(lengths, ends)]
    # A run is read whole, behind its last token too.
    batch = Batch(tables, lengths, 1, ends[-1] + 16)
    plan = planner.plan(tables, lengths, 1, batch.num_pages)
    assert plan.summary()["run_tokens"] > 0
    q, k, v = drawn(batch, shape)
    wide = [k, v] if kv_dtype is None else [k.double(), v.double()]
    check(batch, q, *wide, pa.run(plan, q, k, v, return_lse=True), wider=1 if kv_dtype is None else 2)


@pytest.mark.parametrize("dims, kv_dtype", [*((dims, None) for dims in VARIANTS), ((128, 128), FLOAT8[0])])
def test_bits_of_fixed_chunks_do_not_depend_on_the_batch(dims, kv_dtype):
    shape = shape_of(8, 2, dims, "bfloat16", kv_dtype)
    planner = pa.Planner(shape, DEVICE, mode="fixed-chunk:64")
    batch = deep_forest(11)
    q, k, v = drawn(batch, shape)
    out, lse = pa.run(planner.plan(batch.padded, batch.lengths, 16, batch.num_pages), q, k, v, return_lse=True)
    wide = [k, v] if kv_dtype is None else [k.double(), v.double()]
    check(batch, q, *wide, (out, lse), wider=1 if kv_dtype is None else 2)
    rng = random.Random(11)
    for size in (1, 7, 40):
        some = rng.sample(range(40), size)
        tables, lengths = [batch.block_tables[row] for row in some], [batch.lengths[row] for row in some]
        plan = planner.plan(tables, lengths, 16, batch.num_pages)
        again, lse_again = pa.run(plan, q[some].contiguous(), k, v, return_lse=True)
        assert torch.equal(again, out[some]) and torch.equal(lse_again, lse[some])


@pytest.mark.parametrize(
    "dims, kv_dtype, options, terms",
    [
        ((128, 128), FLOAT8[0], dict(window=100), dict(sinks=True, k_scale=0.5)),
        ((256, 256), None, dict(softcap=20.0), dict(softcap=20.0)),
        ((192, 128), None, {}, {}),
        ((512, 512), None, {}, {}),
        ((96, 96), None, dict(chunk=64), {}),
    ],
)
def test_graphs_serve_plans_that_are_uploaded_later(dims, kv_dtype, options, terms):
    rows, num_pages = 40, 1024
    shape = shape_of(8, 2, dims, "bfloat16", kv_dtype)
    planner = pa.Planner(shape, DEVICE, capacity=pa.Capacity(rows, rows * 128, DEVICE), **options)
    buffers = pa.PlanBuffers(planner, 16, num_pages)
    q, k, v = drawn(Batch([], [], 16, num_pages), shape, rows=rows)
    out, lse = torch.zeros((rows, 8, dims[1]), dtype=q.dtype, device=DEVICE), torch.zeros((rows, 8), device=DEVICE)
    terms = {name: sinks_of(8) if value is True else value for name, value in terms.items()}
    bound = buffers.bind(k, v, q, out, lse, workspace=pa.Workspace.for_planner(planner), **terms)
    wide = k, v
    if kv_dtype is not None:
        wide, terms = (k.double() * terms["k_scale"], v.double()), dict(sinks=terms["sinks"])
    terms |= {name: value for name, value in options.items() if name != "softcap"}

    def upload(batch):
        buffers.upload(planner.plan(batch.block_tables, batch.lengths, 16, num_pages))

    upload(random_forest(0))
    bound.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound.run()
    for batch in (random_forest(1), deep_forest(2), random_forest(3), deep_forest(4)):
        upload(batch)
        graph.replay()
        used = len(batch.lengths)
        check(batch, q[:used], *wide, (out[:used], lse[:used]), wider=1 if kv_dtype is None else 2, **terms)
