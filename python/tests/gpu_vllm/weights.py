"""vLLM plug-in of the GPU runs: random weights that make tokens depend on attention.

vLLM's own dummy weights are so small that all logits are tied, and equal in all layers. Here matrices keep the size of what they
multiply, and the norms of queries and keys give scores of standard deviation 4: a row attends to a few tokens of thousands, and a
token left out, or one too many, changes the logits.
"""

import zlib


def register():
    """Replace the dummy loader's initialisation. Weights depend on the parameter's name and shape alone: ranks agree."""
    from vllm.model_executor.model_loader import dummy_loader

    dummy_loader.initialize_dummy_weights = initialize


def initialize(module, *_, **__):
    """The loader calls this for the model, then for each module of it: the first call has set all of them."""
    import torch

    if getattr(initialize, "is_done", False):
        return
    initialize.is_done = True
    for name, parameter in module.state_dict().items():
        if not torch.is_floating_point(parameter):
            continue
        generator = torch.Generator(device=parameter.device).manual_seed(zlib.crc32(name.encode()))
        if parameter.dim() == 1:
            parameter.fill_(2.0 if "q_norm" in name or "k_norm" in name else 1.0)
        else:
            # Without norms of queries and keys (Llama) the projections make them as large.
            gain = 2.0 if "qkv_proj" in name else 1.5 if "lm_head" in name else 1.0
            fan_in = 1 if "embed" in name else parameter.shape[-1]
            parameter.normal_(0.0, gain * fan_in**-0.5, generator=generator)
