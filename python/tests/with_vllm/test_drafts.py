"""Speculative decoding: rows with several query tokens, of which each sees the tokens up to itself."""

import device_path
import pytest
import simulated
import stock
import torch
from vllm.config import CUDAGraphMode
from world import LAYERS, SCALE, TOLERANCE, World

DRAFTS = 3


@pytest.mark.parametrize("way", ["host", "device"])
@pytest.mark.parametrize("seed", range(3))
def test_random_schedules(monkeypatch, model_folder, stock_kernels, seeded, seed, way):
    launches = device_path.install(monkeypatch) if way == "device" else None
    world = World(monkeypatch, model_folder, seed, drafts=DRAFTS)
    longest = calls = 0
    for metadata, batch in world.random_steps(25):
        decodes = int((batch.num_scheduled_tokens <= 1 + DRAFTS).sum())
        split = getattr(metadata, "prefix_attn", None)
        assert (split is None) == (decodes == 0)
        if split is not None:
            assert split.decode_rows == decodes
            assert split.decode_tokens == batch.num_scheduled_tokens[:decodes].sum()
            longest = max(longest, *batch.num_scheduled_tokens[:decodes])
            calls += 2
    metrics = world.builder.metrics
    assert longest == 1 + DRAFTS
    assert metrics.kernel_calls == calls == 2 * (metrics.decode_steps + metrics.mixed_steps) > 20
    assert launches is None or len(launches) == calls
    assert len(stock_kernels) == 2 * (metrics.mixed_steps + metrics.stock_steps)


def test_prefill_rows_begin_behind_the_decode_tokens(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder, drafts=DRAFTS)
    running = world.joined(*[64] * 5)
    for request in running[:4]:
        world.step([(request, request.prompt - request.computed)])
    stock_kernels.clear()
    last = running[4]
    scheduled = [(request, tokens) for request, tokens in zip(running, (4, 1, 3, 4))]
    metadata, _ = world.step([*scheduled, (last, last.prompt - last.computed)])
    assert (metadata.prefix_attn.decode_rows, metadata.prefix_attn.decode_tokens) == (4, 12)
    assert stock_kernels == [(1, last.prompt - 48)] * 2


def test_a_full_graph_of_several_query_tokens(monkeypatch, model_folder, stock_kernels, seeded):
    """Captured for 8 rows of 4 tokens, replayed for fewer: the layers run once, then only plans change."""
    launches = device_path.install(monkeypatch)
    world = World(monkeypatch, model_folder, drafts=DRAFTS)
    running = world.joined(70, 70, 85, 33, 16)
    for request in running:
        world.step([(request, request.prompt - request.computed)])
    rows, each = 8, 1 + DRAFTS
    query = torch.zeros(rows * each, 8, 64, dtype=torch.bfloat16)
    out = torch.zeros_like(query)
    layer = world.layers[0]

    nobody = [(simulated.Request(0, each, [1], 0), each)] * rows
    metadata, _, _ = simulated.prepare(world.tables, nobody, world.groups, mode=CUDAGraphMode.FULL, is_dummy=True)
    launches.clear()
    layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata[LAYERS[0]], out)
    (replay,) = launches

    for step in range(9):
        if step == 4:
            world.engine.leave(running[1])
        scheduled = [(request, each) for request in running]
        metadata, slots, _ = simulated.prepare(
            world.tables, scheduled, world.groups, pad_to=rows, mode=CUDAGraphMode.FULL, each=each
        )
        split = metadata[LAYERS[0]].prefix_attn
        assert (split.decode_rows, split.decode_tokens) == (rows, rows * each)
        new = torch.cat([world.values(request, request.computed, each) for request in running], 1)
        query.copy_(torch.randn(query.shape))
        layer.impl.do_kv_cache_update(layer, *new, layer.kv_cache, slots[: len(running) * each])
        replay()
        for row, request in enumerate(running):
            history = world.values(request, 0, request.computed + each)
            span = slice(row * each, (row + 1) * each)
            want = stock.attend(query[span], *history, SCALE)
            torch.testing.assert_close(out[span].float(), want.float(), atol=TOLERANCE, rtol=0)
            world.engine.count(request, each)


def test_decode_context_parallel_ranks_serve_single_tokens_alone(monkeypatch, model_folder):
    """Under it a row has its own new token beside the cache, no more."""
    from prefix_attn.vllm import builder

    world = World(monkeypatch, model_folder, drafts=DRAFTS)
    assert builder._query_tokens(world.config) == 1 + DRAFTS
    monkeypatch.setattr(world.config.parallel_config, "decode_context_parallel_size", 2)
    assert builder._query_tokens(world.config) == 1
