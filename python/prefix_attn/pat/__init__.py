"""PAT's Python interface on this library's planner and kernels: a program written for PAT runs with its import unchanged.

What differs is what PAT gets wrong: every tile group of a schedule is run, also where no sequence is split; sequences that
name the same partial last block keep their own lengths; rows of length 0 give 0; V has its own strides; there is no limit on
splits; work goes to torch's current stream. The tables in ``kernel_info`` are a valid PAT schedule, for programs that read
them or pass them on; what runs is this library's own plan of the same batch.
"""

from .attention import prefix_attn_with_kvcache
from .generators import generate_random_kv_cache, generate_tree_seqs
from .tree import AsyncTree, KernelInfo, PrefixTree, PrefixTreeCPP

__all__ = [
    "AsyncTree",
    "KernelInfo",
    "PrefixTree",
    "PrefixTreeCPP",
    "generate_random_kv_cache",
    "generate_tree_seqs",
    "prefix_attn_with_kvcache",
]
