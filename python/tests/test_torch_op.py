"""The custom operators, eager and under torch.compile."""

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
