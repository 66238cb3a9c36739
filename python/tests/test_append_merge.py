"""append_kv and merge_states against plain torch."""

import numpy
import pytest
import torch
from support import SHAPE, Batch, caches, queries, random_forest, reference, tolerance

import prefix_attn as pa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (8, 512)])
def test_rows_go_to_their_slots(dtype, layout, dims):
    batch = random_forest(1)
    k, v = caches(batch, dtype, layout, head_dim=dims[0], value_head_dim=dims[1])
    before = k.clone(), v.clone()
    new = [torch.randn(5, 2, dim).to(dtype) for dim in dims]
    slots = torch.tensor([17, -1, 0, 35, -100], dtype=torch.int64)
    pa.append_kv(*new, k, v, slots, kv_layout=layout)
    for cache, old, rows in zip((k, v), before, new):
        at = (lambda c, s: c[s // 16, s % 16]) if layout == "NHD" else (lambda c, s: c[s // 16, :, s % 16])
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(at(cache, slot), rows[row])
                at(old, slot).copy_(rows[row])
        assert torch.equal(cache.nan_to_num(), old.nan_to_num())


def test_v_inside_the_rows_of_k():
    both = torch.zeros(4, 16, 2, 128, dtype=torch.float16)
    ones = torch.ones(1, 2, 64, dtype=torch.float16)
    pa.append_kv(ones, 2 * ones, both[..., :64], both[..., 64:], torch.tensor([20]))
    assert (both[1, 4, :, :64] == 1).all() and (both[1, 4, :, 64:] == 2).all() and both.sum() == 3 * 128


FLOAT8 = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def rounded(rows, factor, dtype):
    """What vLLM writes: divided in float32, to nearest even, saturated; NaN is 0x7f."""
    numbers = rows.float() / factor
    codes = numbers.clamp(-FLOAT8[dtype], FLOAT8[dtype]).to(dtype).view(torch.uint8)
    return torch.where(numbers.isnan(), 0x7F, codes)


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_bytes", [False, True])
def test_rows_are_rounded_to_8_bits(dtype, kv_dtype, is_bytes):
    """All 65,536 numbers, with a factor of all elements and with those of heads; a cache of float8 or of bytes."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 2, 64)
    rows = len(numbers)
    caches = [torch.full((rows // 16 + 1, 16, 2, 64), 0x55, dtype=torch.uint8) for _ in range(2)]
    slots = torch.randperm(rows + 16)[:rows]
    scales = dict(k_scale=0.37, v_scale=torch.tensor([1.0, 3e-3]))
    given = caches if is_bytes else [cache.view(kv_dtype) for cache in caches]
    pa.append_kv(numbers, numbers, *given, slots, **scales, **(dict(kv_dtype=kv_dtype) if is_bytes else {}))
    for cache, factor in zip(caches, (0.37, scales["v_scale"][:, None])):
        expected = torch.full_like(cache, 0x55).view(-1, 2, 64)
        expected[slots] = rounded(numbers, factor, kv_dtype)
        assert torch.equal(cache.view(-1, 2, 64), expected)


def test_what_was_appended_is_what_run_reads():
    shape = pa.AttentionShape(**SHAPE, dtype="bfloat16", kv_dtype="float8_e4m3fn")
    k_new, v_new = torch.randn(2, 20, 2, 64).bfloat16()
    k, v = torch.zeros(2, 2, 16, 2, 64, dtype=torch.float8_e4m3fn)
    scales = dict(k_scale=torch.tensor([0.25, 0.5]), v_scale=0.125)
    pa.append_kv(k_new, v_new, k, v, torch.arange(20), **scales)
    batch = Batch([[0, 1]], [20], 16, 2)
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(1, torch.bfloat16)
    k_read = k.float() * scales["k_scale"][:, None]
    expected, _ = reference(batch, q, k_read, v.float() * 0.125)
    assert torch.allclose(pa.run(plan, q, k, v, **scales).float(), expected.float(), atol=tolerance(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_was_appended_of_two_head_dims_is_what_run_reads(dtype):
    shape = pa.AttentionShape(8, 2, 192, dtype, value_head_dim=128)
    batch = random_forest(4)
    filled = caches(batch, dtype, head_dim=192, value_head_dim=128)
    written = [torch.full_like(cache, float("nan")) for cache in filled]
    slots = torch.randperm(batch.num_pages * 16)
    pa.append_kv(*(cache.flatten(0, 1)[slots] for cache in filled), *written, slots)
    plan = pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    q = queries(len(batch.lengths), dtype, head_dim=192)
    out, lse = pa.run(plan, q, *written, return_lse=True)
    expected, expected_lse = reference(batch, q, *filled)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)


def test_rows_of_two_head_dims_are_rounded():
    new = [torch.randn(4, 2, dim).bfloat16() for dim in (192, 128)]
    codes = [torch.full((2, 16, 2, dim), 0x55, dtype=torch.uint8) for dim in (192, 128)]
    slots = torch.tensor([30, 0, -1, 7])
    pa.append_kv(*new, *codes, slots, kv_dtype=torch.float8_e5m2, k_scale=0.25, v_scale=torch.tensor([2.0, 3.0]))
    for cache, rows, factor in zip(codes, new, (0.25, torch.tensor([[2.0], [3.0]]))):
        expected = torch.full_like(cache, 0x55).flatten(0, 1)
        written = slots >= 0
        expected[slots[written]] = rounded(rows, factor, torch.float8_e5m2)[written]
        assert torch.equal(cache.flatten(0, 1), expected)


def append(**changes):
    new = torch.ones(2, 2, 64, dtype=torch.float16)
    cache = torch.zeros(4, 16, 2, 64, dtype=torch.float16)
    arguments = dict(k_new=new, v_new=new, k_cache=cache, v_cache=cache.clone(), slots=torch.tensor([0, 1]))
    arguments |= changes
    try:
        pa.append_kv(**arguments)
    except Exception:
        assert (arguments["k_cache"] == 0).all() and (arguments["v_cache"] == 0).all(), "something was written"
        raise


EIGHT_BIT = {name: torch.zeros(4, 16, 2, 64, dtype=torch.uint8) for name in ("k_cache", "v_cache")}
EIGHT_BIT["kv_dtype"] = "float8_e4m3fn"


@pytest.mark.parametrize(
    "argument, error, changes",
    [
        ("slots", TypeError, dict(slots=torch.tensor([0, 1], dtype=torch.int32))),
        ("slots", ValueError, dict(slots=torch.tensor([0]))),
        ("slots", ValueError, dict(slots=torch.tensor([[0, 1]]))),
        ("slots[1]", ValueError, dict(slots=torch.tensor([0, 64]))),
        ("k_new", TypeError, dict(k_new=torch.ones(2, 2, 64))),
        ("k_new", ValueError, dict(k_new=torch.ones(2, 2, 32, dtype=torch.float16))),
        ("v_new", ValueError, dict(v_new=torch.ones(3, 2, 64, dtype=torch.float16))),
        ("v_new", ValueError, dict(v_new=torch.ones(2, 2, 32, dtype=torch.float16))),
        ("v_new", ValueError, dict(v_cache=torch.zeros(4, 16, 2, 32, dtype=torch.float16))),
        ("v_cache", ValueError, dict(v_cache=torch.zeros(4, 16, 1, 64, dtype=torch.float16))),
        ("v_cache", ValueError, dict(v_cache=torch.zeros(4, 16, 2, 60, dtype=torch.float16))),
        ("v_cache", ValueError, dict(v_cache=torch.zeros(4, 16, 2, 64, dtype=torch.float16)[..., :60])),
        ("v_cache", ValueError, dict(v_cache=torch.zeros(5, 16, 2, 64, dtype=torch.float16))),
        ("k_cache", ValueError, dict(k_cache=torch.zeros(4, 16, 128, dtype=torch.float16))),
        ("k_cache", TypeError, dict(k_cache=torch.zeros(4, 16, 2, 64, dtype=torch.float64))),
        ("k_new", ValueError, dict(k_new=torch.ones(2, 2, 64, dtype=torch.float16).requires_grad_())),
        ("k_cache", TypeError, dict(k_cache=torch.zeros(4, 16, 2, 64, dtype=torch.uint8))),
        ("k_cache", TypeError, dict(kv_dtype="float8_e5m2")),
        ("kv_dtype", ValueError, dict(kv_dtype="bfloat16")),
        ("k_scale", ValueError, dict(k_scale=2.0)),
        ("v_scale", ValueError, EIGHT_BIT | dict(v_scale=torch.tensor([1.0, 0.0]))),
        ("v_scale", ValueError, EIGHT_BIT | dict(v_scale=torch.tensor([1.0]))),
        ("k_scale", TypeError, EIGHT_BIT | dict(k_scale=torch.tensor([1.0, 1.0]).half())),
        ("k_scale", ValueError, EIGHT_BIT | dict(k_scale=float("nan"))),
        ("slots[1]", ValueError, EIGHT_BIT | dict(slots=torch.tensor([0, 64]))),
    ],
)
def test_append_refuses(argument, error, changes):
    with pytest.raises(error) as raised:
        append(**changes)
    assert str(raised.value).startswith(argument)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_two_halves_gives_the_whole(dtype):
    """Attention over the first and over the last pages of each sequence, merged, is attention over all."""
    shape = pa.AttentionShape(**SHAPE, dtype=dtype)
    batch = random_forest(17)
    planner = pa.Planner(shape, "cpu")
    q, (k, v) = queries(len(batch.lengths), dtype), caches(batch, dtype)
    halves = []
    for part in range(2):
        tables, lengths = [], []
        for ids, length in zip(batch.block_tables, batch.lengths):
            cut = (len(ids) // 2) * 16
            tables.append(ids[: len(ids) // 2] if part == 0 else ids[len(ids) // 2 :])
            lengths.append(min(length, cut) if part == 0 else max(length - cut, 0))
        plan = planner.plan(tables, lengths, 16, batch.num_pages)
        halves.append(pa.run(plan, q, k, v, return_lse=True))
    out, lse = pa.merge_states(*halves[0], *halves[1])
    expected, expected_lse = reference(batch, q, k, v)
    torch.testing.assert_close(out.double(), expected, atol=2 * tolerance(dtype), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)


def test_empty_states_are_neutral():
    out = torch.randn(3, 8, 64).half()
    lse = torch.randn(3, 8)
    nothing, minus_infinity = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    for one, two in (((out, lse), (nothing, minus_infinity)), ((nothing, minus_infinity), (out, lse))):
        merged, merged_lse = pa.merge_states(*one, *two)
        assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    merged, merged_lse = pa.merge_states(nothing, minus_infinity, nothing, minus_infinity)
    assert (merged == 0).all() and (merged_lse == float("-inf")).all()


def test_merging_in_place_and_into_strided_memory():
    a, b = torch.randn(3, 8, 64).half(), torch.randn(3, 8, 64).half()
    lse_a, lse_b = torch.randn(8, 3).t(), torch.randn(3, 8)
    expected, expected_lse = pa.merge_states(a, lse_a, b, lse_b)
    memory = torch.zeros(3, 16, 64, dtype=torch.float16)
    out, lse = pa.merge_states(a, lse_a, b, lse_b, memory[:, ::2], torch.zeros(8, 3).t())
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse) and (memory[:, 1::2] == 0).all()
    pa.merge_states(a, lse_a, b, lse_b, a, lse_a)
    assert torch.equal(a, expected) and torch.equal(lse_a, expected_lse)


@pytest.mark.parametrize(
    "argument, error, changes",
    [
        ("lse_a", TypeError, dict(lse_a=torch.zeros(3, 8, dtype=torch.float64))),
        ("out_b", TypeError, dict(out_b=torch.zeros(3, 8, 64, dtype=torch.bfloat16))),
        ("out_b", ValueError, dict(out_b=torch.zeros(2, 8, 64, dtype=torch.float16))),
        ("lse_b", ValueError, dict(lse_b=torch.zeros(3, 4))),
        ("out_a", TypeError, dict(out_a=torch.zeros(3, 8, 64))),
        ("out_a", ValueError, dict(out_a=torch.zeros(3, 512, dtype=torch.float16))),
        ("out", ValueError, dict(out=torch.zeros(1, 8, 64, dtype=torch.float16).expand(3, 8, 64))),
    ],
)
def test_merging_refuses(argument, error, changes):
    half, single = torch.zeros(3, 8, 64, dtype=torch.float16), torch.zeros(3, 8)
    arguments = dict(out_a=half, lse_a=single, out_b=half.clone(), lse_b=single.clone()) | changes
    with pytest.raises(error) as raised:
        pa.merge_states(**arguments)
    assert str(raised.value).startswith(argument)


def test_numpy_states():
    a, b = (numpy.random.default_rng(seed).standard_normal((3, 8, 64)).astype(numpy.float16) for seed in range(2))
    lse = numpy.zeros((3, 8), numpy.float32)
    out, out_lse = pa.merge_states(a, lse, b, lse, numpy.empty_like(a), numpy.empty_like(lse))
    numpy.testing.assert_allclose(out, (a.astype("f4") + b) / 2, atol=2e-3)
    numpy.testing.assert_allclose(out_lse, numpy.log(2), rtol=1e-6)
