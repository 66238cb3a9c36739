"""What a decode step needs to know of transformers' cache, by version."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheView:
    """A paged cache of full-attention layers. A layer's K and V are views [pages, page_size, kv_heads, head_dim] of which the
    ids of block tables count every ``page_stride``-th page."""

    page_size: int
    #: Block ids are below it.
    num_blocks: int
    page_stride: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_blocks_per_request: int


def cache_view(cache) -> CacheView:
    """The geometry of a ``PagedAttentionCache`` whose layers are all of full attention."""
    if hasattr(cache, "cache_allocators"):
        # 5.18 and later: a block holds a K page and a V page of every layer.
        allocator = cache.cache_allocators["full_attention"]
        page_size, page_stride = allocator.tokens_per_page, allocator.block_physical_stride // allocator.tokens_per_page
        kv_heads, head_dim = allocator.num_key_value_heads, allocator.head_dim
        # Views of later layers begin later in a block: they are shorter by less than one.
        pages = allocator.get_cache_for_block_table(allocator.layer_indices[0])[0].shape[0]
        device = allocator.cache_tensor.device
    else:
        page_size, page_stride = cache.block_size, 1
        kv_heads, head_dim = cache.num_key_value_heads, cache.head_dim
        pages = cache.key_cache[0].shape[0] // page_size
        device = cache.key_cache[0].device
    num_blocks = -(-pages // page_stride)
    dtype, most = cache.dtype, cache.max_blocks_per_request
    return CacheView(page_size, num_blocks, page_stride, kv_heads, head_dim, dtype, device, most)


def block_tables(cache) -> dict[str, list[int]]:
    """Block ids by request, as the host has them."""
    if hasattr(cache, "cache_allocators"):
        return cache.cache_allocators["full_attention"].block_table
    return cache.group_cache_managers[0].block_table


def host_io(inputs_and_outputs):
    """Where the requests of the batch at hand are listed: in asynchronous batching, on the host's side of its pair."""
    pairs = getattr(inputs_and_outputs, "io_pairs", None)
    return inputs_and_outputs if pairs is None else pairs[inputs_and_outputs.current_pair].host_io
