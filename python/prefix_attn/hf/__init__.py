"""Continuous batching of transformers with prefix-aware decode steps.

::

    import prefix_attn.hf
    prefix_attn.hf.enable(model)                    # says why where it cannot
    model.generate_batch(prompts, generation_config=..., continuous_batching_config=...)

Steps in which every request decodes one token (transformers' decode fast path) run here, inside CUDA graphs too; steps with a
prefill run on a stock kernel. Tested with the versions that :data:`TESTED_VERSIONS` names.
"""

from __future__ import annotations

import logging

import prefix_attn

from .hooks import TESTED_VERSIONS, attention_name, install
from .steps import reset_stats, stats

__all__ = ["TESTED_VERSIONS", "attention_name", "enable", "reset_stats", "stats", "unsupported"]

_log = logging.getLogger("prefix_attn.hf")
#: transformers' default. A call of ``generate_batch`` may name another one: there are kernels for every page size.
_PAGE_SIZE = 256


def enable(model) -> str | None:
    """Makes continuous batching of ``model`` (a transformers model) decode here.

    Returns:
        None; or, where the model has what the kernels have not, the reason: the model is then left as it is, and decodes on
        its stock path.

    Raises:
        RuntimeError: The transformers version is outside the tested range.
    """
    install()
    reason = unsupported(model)
    if reason is not None:
        _log.warning("prefix_attn: %s keeps its stock attention: %s", type(model).__name__, reason)
        return reason
    model.set_attn_implementation(attention_name())
    return None


def unsupported(model) -> str | None:
    """Why the decode steps of ``model`` cannot run here; None if they can."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not hasattr(config, "layer_types") and getattr(config, "sliding_window", None):
        layer_types = {"sliding_attention"}
    if layer_types != {"full_attention"}:
        return f"layers of {', '.join(sorted(layer_types))}: transformers has a decode fast path for full attention alone"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "attention sinks"
    if getattr(config, "attn_logit_softcapping", None):
        return "a soft cap on attention scores"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "v_head_dim", head_dim) != head_dim:
        return f"values of {config.v_head_dim} elements beside keys of {head_dim}"
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    try:
        shape = prefix_attn.AttentionShape(config.num_attention_heads, kv_heads, head_dim, model.dtype)
    except (TypeError, ValueError) as error:
        return str(error)
    return prefix_attn.supports(shape, _PAGE_SIZE)
