"""vLLM plug-in of the GPU runs: random weights that make tokens depend on attention.

vLLM's own dummy weights are so small that all logits are tied, and equal in all layers. Here matrices keep the size of what they
multiply, and the norms of queries and keys give scores of standard deviation 4: a row attends to a few tokens of thousands. As in
trained models, all layers together change the residual stream by about what the embedding puts into it, so that rounding does not
grow from layer to layer; and a token attends to itself more than to another, so that one left out changes the logits.
"""

import os
import re
import zlib

#: Correlation of a query head's projection with its KV head's. At a head dimension of 128 a token's score with itself is 14 in the
#: mean, as the largest of some thousand others.
SELF = 0.3


def register():
    """Replace the dummy loader's initialisation. PAT_ATTENTION=gpt-oss or gemma gives Qwen3 that model's attention, PAT_FACTORS=1
    an FP8 cache factors that are not 1."""
    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_dummy_weights = initialize
    wrap = {"gpt-oss": _as_gpt_oss, "gemma": _as_gemma}.get(os.environ.get("PAT_ATTENTION"))
    if wrap:
        from vllm.model_executor.models import qwen3

        if not hasattr(qwen3.Attention, "pat_is_wrapped"):
            qwen3.Attention = wrap(qwen3.Attention)
            qwen3.Attention.pat_is_wrapped = True
    if os.environ.get("PAT_FACTORS") == "1":
        from vllm.model_executor.layers.attention import attention

        if not hasattr(attention.set_default_quant_scales, "pat_is_wrapped"):
            attention.set_default_quant_scales = _with_factors(attention.set_default_quant_scales)
            attention.set_default_quant_scales.pat_is_wrapped = True


def _with_factors(set_default):
    """Factors as a checkpoint may give them: queries and keys reach 12, values 10, FP8 448. Each layer's differ a little."""

    def set_scales(layer, *args, **kwargs):
        set_default(layer, *args, **kwargs)
        own = 1 + 0.01 * (zlib.crc32(getattr(layer, "layer_name", "").encode()) % 10)
        for name, factor in (("q", 0.05), ("k", 0.06), ("v", 0.04)):
            getattr(layer, f"_{name}_scale").fill_(factor * own)
            setattr(layer, f"_{name}_scale_float", factor * own)
        layer._k_scale_cpu.fill_(layer._k_scale_float)
        layer._v_scale_cpu.fill_(layer._v_scale_float)

    return set_scales


def _as_gemma(attention):
    """`Attention` with a soft cap, and a window of 512 tokens in every other layer."""

    def make(*args, prefix, **kwargs):
        from vllm.model_executor.models.utils import extract_layer_index

        kwargs["logits_soft_cap"] = 50.0
        if extract_layer_index(prefix) % 2 == 0:
            kwargs["per_layer_sliding_window"] = 512
        return attention(*args, prefix=prefix, **kwargs)

    return make


def _as_gpt_oss(attention):
    """`Attention` with a sink for each head, and a window of 128 tokens in every other layer."""

    def make(num_heads, *args, prefix, **kwargs):
        import torch
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.model_executor.models.utils import extract_layer_index

        heads = torch.arange(num_heads) + num_heads * get_tensor_model_parallel_rank()
        # As large as the largest scores.
        kwargs["sinks"] = torch.nn.Parameter((8.0 + heads % 5).to(torch.bfloat16), requires_grad=False)
        if extract_layer_index(prefix) % 2 == 0:
            kwargs["per_layer_sliding_window"] = 128
        return attention(num_heads, *args, prefix=prefix, **kwargs)

    return make


def initialize(module, *_, **__):
    """Set the weights of a model: a function of their names, shapes and tensor-parallel rank.

    The loader calls this for the model, then for each module of it: the first call has set all of them.
    """
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    if getattr(module, "pat_is_set", False):
        return
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    numbers = [int(n) for name in module.state_dict() for n in re.findall(r"layers\.(\d+)\.", name)]
    layers = 1 + max(numbers, default=0)
    for name, parameter in module.state_dict().items():
        # Scalars are scales of quantisation, 1 where there is none.
        if not torch.is_floating_point(parameter) or parameter.dim() == 0:
            continue
        if parameter.dim() == 1:
            parameter.fill_(2.0 if "q_norm" in name or "k_norm" in name else 1.0)
        else:
            # Without norms of queries and keys (Llama) the projections make them as large.
            gain = 2.0 if "qkv_proj" in name else 1.5 if "lm_head" in name else 1.0
            cuts = 1
            if "o_proj" in name or "down_proj" in name:
                # What they give is added to the stream, twice a layer. They are cut along the dimension that is summed over.
                gain, cuts = (2 * layers) ** -0.5, ranks
            fan_in = 1 if "embed" in name else parameter.shape[-1] * cuts
            parameter.normal_(0.0, gain * fan_in**-0.5, generator=_generator(parameter, f"{name} {rank}"))
    for name, part in module.named_modules():
        part.pat_is_set = True
        if getattr(part, "num_kv_head_replicas", 1) > 1:
            # Ranks that share a KV head have its projection in common.
            shared = part.weight.data[part.num_heads * part.head_size :]
            group = rank // part.num_kv_head_replicas
            shared.normal_(0.0, 2.0 * shared.shape[-1] ** -0.5, generator=_generator(shared, f"{name} KV {group}"))
        if hasattr(part, "num_kv_head_replicas"):
            _attend_to_self(part)


def _attend_to_self(part) -> None:
    """Make each query head's projection in part its KV head's."""
    rows = part.num_heads * part.head_size
    query = part.weight.data[:rows].view(part.num_kv_heads, -1, part.head_size, part.weight.shape[-1])
    key = part.weight.data[rows:].view(-1, 1, part.head_size, part.weight.shape[-1])[: part.num_kv_heads]
    query.mul_((1 - SELF**2) ** 0.5).add_(key, alpha=SELF)


def _generator(tensor, name: str):
    import torch

    return torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
