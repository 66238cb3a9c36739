"""Kernels that no device has run yet: engines' adapters serve a model with them only where they are asked to."""

import os

import prefix_attn as pa

#: Whether such kernels, and plans of pages in runs, are used.
SERVES = os.environ.get("PREFIX_ATTN_UNTRIED", "0") == "1"
#: Head dims whose kernels have run on a device.
_HEAD_DIMS = (64, 128, 256)


def reason(shape: "pa.AttentionShape") -> str | None:
    """Why the kernels for ``shape`` count as untried, or ``None``: they have run on a device, or are asked for.

    Args:
        shape: one that :func:`prefix_attn.supports` accepts.
    """
    if SERVES:
        return None
    what = None
    group = shape.q_heads // shape.kv_heads
    if shape.value_head_dim != shape.head_dim:
        what = f"value heads of {shape.value_head_dim} and key heads of {shape.head_dim} elements"
    elif shape.head_dim not in _HEAD_DIMS:
        what = f"head dim {shape.head_dim}"
    elif group > _tile_rows(shape):
        what = f"{group} query heads per KV head"
    return what and f"{what}: run on no device yet (PREFIX_ATTN_UNTRIED=1 serves it)"


def _tile_rows(shape: "pa.AttentionShape") -> int:
    """Rows of the largest tile; larger groups are computed in parts, which is what has not run."""
    return 64 if shape.head_dim == 256 or shape.kv_dtype != shape.dtype else 128
