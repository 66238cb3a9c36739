"""The custom operators, eager and under torch.compile."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from support import SHAPE, caches, queries, random_forest, reference

import prefix_attn as pa
from prefix_attn import torch_op


def a_step(planner, seed):
    batch = random_forest(seed)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    return batch, plan, queries(len(batch.lengths)), *caches(batch)


def test_operators_pass_the_checks_of_torch(planner):
    batch, plan, q, k, v = a_step(planner, 3)
    slot = torch_op.PlanSlot(plan)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.prefix_attn.decode, (q, k, v, slot.number), test_utils=tests)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
    torch.library.opcheck(torch.ops.prefix_attn.decode_out, (q, k, v, out, lse, slot.number), test_utils=tests)
    new, slots = torch.ones(2, 2, 64, dtype=torch.float16), torch.tensor([3, -1])
    torch.library.opcheck(torch.ops.prefix_attn.append_kv, (new, new, k, v, slots), test_utils=tests)


class Layer(torch.nn.Module):
    """What surrounds attention in a model: a projection before it and an addition behind it."""

    def __init__(self, slot):
        super().__init__()
        self.slot = slot
        self.weight = torch.nn.Parameter(torch.eye(64, dtype=torch.float16), requires_grad=False)

    def forward(self, x, k, v):
        q = x @ self.weight
        return torch_op.decode(q, k, v, self.slot) + x


def test_a_layer_compiles_as_one_graph_and_takes_new_plans(planner):
    slot = torch_op.PlanSlot()
    layer = torch.compile(Layer(slot), fullgraph=True, dynamic=True)
    compiled_before = None
    for seed in (5, 6, 7):
        batch, slot.plan, q, k, v = a_step(planner, seed)
        out = layer(q, k, v)
        expected = reference(batch, q, k, v)[0] + q.double()
        torch.testing.assert_close(out.double(), expected, atol=6e-3, rtol=0)
        if compiled_before is not None:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled_before
        compiled_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_step_that_writes_is_not_reordered(planner):
    """append_kv writes what decode reads: the compiler must keep them in order, and see that out is written."""
    slot = torch_op.PlanSlot()
    batch, slot.plan, q, k, v = a_step(planner, 9)
    rows = len(batch.lengths)
    row = max(range(rows), key=lambda row: batch.lengths[row])
    last = batch.lengths[row] - 1
    slots = torch.full((rows,), -1, dtype=torch.int64)
    slots[row] = batch.block_tables[row][last // 16] * 16 + last % 16
    new = torch.full((rows, 2, 64), 0.25, dtype=torch.float16)

    @torch.compile(fullgraph=True)
    def step(q, k, v, out):
        before = out.sum()
        torch_op.append_kv(new, new, k, v, slots)
        torch_op.decode_out(q, k, v, out, slot)
        return before, out.sum()

    out = torch.zeros_like(q)
    before, after = step(q, k, v, out)
    assert (k.view(-1, 2, 64)[slots[row]] == 0.25).all()
    expected = reference(batch, q, k, v)[0]
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=0)
    assert before == 0 and after == out.sum()


def test_one_graph_writes_and_reads_values_of_another_head_dim():
    shape = pa.AttentionShape(8, 2, 192, "float16", value_head_dim=128)
    batch = random_forest(9)
    slot = torch_op.PlanSlot(pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages))
    q, filled = queries(len(batch.lengths), head_dim=192), caches(batch, head_dim=192, value_head_dim=128)
    written = [torch.full_like(cache, float("nan")) for cache in filled]
    slots = torch.arange(batch.num_pages * 16)

    @torch.compile(fullgraph=True)
    def step(q, k_new, v_new, k, v):
        torch_op.append_kv(k_new, v_new, k, v, slots)
        return torch_op.decode(q, k, v, slot)

    out = step(q, *(cache[:-1].flatten(0, 1) for cache in filled), *written)
    torch.testing.assert_close(out.double(), reference(batch, q, *filled)[0], atol=3e-3, rtol=0)


def test_slots_without_a_plan_are_refused(planner):
    batch, plan, q, k, v = a_step(planner, 3)
    with pytest.raises(ValueError, match="^slot: got a PlanSlot without a plan"):
        torch_op.decode(q, k, v, torch_op.PlanSlot())
    number = torch_op.PlanSlot(plan).number
    with pytest.raises(ValueError, match=f"^slot: got number {number}"):
        torch.ops.prefix_attn.decode(q, k, v, number)


@pytest.mark.parametrize("of_heads", [False, True])
def test_8_bit_caches_are_written_and_read_by_one_graph(of_heads):
    shape = pa.AttentionShape(**SHAPE, dtype="float16", kv_dtype="float8_e4m3fn")
    batch = random_forest(9)
    slot = torch_op.PlanSlot(pa.Planner(shape, "cpu").plan(batch.block_tables, batch.lengths, 16, batch.num_pages))
    q, (k, v) = queries(len(batch.lengths)), caches(batch)
    scales = dict(k_scale=torch.tensor([0.25, 0.5]), v_scale=torch.tensor([2.0, 1.0])) if of_heads else dict(v_scale=0.5)
    stored = [torch.zeros(cache.shape, dtype=torch.uint8) for cache in (k, v)]
    slots = torch.arange(k.shape[0] * 16)

    @torch.compile(fullgraph=True)
    def step(q, k_new, v_new, k, v, out):
        torch_op.append_kv(k_new, v_new, k, v, slots, kv_dtype="float8_e4m3fn", **scales)
        float8 = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
        torch_op.decode_out(q, *float8, out, slot, **scales)
        return torch_op.decode(q, *float8, slot, **scales)

    out = torch.empty_like(q)
    returned = step(q, k.flatten(0, 1), v.flatten(0, 1), *stored, out)
    factors = [scales.get(name, torch.ones(2)) * torch.ones(2) for name in ("k_scale", "v_scale")]
    read = [codes.view(torch.float8_e4m3fn).float() * factor[:, None] for codes, factor in zip(stored, factors)]
    # Half a step: a sixteenth of a number, or of the smallest ones.
    for rows, cache in zip(read, (k, v)):
        assert ((rows - cache).abs() <= cache.abs() / 16 + 2**-9)[: batch.num_pages].all()
    expected = reference(batch, q, *read)[0]
    for result in (out, returned):
        torch.testing.assert_close(result.double(), expected, atol=6e-3, rtol=0)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copied_model_runs_plans_of_its_own(planner, copied, compiled):
    """Of a slot that kept its number, the copy would run the plan of the original."""
    slot = torch_op.PlanSlot()
    steps = [a_step(planner, seed) for seed in (5, 6)]
    slot.plan = steps[0][1]
    copied_slot = copied(slot)
    slots = [slot, copied_slot]
    assert slot.number != copied_slot.number
    assert copied_slot.plan is (slot.plan if copied in (copy.copy, copy.deepcopy) else None)
    copied_slot.plan = steps[1][1]
    for one, (batch, _, q, k, v) in zip(slots, steps):
        layer = torch.compile(Layer(one), fullgraph=True) if compiled else Layer(one)
        out = layer(q, k, v)
        torch.testing.assert_close(out.double(), reference(batch, q, k, v)[0] + q.double(), atol=6e-3, rtol=0)


def test_layers_that_share_a_slot_share_one_in_a_copy():
    slot = torch_op.PlanSlot()
    first, second = copy.deepcopy(torch.nn.ModuleList([Layer(slot), Layer(slot)]))
    assert first.slot is second.slot and first.slot is not slot


ARRAY = np.ones(2, dtype=np.float32)
WRONG_TYPES = [
    *((name, bad) for name in ("q", "k_cache", "v_cache") for bad in (None, "a", ARRAY, [1.0])),
    *(("slot", bad) for bad in (None, 5, "a", torch_op.PlanSlot)),
    *((name, bad) for name in ("scale", "softcap") for bad in ("x", [0.5], torch.tensor([0.5]), ARRAY[:1], 1j, float)),
    *((name, bad) for name in ("k_scale", "v_scale") for bad in ("x", ARRAY, [1.0, 1.0])),
    *(("kv_layout", bad) for bad in (3, None)),
    *(("sinks", bad) for bad in ([1.0] * 4, 1.0, ARRAY)),
]


@pytest.mark.parametrize(("name", "bad"), WRONG_TYPES, ids=map(str, range(len(WRONG_TYPES))))
def test_decode_refuses_other_types_by_name(planner, name, bad):
    _, plan, q, k, v = a_step(planner, 3)
    right = dict(q=q, k_cache=k, v_cache=v, slot=torch_op.PlanSlot(plan))
    out = torch.full_like(q, 7)
    for call in (torch_op.decode, functools.partial(torch_op.decode_out, out=out)):
        with pytest.raises(TypeError, match=f"^{name}: got {type(bad).__name__}, expected"):
            call(**right | {name: bad})
    assert bool((out == 7).all())


@pytest.mark.parametrize("name", ["out", "lse"])
def test_decode_out_refuses_other_types_by_name(planner, name):
    _, plan, q, k, v = a_step(planner, 3)
    right = dict(out=torch.empty_like(q), lse=None)
    with pytest.raises(TypeError, match=f"^{name}: got list"):
        torch_op.decode_out(q, k, v, slot=torch_op.PlanSlot(plan), **right | {name: [1.0]})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, bad) for name in ("k_new", "v_new", "k_cache", "v_cache", "slots") for bad in (None, [3, -1], ARRAY)),
        ("kv_layout", 3),
        ("k_scale", ARRAY),
        ("k_scale", True),
        ("v_scale", "x"),
    ],
)
def test_append_kv_refuses_other_types_by_name(name, bad):
    new, caches = torch.ones(2, 2, 64, dtype=torch.float16), torch.zeros(2, 1, 16, 2, 64, dtype=torch.float16)
    right = dict(k_new=new, v_new=new, k_cache=caches[0], v_cache=caches[1], slots=torch.tensor([3, -1]))
    with pytest.raises(TypeError, match=f"^{name}: got {type(bad).__name__}, expected"):
        torch_op.append_kv(**right | {name: bad})
    assert not caches.any()


@pytest.mark.parametrize("scale", [1, np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_without_dimensions_are_taken_as_run_takes_them(planner, scale):
    _, plan, q, k, v = a_step(planner, 3)
    out = torch_op.decode(q, k, v, torch_op.PlanSlot(plan), scale=scale)
    assert torch.equal(out, pa.run(plan, q, k, v, scale=float(scale)))
