"""The layers' implementation: decode rows on the step's plan, other rows on FlashAttention.

Over an FP8 cache FlashAttention wants FP8 queries too, which vLLM's layer makes where the implementation says so. Ours takes the
model's 16-bit queries: it tells the layer that it wants no others, and quantises those of the rows that FlashAttention serves,
by the operator that the layer has for it.
"""

import functools

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from prefix_attn.vllm import eligibility


class Impl(FlashAttentionImpl):
    """K and V of all rows are in the cache before :meth:`forward` (vLLM writes them first)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        #: The layer whose factors runs are bound to.
        self._factors_of = None
        #: What makes FlashAttention's queries: for one factor of Q, and for one of each KV head.
        self._query_quants: tuple | None = None
        is_fp8 = self.kv_cache_dtype in eligibility.FP8_CACHES
        if is_fp8 and self.supports_quant_query_input:
            self._query_quants = _query_quants(self.head_size * self.num_heads // self.num_kv_heads)
            # Read by the layer when it is made, which is now, and later by FlashAttention.
            self.supports_quant_query_input = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks and factors are weights: runs are bound to float32 copies, which take the new values where they are loaded again."""
        super().process_weights_after_loading(act_dtype)
        if self.sinks is not None:
            self._scores["sinks"].copy_(self.sinks)
        if self._factors_of is not None:
            self.take_factors(self._factors_of)

    def take_factors(self, layer) -> None:
        """Copy the factors of a layer's FP8 K and V, one for each KV head, to where runs read them. Does not wait for the device."""
        if self.kv_cache_dtype not in eligibility.FP8_CACHES:
            return
        if self._factors_of is None:
            self._factors_of = layer
            factors = torch.empty((2, self.num_kv_heads), dtype=torch.float32, device=layer._k_scale.device)
            self._scores["k_scale"], self._scores["v_scale"] = factors
        self._scores["k_scale"].copy_(layer._k_scale.reshape(-1))
        self._scores["v_scale"].copy_(layer._v_scale.reshape(-1))

    @functools.cached_property
    def _scores(self) -> dict:
        """What becomes of Q K, see :meth:`DecodeRows.run`."""
        scores = {"scale": self.scale}
        if self.logits_soft_cap:
            scores["softcap"] = self.logits_soft_cap
        if self.sinks is not None:
            scores["sinks"] = self.sinks.detach().to(torch.float32, copy=True)
        return scores

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        """As FlashAttention's: ``query`` and ``output`` are ``[tokens, q_heads, head_dim]``, maybe with padding behind."""
        split = getattr(attn_metadata, "prefix_attn", None)
        scales = output_scale, output_block_scale
        if split is None or self.dcp_world_size > 1:
            return self._stock(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        key_cache, value_cache = self._caches(kv_cache)
        split.decoder.run(layer.layer_name, self._scores, query, key_cache, value_cache, output)
        split.metrics.kernel_calls += 1
        if split.prefill is not None:
            first = split.decode_tokens
            rows = [None if tensor is None else tensor[first:] for tensor in (query, key, value)]
            self._stock(layer, *rows, kv_cache, split.prefill, output[first:], *scales)
        return output

    def _stock(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        """FlashAttention's forward of all given rows."""
        if self._query_quants is not None and attn_metadata is not None:
            # Now it is FlashAttention that asks, and multiplies with the factor of Q.
            self.supports_quant_query_input = True
            quantize = self._query_quants[layer._q_scale.numel() > 1]
            query = quantize(query.flatten(1), layer._q_scale)[0].view(query.shape)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)

    def _caches(self, kv_cache):
        """K and V as ``[pages, page_size, kv_heads, head_dim]``."""
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return canonicalize_singleton_dim_strides(key_cache), canonicalize_singleton_dim_strides(value_cache)

    def _forward_with_dcp(self, query, key, value, key_cache, value_cache, output, attn_metadata, **descales):
        """Decode context parallelism: this rank's part of the cache for the query heads of all ranks, combined by LSE."""
        split = getattr(attn_metadata, "prefix_attn", None)
        if split is None:
            return super()._forward_with_dcp(
                query, key, value, key_cache, value_cache, output, attn_metadata, **descales
            )
        group = flash_attn.get_dcp_group()
        every_query = group.all_gather(query.contiguous(), dim=1)
        rows = every_query.shape[0]
        part = split.decoder.template("dcp out", every_query.stride(), every_query.dtype)
        part_lse = split.decoder.lse()
        split.decoder.run(
            self._dcp_name(key_cache), self._scores, every_query, key_cache, value_cache, part, part_lse
        )
        split.metrics.kernel_calls += 1
        context, context_lse = self.dcp_combine(part[:rows], part_lse[:rows], group, return_lse=True)
        # A row attends to its own new token alone: its output is that token's V, its LSE the one score.
        groups = self.num_heads // self.num_kv_heads
        own = value.repeat_interleave(groups, dim=1)
        score = (query.float() * key.repeat_interleave(groups, dim=1).float()).sum(-1) * self.scale
        flash_attn.merge_attn_states(
            output, context, context_lse.transpose(0, 1).contiguous(), own, score.transpose(0, 1).contiguous()
        )
        return output

    @staticmethod
    def _dcp_name(key_cache: torch.Tensor) -> str:
        """Names the layer, which this method is not told, by its cache."""
        return f"dcp {key_cache.data_ptr()}"


def _query_quants(elements: int) -> tuple:
    """vLLM's operators that make FP8 queries: by one factor, and by one for each KV head, whose queries have so many elements."""
    # Not where nothing needs them: other versions may have them elsewhere.
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    return tuple(QuantFP8(static=True, group_shape=shape) for shape in (GroupShape.PER_TENSOR, GroupShape(-1, elements)))
