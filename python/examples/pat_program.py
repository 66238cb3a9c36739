"""A program as it is written for PAT: decode attention over PAT's 14 test trees and its manual case, checked against torch.

    python examples/pat_program.py                       on the GPU, at full size
    python examples/pat_program.py --device cpu --most-sequences 16 --nheads-q 16 --nheads-kv 2
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from prefix_attn import (
    AsyncTree,
    PrefixTree,
    PrefixTreeCPP,
    generate_random_kv_cache,
    generate_tree_seqs,
    prefix_attn_with_kvcache,
)

TREES = [
    "1,2,4,16,32,64,128,256,512_3072,1024,32,32,32,32,32,32,32",
    "1,2,4,16,32,64,256_4096,32,128,128,32,256,512",
    "1,2,4,16,32,64,128,256,512_3072,1024,512,256,128,32,256,512,32",
    "1,2,4,16,32,64,128,256,1024_512,32,128,128,32,256,512,32,32",
    "1,2,4,16,32,64,128,512_512,32,128,128,32,256,512,256",
    "1,2,4,16,32,64,128_512,32,128,128,32,256,512",
    "4_4096",
    "4,16_4096,256",
    "1,8_640,32",
    "1,4,16_32,256,32",
    "1,2,4,8,16,32,64_32,512,32,256,32,32,32",
    "1,4,256_32,256,32",
    "1,16,32_2048,1024,256",
    "1,10_4096,416",
]
TOLERANCE = 1e-2


def shrink(tree: str, most_sequences: int) -> str:
    nodes, tokens = tree.split("_")
    return ",".join(str(min(int(count), most_sequences)) for count in nodes.split(",")) + "_" + tokens


def reference(q, k_cache, v_cache, seq_lens, block_table, scale):
    """torch's attention, sequence by sequence: in float64 on the CPU, in float32 on a GPU."""
    dtype = torch.float64 if q.device.type == "cpu" else torch.float32
    rows = []
    for sequence, length in enumerate(seq_lens):
        blocks = block_table[sequence, : -(-length // k_cache.shape[1])].to(q.device, torch.long)
        keys, values = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1)[None].to(dtype) for cache in (k_cache, v_cache))
        query = q[sequence].transpose(0, 1)[None].to(dtype)
        rows.append(F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.stack(rows)


def check(name, out, expected):
    difference = (out.to(expected.dtype) - expected).abs()
    print(f"{name}: max diff {difference.max():.2e}, mean diff {difference.mean():.2e}")
    assert difference.max() <= TOLERANCE, f"{name}: differs by {difference.max()}"


def run(name, seq_lens, block_table, num_blocks, block_size, args):
    dtype, device = getattr(torch, args.dtype), args.device
    ratio, scale = args.nheads_q // args.nheads_kv, args.head_dim**-0.5
    k_cache, v_cache = generate_random_kv_cache(num_blocks, block_size, args.nheads_kv, args.head_dim, dtype, device)
    q = torch.randn(len(seq_lens), 1, args.nheads_q, args.head_dim, dtype=dtype, device=device)
    expected = reference(q, k_cache, v_cache, seq_lens, block_table, scale)

    # The tree form, twice: as two layers of one step.
    tree = PrefixTreeCPP(block_size)
    tree.build_radix_tree(seq_lens, block_table)
    tree.pack_schedule(None, ratio, args.nheads_kv)
    tree.kernel_info.to_gpu(device)
    for layer in range(2):
        out = torch.full_like(q, torch.nan)
        prefix_attn_with_kvcache(q, k_cache, v_cache, tree, scale, out)
        check(f"{name} layer {layer}", out, expected)

    # The tree of another thread, beside other work.
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    future = AsyncTree(block_size, lengths, block_table, None, ratio, args.nheads_kv, device)
    out = torch.full_like(q, torch.nan)
    prefix_attn_with_kvcache(q, k_cache, v_cache, future.tree, scale, out)
    check(f"{name} async", out, expected)

    # The table form.
    tree = PrefixTree(block_size)
    tree.build_radix_tree(seq_lens, block_table)
    tree.pack_schedule(None, ratio, args.nheads_kv)
    tree.kernel_info.to_gpu(device)
    info = tree.kernel_info
    out = torch.full_like(q, torch.nan)
    prefix_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        info.num_split_per_seq,
        info.query_tables,
        info.block_tables,
        info.num_seqs_per_CTAs,
        info.CTA_ranks,
        info.kv_in_CTAs,
        info.MNW,
        info.max_split_per_seq,
        info.max_seqs_in_CTA,
        info.max_blocks_in_CTA,
        scale,
        out,
    )
    check(f"{name} tables", out, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--nheads-q", type=int, default=64)
    parser.add_argument("--nheads-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--most-sequences", type=int, default=1 << 30, help="cut levels of a tree to this many nodes")
    args = parser.parse_args()
    torch.manual_seed(0)
    for tree in TREES:
        tree = shrink(tree, args.most_sequences)
        seq_lens, block_table, num_blocks = generate_tree_seqs(tree, 32, seed=0)
        run(tree, seq_lens, block_table, num_blocks, 32, args)
    manual = torch.tensor([[0, 1, 5], [0, 2, 6], [3, 4, 7]], dtype=torch.int32)
    args.nheads_q, args.nheads_kv = min(args.nheads_q, 32), min(args.nheads_kv, 8)
    run("manual", [33, 33, 33], manual, 8, 16, args)
    print("successfully pass")


if __name__ == "__main__":
    sys.exit(main())
