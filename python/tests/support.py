"""What the tests share: random ragged forests, paged caches, and torch's attention in float64 to compare with."""

import random
from dataclasses import dataclass

import torch

SHAPE = dict(q_heads=8, kv_heads=2, head_dim=64)


@dataclass
class Batch:
    """A decode batch: its tables may be ragged, empty and shared in any way."""

    block_tables: list
    lengths: list
    page_size: int
    num_pages: int

    @property
    def padded(self):
        """The tables as engines keep them: int32, garbage behind what is needed."""
        columns = max((len(row) for row in self.block_tables), default=0) + 2
        table = torch.full((len(self.block_tables), columns), -1, dtype=torch.int32)
        for row, ids in enumerate(self.block_tables):
            table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        return table


def random_forest(seed, page_size=16, most_sequences=24):
    """Sequences that branch off each other at random, some empty, some equal, some with a partial last page."""
    rng = random.Random(seed)
    tables, lengths, next_page = [], [], 0
    for _ in range(rng.randint(1, most_sequences)):
        if rng.random() < 0.1:
            tables.append([])
            lengths.append(0)
            continue
        parent = rng.choice(tables) if tables else []
        row = parent[: rng.randint(0, len(parent))]
        own = rng.randint(0, 6)
        row = row + list(range(next_page, next_page + own))
        next_page += own
        if not row:
            row, next_page = [next_page], next_page + 1
        tables.append(row)
        lengths.append(len(row) * page_size - rng.choice([0, 0, rng.randint(0, page_size - 1)]))
    return Batch(tables, lengths, page_size, max(next_page, 1))


def written_out(batch, counts):
    """The batch with a row per query token."""
    rows = [(row, back) for row, count in enumerate(counts) for back in range(count - 1, -1, -1)]
    tables = [batch.block_tables[row] for row, _ in rows]
    return Batch(tables, [max(batch.lengths[row] - back, 0) for row, back in rows], batch.page_size, batch.num_pages)


def draw_trees(batch, seed):
    """By sequence, the parents of its query tokens."""
    rng = random.Random(seed)
    counts = [min(length, rng.randint(1, 9)) for length in batch.lengths]
    return [[rng.choice([None, *range(i)]) if i else None for i in range(count)] for count in counts]


def seen_by(batch, trees):
    """By query token, the tokens that it sees."""
    for length, tree in zip(batch.lengths, trees):
        context = length - len(tree)
        for token in range(len(tree)):
            path = []
            while token is not None:
                path.append(context + token)
                token = tree[token]
            yield [*range(context), *reversed(path)]


def caches(batch, dtype=torch.float16, layout="NHD", seed=0, kv_heads=2, head_dim=64, device="cpu", value_head_dim=None):
    """K and V with rows that no sequence owns set to NaN: nobody may read them."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch.num_pages + 1, batch.page_size, kv_heads)
    dims = (head_dim, value_head_dim or head_dim)
    k, v = (torch.randn((*size, dim), generator=generator).to(dtype) for dim in dims)
    for cache in (k, v):
        cache[batch.num_pages] = float("nan")
    if layout == "HND":
        k, v = (cache.transpose(1, 2).contiguous() for cache in (k, v))
    return k.to(device), v.to(device)


def queries(rows, dtype=torch.float16, seed=1, q_heads=8, head_dim=64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, q_heads, head_dim), generator=generator).to(dtype).to(device)


def reference(
    batch,
    q,
    k,
    v,
    layout="NHD",
    scale=None,
    dtype=torch.float64,
    softcap=None,
    sinks=None,
    window=None,
    chunk=None,
    visible=None,
):
    """Output and LSE by torch's own operations, one sequence at a time; without caps and sinks by its attention."""
    if layout == "HND":
        k, v = (cache.transpose(1, 2) for cache in (k, v))
    rows, q_heads, head_dim = q.shape
    group = q_heads // k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros((rows, q_heads, v.shape[-1]), dtype=dtype, device=q.device)
    lse = torch.full((rows, q_heads), float("-inf"), dtype=dtype, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(dtype)
    for row, (ids, length) in enumerate(zip(batch.block_tables, batch.lengths)):
        if length == 0:
            continue
        used = torch.tensor(ids[: -(-length // batch.page_size)], device=q.device)
        # [kv_heads, tokens, head_dim], repeated for the query heads of a group.
        keys, values = (
            cache[used].reshape(-1, *cache.shape[2:])[:length].transpose(0, 1).repeat_interleave(group, 0).to(dtype)
            for cache in (k, v)
        )
        if window is not None:
            keys, values = keys[:, -window:], values[:, -window:]
        if chunk is not None:
            keys, values = keys[:, (length - 1) // chunk * chunk :], values[:, (length - 1) // chunk * chunk :]
        if visible is not None:
            keys, values = keys[:, visible[row]], values[:, visible[row]]
        query = q[row].to(dtype).unsqueeze(1)
        if softcap is not None or sinks is not None:
            scores = (query @ keys.transpose(1, 2)).squeeze(1) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            terms = scores if sinks is None else torch.cat([scores, sinks.to(dtype).unsqueeze(1)], dim=1)
            lse[row] = torch.logsumexp(terms, dim=-1)
            out[row] = ((scores - lse[row].unsqueeze(1)).exp().unsqueeze(1) @ values).squeeze(1)
            continue
        out[row] = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale).squeeze(1)
        lse[row] = torch.logsumexp((query @ keys.transpose(1, 2)).squeeze(1) * scale, dim=-1)
    return out, lse


def tolerance(dtype):
    """Twice what rounding P and O to 16 bits can add to values of size 1, and one unit in the last place."""
    return {torch.float16: 3e-3, torch.bfloat16: 2.5e-2}[dtype]
