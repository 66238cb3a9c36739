"""The counter-based generator of test tensors, in array operations.

What it computes is described in kernels-gpu/abi/src/generator.rs; golden_generator.json holds both sides to it. The
functions take numpy arrays and torch tensors alike. Everything is int32: both libraries wrap around in it, torch has no
complete set of operations on unsigned types, and right shifts are masked because int32 shifts copy the sign.
"""

Q, K, V = 0, 1, 2

SCALE = 2.6428996e-5


def signed(value):
    """The int32 with the bits of an unsigned 32-bit number."""
    return value - (1 << 32) if value >= 1 << 31 else value


def mix(x):
    """The finaliser lowbias32."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * signed(0x7FEB352D)
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def draw(seed, tensor, page, token, head, dim):
    """Elements as float32, before they are rounded to the 16-bit type.

    `page`, `token`, `head` and `dim` are int32 arrays that broadcast against each other, each with at least one axis
    (numpy warns of overflow in scalars). Of Q, `page` is the sequence and `token` 0.
    """
    key = mix(page * 0 + signed(seed))
    for coordinate in (tensor, page, token, head):
        key = mix(key + coordinate)
    h = mix(key + dim)
    g = mix(h ^ signed(0x9E3779B9))
    total = (h & 0xFFFF) + ((h >> 16) & 0xFFFF) + (g & 0xFFFF) + ((g >> 16) & 0xFFFF) - 131070
    # Exact in float32, and the product of two float32 is rounded in the same way everywhere.
    as_float = total.astype("float32") if hasattr(total, "astype") else total.float()
    return as_float * SCALE


def fill(out, seed, tensor, chunk_elements=1 << 26):
    """Draws a torch tensor `[pages, tokens, heads, head_dim]`, some pages at a time: the temporaries are five int32 arrays
    of `chunk_elements`."""
    import torch

    def axis(begin, end, *shape):
        return torch.arange(begin, end, dtype=torch.int32, device=out.device).reshape(shape)

    pages, tokens, heads, head_dim = out.shape
    token, head, dim = axis(0, tokens, -1, 1, 1), axis(0, heads, -1, 1), axis(0, head_dim, -1)
    step = max(1, chunk_elements // max(1, tokens * heads * head_dim))
    for first in range(0, pages, step):
        last = min(first + step, pages)
        out[first:last] = draw(seed, tensor, axis(first, last, -1, 1, 1, 1), token, head, dim)
