"""What the plug-in serves: reasons why a model, a KV cache group or a layer stays on the stock path."""

import prefix_attn as pa


def of_engine(vllm_config) -> str | None:
    """Why no layer of this engine can be served, or ``None``."""
    parallel = vllm_config.parallel_config
    if not vllm_config.use_v2_model_runner:
        return "model runner V1 has no hook for its block tables"
    if vllm_config.speculative_config is not None and vllm_config.scheduler_config.async_scheduling:
        return "speculative decoding under asynchronous scheduling: lengths are known on the device alone"
    if parallel.prefill_context_parallel_size > 1:
        return "prefill context parallelism"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        return "microbatches"
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector may take back tokens after they were counted"
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        return "fast prefill of layers that share KV"
    model = vllm_config.model_config
    if getattr(model, "rswa_window", None) is not None:
        return "reference sliding windows"
    if getattr(model, "is_mm_prefix_lm", False):
        return "bidirectional image tokens"
    if _is_batch_invariant():
        return "VLLM_BATCH_INVARIANT"
    return None


def of_group(spec, shape: "pa.AttentionShape | None") -> str | None:
    """Why the layers of a KV cache group cannot be served, or ``None``.

    Args:
        spec: vLLM's ``KVCacheSpec`` of the group.
        shape: what the kernels would be asked for; ``None`` where there is no such shape.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        return type(spec).__name__
    if getattr(spec, "attention_chunk_size", None) is not None:
        return "chunked attention"
    if getattr(spec, "non_causal", False):
        return "non-causal attention"
    value_head_size = getattr(spec, "head_size_v", spec.head_size)
    if value_head_size != spec.head_size:
        return f"value heads of {value_head_size} and key heads of {spec.head_size} elements"
    if spec.kv_quant_mode.name != "NONE":
        return f"a KV cache of {spec.kv_quant_mode.name}"
    if shape is None:
        return "a shape for which there are no kernels"
    return pa.supports(shape, spec.block_size, window=spec.sliding_window)


def of_layer(layer, shape: "pa.AttentionShape", page_size: int, ranks: int, window: int | None = None) -> str | None:
    """Why a layer of a group that can be served cannot, or ``None``.

    Args:
        layer: vLLM's ``Attention``.
        shape: what the kernels are asked for.
        page_size: tokens per block.
        ranks: of decode context parallelism.
        window: tokens that the group's sliding window leaves, if it has one.
    """
    from vllm.v1.attention.backend import AttentionType

    impl = layer.impl
    if impl.attn_type != AttentionType.DECODER:
        return f"{impl.attn_type} attention"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    own_window = None if impl.sliding_window in (None, (-1, -1)) else impl.sliding_window[0] + 1
    if own_window != window:
        return f"a sliding window of {own_window} tokens in a group of {window}"
    if window is not None and ranks > 1:
        return "a sliding window under decode context parallelism: a rank has every so many tokens of it"
    if impl.sinks is not None and ranks > 1:
        return "attention sinks under decode context parallelism: each rank would count them"
    return pa.supports(shape, page_size, window=window, softcap=impl.logits_soft_cap or None, sinks=impl.sinks is not None)


def _is_batch_invariant() -> bool:
    import vllm.envs as envs

    return bool(envs.VLLM_BATCH_INVARIANT)
