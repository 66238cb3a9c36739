"""A real `Attention` layer, builders and batch preparation of vLLM: outputs against torch's SDPA, calls counted."""

import dataclasses
from types import SimpleNamespace

import device_path
import pytest
import simulated
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from world import World

import prefix_attn as pa
from prefix_attn.vllm import eligibility
from prefix_attn.vllm.builder import Builder


@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(monkeypatch, model_folder, stock_kernels, seeded, seed):
    world = World(monkeypatch, model_folder, seed)
    steps = calls = 0
    for metadata, batch in world.random_steps(25):
        decodes = int((batch.num_scheduled_tokens == 1).sum())
        split = getattr(metadata, "prefix_attn", None)
        assert (split is None) == (decodes == 0)
        if split is not None:
            assert split.decode_rows == decodes
            assert (split.prefill is None) == (decodes == batch.num_reqs)
            calls += 2
        steps += 1
    metrics = world.builder.metrics
    assert metrics.steps == steps == 25
    assert metrics.kernel_calls == calls == 2 * (metrics.decode_steps + metrics.mixed_steps)
    assert metrics.mixed_steps > 0 and metrics.planned_rows > 0
    assert len(stock_kernels) == 2 * (metrics.mixed_steps + metrics.stock_steps)


def test_decode_only_steps_never_reach_the_stock_kernel(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    running = world.joined(70, 70, 80, 33)
    world.step([(running[0], running[0].prompt)])
    world.step([(request, request.prompt - request.computed) for request in running[1:]])
    stock_kernels.clear()
    for _ in range(20):
        world.step([(request, 1) for request in running])
    assert stock_kernels == []
    assert world.builder.metrics.decode_steps == 20 and world.builder.metrics.kernel_calls == 40


def test_padded_rows_of_full_graphs(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    running = world.joined(40, 50, 20)
    for request in running:
        world.step([(request, request.prompt - request.computed)])
    metadata, batch = world.step([(request, 1) for request in running], pad_to=8, mode=CUDAGraphMode.FULL)
    assert batch.num_reqs == 3 and metadata.prefix_attn.decode_rows == 8


def test_the_stock_builder_looks_for_windows(monkeypatch, model_folder, stock_kernels, seeded):
    """It does so in its first build alone, unless that is a fast one: then later schedules are made for no window."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    asked, build = [], FlashAttentionMetadataBuilder.build

    def watched(builder, prefix, batch, fast):
        asked.append(fast)
        return build(builder, prefix, batch, fast)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", watched)
    world = World(monkeypatch, model_folder)
    running = world.joined(1, 1)
    world.step([(running[0], 1)])
    assert asked == [False]
    world.step([(running[0], 1)])
    world.step([(running[1], 1)])
    assert asked == [False, True, True]


def test_one_prefill_does_not_take_the_decodes_along(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    running = world.joined(*[64] * 10)
    for request in running[:9]:
        world.step([(request, request.prompt - request.computed)])
    stock_kernels.clear()
    last = running[9]
    metadata, _ = world.step([(request, 1) for request in running[:9]] + [(last, last.prompt - last.computed)])
    assert metadata.prefix_attn.decode_rows == 9
    assert stock_kernels == [(1, last.prompt - 48)] * 2


def test_blocks_that_are_computed_in_the_same_step(monkeypatch, model_folder, stock_kernels, seeded):
    """vLLM shares blocks before anybody has computed them: a row of one token reads what another row's prefill writes."""
    world = World(monkeypatch, model_folder)
    running = world.joined(48, 49, 49)
    assert [request.computed for request in running] == [0, 48, 48]
    metadata, _ = world.step([(running[1], 1), (running[2], 1), (running[0], 48)])
    assert metadata.prefix_attn.decode_rows == 2
    assert stock_kernels == [(1, 48)] * 2


def test_a_step_without_announced_tables_is_stock(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    world.builder.step_tables = None
    batch = SimpleNamespace()
    assert world.builder._decode_rows(batch, None) == (0, 0)
    assert "which request a row is" in world.builder._stock_reason


def test_a_lost_announcement_after_plans_is_an_error(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.step([(running[0], 1)])
    with pytest.raises(RuntimeError, match="old plan"):
        world.builder._decode_rows(SimpleNamespace(), None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"alibi_slopes": [0.5] * 8}, "ALiBi"),
        (
            {
                "config": {
                    "self.speculative_config": SimpleNamespace(num_speculative_tokens=3),
                    "scheduler_config.async_scheduling": True,
                }
            },
            "speculative decoding under asynchronous scheduling",
        ),
        ({"config": {"self.kv_transfer_config": SimpleNamespace()}}, "KV connector"),
        ({"config": {"parallel_config.enable_dbo": True}}, "microbatches"),
    ],
)
def test_what_is_not_served_stays_stock(monkeypatch, model_folder, caplog_vllm, change, reason):
    world = World(monkeypatch, model_folder, **change)
    assert reason in world.builder._stock_reason
    lines = [line for line in caplog_vllm if "stay on FlashAttention" in line]
    assert len(lines) == 1 and reason in lines[0]


@pytest.mark.parametrize(
    "layer",
    [
        {"sinks": torch.arange(8) / 2 - 1},
        {"logits_soft_cap": 2.0},
        {"per_layer_sliding_window": 128},
        {"per_layer_sliding_window": 37, "sinks": torch.arange(8) / 2 - 1, "drafts": 2},
    ],
)
@pytest.mark.parametrize("way", ["host", "device"])
def test_windows_sinks_and_soft_caps(monkeypatch, model_folder, stock_kernels, seeded, layer, way):
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(eligibility, "MIN_WINDOW", 1)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
    if way == "device":
        device_path.install(monkeypatch)
    world = World(monkeypatch, model_folder, **layer)
    window = layer.get("per_layer_sliding_window")
    reason = pa.supports(world.builder._shape, simulated.BLOCK, window=window)
    assert world.builder._stock_reason == reason and (reason is None or window is not None)
    for _ in world.random_steps(12):
        pass
    metrics = world.builder.metrics
    assert metrics.kernel_calls == 2 * (metrics.decode_steps + metrics.mixed_steps)
    assert (metrics.kernel_calls > 12) == (reason is None)


@pytest.mark.parametrize("text", ["", "-1", "many", "5.5"])
def test_a_least_window_that_is_no_number_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("PREFIX_ATTN_MIN_WINDOW", text)
    with pytest.raises(ValueError, match=f"^PREFIX_ATTN_MIN_WINDOW: got '{text}', expected a number of tokens$"):
        eligibility._tokens("PREFIX_ATTN_MIN_WINDOW", 512)
    monkeypatch.delenv("PREFIX_ATTN_MIN_WINDOW")
    assert eligibility._tokens("PREFIX_ATTN_MIN_WINDOW", 512) == 512


@pytest.mark.parametrize("window", [128, 511, 512])
def test_short_windows_are_the_stock_backends(monkeypatch, model_folder, stock_kernels, seeded, window):
    world = World(monkeypatch, model_folder, per_layer_sliding_window=window)
    reason = f"a window of {window} tokens, shorter than PREFIX_ATTN_MIN_WINDOW=512"
    assert world.builder._stock_reason == (None if window == 512 else reason)
    for _ in world.random_steps(4):
        pass
    assert (world.builder.metrics.kernel_calls > 0) == (window == 512)


def test_groups_of_more_heads_than_a_tile_has_rows_are_served(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder, heads=(258, 2))
    assert world.builder._stock_reason is None
    for _ in world.random_steps(4):
        pass
    assert world.builder.metrics.kernel_calls > 0


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256, 512])
def test_all_head_dims_are_served(monkeypatch, model_folder, head_dim):
    world = World(monkeypatch, model_folder)
    spec = dataclasses.replace(world.spec, head_size=head_dim, head_size_v=head_dim)
    assert eligibility.of_group(spec, pa.AttentionShape(8, 2, head_dim, "bfloat16")) is None


@pytest.fixture
def fp8_flash_attention(monkeypatch):
    """FlashAttention 3 as on Hopper, which takes FP8 caches, and the operator that quantises queries for it, in torch."""
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(QuantFP8, "forward_cuda", QuantFP8.forward_native)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)


@pytest.mark.parametrize("layer", [{}, {"drafts": 2}, {"logits_soft_cap": 2.0, "sinks": torch.arange(8) / 2 - 1}])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("way", ["host", "device"])
def test_fp8_caches(
    monkeypatch, model_folder, stock_kernels, seeded, fp8_flash_attention, caplog_vllm, layer, cache_dtype, way
):
    """Decode rows have 16-bit queries (the tolerance says so), prefill rows those that FlashAttention asks for."""
    if way == "device":
        device_path.install(monkeypatch)
    world = World(monkeypatch, model_folder, cache_dtype=cache_dtype, **layer)
    assert world.layers[0].query_quant is None and world.builder._stock_reason is None
    assert 'kv_dtype="float8_e4m3fn"' in caplog_vllm[-1]
    for _ in world.random_steps(12):
        pass
    metrics = world.builder.metrics
    assert metrics.kernel_calls == 2 * (metrics.decode_steps + metrics.mixed_steps) > 12
    assert metrics.mixed_steps > 0 and len(stock_kernels) == 2 * (metrics.mixed_steps + metrics.stock_steps)


def test_fp8_caches_on_the_stock_path(monkeypatch, model_folder, stock_kernels, seeded, fp8_flash_attention):
    """FlashAttention gets FP8 queries, which the implementation has quantised."""
    from vllm.v1.attention.backends import flash_attn

    seen, kernel = [], flash_attn.flash_attn_varlen_func
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda q, **rest: (seen.append(q), kernel(q, **rest))[1])
    world = World(monkeypatch, model_folder, cache_dtype="fp8", config={"parallel_config.enable_dbo": True})
    assert world.builder._stock_reason == "microbatches" and world.layers[0].query_quant is None
    for _ in world.random_steps(4):
        pass
    assert world.builder.metrics.kernel_calls == 0
    assert {q.dtype for q in seen} == {torch.float8_e4m3fn} and seen[0].shape[1:] == (8, 64)


def test_what_of_fp8_caches_is_not_served(monkeypatch, model_folder, stock_kernels, fp8_flash_attention):
    world = World(monkeypatch, model_folder, cache_dtype="fp8")
    layer, spec, shape = world.layers[0], world.spec, world.builder._shape
    assert eligibility.of_layer(layer, spec, shape, ranks=1) is None
    assert "decode context parallelism" in eligibility.of_layer(layer, spec, shape, ranks=2)
    layer.calculate_kv_scales = True
    assert "a first step computes" in eligibility.of_layer(layer, spec, shape, ranks=1)
    layer.kv_cache_dtype = "fp8_e5m2"
    assert "fp8_e5m2" in eligibility.of_layer(layer, spec, shape, ranks=1)


@pytest.mark.parametrize("way", ["host", "device"])
def test_factors_of_heads_that_are_loaded_again(
    monkeypatch, model_folder, stock_kernels, seeded, fp8_flash_attention, way
):
    """Runs are bound to the factors' copies; new weights must reach these."""
    if way == "device":
        device_path.install(monkeypatch)
    world = World(monkeypatch, model_folder, cache_dtype="fp8")
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.step([(running[0], 1)])
    for layer in world.layers:
        # One factor for each KV head, other than those by which the cache was written.
        layer._k_scale, layer._v_scale = torch.tensor([0.25, 0.25]), torch.tensor([1.0, 0.5])
        layer.impl.process_weights_after_loading(torch.bfloat16)
    with pytest.raises(AssertionError, match="not close"):
        world.step([(running[0], 1)])
    assert all(layer.impl._scores["v_scale"].tolist() == [1.0, 0.5] for layer in world.layers)


def test_sinks_that_are_loaded_again(monkeypatch, model_folder, stock_kernels, seeded):
    """Runs are bound to the sinks' copies; new weights must reach these."""
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
    device_path.install(monkeypatch)
    sinks = torch.zeros(8)
    world = World(monkeypatch, model_folder, sinks=sinks)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.step([(running[0], 1)])
    sinks.fill_(4.0)
    for layer in world.layers:
        layer.impl.process_weights_after_loading(torch.bfloat16)
    world.step([(running[0], 1)])


def test_graph_support(monkeypatch, model_folder):
    world = World(monkeypatch, model_folder)
    support = Builder.get_cudagraph_support(world.config, world.spec)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    drafts = SimpleNamespace(num_speculative_tokens=3)
    monkeypatch.setattr(world.config, "speculative_config", drafts)
    monkeypatch.setattr(world.config.scheduler_config, "async_scheduling", False)
    assert Builder.get_cudagraph_support(world.config, world.spec) == AttentionCGSupport.UNIFORM_BATCH
    monkeypatch.setattr(world.config.scheduler_config, "async_scheduling", True)
    monkeypatch.setattr(Builder.__mro__[1], "_cudagraph_support", AttentionCGSupport.ALWAYS)
    stock_support = Builder.__mro__[1].get_cudagraph_support(world.config, world.spec)
    assert Builder.get_cudagraph_support(world.config, world.spec) == stock_support != support


def test_check_mode_finds_a_length_that_is_too_long(monkeypatch, model_folder, stock_kernels, seeded):
    from prefix_attn.vllm import builder

    monkeypatch.setattr(builder, "IS_CHECKING", True)
    world = World(monkeypatch, model_folder)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.step([(running[0], 1)])
    prepare = simulated.SimpleNamespace

    def longer(**fields):
        if "seq_lens_cpu_upper_bound" in fields:
            fields["seq_lens_cpu_upper_bound"] = fields["seq_lens_cpu_upper_bound"] + 1
        return prepare(**fields)

    monkeypatch.setattr(simulated, "SimpleNamespace", longer)
    with pytest.raises(RuntimeError, match="lengths on the host"):
        world.step([(running[0], 1)])


def test_check_mode_compares_the_entries_that_rows_see(monkeypatch, model_folder, stock_kernels, seeded):
    """vLLM 0.33 gives the device 0 for entries wholly in front of a row's window."""
    from prefix_attn.vllm import builder

    monkeypatch.setattr(builder, "IS_CHECKING", True)
    monkeypatch.setattr(eligibility, "MIN_WINDOW", 1)
    world = World(monkeypatch, model_folder, per_layer_sliding_window=64)
    running = world.joined(200)
    world.step([(running[0], 200)])
    gather, zeros = simulated.Gather.__call__, 0

    def without_front(self, idx_mapping, addresses, *args, **kwargs):
        gather(self, idx_mapping, addresses, *args, **kwargs)
        simulated.by_address[addresses.tolist()[0]].input_block_tables[0][0, :zeros] = 0

    monkeypatch.setattr(simulated.Gather, "__call__", without_front)
    zeros = (201 - 64) // simulated.BLOCK
    world.step([(running[0], 1)])
    zeros += 1
    with pytest.raises(RuntimeError, match="table of row 0"):
        world.step([(running[0], 1)])


def test_a_page_outside_the_pool_is_refused_before_anything_runs(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder, pages=64)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.tables.append_block_ids(running[0].slot, ([1, 2, 64],), overwrite=True)
    world.tables.apply_staged_writes()
    with pytest.raises(ValueError, match="64"):
        world.step([(running[0], 1)])


