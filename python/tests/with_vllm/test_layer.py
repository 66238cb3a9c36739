"""A real `Attention` layer, builders and batch preparation of vLLM: outputs against torch's SDPA, calls counted."""

from types import SimpleNamespace

import pytest
import simulated
import stock
import torch
from vllm.config import (
    AttentionConfig,
    CacheConfig,
    CUDAGraphMode,
    DeviceConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.utils import AttentionGroup

from prefix_attn.vllm.backend import Backend
from prefix_attn.vllm.builder import Builder

SCALE = 64**-0.5
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
ROWS = 24
#: bfloat16 outputs of values of about 1: one rounding of P, one of O.
TOLERANCE = 2e-2


class World:
    """Two layers, their caches, the block tables and a builder."""

    def __init__(self, monkeypatch, model_folder, seed=0, pages=400, **layer):
        with monkeypatch.context() as context:
            # On a machine without Triton the configuration refuses runner V2.
            context.setattr(VllmConfig, "use_v2_model_runner", False)
            self.config = self._config(model_folder)

        for name, value in layer.pop("config", {}).items():
            owner, attribute = name.split(".")
            monkeypatch.setattr(getattr(self.config, owner) if owner != "self" else self.config, attribute, value)
        with set_current_vllm_config(self.config):
            self.layers = [
                Attention(8, 64, SCALE, num_kv_heads=2, prefix=name, attn_backend=Backend, **layer).to(torch.bfloat16)
                for name in LAYERS
            ]
            spec = self.layers[0].get_kv_cache_spec(self.config)
            for attention in self.layers:
                # NHD memory seen as [blocks, heads, tokens, 2 * head_dim], as vLLM binds it. Nobody may read what nobody wrote.
                memory = torch.full((pages, simulated.BLOCK, 2, 128), float("nan"), dtype=torch.bfloat16)
                attention.kv_cache = memory.permute(0, 2, 1, 3)
            group = AttentionGroup(Backend, list(LAYERS), spec, 0)
            group.create_metadata_builders(self.config, torch.device("cpu"))
        self.spec = spec
        self.builder = group.get_metadata_builder()
        self.groups = [[group]]
        self.tables = simulated.make_tables(monkeypatch, ROWS, 64)
        self.engine = simulated.Engine(self.tables, seed, pages, longest=900)
        self.pool = torch.randn(2, pages * simulated.BLOCK, 2, 64).to(torch.bfloat16)

    @staticmethod
    def _config(model_folder):
        return VllmConfig(
            model_config=ModelConfig(model=model_folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True),
            cache_config=CacheConfig(block_size=simulated.BLOCK),
            scheduler_config=SchedulerConfig(
                max_num_seqs=ROWS, max_model_len=1024, max_num_batched_tokens=4096, is_encoder_decoder=False
            ),
            device_config=DeviceConfig("cpu"),
            attention_config=AttentionConfig(backend="CUSTOM"),
        )

    def values(self, request, begin, count):
        """K and V of a request's tokens: a function of block and place, as what shares a block wrote the same there."""
        positions = torch.arange(begin, begin + count)
        slots = torch.tensor(request.blocks)[positions // simulated.BLOCK] * simulated.BLOCK + positions % simulated.BLOCK
        return self.pool[:, slots]

    def step(self, scheduled, pad_to=0, mode=CUDAGraphMode.NONE):
        """Runs both layers on a step and compares each row with SDPA over its own history."""
        metadata, slots, batch = simulated.prepare(self.tables, scheduled, self.groups, pad_to, mode)
        assert self.builder.step_tables is None
        new = [self.values(request, request.computed, chunk) for request, chunk in scheduled]
        keys, values = (torch.cat([pair[i] for pair in new]) for i in (0, 1))
        padding = len(slots) - len(keys)
        keys, values = (torch.cat([x, torch.randn(padding, 2, 64).to(x.dtype)]) for x in (keys, values))
        for layer in self.layers:
            q = torch.randn(len(keys), 8, 64).to(torch.bfloat16)
            with set_forward_context(metadata, self.config, slot_mapping={layer.layer_name: slots}):
                out = layer(q.flatten(1), keys.flatten(1), values.flatten(1)).view(-1, 8, 64)
            begin = 0
            for request, chunk in scheduled:
                history = self.values(request, 0, request.computed + chunk)
                want = stock.attend(q[begin : begin + chunk], *history, SCALE)
                torch.testing.assert_close(out[begin : begin + chunk].float(), want.float(), atol=TOLERANCE, rtol=0)
                begin += chunk
        for request, chunk in scheduled:
            request.computed += chunk
        return metadata[LAYERS[0]], batch

    def random_steps(self, count):
        done = 0
        while done < count:
            scheduled = self.engine.step()
            if scheduled:
                yield self.step(scheduled)
                done += 1

    def joined(self, *prompts):
        """Requests of these many tokens, all but the first sharing the first's full blocks."""
        for prompt in prompts:
            first = self.engine.running[0] if self.engine.running else simulated.Request(0, 0, [])
            hit = first.blocks[: min(first.prompt, prompt - 1) // simulated.BLOCK]
            slot = self.engine.free_slots.pop()
            for block in hit:
                self.engine.references[block] += 1
            blocks = hit + self.engine.take(-(-(prompt + 40) // simulated.BLOCK) - len(hit))
            request = simulated.Request(slot, prompt, blocks, len(hit) * simulated.BLOCK)
            self.engine.running.append(request)
            self.tables.append_block_ids(slot, (blocks,), overwrite=True)
        self.tables.apply_staged_writes()
        return self.engine.running


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


def test_a_step_without_announced_tables_is_stock(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    world.builder.step_tables = None
    batch = SimpleNamespace()
    assert world.builder._decode_rows(batch, None) == 0
    assert "which request a row is" in world.builder._stock_reason


def test_a_lost_announcement_after_plans_is_an_error(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.step([(running[0], 1)])
    with pytest.raises(RuntimeError, match="without block tables"):
        world.builder._decode_rows(SimpleNamespace(), None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"alibi_slopes": [0.5] * 8}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "soft cap"),
        ({"per_layer_sliding_window": 128}, "SlidingWindowSpec"),
        ({"config": {"self.speculative_config": SimpleNamespace()}}, "speculative"),
        ({"config": {"self.kv_transfer_config": SimpleNamespace()}}, "KV connector"),
        ({"config": {"parallel_config.enable_dbo": True}}, "microbatches"),
    ],
)
def test_what_is_not_served_stays_stock(monkeypatch, model_folder, caplog_vllm, change, reason):
    world = World(monkeypatch, model_folder, **change)
    assert reason in world.builder._stock_reason
    lines = [line for line in caplog_vllm if "stay on FlashAttention" in line]
    assert len(lines) == 1 and reason in lines[0]


def test_sinks_stay_stock(monkeypatch, model_folder):
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)
    world = World(monkeypatch, model_folder, sinks=torch.zeros(8))
    assert world.builder._stock_reason == "attention sinks"


def test_graph_support(monkeypatch, model_folder):
    world = World(monkeypatch, model_folder)
    support = Builder.get_cudagraph_support(world.config, world.spec)
    assert support == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    monkeypatch.setattr(world.config, "speculative_config", SimpleNamespace())
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


def test_a_page_outside_the_pool_is_refused_before_anything_runs(monkeypatch, model_folder, stock_kernels, seeded):
    world = World(monkeypatch, model_folder, pages=64)
    running = world.joined(40)
    world.step([(running[0], 40)])
    world.tables.append_block_ids(running[0].slot, ([1, 2, 64],), overwrite=True)
    world.tables.apply_staged_writes()
    with pytest.raises(ValueError, match="64"):
        world.step([(running[0], 1)])


