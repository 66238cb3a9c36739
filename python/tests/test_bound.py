"""PlanBuffers and bound runs, on the CPU, where they run as they do on a device."""

import gc
import weakref

import pytest
import torch
from support import SHAPE, caches, queries, random_forest, reference

import prefix_attn as pa


class Engine:
    """A planner with a capacity, buffers, and one bound layer."""

    def __init__(self, batch, rows=None, **bind):
        shape = pa.AttentionShape(**SHAPE, dtype="float16")
        self.rows = rows or len(batch.lengths)
        self.planner = pa.Planner(shape, "cpu", capacity=pa.Capacity(self.rows, 4096, "cpu"))
        self.buffers = pa.PlanBuffers(self.planner, 16, batch.num_pages)
        self.k, self.v = caches(batch)
        self.q, self.out = queries(self.rows), torch.zeros((self.rows, 8, 64), dtype=torch.float16)
        self.lse = torch.zeros((self.rows, 8))
        self.bound = self.buffers.bind(self.k, self.v, self.q, self.out, self.lse, **bind)

    def plan(self, batch):
        return self.planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)


def test_caps_and_sinks_are_bound():
    batch = random_forest(37)
    scores = dict(softcap=2.0, sinks=torch.linspace(-3, 3, 8))
    engine = Engine(batch, **scores)
    engine.buffers.upload(engine.plan(batch))
    engine.bound.run()
    expected, expected_lse = reference(batch, engine.q, engine.k, engine.v, **scores)
    torch.testing.assert_close(engine.out.double(), expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(engine.lse.double(), expected_lse, atol=1e-3, rtol=0)


def test_every_upload_serves_the_same_bound_run():
    first = random_forest(31)
    engine = Engine(first, rows=32)
    for seed in (31, 32, 33):
        batch = random_forest(seed)
        batch.num_pages = first.num_pages
        batch.block_tables = [[page % first.num_pages for page in row] for row in batch.block_tables]
        engine.buffers.upload(engine.plan(batch))
        engine.bound.run()
        expected, expected_lse = reference(batch, engine.q[: len(batch.lengths)], engine.k, engine.v)
        torch.testing.assert_close(engine.out[: len(batch.lengths)].double(), expected, atol=3e-3, rtol=0)
        torch.testing.assert_close(engine.lse[: len(batch.lengths)].double(), expected_lse, atol=1e-3, rtol=0)


def test_a_run_before_the_first_upload_is_refused():
    with pytest.raises(ValueError, match="nothing uploaded"):
        Engine(random_forest(1)).bound.run()


def test_a_bound_run_keeps_its_tensors():
    batch = random_forest(1)
    engine = Engine(batch)
    engine.buffers.upload(engine.plan(batch))
    alive = weakref.ref(engine.k)
    bound, out, expected = engine.bound, engine.out, reference(batch, engine.q, engine.k, engine.v)[0]
    del engine
    gc.collect()
    assert alive() is not None
    bound.run()
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=0)
    del bound
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse"])
@pytest.mark.parametrize("how", ["resize_", "set_", "storage"])
def test_resized_tensors_are_noticed(name, how):
    batch = random_forest(1)
    engine = Engine(batch)
    engine.buffers.upload(engine.plan(batch))
    tensor = getattr(engine, name)
    if how == "resize_":
        tensor.resize_([10 * tensor.shape[0], *tensor.shape[1:]])
    elif how == "set_":
        tensor.set_(torch.zeros_like(tensor))
    else:
        tensor.untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="resized|torch"):
        engine.bound.run()


def test_what_a_bound_run_refuses():
    batch = random_forest(1)
    engine = Engine(batch)
    with pytest.raises(ValueError, match="^q: got shape"):
        engine.buffers.bind(engine.k, engine.v, engine.q[:-1], engine.out)
    with pytest.raises(ValueError, match="^out: got memory of q"):
        engine.buffers.bind(engine.k, engine.v, engine.q, engine.q)
    with pytest.raises(ValueError, match="run_ptr: got a run on the CPU"):
        engine.bound.run_ptr(engine.q.data_ptr(), engine.out.data_ptr())


FACTORS = [0.0, float("nan"), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -1.0]), torch.ones(3)]


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("factor", FACTORS, ids=[str(i) for i in range(len(FACTORS))])
def test_factors_are_checked_when_they_are_bound(name, factor):
    planner = pa.Planner(
        pa.AttentionShape(**SHAPE, dtype="float16", kv_dtype="float8_e4m3fn"), "cpu", capacity=pa.Capacity(4, 64, "cpu")
    )
    cache = torch.zeros((8, 16, 2, 64), dtype=torch.uint8)
    q, out = queries(4), torch.zeros((4, 8, 64), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        pa.PlanBuffers(planner, 16, 8).bind(cache, cache, q, out, **{name: factor})


def test_caps_and_factors_of_16_bit_caches_are_checked_when_they_are_bound():
    batch = random_forest(1)
    with pytest.raises(ValueError, match="^k_scale: got 2, expected 1 where K and V do not have 8 bits"):
        Engine(batch, k_scale=2.0)
    with pytest.raises(ValueError, match="^softcap: got"):
        Engine(batch, softcap=1e-45)


@pytest.mark.parametrize("name, factor, got", [("k_scale", 1e-46, "1e-46"), ("v_scale", 1e39, "1e39")])
def test_a_number_that_float32_has_not_is_said_as_it_came(name, factor, got):
    with pytest.raises(ValueError, match=f"^{name}: got {got}, expected a positive finite number of float32"):
        Engine(random_forest(1), **{name: factor})


def test_plans_of_another_kind_are_not_uploaded():
    batch = random_forest(1)
    engine = Engine(batch)
    other = pa.Planner(pa.AttentionShape(4, 2, 64, "float16"), "cpu").plan([[0]], [1], 16, batch.num_pages)
    with pytest.raises(ValueError, match="^plan: got one for"):
        engine.buffers.upload(other)
    wide = pa.Planner(engine.planner.shape, "cpu").plan([[0]] * 64, [1] * 64, 16, batch.num_pages)
    with pytest.raises(ValueError, match="^plan: got one of 64 sequences"):
        engine.buffers.upload(wide)
    pages = pa.Planner(engine.planner.shape, "cpu").plan([[0]], [1], 32, batch.num_pages)
    with pytest.raises(ValueError, match="page_size 32"):
        engine.buffers.upload(pages)
    with pytest.raises(TypeError, match="^plan: got str"):
        engine.buffers.upload("plan")


def test_later_changes_of_the_plan_do_not_reach_the_buffers():
    batch = random_forest(4)
    engine = Engine(batch)
    plan = engine.plan(batch)
    engine.buffers.upload(plan)
    engine.bound.run()
    before = engine.out.clone()
    engine.planner.advance(plan, batch.block_tables, [0] * len(batch.lengths))
    engine.bound.run()
    assert torch.equal(engine.out, before)
    engine.buffers.upload(plan)
    engine.bound.run()
    assert (engine.out == 0).all()


def test_workspaces_on_the_cpu_are_empty():
    planner = Engine(random_forest(1)).planner
    workspace = pa.Workspace.for_planner(planner)
    assert workspace.device == "cpu" and workspace.bytes > 0
    with pytest.raises((pa.CudaUnavailable, ValueError)):
        pa.Workspace(1 << 20, "cuda:99")
