"""Small models with random weights in continuous batching on the CPU."""

import random

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import prefix_attn.hf

# Small matrices: threads cost more than they bring.
torch.set_num_threads(1)

IS_PAGED_BY_NAME = prefix_attn.hf.attention_name().startswith("paged|")
STOCK = "paged|sdpa" if IS_PAGED_BY_NAME else "sdpa"
PAGE_SIZE_NAME = "block_size" if IS_PAGED_BY_NAME else "page_size"
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    # Wide enough that outputs do not collapse to one token.
    "initializer_range": 0.08,
    "max_position_embeddings": 4096,
}


def llama(dtype=torch.float16):
    torch.manual_seed(1)
    config = LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2, head_dim=64, attn_implementation=STOCK)
    return LlamaForCausalLM(config).to(dtype).eval()


def qwen3(dtype=torch.float16):
    torch.manual_seed(2)
    config = Qwen3Config(**SIZES, num_attention_heads=5, num_key_value_heads=1, head_dim=128, attn_implementation=STOCK)
    return Qwen3ForCausalLM(config).to(dtype).eval()


def prompts(count, system_prompts=4, system_tokens=70, seed=0):
    """Prompts of ``count`` users behind a few system prompts, of several lengths each."""
    draw = random.Random(seed)
    systems = [[draw.randrange(512) for _ in range(system_tokens + 3 * i)] for i in range(system_prompts)]
    return [draw.choice(systems) + [draw.randrange(512) for _ in range(draw.randint(1, 30))] for _ in range(count)]


def configurations(*, new_tokens=12, page_size=16, num_blocks=256, **settings):
    """Greedy generation; 8 requests are in a batch at most, so that the others join as some leave."""
    settings = {"max_requests_per_batch": 8, "max_batch_tokens": 128, "max_blocks_per_request": 16, **settings}
    settings |= {PAGE_SIZE_NAME: page_size, "num_blocks": num_blocks}
    return {
        "generation_config": GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": ContinuousBatchingConfig(**settings),
    }


def generate(model, requests, **settings):
    """Tokens by request."""
    outputs = model.generate_batch(requests, **configurations(**settings))
    errors = [output.error for output in outputs.values() if output.error is not None]
    assert not errors, errors
    return [output.generated_tokens for output in outputs.values()]
