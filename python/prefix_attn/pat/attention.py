"""``prefix_attn_with_kvcache`` in PAT's two forms: of a tree, and of a schedule's tables."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

import prefix_attn

from .tree import PrefixTreeCPP, is_unchanged, kind, known_of, mark_of

#: More than any schedule of a cache has in a group; what is larger would take the host's memory when it is read.
MOST_TABLE_ENTRIES = 1 << 28


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
            from the device once per schedule, which waits for it. A program may write into tables between calls: on the CPU
            they are compared with what they were; on a device, where that would wait for it, torch counts writes, but not
            those by way of ``.data`` or of another library, after which the tables are to be passed as other tensors.
        softmax_scale: Factor on the scores, usually ``D ** -0.5``. Scores beyond float32's range can give NaN.
        out: as q.

    Raises:
        TypeError, ValueError: An argument has another type, shape, dtype or device, or the tables are not a schedule.
    """
    what = args[0] if args else kwargs.get("tree", kwargs.get("num_split_per_seq"))
    if isinstance(what, PrefixTreeCPP):
        _tree_form(q, k_cache_paged, v_cache_paged, *args, **kwargs)
    elif isinstance(what, torch.Tensor):
        _table_form(q, k_cache_paged, v_cache_paged, *args, **kwargs)
    else:
        raise TypeError(f"tree: {kind(what)}, expected a PrefixTreeCPP, or the tensor num_split_per_seq and the tables behind it")


def _tree_form(q, k_cache_paged, v_cache_paged, tree: PrefixTreeCPP, softmax_scale: float, out: torch.Tensor) -> None:
    _check_tensors(q=q, k_cache_paged=k_cache_paged, v_cache_paged=v_cache_paged, out=out)
    if q.shape[1] != 1 or out.shape != q.shape:
        raise ValueError(f"q, out: {list(q.shape)} and {list(out.shape)}, expected both [B, 1, Hq, D]")
    if q.shape[0] != len(tree._lengths):
        raise ValueError(f"q: {q.shape[0]} sequences, expected the tree's {len(tree._lengths)}")
    num_blocks, block_size, kv_heads, head_dim = k_cache_paged.shape
    if block_size != tree.block_size:
        raise ValueError(f"k_cache_paged: blocks of {block_size} tokens, expected the tree's {tree.block_size}")
    if not q.shape[2] or not kv_heads or q.shape[2] % kv_heads:
        raise ValueError(f"q: {q.shape[2]} heads, expected a positive multiple of the cache's {kv_heads}")
    plan = tree._plan(q.shape[2], kv_heads, head_dim, q.dtype, q.device, num_blocks)
    try:
        prefix_attn.run(plan, q[:, 0], k_cache_paged, v_cache_paged, out=out[:, 0], scale=softmax_scale)
    except (TypeError, ValueError) as error:
        raise type(error)(_RUN_NAMES.sub(lambda name: _PAT_NAMES[name[0]], str(error))) from error


#: What `run` calls its arguments, by the start of its messages or, the caches, anywhere.
_RUN_NAMES = re.compile(r"^scale\b|\b[kv]_cache\b")
_PAT_NAMES = {"scale": "softmax_scale", "k_cache": "k_cache_paged", "v_cache": "v_cache_paged"}


def _check_tensors(**tensors: object) -> None:
    """Tensors of four dimensions that are where something can be computed; the call itself checks the rest."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: {kind(tensor)}, expected a tensor of 4 dimensions")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name}: {tensor.layout}, expected a dense tensor")
        if tensor.dim() != 4:
            raise ValueError(f"{name}: {tensor.dim()} dimensions, expected 4")
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: on {tensor.device}, expected on cuda or the CPU")
        # Before it is planned for: the planner's error would not name the tensor.
        if name == "q" and tensor.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"q: {tensor.dtype}, expected torch.float16 or torch.bfloat16")


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
    _check_tensors(q=q, k_cache_paged=k_cache_paged, v_cache_paged=v_cache_paged, out=out)
    # Ahead of anything that reads it: a tensor of any number of elements may take no memory.
    _check_table("num_split_per_seq", num_split_per_seq, 1)
    if num_split_per_seq.shape[0] != q.shape[0]:
        raise ValueError(f"num_split_per_seq: {num_split_per_seq.shape[0]} sequences, expected the {q.shape[0]} of q")
    tables = {
        "query_tables": query_tables,
        "block_tables": block_tables,
        "num_seqs_per_CTAs": num_seqs_per_CTAs,
        "CTA_ranks": CTA_ranks,
        "kv_in_CTAs": kv_in_CTAs,
    }
    for name, groups in (tables | {"MNW": MNW}).items():
        if not isinstance(groups, Sequence) or isinstance(groups, str):
            raise TypeError(f"{name}: {kind(groups)}, expected a sequence with one entry per group of packs")
    counts = {name: len(groups) for name, groups in tables.items()} | {"MNW": len(MNW)}
    if len(set(counts.values())) != 1:
        raise ValueError(f"tables of {counts} groups, expected as many in each")
    parts = [num_split_per_seq, *(table for groups in tables.values() for table in groups)]
    tree = _tree_of_same(parts)
    if tree is None:
        for name, groups in tables.items():
            for group, table in enumerate(groups):
                _check_table(f"{name}[{group}]", table, 2 if name in ("query_tables", "block_tables") else 1)
        _check_pack_counts(tables, q.shape[0])
        tree = _tree_of_own_tables(num_split_per_seq, tables) or _tree_of_tables(
            num_split_per_seq.tolist(), {name: [t.tolist() for t in groups] for name, groups in tables.items()}, k_cache_paged
        )
        known_of(num_split_per_seq).schedule = ([(part, mark_of(part)) for part in parts], tree)
    _tree_form(q, k_cache_paged, v_cache_paged, tree, softmax_scale, out)


# Errors about missing arguments name the function that was called.
_tree_form.__qualname__ = _table_form.__qualname__ = prefix_attn_with_kvcache.__qualname__


def _check_table(name: str, table: object, dims: int) -> None:
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"{name}: {kind(table)}, expected a tensor")
    if table.layout is not torch.strided or table.is_nested:
        raise TypeError(f"{name}: {table.layout}, expected a dense tensor")
    if table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {table.dtype}, expected torch.int32")
    if table.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: on {table.device}, expected on cuda or the CPU")
    if table.dim() != dims:
        raise ValueError(f"{name}: {table.dim()} dimensions, expected {dims}")


def _check_pack_counts(tables: dict, sequences: int) -> None:
    """Before the tables are read: as many packs in each table of a group, and no more than can have a partial."""
    for group in zip(*tables.values()):
        counts = [table.shape[0] for table in group]
        if len(set(counts)) != 1:
            raise ValueError(f"tables of {counts} packs in a group, expected as many in each")
        if group[0].shape[1] > sequences:
            raise ValueError(f"query_tables: {group[0].shape[1]} queries in a pack, expected at most the {sequences} of q")
        if any(table.numel() > MOST_TABLE_ENTRIES for table in group):
            raise ValueError(f"block_tables: {group[1].numel()} entries in a group, expected at most {MOST_TABLE_ENTRIES}")


def _tree_of_same(parts: list[torch.Tensor]) -> PrefixTreeCPP | None:
    """The tree of the layer before: where the tensors are the same ones, unchanged."""
    known, tree = known_of(parts[0]).schedule
    same = len(known) == len(parts) and all(a is b and is_unchanged(b, mark) for (a, mark), b in zip(known, parts))
    return tree if same else None


def _tree_of_own_tables(num_split_per_seq: torch.Tensor, tables: dict) -> PrefixTreeCPP | None:
    """The tree whose ``kernel_info`` the tables are, if they are as it made them."""
    tree = known_of(num_split_per_seq).tree
    if tree is None or not _is_as_made(tree.kernel_info.num_split_per_seq, num_split_per_seq):
        return None
    for name, groups in tables.items():
        own = getattr(tree.kernel_info, name)
        if len(own) != len(groups) or not all(map(_is_as_made, own, groups)):
            return None
    return tree


def _is_as_made(own: torch.Tensor, given: torch.Tensor) -> bool:
    return own is given and is_unchanged(own, known_of(own).mark)


def _tree_of_tables(num_splits: list[int], tables: dict[str, list], k_cache_paged: torch.Tensor) -> PrefixTreeCPP:
    """A batch with what each query of a schedule reads: attention does not depend on the order of the keys."""
    num_blocks, block_size = k_cache_paged.shape[:2]
    read: list[list[tuple]] = [[] for _ in num_splits]
    index = 0
    for group in zip(*tables.values()):
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
                used = blocks[: -(-kv_tokens // block_size)]
                if not all(0 <= block < num_blocks for block in used):
                    raise ValueError(f"block_tables: {used}, expected blocks of the cache, 0 to {num_blocks - 1}")
                read[query].append((key, rank, used, kv_tokens))
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
