"""Execution on torch CPU tensors against torch's attention in float64."""

import os
import signal
import time

import pytest
import torch
from support import SHAPE, caches, queries, random_forest, reference, tolerance

import prefix_attn as pa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("seed", range(6))
def test_random_forests_equal_torch(dtype, layout, seed):
    batch = random_forest(seed, page_size=[1, 7, 16, 32][seed % 4])
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype=dtype), device="cpu")
    plan = planner.plan(batch.block_tables, batch.lengths, batch.page_size, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths), dtype), caches(batch, dtype, layout)
    out, lse = pa.run(plan, q, k, v, return_lse=True, kv_layout=layout)
    expected, expected_lse = reference(batch, q, k, v, layout)
    assert out.dtype == dtype and out.shape == q.shape and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance(dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 512])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_caps_and_sinks_equal_torch(head_dim, softcap, with_sinks):
    batch = random_forest(head_dim)
    shape = pa.AttentionShape(q_heads=8, kv_heads=2, head_dim=head_dim, dtype="float16")
    plan = pa.Planner(shape, "cpu", softcap=softcap).plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths), head_dim=head_dim), caches(batch, head_dim=head_dim)
    scores = dict(softcap=softcap, sinks=torch.linspace(-4, 6, 8) if with_sinks else None)
    out, lse = pa.run(plan, q, k, v, return_lse=True, **scores)
    expected, expected_lse = reference(batch, q, k, v, **scores)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(torch.float16), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 10_000])
@pytest.mark.parametrize("reach", ["window", "chunk"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_windows_and_chunks_equal_torch(tokens, reach, with_sinks):
    batch = random_forest(tokens)
    shape, reach = pa.AttentionShape(**SHAPE, dtype="float16"), {reach: tokens}
    assert pa.supports(shape, 16, **reach) is None
    plan = pa.Planner(shape, "cpu", **reach).plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    sinks = torch.linspace(-4, 6, 8) if with_sinks else None
    out, lse = pa.run(plan, q, k, v, return_lse=True, sinks=sinks)
    expected, expected_lse = reference(batch, q, k, v, sinks=sinks, **reach)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(torch.float16), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)
    assert "<svg" in plan.svg() and plan.explain()


def test_values_may_be_shorter_than_keys():
    batch = random_forest(5)
    shape = pa.AttentionShape(8, 2, 192, "bfloat16", value_head_dim=128)
    assert (shape.head_dim, shape.value_head_dim) == (192, 128) and "value_head_dim=128" in repr(shape)
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(len(batch.lengths), torch.bfloat16, head_dim=192)
    k, v = caches(batch, torch.bfloat16, head_dim=192, value_head_dim=128)
    out, lse = pa.run(plan, q, k, v, return_lse=True)
    expected, expected_lse = reference(batch, q, k, v)
    assert out.shape == (*q.shape[:2], 128) and out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance(torch.bfloat16), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"v_cache: got shape \[.*, 192\], expected \[pages, 16, 2, 128\]"):
        pa.run(plan, q, k, k)
    with pytest.raises(ValueError, match="^value_head_dim: got 64, expected 128"):
        pa.Planner(pa.AttentionShape(8, 2, 192, "bfloat16", value_head_dim=64), "cpu")


def test_a_sink_of_minus_infinity_is_none(planner):
    batch = random_forest(3)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    out, lse = pa.run(plan, q, k, v, return_lse=True)
    with_sinks = pa.run(plan, q, k, v, return_lse=True, sinks=torch.full((8,), float("-inf")))
    assert torch.equal(out, with_sinks[0]) and torch.equal(lse, with_sinks[1])


@pytest.mark.parametrize("mode", ["auto", "flat", "per-node", "packed", "fixed-chunk:32"])
def test_modes_agree(mode):
    batch = random_forest(3)
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), device="cpu", mode=mode)
    plan = planner.plan(batch.block_tables, batch.lengths, batch.page_size, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    out = pa.run(plan, q, k, v, scale=0.2)
    expected, _ = reference(batch, q, k, v, scale=0.2)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(torch.float16), rtol=0)


def test_outputs_are_written_in_place_and_nothing_else_is(planner):
    batch = random_forest(5)
    rows = len(batch.lengths)
    plan = planner.plan(batch.padded, torch.tensor(batch.lengths, dtype=torch.int32), 16, batch.num_pages)
    # Rows 0 to `rows` of every second head group of a larger tensor, with rows to spare.
    memory = torch.full((rows + 3, 2, 8, 64), 7.0, dtype=torch.float16)
    out = memory[:, 1]
    lse = torch.full((8, rows + 3), 7.0).t()
    q, (k, v) = queries(rows + 3), caches(batch)
    assert pa.run(plan, q, k, v, out, lse) is out
    expected, expected_lse = reference(batch, q, k, v)
    torch.testing.assert_close(out[:rows].double(), expected[:rows], atol=3e-3, rtol=0)
    torch.testing.assert_close(lse[:rows].double(), expected_lse[:rows], atol=1e-3, rtol=0)
    assert (memory[:, 0] == 7).all() and (memory[rows:] == 7).all() and (lse[rows:] == 7).all()


def test_v_may_lie_inside_the_rows_of_k(planner):
    batch = random_forest(7)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    k, v = caches(batch)
    both = torch.cat([k, v], dim=-1)
    q = queries(len(batch.lengths))
    assert torch.equal(pa.run(plan, q, both[..., :64], both[..., 64:]), pa.run(plan, q, k, v))


def test_forms_of_block_tables_give_the_same_plan(planner):
    import numpy

    batch = random_forest(11)
    padded = batch.padded
    lengths = torch.tensor(batch.lengths, dtype=torch.int32)
    indptr = [0]
    for row in batch.block_tables:
        indptr.append(indptr[-1] + len(row))
    flat = [page for row in batch.block_tables for page in row]
    read_only = padded.numpy().copy()
    read_only.flags.writeable = False
    forms = [
        batch.block_tables,
        [tuple(row) for row in batch.block_tables],
        [torch.tensor(row, dtype=torch.int32) for row in batch.block_tables],
        padded,
        padded.t().contiguous().t(),
        padded.numpy(),
        read_only,
        (indptr, flat),
        (numpy.array(indptr, dtype=numpy.int32), torch.tensor(flat, dtype=torch.int32)),
    ]
    summaries = [
        planner.plan(form, length, 16, batch.num_pages).summary()
        for form in forms
        for length in (batch.lengths, tuple(batch.lengths), lengths, lengths.numpy())
    ]
    assert all(summary == summaries[0] for summary in summaries)
    assert summaries[0]["sequences"] == len(batch.lengths)


def test_numpy_through_dlpack(planner):
    numpy = pytest.importorskip("numpy")
    batch = random_forest(13)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    out, lse = numpy.empty(q.shape, numpy.float16), numpy.empty(q.shape[:2], numpy.float32)
    assert pa.run(plan, q.numpy(), k.numpy(), v.numpy(), out, lse) is out
    expected, expected_lse = pa.run(plan, q, k, v, return_lse=True)
    assert torch.equal(torch.from_numpy(out), expected) and torch.equal(torch.from_numpy(lse), expected_lse)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_8_bit_caches_equal_torch(kv_dtype, dtype, by_head, as_bytes):
    batch = random_forest(11)
    shape = pa.AttentionShape(**SHAPE, dtype=dtype, kv_dtype=kv_dtype)
    assert repr(shape).endswith(f'kv_dtype="{str(kv_dtype).removeprefix("torch.")}")')
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(len(batch.lengths), dtype)
    k, v = (cache.float().to(kv_dtype) for cache in caches(batch))
    factors = (torch.tensor([0.75, 1.5]), torch.tensor([2.0, 0.3])) if by_head else (0.75, 2.0)
    given = (k.view(torch.uint8), v.view(torch.uint8)) if as_bytes else (k, v)
    out, lse = pa.run(plan, q, *given, return_lse=True, k_scale=factors[0], v_scale=factors[1])
    wide = [cache.double() * (factor[:, None] if by_head else factor) for cache, factor in zip((k, v), factors)]
    expected, expected_lse = reference(batch, q, *wide)
    torch.testing.assert_close(out.double(), expected, atol=2 * tolerance(dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, float("nan")]), torch.ones(3), torch.ones(1)])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_factors_that_are_none_are_refused(name, factor):
    batch = random_forest(11)
    shape = pa.AttentionShape(**SHAPE, dtype="float16", kv_dtype="float8_e4m3fn")
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(len(batch.lengths))
    k, v = (cache.float().to(torch.float8_e4m3fn) for cache in caches(batch))
    with pytest.raises(ValueError, match=name):
        pa.run(plan, q, k, v, **{name: factor})
    with pytest.raises(TypeError, match="k_cache"):
        pa.run(plan, q, k.half(), v.half())


@pytest.mark.parametrize("dtype", ["fp8", "e4m3", torch.uint8, torch.float8_e4m3fnuz])
def test_types_of_caches_that_are_none_are_refused(dtype):
    with pytest.raises(ValueError, match="kv_dtype: got .*, expected float16, bfloat16, float8_e4m3fn or float8_e5m2, as"):
        pa.AttentionShape(**SHAPE, dtype="float16", kv_dtype=dtype)


def test_outputs_over_factors_are_refused():
    batch = random_forest(11)
    shape = pa.AttentionShape(**SHAPE, dtype="float16", kv_dtype="float8_e4m3fn")
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(len(batch.lengths))
    k, v = (cache.float().to(torch.float8_e4m3fn) for cache in caches(batch))
    out = torch.ones_like(q)
    with pytest.raises(ValueError, match="memory of v_scale"):
        pa.run(plan, q, k, v, out=out, v_scale=out.view(torch.float32).flatten()[:2])


def test_16_bit_caches_have_no_factor(planner):
    batch = random_forest(3)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    with pytest.raises(ValueError, match="k_scale: got 2"):
        pa.run(plan, queries(len(batch.lengths)), *caches(batch), k_scale=2.0)


def test_tensors_without_elements_have_no_address(planner):
    rows, pages = torch.empty(0, 8, 64, dtype=torch.float16), torch.empty(0, 16, 2, 64, dtype=torch.float16)
    assert rows.data_ptr() == pages.data_ptr() == 0
    assert pa.run(planner.plan([], [], 16, 0), rows, pages, pages).shape == (0, 8, 64)
    # Rows without tokens need no pages.
    out, lse = pa.run(planner.plan([[]], [0], 16, 0), queries(1), pages, pages, return_lse=True)
    assert not out.any() and lse.isneginf().all()


def test_slices_of_a_fused_projection_may_have_no_rows(planner):
    """They begin behind the end of a storage of no bytes."""
    plan = planner.plan(torch.zeros((0, 8), dtype=torch.int32)[:, 2:], torch.zeros(0, dtype=torch.int32), 16, 2)
    k = torch.zeros(2, 16, 2, 64, dtype=torch.float16)
    v = k.clone()
    qkv = torch.zeros(0, (8 + 2 + 2) * 64, dtype=torch.float16)
    q, k_new, v_new = (part.view(0, part.shape[1] // 64, 64) for part in qkv.split([512, 128, 128], dim=1))
    assert pa.run(plan, q, k, v).shape == (0, 8, 64)
    pa.append_kv(k_new, v_new, k, v, torch.zeros(0, dtype=torch.int64))
    partials = torch.zeros(0, 3, 72, dtype=torch.float16)[:, 1:, 8:]
    merged, _ = pa.merge_states(partials, torch.zeros(0, 2), partials, torch.zeros(0, 2))
    assert merged.shape == (0, 2, 64)
    assert not k.any() and not v.any()


def test_a_forked_process_executes_what_its_parent_did(planner):
    batch = random_forest(5)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    expected = pa.run(plan, q, k, v)
    out = torch.zeros_like(expected).share_memory_()
    child = os.fork()
    if child == 0:
        pa.run(plan, q, k, v, out)
        os._exit(0)
    for _ in range(600):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise AssertionError("the child hangs")
    assert status == 0 and torch.equal(out, expected)
