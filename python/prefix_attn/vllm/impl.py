"""The layers' implementation: decode rows on the step's plan, other rows on FlashAttention."""

import functools

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl


class Impl(FlashAttentionImpl):
    """K and V of all rows are in the cache before :meth:`forward` (vLLM writes them first)."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks are weights: runs are bound to float32 copies of them, which take the new values where weights are loaded again."""
        super().process_weights_after_loading(act_dtype)
        if self.sinks is not None:
            self._scores["sinks"].copy_(self.sinks)

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
        if split is None or self.dcp_world_size > 1:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        key_cache, value_cache = self._caches(kv_cache)
        split.decoder.run(layer.layer_name, self._scores, query, key_cache, value_cache, output)
        split.metrics.kernel_calls += 1
        if split.prefill is not None:
            first = split.decode_tokens
            super().forward(
                layer,
                query[first:],
                None if key is None else key[first:],
                None if value is None else value[first:],
                kv_cache,
                split.prefill,
                output[first:],
                output_scale,
                output_block_scale,
            )
        return output

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
