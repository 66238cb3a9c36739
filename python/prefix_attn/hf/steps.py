"""The decode steps of continuous batching: a plan for each, made from what the host knows, and the layers' calls."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter

import torch

import prefix_attn

from .engine import block_tables, cache_view, host_io

_stats: Counter[str] = Counter()
#: The step whose forward pass this thread runs.
_running = threading.local()


def stats() -> dict[str, int]:
    """Counts since the start or :func:`reset_stats`: ``decode_steps`` that ran here and ``stock_steps`` that did not;
    ``kernel_calls`` of layers (with CUDA graphs, of captures: replays call no Python); ``kv_bytes_read`` by the plans and
    ``kv_bytes_flat`` that reading every sequence's own KV would have taken, of one layer."""
    return dict(_stats)


def reset_stats() -> None:
    """Sets the counts to 0."""
    _stats.clear()


@contextlib.contextmanager
def forward_pass(runner, model):
    """Around a forward pass, eager, captured or replayed: plans it where it is a decode step."""
    if not runner.inputs_and_outputs.use_block_table:
        _stats["stock_steps"] += 1
        yield
        return
    steps = getattr(runner.cache, "_prefix_attn_steps", None)
    if steps is None:
        steps = runner.cache._prefix_attn_steps = DecodeSteps(runner, model)
    _running.step = steps.prepare(runner)
    _stats["decode_steps"] += 1
    try:
        yield
    finally:
        _running.step = None


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes ``k`` and ``v`` [B, 1, Hkv, d] to the cache and returns the attention of ``q`` [B, 1, Hq, d].

    Tables and lengths are those of the step's plan, so the device's copies (``cache_seqlens``, ``block_table``) are not read.
    """
    if tuple(window_size) != (-1, -1) or softcap or s_aux is not None or not causal:
        raise ValueError("prefix_attn.hf: a window, soft cap or sinks; prefix_attn.hf.enable(model) would have said so")
    step = getattr(_running, "step", None)
    if step is None:
        raise RuntimeError("prefix_attn.hf: a decode step outside of continuous batching")
    _stats["kernel_calls"] += 1
    return step.attend(q[:, 0], k_cache, v_cache, k[:, 0], v[:, 0], softmax_scale or q.shape[-1] ** -0.5).unsqueeze(1)


class DecodeSteps:
    """Plans the decode steps over one cache."""

    def __init__(self, runner, model):
        self.view = view = cache_view(runner.cache)
        config = model.config.get_text_config()
        # Under tensor parallelism a rank has its part of the KV heads, and of the query heads as many.
        ranks = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) // view.kv_heads
        q_heads = config.num_attention_heads // ranks
        self.shape = prefix_attn.AttentionShape(q_heads, view.kv_heads, view.head_dim, view.dtype)
        self.uses_graphs = runner.use_cuda_graph_decode
        #: By rows of the batch, padded ones included.
        self.batches: dict[int, EagerBatch | GraphBatch] = {}
        self.workspace: prefix_attn.Workspace | None = None
        self.most_rows = runner.cb_config.max_requests_per_batch

    def prepare(self, runner) -> EagerBatch | GraphBatch:
        """Plans the batch that transformers has just prepared."""
        io = host_io(runner.inputs_and_outputs)
        rows = io._get_num_sequences(use_padding=runner.pad_inputs)
        tables_by_request = block_tables(runner.cache)
        tables, lengths, slots = [], [], []
        page_size = self.view.page_size
        for future_state in io.requests_in_batch:
            state = future_state.state
            # The new token is counted already.
            last = state.position_offset - 1
            table = tables_by_request[state.request_id]
            tables.append(table)
            lengths.append(last + 1)
            slots.append(table[last // page_size] * page_size + last % page_size)
        padding = rows - len(lengths)
        tables += [[]] * padding
        lengths += [0] * padding
        slots += [-1] * padding
        batch = self.batches.get(rows if self.uses_graphs else 0)
        if batch is None:
            batch = GraphBatch(self, rows) if self.uses_graphs else EagerBatch(self)
            self.batches[rows if self.uses_graphs else 0] = batch
        batch.step(tables, lengths, slots, runner.inputs_and_outputs.compute_stream)
        _stats["kv_bytes_read"] += batch.kv_bytes[0]
        _stats["kv_bytes_flat"] += batch.kv_bytes[1]
        return batch


class EagerBatch:
    """Steps of any number of rows, launched layer by layer."""

    def __init__(self, steps: DecodeSteps, capacity: prefix_attn.Capacity | None = None):
        self.view = steps.view
        self.planner = prefix_attn.Planner(steps.shape, steps.view.device, capacity=capacity)
        self.plan: prefix_attn.Plan | None = None
        self.slots: torch.Tensor | None = None
        #: By one layer: what the plan reads, what plans without sharing would. Tokens of last pages are counted when a plan
        #: is made, not step by step.
        self.kv_bytes = (0, 0)

    def step(self, tables, lengths, slots, stream) -> None:
        """Plans a step; on ``stream`` goes what its layers need."""
        change = "forest"
        if self.plan is None:
            self.plan = self.planner.plan(tables, lengths, self.view.page_size, self.view.num_blocks)
        else:
            # Contents are compared: transformers replaces entries anywhere in a table by those of equal blocks.
            change = self.planner.advance(self.plan, tables, lengths)
        if change in ("pages", "forest"):
            summary = self.plan.summary()
            self.kv_bytes = summary["planned_kv_bytes"], summary["flat_kv_bytes"]
        is_cuda = self.view.device.type == "cuda"
        host_slots = torch.tensor(slots, dtype=torch.int64, pin_memory=is_cuda)
        with torch.cuda.stream(stream) if is_cuda else contextlib.nullcontext():
            self.upload(host_slots)

    def upload(self, host_slots: torch.Tensor) -> None:
        self.slots = host_slots.to(self.view.device, non_blocking=True)

    def attend(self, q, k_cache, v_cache, k, v, scale: float) -> torch.Tensor:
        """Of one layer; rows beyond those of the requests get 0."""
        k_cache, v_cache = k_cache[:: self.view.page_stride], v_cache[:: self.view.page_stride]
        prefix_attn.append_kv(k, v, k_cache, v_cache, self.slots)
        return self.run(q, k_cache, v_cache, scale)

    def run(self, q, k_cache, v_cache, scale: float) -> torch.Tensor:
        return prefix_attn.run(self.plan, q, k_cache, v_cache, scale=scale)


class GraphBatch(EagerBatch):
    """Steps of ``rows`` rows whose layers are captured once: plan and slots stand where the graph reads them."""

    def __init__(self, steps: DecodeSteps, rows: int):
        view = steps.view
        super().__init__(steps, prefix_attn.Capacity(rows, rows * view.max_blocks_per_request, view.device))
        self.buffers = prefix_attn.PlanBuffers(self.planner, view.page_size, view.num_blocks)
        self.slots = torch.empty(rows, dtype=torch.int64, device=view.device)
        if steps.workspace is None:
            most = steps.most_rows
            capacity = prefix_attn.Capacity(most, most * view.max_blocks_per_request, view.device)
            steps.workspace = prefix_attn.Workspace.for_planner(
                prefix_attn.Planner(steps.shape, view.device, capacity=capacity)
            )
        self.workspace = steps.workspace
        row_shape = (rows, steps.shape.q_heads, view.head_dim)
        self.q_like, self.out_like = (torch.empty(row_shape, dtype=view.dtype, device=view.device) for _ in range(2))
        self.layers: dict[tuple[int, float], prefix_attn.BoundRun] = {}

    def upload(self, host_slots: torch.Tensor) -> None:
        self.slots.copy_(host_slots, non_blocking=True)
        self.buffers.upload(self.plan)

    def run(self, q, k_cache, v_cache, scale: float) -> torch.Tensor:
        layer = self.layers.get((k_cache.data_ptr(), scale))
        if layer is None:
            layer = self.buffers.bind(
                k_cache, v_cache, self.q_like, self.out_like, scale=scale, workspace=self.workspace
            )
            self.layers[k_cache.data_ptr(), scale] = layer
        if not q.is_cuda:
            self.q_like.copy_(q)
            layer.run()
            return self.out_like.clone()
        q, out = q.contiguous(), torch.empty_like(self.out_like)
        layer.run_ptr(q.data_ptr(), out.data_ptr())
        return out
