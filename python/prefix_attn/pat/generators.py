"""Random batches in PAT's notation."""

from __future__ import annotations

import math
import random

import torch

from .tree import count_of, device_of, integer, kind

#: Most entries of a block table that is made.
MOST_BLOCKS = 1 << 28
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def generate_tree_seqs(tree: str, block_size: int, seed: int | None = None) -> tuple[list[int], torch.Tensor, int]:
    """A batch with the prefix tree ``nodes_tokens``: nodes by level, then tokens of each node by level, as in
    ``"1,10_4096,416"``. Blocks are numbered level by level; sequences stand at random places of the batch.

    Returns ``(seq_lens, block_table, num_blocks)``: B lengths in tokens, an int32 CPU tensor [B, blocks], and how many blocks
    the cache needs.

    Raises:
        TypeError: ``tree`` is no string; ``block_size`` or ``seed`` is no integer.
        ValueError: ``tree`` is not in the notation, a level has fewer nodes than the one above or not a multiple of it, its
            tokens are not a positive multiple of ``block_size``, or the block table or the cache has more than 2^28 blocks.
    """
    block_size = count_of("block_size", block_size)
    seed = None if seed is None else integer("seed", seed)
    if not isinstance(tree, str):
        raise TypeError(f"tree: {kind(tree)}, expected a string like '1,10_4096,416'")
    try:
        nodes, tokens = ([int(part) for part in side.split(",")] for side in tree.split("_"))
    except ValueError:
        raise ValueError(f"tree: {tree!r}, expected nodes by level, '_', tokens by level, as in '1,10_4096,416'") from None
    if len(nodes) != len(tokens):
        raise ValueError(f"tree: {len(nodes)} levels of nodes and {len(tokens)} of tokens in {tree!r}, expected as many")
    for above, below in zip([1, *nodes], nodes):
        if below <= 0 or below % above:
            raise ValueError(f"tree: a level of {below} nodes below one of {above} in {tree!r}, expected a multiple")
    if any(count <= 0 or count % block_size for count in tokens):
        raise ValueError(f"tree: levels of {tokens} tokens in {tree!r}, expected positive multiples of {block_size}")
    batch = nodes[-1]
    # Also the blocks of the cache, which are no more.
    entries = batch * sum(tokens) // block_size
    if entries > MOST_BLOCKS:
        raise ValueError(f"tree: {tree!r} is a block table of too many entries, expected at most {MOST_BLOCKS}")
    levels, first = [], 0
    for node_count, token_count in zip(nodes, tokens):
        blocks = token_count // block_size
        level = torch.arange(first, first + node_count * blocks, dtype=torch.int32).view(node_count, blocks)
        levels.append(level.repeat_interleave(batch // node_count, dim=0))
        first += node_count * blocks
    order = list(range(batch))
    random.Random(seed).shuffle(order)
    return [sum(tokens)] * batch, torch.cat(levels, dim=1)[order].contiguous(), first


def generate_random_kv_cache(
    num_blocks: int,
    block_size: int,
    nheads_kv: int,
    head_dim: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of normally distributed elements, each [num_blocks, block_size, nheads_kv, head_dim].

    Raises:
        TypeError, ValueError: A size is not a positive integer, ``dtype`` is none of float16, bfloat16, float32 and float64,
            ``device`` names no CUDA device and no CPU, or a cache has 2^60 elements or more.
    """
    sizes = dict(num_blocks=num_blocks, block_size=block_size, nheads_kv=nheads_kv, head_dim=head_dim)
    shape = [count_of(name, size) for name, size in sizes.items()]
    # torch counts bytes in 64 bits.
    if math.prod(shape) >= 1 << 60:
        raise ValueError(f"num_blocks, block_size, nheads_kv, head_dim: {shape}, expected fewer than 2^60 elements")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")
    device = device_of(device)
    return torch.randn(shape, dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
