"""Prefix-aware decode attention over a paged KV cache.

Sequences that begin with the same pages (system prompts, documents, rollouts of one prompt) read them once for many, not once
each. Plan once per decode step, run once per layer::

    import prefix_attn as pa

    shape = pa.AttentionShape(q_heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    planner = pa.Planner(shape, device="cuda:0")
    plan = planner.plan(block_tables, lengths, page_size=16, num_pages=k_cache.shape[0])
    out = pa.run(plan, q, k_cache, v_cache)

torch is used where the program has imported it; it is not needed to import this package. The wheel is one of Python's stable
ABI: free-threaded builds of Python do not load it, and pip refuses it there.
"""

from typing import TYPE_CHECKING

from ._errors import CudaError, CudaUnavailable
from ._native import (
    AttentionShape,
    BoundRun,
    Capacity,
    DeviceProfile,
    Plan,
    PlanBuffers,
    PlanFuture,
    Planner,
    Workspace,
    append_kv,
    doctor,
    merge_states,
    run,
    supports,
)

if TYPE_CHECKING:
    from .pat import (
        AsyncTree,
        KernelInfo,
        PrefixTree,
        PrefixTreeCPP,
        generate_random_kv_cache,
        generate_tree_seqs,
        prefix_attn_with_kvcache,
    )

__all__ = [
    "AttentionShape",
    "BoundRun",
    "Capacity",
    "CudaError",
    "CudaUnavailable",
    "DeviceProfile",
    "Plan",
    "PlanBuffers",
    "PlanFuture",
    "Planner",
    "Workspace",
    "append_kv",
    "doctor",
    "merge_states",
    "run",
    "supports",
]

#: PAT's names, see `prefix_attn.pat`.
_PAT_NAMES = {
    "AsyncTree",
    "KernelInfo",
    "PrefixTree",
    "PrefixTreeCPP",
    "generate_random_kv_cache",
    "generate_tree_seqs",
    "prefix_attn_with_kvcache",
}


def __getattr__(name: str):
    # They bring torch, which nothing else here needs.
    if name not in _PAT_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pat

    return getattr(pat, name)
