"""Four sequences behind one system prompt, one layer of one decode step; on the GPU if there is one, else on the CPU.

    python examples/quick_start.py
"""

import torch

import prefix_attn as pa

device = "cuda:0" if torch.cuda.is_available() else "cpu"
q_heads, kv_heads, head_dim, page_size = 32, 8, 128, 16

# 64 pages hold the prompt, which all share; each sequence has two pages of its own, the second one half full.
prompt = list(range(64))
block_tables = [prompt + [64 + 2 * row, 65 + 2 * row] for row in range(4)]
lengths = [66 * page_size - 8] * 4
num_pages = 72

# Once per model.
shape = pa.AttentionShape(q_heads, kv_heads, head_dim, torch.bfloat16)
planner = pa.Planner(shape, device)

# Once per decode step, for all layers.
plan = planner.plan(block_tables, lengths, page_size, num_pages)
print(f"without sharing, the average KV byte would be read {plan.summary()['sharing_factor']:.1f} times")

# Once per layer.
q = torch.randn((4, q_heads, head_dim), dtype=torch.bfloat16, device=device)
k_cache, v_cache = torch.randn((2, num_pages, page_size, kv_heads, head_dim), dtype=torch.bfloat16, device=device)
out, lse = pa.run(plan, q, k_cache, v_cache, return_lse=True)

# The same with torch, for the first sequence.
keys, values = (cache[torch.tensor(block_tables[0], device=device)].flatten(0, 1)[: lengths[0]] for cache in (k_cache, v_cache))
expected = torch.nn.functional.scaled_dot_product_attention(
    q[:1].transpose(0, 1).float(), *(x.transpose(0, 1).repeat_interleave(4, 0).float() for x in (keys, values))
)
difference = (out[0].float() - expected[:, 0]).abs().max().item()
print(f"largest difference from torch: {difference:.1e}")
assert difference < 1e-2
