"""What the plug-in serves: reasons why a model, a KV cache group or a layer stays on the stock path."""

import os

import prefix_attn as pa


def _tokens(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ValueError(f"{variable}: got {text!r}, expected a number of tokens")
    return int(text)


#: The shortest sliding window that is served, in tokens. Such layers cost each step a plan of their own, which takes the host
#: longer than short windows save on the device.
MIN_WINDOW = _tokens("PREFIX_ATTN_MIN_WINDOW", 512)
#: The FP8 caches that FlashAttention has, by vLLM's names.
FP8_CACHES = ("fp8", "fp8_e4m3")


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
    if type(spec) is FullAttentionSpec and (spec.sliding_window is not None or spec.attention_chunk_size is not None):
        return "sliding windows or chunked attention in a cache of whole sequences"
    if getattr(spec, "non_causal", False):
        return "non-causal attention"
    if spec.head_size_v != spec.head_size:
        return f"value heads of {spec.head_size_v} and key heads of {spec.head_size} elements"
    if not is_fp8(spec) and spec.kv_quant_mode.name != "NONE":
        return f"a KV cache of {spec.kv_quant_mode.name}"
    if shape is None:
        return "a shape for which there are no kernels"
    window = window_of(spec)
    if window is not None and window < MIN_WINDOW:
        return f"a window of {window} tokens, shorter than PREFIX_ATTN_MIN_WINDOW={MIN_WINDOW}"
    return pa.supports(shape, spec.block_size, window=window)


def is_fp8(spec) -> bool:
    """Whether K and V have 8 bits, with factors for a layer's K and V, or for each of their heads."""
    return getattr(spec, "kv_quant_mode", None) is not None and spec.kv_quant_mode.name == "FP8_PER_TENSOR"


def window_of(spec) -> int | None:
    """Tokens that a row of a served group sees at most, if that is not all of them."""
    return spec.sliding_window


def of_layer(layer, spec, shape: "pa.AttentionShape", ranks: int) -> str | None:
    """Why a layer of a group that can be served cannot, or ``None``.

    Args:
        layer: vLLM's ``Attention``.
        spec: the group's ``KVCacheSpec``.
        shape: what the kernels are asked for.
        ranks: of decode context parallelism.
    """
    from vllm.v1.attention.backend import AttentionType

    impl = layer.impl
    if impl.attn_type != AttentionType.DECODER:
        return f"{impl.attn_type} attention"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    window = window_of(spec)
    if tuple(impl.sliding_window or (-1, -1)) != ((-1, -1) if window is None else (window - 1, 0)):
        return f"a sliding window of {impl.sliding_window} in a cache for {window or 'all'} tokens"
    if ranks > 1 and (impl.sinks is not None or window is not None):
        return "sinks or windows under decode context parallelism: a rank does not know the other's part"
    if is_fp8(spec):
        if layer.kv_cache_dtype not in FP8_CACHES:
            return f"a KV cache of {layer.kv_cache_dtype}"
        if getattr(layer, "calculate_kv_scales", False):
            return "factors of K and V that a first step computes"
        if ranks > 1:
            return "an FP8 KV cache under decode context parallelism"
    softcap = impl.logits_soft_cap or None
    return pa.supports(shape, spec.block_size, window=window, softcap=softcap, sinks=impl.sinks is not None)


def _is_batch_invariant() -> bool:
    import vllm.envs as envs

    return bool(envs.VLLM_BATCH_INVARIANT)
