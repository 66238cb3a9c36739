"""The metadata builder: plans the decode rows of a step, and gives FlashAttention's builder the other rows.

Under full CUDA graphs vLLM calls the builder before each replay and no Python of the layers: the upload of the plan, enqueued
here before the replay, is all that changes from step to step.

Lengths are ``seq_lens_cpu_upper_bound``. It is the sum of what the scheduler has counted and what it has scheduled, and exact
unless tokens are taken back after the next step was scheduled: drafts that are refused under asynchronous scheduling, or tokens of
a KV connector that failed to load. Engines with either take the stock path (:mod:`prefix_attn.vllm.eligibility`).
``PREFIX_ATTN_CHECK=1`` compares lengths and tables of each step with the device's, and waits for it.

With speculative decoding a decode row has a query token for each draft too. Each is a row of the plan.
"""

import dataclasses
import os

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

import prefix_attn as pa
from prefix_attn.vllm import eligibility, hooks, metrics
from prefix_attn.vllm.decoder import DecodeRows, Group

logger = init_logger("vllm.prefix_attn")

IS_CHECKING = os.environ.get("PREFIX_ATTN_CHECK", "0") == "1"
#: Why nothing of this process can be served.
HOOKS_MISSING = hooks.install()


@dataclasses.dataclass
class StepSplit:
    """Attached to FlashAttention's metadata as ``prefix_attn``: who serves which rows."""

    decoder: DecodeRows
    metrics: metrics.StepMetrics
    #: Rows that the plan serves, the first of the batch, and their query tokens.
    decode_rows: int
    decode_tokens: int
    #: The stock kernel's metadata for the rows behind them, if there are any.
    prefill: object | None


class Builder(FlashAttentionMetadataBuilder):
    """See the module."""

    # Tables of a copied metadata object would not be the plan's.
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full graphs of decode steps where plans are made, else what FlashAttention has."""
        if HOOKS_MISSING or eligibility.of_engine(vllm_config) or _is_stock_group(vllm_config, kv_cache_spec):
            return super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if _query_tokens(vllm_config) > 1:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        #: Set by the hook for the time of one `build`.
        self.step_tables = None
        self.metrics = metrics.GROUPS[layer_names[0]] = metrics.StepMetrics()
        self._layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        #: Query tokens of a decode row, at most.
        self._query_tokens = _query_tokens(vllm_config)
        self._shape = _shape(vllm_config, self._layers[0].num_heads * self.dcp_world_size, kv_cache_spec)
        self._decoder: DecodeRows | None = None
        #: FlashAttention's builder has looked for the layers' windows.
        self._knows_windows = False
        self._stock_reason = (
            HOOKS_MISSING
            or eligibility.of_engine(vllm_config)
            or eligibility.of_group(kv_cache_spec, self._shape)
            or next(filter(None, map(self._why_stock, self._layers)), None)
        )
        what = f"{len(layer_names)} layers ({layer_names[0]}, ...)"
        if self._stock_reason:
            logger.info("prefix_attn: %s stay on FlashAttention: %s", what, self._stock_reason)
        else:
            for layer in self._layers:
                layer.impl.take_factors(layer)
            logger.info("prefix_attn: decode rows of %s run on prefix-aware plans, %s", what, self._shape)

    def _why_stock(self, layer) -> str | None:
        return eligibility.of_layer(layer, self.kv_cache_spec, self._shape, self.dcp_world_size)

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """As :meth:`build`; a capture without tables means that no replay would have them: the group stays stock."""
        if self.step_tables is None and self._stock_reason is None:
            self._stay_stock("this model's runner state does not say which request a row is")
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        """FlashAttention's metadata of the batch, with a :class:`StepSplit` where decode rows run on a plan."""
        batch, tables = common_attn_metadata, self.step_tables
        decode_rows = decode_tokens = 0
        if self._stock_reason is None:
            decode_rows, decode_tokens = self._decode_rows(batch, tables)
        if decode_rows == 0:
            self._count("stock")
            return self._build_stock(common_prefix_len, batch, fast_build)

        decoder = self._decoder = self._decoder or DecodeRows(self._group())
        plan = decoder.plan(
            tables,
            self._lengths(batch, tables, decode_rows),
            self._tokens_of_rows(batch, tables, decode_rows, decode_tokens),
            # A graph's own number of tokens, which padding makes up where there are fewer.
            decode_tokens,
        )
        if IS_CHECKING and not tables.is_dummy:
            self._check(batch, tables, decode_rows)
        prefill = None
        if decode_rows < batch.num_reqs:
            prefill = self._build_stock(common_prefix_len, _rows_from(batch, decode_rows, decode_tokens), fast_build)
        # Nobody runs the whole batch: the schedule that takes time is left out.
        metadata = self._build_stock(common_prefix_len, batch, fast_build=True)
        metadata.prefix_attn = StepSplit(decoder, self.metrics, decode_rows, decode_tokens, prefill)
        if not tables.is_dummy:
            self.metrics.planned_rows += decode_rows
            self._count("decode" if prefill is None else "mixed")
            if self.metrics.is_sample_due():
                self.metrics.sample(plan.summary())
        return metadata

    def _build_stock(self, common_prefix_len, batch, fast_build):
        """FlashAttention's metadata. The first build is never a fast one: only then does it look for windows."""
        is_fast = fast_build and self._knows_windows
        self._knows_windows = True
        return super().build(common_prefix_len, batch, is_fast)

    def _decode_rows(self, batch, tables) -> tuple[int, int]:
        """How many of the first rows run on a plan, and their tokens with those that pad a graph's batch."""
        if tables is None:
            self._stay_stock("this model's runner state does not say which request a row is")
            return 0, 0
        if tables.mirror.block_size != self.block_size:
            self._stay_stock(f"blocks of {tables.mirror.block_size} tokens, kernels with {self.block_size}")
            return 0, 0
        if batch.causal is not True:
            return 0, 0
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(batch, decode_threshold=self._query_tokens)
        if self.dcp_world_size > 1 and prefills > 0:
            return 0, 0
        return decodes, decode_tokens

    def _tokens_of_rows(self, batch, tables, rows: int, tokens: int) -> np.ndarray | None:
        """Query tokens of each decode row, 0 where there is no request; `None` stands for one each."""
        if tables.is_dummy or tokens == rows:
            return None
        return np.diff(batch.query_start_loc_cpu[: rows + 1].numpy())

    def _lengths(self, batch, tables, rows: int) -> np.ndarray:
        """Tokens of each decode row in this rank's cache."""
        if tables.is_dummy:
            return np.zeros(rows, dtype=np.int32)
        lengths = batch.seq_lens_cpu_upper_bound.numpy()[:rows]
        if self.dcp_world_size > 1:
            # The new token's own K and V come from the layer, not from the cache.
            lengths = local_lengths(
                np.maximum(lengths - 1, 0), self.dcp_world_size, self.dcp_rank, self.cp_kv_cache_interleave_size
            )
        return lengths

    def _group(self) -> Group:
        scheduler, cache = self.vllm_config.scheduler_config, self._layers[0].kv_cache
        tokens = -(-self.model_config.max_model_len // self.dcp_world_size) + self.cp_kv_cache_interleave_size
        pool = (cache.shape[0], cache.shape[1], self.block_size, 2 * self._shape.head_dim)
        for layer in self._layers:
            if tuple(layer.kv_cache.shape) != pool:
                raise RuntimeError(
                    f"prefix_attn: KV cache of {layer.layer_name}: {tuple(layer.kv_cache.shape)}; expected {pool}"
                )
        return Group(
            shape=self._shape,
            device=self.device,
            page_size=self.block_size,
            num_pages=cache.shape[0],
            max_rows=scheduler.max_num_seqs,
            max_row_tokens=self._query_tokens,
            visible=self._visible(),
            max_row_pages=-(-tokens // self.block_size),
        )

    def _visible(self) -> dict:
        """What the planner must know of the layers' windows and scores."""
        window = eligibility.window_of(self.kv_cache_spec)
        softcap = max(layer.impl.logits_soft_cap or 0.0 for layer in self._layers)
        return {**({"window": window} if window else {}), **({"softcap": softcap} if softcap else {})}

    def _stay_stock(self, reason: str) -> None:
        if self._decoder is not None:
            raise RuntimeError(f"prefix_attn: {reason}; a captured graph would run an old plan")
        self._stock_reason = reason
        logger.info("prefix_attn: %s, ... stay on FlashAttention: %s", self.layer_names[0], reason)

    def _count(self, kind: str) -> None:
        if self.metrics.count(kind):
            logger.info("prefix_attn: %s, ...: %s", self.layer_names[0], self.metrics.line())

    def _check(self, batch, tables, rows: int) -> None:
        lengths = batch.seq_lens_cpu_upper_bound[:rows]
        if not torch.equal(batch.seq_lens[:rows].cpu(), lengths):
            raise RuntimeError(
                f"prefix_attn: lengths on the host {lengths.tolist()}, on the device {batch.seq_lens[:rows].tolist()}"
            )
        device = batch.block_table_tensor[:rows].cpu().numpy()
        window, queries = eligibility.window_of(self.kv_cache_spec), np.diff(batch.query_start_loc_cpu[: rows + 1].numpy())
        for row, request in enumerate(tables.requests[:rows]):
            tokens = int(lengths[row])
            # Entries in front of what the row's first query token sees are 0 on the device from vLLM 0.33 on.
            first = 0 if window is None else max(tokens - int(queries[row]) + 1 - window, 0) // self.block_size
            used = slice(first, -(-tokens // (self.block_size * self.dcp_world_size)))
            host = tables.mirror.ids[request, used]
            if not np.array_equal(device[row, used], host):
                raise RuntimeError(f"prefix_attn: table of row {row}: host {host}, device {device[row, used]}")


def _query_tokens(vllm_config) -> int:
    """Query tokens of a decode row, at most: its newest token and the drafts behind it."""
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        return 1
    return 1 + vllm_config.num_speculative_tokens


def _is_stock_group(vllm_config, spec) -> bool:
    """Whether the group stays stock whatever its layers are. How many query heads they have is not known here."""
    return eligibility.of_group(spec, _shape(vllm_config, getattr(spec, "num_kv_heads", 0), spec)) is not None


def _shape(vllm_config, q_heads: int, spec) -> "pa.AttentionShape | None":
    """What the kernels are asked for, if there are such kernels."""
    try:
        dtype, stored = vllm_config.model_config.dtype, "float8_e4m3fn" if eligibility.is_fp8(spec) else spec.dtype
        return pa.AttentionShape(q_heads, spec.num_kv_heads, spec.head_size, dtype, kv_dtype=stored)
    except (AttributeError, TypeError, ValueError):
        return None


def _rows_from(batch, first: int, first_token: int):
    """The batch without its first rows and their tokens."""
    upper = batch.seq_lens_cpu_upper_bound
    parts = {
        "query_start_loc": batch.query_start_loc[first:] - first_token,
        "query_start_loc_cpu": batch.query_start_loc_cpu[first:] - first_token,
        "seq_lens": batch.seq_lens[first:],
        "num_reqs": batch.num_reqs - first,
        "num_actual_tokens": batch.num_actual_tokens - first_token,
        "max_seq_len": int(upper[first:].max()),
        "block_table_tensor": batch.block_table_tensor[first:],
        "slot_mapping": batch.slot_mapping[first_token:],
        "seq_lens_cpu_upper_bound": upper[first:],
        "is_prefilling": _from(batch.is_prefilling, first),
        "positions": _from(batch.positions, first_token),
        "req_idx": _from(getattr(batch, "req_idx", None), first),
    }
    # Caches of the whole batch; which there are differs from version to version.
    fields = {field.name for field in dataclasses.fields(batch)}
    parts.update({name: None for name in fields if name.startswith("_")})
    return dataclasses.replace(batch, **{name: value for name, value in parts.items() if name in fields})


def _from(values, first: int):
    return None if values is None else values[first:]


def local_lengths(lengths: np.ndarray, ranks: int, rank: int, interleave: int) -> np.ndarray:
    """Of sequences whose tokens are dealt to ``ranks`` ranks in turns of ``interleave``: how many each gives to ``rank``."""
    turns = lengths // (interleave * ranks)
    rest = lengths - turns * interleave * ranks
    return turns * interleave + np.clip(rest - rank * interleave, 0, interleave)
