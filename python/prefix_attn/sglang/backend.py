"""The attention backend: a stock one whose decode batches are planned and run here."""

from __future__ import annotations

import functools
import logging
from collections import Counter

import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

import prefix_attn

_log = logging.getLogger("prefix_attn.sglang")
#: ``decode_batches`` that were planned; ``kernel_calls`` and ``stock_calls`` of their layers.
stats: Counter[str] = Counter()


@functools.cache
def backend_over(stock):
    """A subclass of the backend class ``stock``."""
    return type("PrefixAttnBackend", (_PrefixAttn, stock), {})


@functools.cache
def _has_kernels(q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int) -> bool:
    """Whether layers of these heads are computed here; the stock backend serves others, and one line says which and why."""
    try:
        shape = prefix_attn.AttentionShape(q_heads, kv_heads, head_dim, dtype)
    except (TypeError, ValueError) as error:
        reason = str(error)
    else:
        reason = prefix_attn.supports(shape, page_size)
    if reason is not None:
        _log.warning("prefix_attn: %d query heads over %d KV heads stay on SGLang's backend: %s", q_heads, kv_heads, reason)
    return reason is None


class _PrefixAttn:
    # The plan is made of lengths on the host.
    needs_cpu_seq_lens = True

    def __init__(self, runner):
        super().__init__(runner)
        self._page_size = runner.page_size
        self._planners: dict[tuple, prefix_attn.Planner] = {}
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._plans: dict[tuple, prefix_attn.Plan] = {}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args, **kwargs) -> None:
        raise ValueError("prefix_attn: CUDA graphs are not supported in SGLang yet, start it with --disable-cuda-graph")

    def init_forward_metadata(self, forward_batch) -> None:
        """Takes the batch's tables over: of a decode batch, from the device, which waits for what is queued before."""
        super().init_forward_metadata(forward_batch)
        self._batch, self._plans = None, {}
        if forward_batch.forward_mode.is_decode() and forward_batch.spec_info is None and forward_batch.batch_size > 0:
            lengths = forward_batch.seq_lens_cpu.to(torch.int32)
            slots = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : int(lengths.max()) : self._page_size]
            self._batch = (slots // self._page_size).to("cpu", torch.int32), lengths
            stats["decode_batches"] += 1

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if self._batch is None or not self._serves(layer, k, kwargs):
            stats["stock_calls"] += 1
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        k_cache, v_cache = (
            buffer.unflatten(0, (-1, self._page_size))
            for buffer in (
                self.token_to_kv_pool.get_key_buffer(layer.layer_id),
                self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            )
        )
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        out = torch.empty_like(q)
        plan = self._plan(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, q.dtype, q.device, k_cache.shape[0])
        prefix_attn.run(plan, q, k_cache, v_cache, out=out, scale=layer.scaling)
        stats["kernel_calls"] += 1
        return out.flatten(1)

    def _serves(self, layer, k, options: dict) -> bool:
        """Whether the kernels have all that a layer asks for."""
        return (
            k is not None
            and layer.attn_type == AttentionType.DECODER
            and not layer.is_cross_attention
            and layer.v_head_dim == layer.head_dim
            and layer.sliding_window_size <= 0
            and not layer.logit_cap
            and layer.xai_temperature_len <= 0
            and layer.k_scale is None
            and all(value is None for value in options.values())
            and self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype == k.dtype
            and _has_kernels(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, k.dtype, self._page_size)
        )

    def _plan(self, *geometry) -> prefix_attn.Plan:
        """The batch's plan for layers of one geometry; the last is the number of pages."""
        plan = self._plans.get(geometry)
        if plan is None:
            planner = self._planners.get(geometry[:-1])
            if planner is None:
                q_heads, kv_heads, head_dim, dtype, device = geometry[:-1]
                shape = prefix_attn.AttentionShape(q_heads, kv_heads, head_dim, dtype)
                planner = prefix_attn.Planner(shape, device)
                self._planners[geometry[:-1]] = planner
            tables, lengths = self._batch
            plan = self._plans[geometry] = planner.plan(tables, lengths, self._page_size, geometry[-1])
        return plan
