"""Two real `Attention` layers of vLLM, their caches, block tables and metadata builder; steps are compared with SDPA."""

from types import SimpleNamespace

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
from vllm.v1.worker.utils import AttentionGroup

from prefix_attn.vllm.backend import Backend

SCALE = 64**-0.5
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
ROWS = 24
#: bfloat16 outputs of values of about 1: one rounding of P, one of O.
TOLERANCE = 2e-2
#: Where Q is rounded to e4m3, too.
FP8_QUERY_TOLERANCE = 0.2
#: Factors of FP8 K and V.
K_SCALE, V_SCALE = 0.25, 0.5


class World:
    """Two layers, their caches, the block tables and a builder."""

    def __init__(self, monkeypatch, model_folder, seed=0, pages=400, heads=(8, 2), drafts=0, cache_dtype="auto", **layer):
        with monkeypatch.context() as context:
            # On a machine without Triton the configuration refuses runner V2.
            context.setattr(VllmConfig, "use_v2_model_runner", False)
            self.config = self._config(model_folder, cache_dtype)

        self.heads = heads
        self.is_fp8 = cache_dtype.startswith("fp8")
        change = layer.pop("config", {})
        if drafts:
            speculative = SimpleNamespace(num_speculative_tokens=drafts)
            change = {"self.speculative_config": speculative, "scheduler_config.async_scheduling": False}
        for name, value in change.items():
            owner, attribute = name.split(".")
            monkeypatch.setattr(getattr(self.config, owner) if owner != "self" else self.config, attribute, value)
        with set_current_vllm_config(self.config):
            options = dict(num_kv_heads=heads[1], attn_backend=Backend, cache_config=self.config.cache_config, **layer)
            self.layers = [
                Attention(heads[0], 64, SCALE, prefix=name, **options)
                for name in LAYERS
            ]
            spec = self.layers[0].get_kv_cache_spec(self.config)
            for attention in self.layers:
                attention.to(torch.bfloat16)
                if self.is_fp8:
                    # As a checkpoint's, which stay float32.
                    for name, factor in (("_k_scale", K_SCALE), ("_v_scale", V_SCALE), ("_q_scale", 0.5)):
                        setattr(attention, name, torch.tensor(factor))
                # NHD memory seen as [blocks, heads, tokens, 2 * head_dim], as vLLM binds it. Nobody may read what nobody wrote.
                nan = dict(fill_value=float("nan"), dtype=torch.bfloat16)
                if self.is_fp8:
                    nan = dict(fill_value=0x7F, dtype=torch.uint8)
                memory = torch.full((pages, simulated.BLOCK, heads[1], 128), **nan)
                attention.kv_cache = memory.permute(0, 2, 1, 3)
            group = AttentionGroup(Backend, list(LAYERS), spec, 0)
            group.create_metadata_builders(self.config, torch.device("cpu"))
        self.spec = spec
        impl = self.layers[0].impl
        #: What `stock.attend` is told of the layers' scores.
        self.scores = SCALE, impl.logits_soft_cap, impl.sinks, impl.sliding_window[0]
        self.builder = group.get_metadata_builder()
        self.groups = [[group]]
        self.tables = simulated.make_tables(monkeypatch, ROWS, 64)
        self.engine = simulated.Engine(self.tables, seed, pages, longest=900, drafts=drafts)
        self.pool = torch.randn(2, pages * simulated.BLOCK, heads[1], 64)
        if self.is_fp8:
            # What the cache holds, exactly.
            factors = torch.tensor([K_SCALE, V_SCALE])[:, None, None, None]
            self.pool = (self.pool / factors).to(stock.FP8).float() * factors
        self.pool = self.pool.to(torch.bfloat16)

    @staticmethod
    def _config(model_folder, cache_dtype):
        return VllmConfig(
            model_config=ModelConfig(model=model_folder, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True),
            cache_config=CacheConfig(block_size=simulated.BLOCK, cache_dtype=cache_dtype),
            scheduler_config=SchedulerConfig(
                max_num_seqs=ROWS, max_model_len=1024, max_num_batched_tokens=4096, is_encoder_decoder=False
            ),
            device_config=DeviceConfig("cpu"),
            attention_config=AttentionConfig(backend="CUSTOM"),
        )

    def _tolerance(self, chunk: int) -> float:
        """Of a request's rows: those that FlashAttention serves over an FP8 cache have FP8 queries."""
        is_stock = self.builder._stock_reason is not None or chunk > self.builder._query_tokens
        return FP8_QUERY_TOLERANCE if self.is_fp8 and is_stock else TOLERANCE

    def values(self, request, begin, count):
        """K and V of a request's tokens: a function of block and place, as what shares a block wrote the same there."""
        positions = torch.arange(begin, begin + count)
        slots = torch.tensor(request.blocks)[positions // simulated.BLOCK] * simulated.BLOCK + positions % simulated.BLOCK
        return self.pool[:, slots]

    def step(self, scheduled, pad_to=0, mode=CUDAGraphMode.NONE, each=1):
        """Runs both layers on a step and compares each row with SDPA over its own history."""
        metadata, slots, batch = simulated.prepare(self.tables, scheduled, self.groups, pad_to, mode, each=each)
        assert self.builder.step_tables is None
        q_heads, kv_heads = self.heads
        new = [self.values(request, request.computed, chunk) for request, chunk in scheduled]
        keys, values = (torch.cat([pair[i] for pair in new]) for i in (0, 1))
        padding = len(slots) - len(keys)
        keys, values = (torch.cat([x, torch.randn(padding, kv_heads, 64).to(x.dtype)]) for x in (keys, values))
        for layer in self.layers:
            q = torch.randn(len(keys), q_heads, 64).to(torch.bfloat16)
            with set_forward_context(metadata, self.config, slot_mapping={layer.layer_name: slots}):
                out = layer(q.flatten(1), keys.flatten(1), values.flatten(1)).view(-1, q_heads, 64)
            begin = 0
            for request, chunk in scheduled:
                history = self.values(request, 0, request.computed + chunk)
                want = stock.attend(q[begin : begin + chunk], *history, *self.scores)
                tolerance = dict(atol=self._tolerance(chunk), rtol=0)
                torch.testing.assert_close(out[begin : begin + chunk].float(), want.float(), **tolerance)
                begin += chunk
        for request, chunk in scheduled:
            self.engine.count(request, chunk)
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
