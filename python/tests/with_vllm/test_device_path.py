"""Plan buffers, bound runs and full graphs: what else runs on a device alone, with stand-ins for its memory."""

import device_path
import numpy as np
import pytest
import simulated
import stock
import torch
from vllm.config import CUDAGraphMode
from world import ROWS, SCALE, TOLERANCE, World

import prefix_attn as pa
from prefix_attn.vllm import decoder
from prefix_attn.vllm.tables import StepTables, TableMirror


@pytest.fixture
def launches(monkeypatch):
    """Those of the device's way."""
    return device_path.install(monkeypatch)


@pytest.mark.parametrize("seed", range(2))
def test_random_schedules(monkeypatch, model_folder, stock_kernels, seeded, launches, seed):
    world = World(monkeypatch, model_folder, seed)
    for _ in world.random_steps(20):
        pass
    metrics = world.builder.metrics
    assert metrics.kernel_calls == len(launches) == 2 * (metrics.decode_steps + metrics.mixed_steps) > 20
    assert len(world.builder._decoder._capacities) > 1


def test_a_full_graph_serves_every_later_step(monkeypatch, model_folder, stock_kernels, seeded, launches):
    """The layers run once, at the capture; then only plans change, and what lies at the captured addresses."""
    world = World(monkeypatch, model_folder)
    running = world.joined(70, 70, 85, 33, 16)
    for request in running:
        world.step([(request, request.prompt - request.computed)])
    rows = 8
    query = torch.zeros(rows, 8, 64, dtype=torch.bfloat16)
    outs = [torch.zeros_like(query) for _ in world.layers]

    nobody = [(simulated.Request(0, 1, [1], 0), 1)] * rows
    metadata, _, _ = simulated.prepare(world.tables, nobody, world.groups, mode=CUDAGraphMode.FULL, is_dummy=True)
    launches.clear()
    for layer, out in zip(world.layers, outs):
        layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata[layer.layer_name], out)
    graph = list(launches)
    assert len(graph) == 2 and not any(out.any() for out in outs)

    for step in range(40):
        if step == 12:
            world.engine.leave(running[1])
        if step == 20:
            world.joined(97, 20)
            for request in running[-2:]:
                world.step([(request, request.prompt - request.computed)])
        scheduled = [(request, 1) for request in running]
        calls = world.builder.metrics.kernel_calls
        _, slots, _ = simulated.prepare(world.tables, scheduled, world.groups, pad_to=rows, mode=CUDAGraphMode.FULL)
        new = torch.cat([world.values(request, request.computed, 1) for request in running], 1)
        query.copy_(torch.randn(query.shape))
        for layer in world.layers:
            layer.impl.do_kv_cache_update(layer, *new, layer.kv_cache, slots[: len(running)])
        for launch in graph:
            launch()
        for row, request in enumerate(running):
            request.computed += 1
            want = stock.attend(query[row : row + 1], *world.values(request, 0, request.computed), SCALE)
            for out in outs:
                torch.testing.assert_close(out[row : row + 1].float(), want.float(), atol=TOLERANCE, rtol=0)
        assert world.builder.metrics.kernel_calls == calls


def test_no_memory_for_the_workspace(monkeypatch, model_folder, stock_kernels, seeded, launches):
    """The driver's error is the step's, no row was computed, and the next step is right."""
    world = World(monkeypatch, model_folder)
    running = world.joined(70, 70)
    world.step([(running[0], 70)])
    world.step([(running[1], running[1].prompt - running[1].computed)])
    launches.clear()

    def refuse(planner):
        raise pa.CudaError("CUDA cannot allocate 1 byte: out of memory")

    with monkeypatch.context() as context:
        context.setattr(decoder.pa, "Workspace", type("Workspace", (), {"for_planner": staticmethod(refuse)}))
        with pytest.raises(pa.CudaError, match="out of memory"):
            world.step([(request, 1) for request in running])
    assert launches == []
    world.step([(request, 1) for request in running])
    assert len(launches) == 2


def test_no_memory_for_a_plan(monkeypatch, model_folder, stock_kernels, seeded, launches):
    world = World(monkeypatch, model_folder)
    running = world.joined(70)
    world.step([(running[0], 70)])
    launches.clear()

    def refuse(*_):
        raise pa.CudaError("CUDA cannot allocate 1 byte: out of memory")

    with monkeypatch.context() as context:
        context.setattr(decoder.pa, "PlanBuffers", refuse)
        with pytest.raises(pa.CudaError, match="out of memory"):
            world.step([(running[0], 1)])
    assert launches == [] and world.builder.metrics.kernel_calls == 0
    world.step([(running[0], 1)])
    assert len(launches) == 2


def test_a_plan_larger_than_the_capacity(monkeypatch, model_folder, stock_kernels, seeded, launches):
    """Rows longer, or more of them, than the engine said: an error that names both numbers, before anything is uploaded."""
    world = World(monkeypatch, model_folder)
    running = world.joined(70)
    world.step([(running[0], 70)])
    world.step([(running[0], 1)])
    before = len(launches)
    group = world.builder._decoder.group
    assert (group.max_rows, group.max_row_pages) == (24, 65)
    tables = StepTables(TableMirror(ROWS, 80, simulated.BLOCK), np.zeros(25, dtype=np.int32), is_dummy=False)
    with pytest.raises(ValueError, match="25 rows.*24"):
        world.builder._decoder.plan(tables, np.full(25, 10, dtype=np.int32))
    with pytest.raises(ValueError, match="66 pages.*65"):
        world.builder._decoder.plan(tables, np.full(1, 65 * simulated.BLOCK + 1, dtype=np.int32))
    assert len(launches) == before
    world.step([(running[0], 1)])


def test_engines_of_one_process_know_their_own_tables(monkeypatch, model_folder, stock_kernels, seeded, launches):
    """A restart in the middle: another engine comes while the first one is there, or is gone."""
    first = World(monkeypatch, model_folder, seed=1)
    for _ in first.random_steps(5):
        pass
    second = World(monkeypatch, model_folder, seed=2)
    for _ in zip(second.random_steps(5), first.random_steps(5)):
        pass
    del first
    for _ in second.random_steps(5):
        pass
    assert second.builder.metrics.steps == 10 and second.builder.metrics.kernel_calls > 0
