"""The decode rows of one KV cache group: one plan per step, run once per layer.

A plan's launches under CUDA graphs cover a capacity, whatever the step. Capacities are powers of two of query tokens, so that the
graph of 8 does not launch what 256 may need; each has its planner and its plan buffers, made when a step or a capture first
needs it. Steps run in stream order, so that one workspace serves all.
"""

import dataclasses

import numpy as np
import torch

import prefix_attn as pa
from prefix_attn.vllm.tables import StepTables


@dataclasses.dataclass(frozen=True)
class Group:
    """What all layers of a KV cache group have in common."""

    shape: "pa.AttentionShape"
    device: torch.device
    page_size: int
    num_pages: int
    #: Rows of the largest batch, pages of the longest row, and query tokens of a row at most.
    max_rows: int
    max_row_pages: int
    max_row_tokens: int = 1
    #: ``window`` and ``softcap`` of :class:`pa.Planner`, where the layers have them.
    visible: dict = dataclasses.field(default_factory=dict)

    @property
    def max_planned_pages(self) -> int:
        """Pages of a row in a plan, at most: those that its window may lie in."""
        window = self.visible.get("window")
        if window is None:
            return self.max_row_pages
        return min(self.max_row_pages, (window + self.page_size - 2) // self.page_size + 1)

    @property
    def max_tokens(self) -> int:
        """Query tokens of the largest batch: what a plan has as rows."""
        return self.max_rows * self.max_row_tokens


@dataclasses.dataclass
class _BoundLayer:
    run: "pa.BoundRun"
    q_stride: tuple
    out_stride: tuple


class DecodeRows:
    """Plans steps and runs them; on the CPU (tests) without buffers."""

    def __init__(self, group: Group):
        self.group = group
        self._capacities: dict[int, _Capacity] = {}
        self._current: _Capacity | None = None
        self._templates: dict[tuple, torch.Tensor] = {}
        self._workspace: pa.Workspace | None = None
        self._lse: torch.Tensor | None = None

    def plan(self, tables: StepTables, lengths: np.ndarray, query_tokens: np.ndarray | None = None, room: int = 0) -> "pa.Plan":
        """Make this step's plan and enqueue its upload on torch's current stream.

        Args:
            tables: the step's.
            lengths: int32 tokens of each row, its query tokens included; 0 where there is none.
            query_tokens: int32 query tokens of each row; by default 1.
            room: query tokens of the step's graph: the plan is one of a capacity for so many.

        Raises:
            ValueError: a table names a page outside the pool, or there are more rows, or longer ones, than the group has.
            CudaError: the device has no memory for the plan.
        """
        pages = -(-int(lengths.max()) // self.group.page_size) if len(lengths) else 0
        if len(lengths) > self.group.max_rows or pages > self.group.max_row_pages:
            raise ValueError(
                f"prefix_attn: a step of {len(lengths)} rows, the longest of {pages} pages; plans are sized for "
                f"{self.group.max_rows} rows of {self.group.max_row_pages} pages"
            )
        tokens = len(lengths) if query_tokens is None else int(query_tokens.sum())
        capacity = self._capacity(max(tokens, room))
        plan = capacity.advance(tables, lengths, query_tokens)
        self._current = capacity
        return plan

    def run(self, name: str, scores: dict, query, key_cache, value_cache, output, lse=None) -> None:
        """Run this step's plan for one layer.

        Args:
            name: the layer's, the same tensors' strides at every call.
            scores: what becomes of Q K: ``scale``, and ``softcap`` and ``sinks`` where the layer has them, as in ``pa.run``.
            query, output: ``[query tokens or more, q_heads, head_dim]``; what is behind the plan's keeps its values.
            key_cache, value_cache: ``[num_pages, page_size, kv_heads, head_dim]``.
            lse: float32 ``[rows, q_heads]``, at one address for ever, where it is wanted.
        """
        self._current.run(name, scores, query, key_cache, value_cache, output, lse)

    def _capacity(self, tokens: int) -> "_Capacity":
        size = min(1 << max(tokens - 1, 0).bit_length(), self.group.max_tokens)
        capacity = self._capacities.get(size)
        if capacity is None:
            kind = _HostCapacity if self.group.device.type == "cpu" else _DeviceCapacity
            capacity = self._capacities[size] = kind(self, size)
        return capacity

    def workspace(self) -> "pa.Workspace":
        """One for all: as large as the largest capacity needs."""
        if self._workspace is None:
            largest = planner(self.group, self.group.max_tokens)
            self._workspace = pa.Workspace.for_planner(largest)
        return self._workspace

    def lse(self) -> torch.Tensor:
        """Float32 ``[query tokens, q_heads]`` for as many as any batch has, at one address."""
        if self._lse is None:
            shape = (self.group.max_tokens, self.group.shape.q_heads)
            self._lse = torch.empty(shape, dtype=torch.float32, device=self.group.device)
        return self._lse

    def template(self, name: str, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
        """Memory for as many query tokens as any batch has, in these strides: what a run is bound to before its tensors are known."""
        key = (name, stride, dtype)
        if key not in self._templates:
            shape = (self.group.max_tokens, self.group.shape.q_heads, self.group.shape.head_dim)
            self._templates[key] = torch.empty_strided(shape, stride, dtype=dtype, device=self.group.device)
        return self._templates[key]


def limits(group: Group, rows: int) -> "pa.Capacity":
    """The largest plan of ``rows`` rows, a row for each query token.

    A plan has an item for each row, or, where it shares or cuts rows, about as many as fill the device once. Each item that a
    capacity allows costs every captured step a CTA per KV head that finds nothing to do, so it allows little more.
    """
    profile = pa.DeviceProfile.detect(group.device)
    max_items = rows + -(-4 * profile.sm_count // group.shape.kv_heads)
    return pa.Capacity(rows, rows * group.max_planned_pages, profile, max_items=max_items)


def planner(group: Group, rows: int) -> "pa.Planner":
    """One for plans of up to ``rows`` query tokens."""
    return pa.Planner(group.shape, group.device, capacity=limits(group, rows), **group.visible)


class _Capacity:
    """The planner for up to so many query tokens, and its newest plan."""

    def __init__(self, owner: DecodeRows, rows: int):
        self.group = owner.group
        self.owner = owner
        self.planner = planner(owner.group, rows)
        self.plan = None

    def advance(self, tables: StepTables, lengths: np.ndarray, query_tokens: np.ndarray | None) -> "pa.Plan":
        ids, rows = tables.mirror.ids, tables.rows(len(lengths))
        if self.plan is None:
            pool = self.group.page_size, self.group.num_pages
            self.plan = self.planner.plan(ids, lengths, *pool, query_tokens=query_tokens, table_rows=rows)
        else:
            self.planner.advance(self.plan, ids, lengths, query_tokens=query_tokens, table_rows=rows)
        return self.plan


class _HostCapacity(_Capacity):
    def run(self, name, scores, query, key_cache, value_cache, output, lse) -> None:
        rows = self.plan.sequence_count
        lse = None if lse is None else lse[:rows]
        pa.run(self.plan, query[:rows], key_cache, value_cache, out=output[:rows], lse=lse, **scores)


class _DeviceCapacity(_Capacity):
    def __init__(self, owner: DecodeRows, rows: int):
        super().__init__(owner, rows)
        self.buffers = pa.PlanBuffers(self.planner, self.group.page_size, self.group.num_pages)
        self.layers: dict[str, _BoundLayer] = {}

    def advance(self, tables: StepTables, lengths: np.ndarray, query_tokens: np.ndarray | None) -> "pa.Plan":
        plan = super().advance(tables, lengths, query_tokens)
        self.buffers.upload(plan)
        return plan

    def run(self, name, scores, query, key_cache, value_cache, output, lse) -> None:
        if min(query.shape[0], output.shape[0]) < self.plan.sequence_count:
            raise ValueError(f"query and output have {query.shape[0]} rows, the plan {self.plan.sequence_count}")
        layer = self.layers.get(name)
        if layer is None or layer.q_stride != query.stride() or layer.out_stride != output.stride():
            layer = self._bind(name, scores, query, key_cache, value_cache, output, lse)
        # The strides are those bound, the plan's rows are there: what run_ptr asks its caller to vouch for.
        layer.run.run_ptr(query.data_ptr(), output.data_ptr())

    def _bind(self, name, scores, query, key_cache, value_cache, output, lse) -> _BoundLayer:
        q, out = (self.owner.template(kind, t.stride(), t.dtype) for kind, t in (("q", query), ("out", output)))
        workspace = self.owner.workspace()
        run = self.buffers.bind(key_cache, value_cache, q, out, lse, workspace=workspace, **scores)
        layer = self.layers[name] = _BoundLayer(run, query.stride(), output.stride())
        return layer
