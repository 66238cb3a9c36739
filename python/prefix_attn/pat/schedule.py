"""PAT's schedule of a batch: which queries read which blocks together, tile by tile.

Only the tables that PAT programs look at are made of it; nothing here decides what this library runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: (M, N, warps) of PAT's tiles: the order of the groups of a schedule.
DEFAULT_TILES = (
    (64, 128, 4),
    (64, 64, 4),
    (64, 32, 4),
    (32, 128, 2),
    (32, 64, 2),
    (32, 32, 2),
    (32, 16, 2),
    (16, 128, 1),
    (16, 64, 1),
    (16, 32, 1),
    (16, 16, 1),
)
#: Most partials of a sequence that PAT's merge takes.
MAX_SPLITS = 32


@dataclass
class Pack:
    """Queries that read a run of blocks together."""

    queries: list[int]
    blocks: list[int]
    kv_tokens: int
    #: The partial that each of the queries gets from it.
    rank: int


@dataclass
class _Node:
    #: Of the sequences below, in the order of the batch.
    queries: list[int]
    blocks: list[int]
    #: What blocks are compared by: full blocks by id, partial ones by their sequence, so that they are never shared.
    keys: list[tuple[int, int]]
    tokens: int
    children: dict[tuple[int, int], _Node] = field(default_factory=dict)


def packs(lengths: list[int], tables: list[list[int]], block_size: int, most_queries: int) -> list[Pack]:
    """The packs of a batch by PAT's rule, of at most ``most_queries`` queries each."""
    root = _forest(lengths, tables, block_size)
    splits = [0] * len(lengths)
    result: list[Pack] = []

    def emit(queries: list[int], blocks: list[int], kv_tokens: int) -> None:
        for begin in range(0, len(queries), most_queries):
            chunk = queries[begin : begin + most_queries]
            result.append(Pack(chunk, blocks, kv_tokens, splits[chunk[0]]))
            for query in chunk:
                splits[query] += 1

    pending: list[tuple[_Node, list[int]]] = [(child, []) for child in reversed(root.children.values())]
    while pending:
        node, inherited = pending.pop()
        blocks = inherited + node.blocks
        kv_tokens = block_size * len(inherited) + node.tokens
        own, split, merged = _divide(node, kv_tokens, most_queries, splits[node.queries[0]])
        emit(own, blocks, kv_tokens)
        pending += [(child, blocks) for child in reversed(merged)]
        pending += [(child, []) for child in reversed(split)]
    return result


def _forest(lengths: list[int], tables: list[list[int]], block_size: int) -> _Node:
    root = _Node([], [], [], 0)
    for sequence, (length, table) in enumerate(zip(lengths, tables)):
        count = -(-length // block_size)
        blocks = table[:count]
        keys = [(block, -1) for block in blocks]
        if length % block_size:
            keys[-1] = (blocks[-1], sequence)
        node, done = root, 0
        while done < count:
            child = node.children.get(keys[done])
            if child is None:
                tokens = length - done * block_size
                node.children[keys[done]] = _Node([sequence], blocks[done:], keys[done:], tokens)
                break
            same = 0
            for mine, theirs in zip(keys[done:], child.keys):
                if mine != theirs:
                    break
                same += 1
            if same < len(child.keys):
                tokens = same * block_size
                upper = _Node(list(child.queries), child.blocks[:same], child.keys[:same], tokens)
                node.children[child.keys[0]] = upper
                child.blocks, child.keys, child.tokens = child.blocks[same:], child.keys[same:], child.tokens - tokens
                upper.children[child.keys[0]] = child
                child = upper
            child.queries.append(sequence)
            node, done = child, done + same
    return root


def _divide(node: _Node, kv_tokens: int, most_queries: int, rank: int) -> tuple[list[int], list[_Node], list[_Node]]:
    """The queries that read the node's blocks in packs of its own, the children that go on from there, and those that read
    the blocks again themselves."""

    def chunks(count: int) -> int:
        return -(-count // most_queries)

    left = len(node.queries)
    split, merged = [], []
    for child in node.children.values():
        count = len(child.queries)
        extra_reads = chunks(left - count) + chunks(count) - chunks(left)
        if left == count or 4 * count >= extra_reads * kv_tokens or rank == MAX_SPLITS - 1:
            merged.append(child)
            left -= count
        else:
            split.append(child)
    elsewhere = {query for child in merged for query in child.queries}
    return [query for query in node.queries if query not in elsewhere], split, merged


def tile_of(rows: int, kv_tokens: int, block_size: int, tiles: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The tile of ``tiles`` for a pack of ``rows`` (query, head) rows: one that holds them where there is one, the smallest
    of those, with PAT's number of keys or the nearest to it."""
    height = 64 if rows > 32 else 32 if rows > 16 else 16
    keys = 16 if kv_tokens < 32 else 32 if kv_tokens < 64 else 64 if kv_tokens < 128 else 128
    keys = max(keys, 32) if height == 64 else keys
    # The rows of a thread may not straddle blocks.
    whole = [tile for tile in tiles if block_size % max(1, tile[1] // (4 * tile[2])) == 0] or tiles
    fitting = [tile for tile in whole if tile[0] >= rows] or [max(whole)]
    return min(fitting, key=lambda tile: (tile[0], abs(tile[1] - keys)))
