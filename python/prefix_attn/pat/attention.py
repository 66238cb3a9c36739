"""``prefix_attn_with_kvcache`` in PAT's two forms: of a tree, and of a schedule's tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import prefix_attn

from .tree import PrefixTreeCPP


def prefix_attn_with_kvcache(q, k_cache_paged, v_cache_paged, *args, **kwargs) -> None:
    """Decode attention over a paged KV cache; writes ``out`` in place, on torch's current stream.

    Two forms::

        prefix_attn_with_kvcache(q, k_cache_paged, v_cache_paged, tree, softmax_scale, out)
        prefix_attn_with_kvcache(q, k_cache_paged, v_cache_paged, num_split_per_seq, query_tables, block_tables,
                                 num_seqs_per_CTAs, CTA_ranks, kv_in_CTAs, MNW, max_split_per_seq, max_seqs_in_CTA,
                                 max_blocks_in_CTA, softmax_scale, out, timing_=None)

    Args:
        q: fp16 or bf16 [B, 1, Hq, D].
        k_cache_paged, v_cache_paged: as q, [num_blocks, block_size, Hkv, D], each with strides of its own.
        tree: The batch; its tables as ``kernel_info`` has them are the second form. Tables of another origin are read back
            from the device once per schedule, which waits for it.
        softmax_scale: Factor on the scores, usually ``D ** -0.5``.
        out: as q.

    Raises:
        TypeError, ValueError: An argument has another type, shape, dtype or device, or the tables are not a schedule.
    """
    is_tree = isinstance(args[0] if args else kwargs.get("tree"), PrefixTreeCPP)
    (_tree_form if is_tree else _table_form)(q, k_cache_paged, v_cache_paged, *args, **kwargs)


def _tree_form(q, k_cache_paged, v_cache_paged, tree: PrefixTreeCPP, softmax_scale: float, out: torch.Tensor) -> None:
    for name, tensor in (("q", q), ("k_cache_paged", k_cache_paged), ("v_cache_paged", v_cache_paged), ("out", out)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name}: expected a tensor of 4 dimensions")
    if q.shape[1] != 1 or out.shape != q.shape:
        raise ValueError(f"q, out: {list(q.shape)} and {list(out.shape)}, expected both [B, 1, Hq, D]")
    if q.shape[0] != len(tree._lengths):
        raise ValueError(f"q: {q.shape[0]} sequences, expected the tree's {len(tree._lengths)}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q: {q.dtype}, expected torch.float16 or torch.bfloat16")
    num_blocks, block_size, kv_heads, head_dim = k_cache_paged.shape
    if block_size != tree.block_size:
        raise ValueError(f"k_cache_paged: blocks of {block_size} tokens, expected the tree's {tree.block_size}")
    plan = tree._plan(q.shape[2], kv_heads, head_dim, q.dtype, q.device, num_blocks)
    prefix_attn.run(plan, q[:, 0], k_cache_paged, v_cache_paged, out=out[:, 0], scale=softmax_scale)


def _table_form(
    q,
    k_cache_paged,
    v_cache_paged,
    num_split_per_seq: torch.Tensor,
    query_tables: Sequence[torch.Tensor],
    block_tables: Sequence[torch.Tensor],
    num_seqs_per_CTAs: Sequence[torch.Tensor],
    CTA_ranks: Sequence[torch.Tensor],
    kv_in_CTAs: Sequence[torch.Tensor],
    MNW: Sequence[Sequence[int]],
    max_split_per_seq: int,
    max_seqs_in_CTA: int,
    max_blocks_in_CTA: int,
    softmax_scale: float,
    out: torch.Tensor,
    timing_: object = None,
) -> None:
    if not isinstance(num_split_per_seq, torch.Tensor):
        raise TypeError(f"{type(num_split_per_seq).__name__}, expected a PrefixTreeCPP or the tensor num_split_per_seq")
    tables = {
        "query_tables": query_tables,
        "block_tables": block_tables,
        "num_seqs_per_CTAs": num_seqs_per_CTAs,
        "CTA_ranks": CTA_ranks,
        "kv_in_CTAs": kv_in_CTAs,
    }
    for name, groups in (tables | {"MNW": MNW}).items():
        if not hasattr(groups, "__len__"):
            raise TypeError(f"{name}: {type(groups).__name__}, expected a sequence with one entry per group of packs")
    counts = {name: len(groups) for name, groups in tables.items()} | {"MNW": len(MNW)}
    if len(set(counts.values())) != 1:
        raise ValueError(f"tables of {counts} groups, expected as many in each")
    parts = [num_split_per_seq, *(table for groups in tables.values() for table in groups)]
    tree = _tree_of_same(parts)
    if tree is None:
        for name, groups in tables.items():
            for group, table in enumerate(groups):
                if not isinstance(table, torch.Tensor):
                    raise TypeError(f"{name}[{group}]: {type(table).__name__}, expected a tensor")
        tree = _tree_of_own_tables(num_split_per_seq, tables) or _tree_of_tables(
            num_split_per_seq.tolist(), {name: [t.tolist() for t in groups] for name, groups in tables.items()}, k_cache_paged
        )
        num_split_per_seq._prefix_attn_schedule = ([(part, part._version) for part in parts], tree)
    _tree_form(q, k_cache_paged, v_cache_paged, tree, softmax_scale, out)


def _tree_of_same(parts: list[torch.Tensor]) -> PrefixTreeCPP | None:
    """The tree of the layer before: where the tensors are the same ones, unchanged."""
    known, tree = getattr(parts[0], "_prefix_attn_schedule", ([], None))
    same = len(known) == len(parts) and all(a is b and b._version == version for (a, version), b in zip(known, parts))
    return tree if same else None


def _tree_of_own_tables(num_split_per_seq: torch.Tensor, tables: dict) -> PrefixTreeCPP | None:
    """The tree whose ``kernel_info`` the tables are, if they are as it made them."""
    tree = getattr(num_split_per_seq, "_prefix_attn_tree", None)
    if tree is None or tree.kernel_info.num_split_per_seq is not num_split_per_seq or num_split_per_seq._version:
        return None
    for name, groups in tables.items():
        own = getattr(tree.kernel_info, name)
        if len(own) != len(groups) or any(mine is not given or given._version for mine, given in zip(own, groups)):
            return None
    return tree


def _tree_of_tables(num_splits: list[int], tables: dict[str, list], k_cache_paged: torch.Tensor) -> PrefixTreeCPP:
    """A batch with what each query of a schedule reads: attention does not depend on the order of the keys."""
    block_size = k_cache_paged.shape[1]
    read: list[list[tuple]] = [[] for _ in num_splits]
    index = 0
    for group in zip(*tables.values()):
        if len(set(map(len, group))) != 1:
            raise ValueError(f"tables of {[len(table) for table in group]} packs in a group, expected as many in each")
        for queries, blocks, query_count, rank, kv_tokens in zip(*group):
            if not 0 < query_count <= len(queries):
                raise ValueError(f"num_seqs_per_CTAs: {query_count}, expected 1 to {len(queries)}, a row of query_tables")
            if not 0 < kv_tokens <= len(blocks) * block_size:
                raise ValueError(f"kv_in_CTAs: {kv_tokens}, expected 1 to {len(blocks) * block_size}, a row of block_tables")
            for query in queries[:query_count]:
                if not 0 <= query < len(num_splits):
                    raise ValueError(f"query_tables: query {query}, expected below {len(num_splits)}")
                # A partial block comes last; before it, what most others read too, so that it is found to be shared.
                is_partial = kv_tokens % block_size != 0
                key = (is_partial, -query_count, index)
                read[query].append((key, rank, blocks[: -(-kv_tokens // block_size)], kv_tokens))
            index += 1
    lengths, rows = [], []
    for query, (splits, packs) in enumerate(zip(num_splits, read)):
        ranks = sorted(rank for _, rank, _, _ in packs)
        # The count first: a range of any number that a table holds may not fit into memory.
        if len(ranks) != splits or ranks != list(range(splits)):
            raise ValueError(f"CTA_ranks: {ranks} for query {query}, expected each of 0 to num_split_per_seq - 1 = {splits - 1}")
        packs.sort(key=lambda pack: pack[0])
        if sum(key[0] for key, *_ in packs) > 1:
            raise ValueError(f"kv_in_CTAs: query {query} has two packs that end within a block, expected at most one")
        lengths.append(sum(kv_tokens for *_, kv_tokens in packs))
        rows.append([block for _, _, blocks, _ in packs for block in blocks])
    width = max(map(len, rows), default=0)
    tree = PrefixTreeCPP(block_size)
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32).view(len(rows), width)
    tree.build_radix_tree(lengths, padded)
    return tree
