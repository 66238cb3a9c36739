"""PAT's API: its examples of schedules, its cases against torch in float64, and what PAT gets wrong."""

import copy
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import prefix_attn
from prefix_attn import (
    AsyncTree,
    PrefixTree,
    PrefixTreeCPP,
    generate_random_kv_cache,
    generate_tree_seqs,
    prefix_attn_with_kvcache,
)
from prefix_attn.pat.schedule import DEFAULT_TILES, packs, tile_of

EXAMPLES = Path(__file__).parent.parent / "examples"
DRAWN = [(seed, block_size) for seed in range(12) for block_size in (16, 32)]


def table_of(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


def tree_of(lengths, rows, block_size, group=4, kv_heads=2, tree_class=PrefixTreeCPP):
    tree = tree_class(block_size)
    tree.build_radix_tree(lengths, table_of(rows))
    tree.pack_schedule(None, group, kv_heads)
    tree.kernel_info.to_gpu("cpu")
    return tree


def tensors_of(batch, num_blocks, block_size, q_heads=8, kv_heads=2, head_dim=64, dtype=torch.float16):
    generator = torch.Generator().manual_seed(batch * num_blocks)
    q = torch.randn(batch, 1, q_heads, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(num_blocks, block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


def expected_of(q, k, v, lengths, rows):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for sequence, (length, row) in enumerate(zip(lengths, rows)):
        if length:
            blocks = torch.tensor(row[: -(-length // k.shape[1])])
            keys, values = (t[blocks].flatten(0, 1)[:length].transpose(0, 1)[None].double() for t in (k, v))
            query = q[sequence].transpose(0, 1)[None].double()
            out[sequence] = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)[0].transpose(0, 1)
    return out


def foreign_copies(tables):
    """The same numbers in tensors that no tree has made."""
    return [tables[0].clone(), *([part.clone() for part in group] for group in tables[1:6]), *tables[6:]]


def tables_of(info):
    return [
        info.num_split_per_seq,
        info.query_tables,
        info.block_tables,
        info.num_seqs_per_CTAs,
        info.CTA_ranks,
        info.kv_in_CTAs,
        info.MNW,
        info.max_split_per_seq,
        info.max_seqs_in_CTA,
        info.max_blocks_in_CTA,
    ]


def ragged(seed, block_size):
    """A batch with prefixes of prefixes, ragged ends, equal rows, empty rows and rows that end in another's prefix."""
    draw = random.Random(seed)
    rows, lengths, blocks = [], [], iter(range(1 << 20))
    for _ in range(draw.randint(1, 40)):
        kept = draw.choice(rows)[: draw.randint(0, 6)] if rows else []
        row = kept + [next(blocks) for _ in range(draw.randint(0, 5))]
        least = len(kept) * block_size
        rows.append(row)
        lengths.append(draw.randint(least, len(row) * block_size))
    return lengths, rows, next(blocks) + 1


def test_the_schedules_of_pats_worked_examples():
    def scheduled(lengths, rows, block_size, group):
        result = []
        for pack in packs(lengths, rows, block_size, 64 // group):
            tile = tile_of(len(pack.queries) * group, pack.kv_tokens, block_size, list(DEFAULT_TILES))
            result.append((pack.queries, pack.kv_tokens, pack.blocks[0], pack.rank, tile[:2]))
        return result

    rows = [
        [0, 1, 2, 3, 4, 5, 13, 14, 15],
        [0, 1, 2, 3, 4, 5, 16],
        [0, 1, 2, 7, 8, 9, 17, 18, 19],
        [0, 1, 2, 7, 8, 9, 20],
        [0, 1, 2, 7, 8, 9, 21, 22, 23, 24],
        [0, 1, 2, 10, 11, 12, 25],
    ]
    assert sorted(scheduled([32 * len(row) - 5 for row in rows], rows, 32, 4)) == sorted(
        [
            ([0, 1, 2, 3, 4, 5], 96, 0, 0, (32, 64)),
            ([0, 1], 96, 3, 1, (16, 64)),
            ([2, 3, 4], 96, 7, 1, (16, 64)),
            ([5], 123, 10, 1, (16, 64)),
            ([0], 91, 13, 2, (16, 64)),
            ([2], 91, 17, 2, (16, 64)),
            ([4], 123, 21, 2, (16, 64)),
            ([1], 27, 16, 2, (16, 16)),
            ([3], 27, 20, 2, (16, 16)),
        ]
    )
    # Both groups of 16 read the one block above them themselves.
    groups = [[0, *range(1 + 8 * g, 9 + 8 * g), 100 + s] for g in range(2) for s in range(16 * g, 16 * g + 16)]
    merged = scheduled([9 * 32 + 7] * 32, groups, 32, 4)
    sizes = sorted((len(queries), kv_tokens, rank) for queries, kv_tokens, _, rank, _ in merged)
    assert sizes == [(1, 7, 1)] * 32 + [(16, 288, 0)] * 2
    assert [pack[:4] for pack in scheduled([64, 32, 96], [[0, 1], [0], [0, 1, 2]], 32, 4)] == [
        ([0, 1, 2], 32, 0, 0),
        ([0, 2], 32, 1, 1),
        ([2], 32, 2, 2),
    ]


@pytest.mark.parametrize(
    ("tree", "group", "pack_count", "splits", "kv_tokens"),
    [
        ("1,256_256,32", 8, 288, 2, 16384),
        ("1,4,256_32,256,32", 4, 272, 2, 12800),
        ("1,4,16,64,256,1024_256,32,256,64,32,256", 2, 1376, 4, 291840),
        ("1,16,32,64,256,1024_256,128,64,32,32,32", 1, 1360, 4, 53248),
        ("4,16,256,512_512,32,128,32", 1, 792, 4, 53760),
        ("8,16,32,256_512,512,256,32", 4, 304, 3, 32768),
        ("256_1024", 8, 256, 1, 262144),
    ],
)
def test_schedules_of_pats_benchmark(tree, group, pack_count, splits, kv_tokens):
    lengths, table, _ = generate_tree_seqs(tree, 32, seed=1)
    schedule = packs(lengths, table.tolist(), 32, 64 // group)
    assert (len(schedule), sum(pack.kv_tokens for pack in schedule)) == (pack_count, kv_tokens)
    assert 1 + max(pack.rank for pack in schedule) == splits


@pytest.mark.parametrize(("seed", "block_size"), DRAWN)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_tables_are_a_schedule(seed, block_size, group):
    lengths, rows, num_blocks = ragged(seed, block_size)
    info = tree_of(lengths, rows, block_size, group).kernel_info
    covered = [[] for _ in lengths]
    slots = [[] for _ in lengths]
    for queries, blocks, counts, ranks, kv_counts, tile in zip(
        *(map(torch.Tensor.tolist, tables) for tables in tables_of(info)[1:6]), info.MNW
    ):
        for query_row, block_row, count, rank, kv_tokens in zip(queries, blocks, counts, ranks, kv_counts):
            assert 1 <= count * group <= tile[0]
            used = block_row[: -(-kv_tokens // block_size)]
            assert len(used) <= info.max_blocks_in_CTA and count <= info.max_seqs_in_CTA
            for query in query_row[:count]:
                slots[query].append(rank)
                tail = kv_tokens % block_size or block_size
                covered[query] += [(block, block_size) for block in used[:-1]] + [(used[-1], tail)]
    for sequence, (length, row) in enumerate(zip(lengths, rows)):
        count = -(-length // block_size)
        full = [(block, block_size) for block in row[: length // block_size]]
        tail = [(row[count - 1], length % block_size)] if length % block_size else []
        assert sorted(covered[sequence]) == sorted(full + tail)
        assert sorted(slots[sequence]) == list(range(info.num_split_per_seq[sequence]))
    assert info.max_split_per_seq == max(map(len, slots)) <= 32
    assert num_blocks > max((block for row in covered for block, _ in row), default=0)


def test_a_chain_of_prefixes_stays_within_pats_32_splits():
    rows = [list(range(depth)) for depth in range(1, 60)]
    info = tree_of([1024 * len(row) for row in rows], rows, 1024, 1).kernel_info
    assert info.max_split_per_seq == 32


@pytest.mark.parametrize(("seed", "block_size"), DRAWN)
@pytest.mark.parametrize("form", ["tree", "tables", "foreign tables"])
def test_ragged_batches_in_all_forms(seed, block_size, form):
    lengths, rows, num_blocks = ragged(seed, block_size)
    dtype = torch.bfloat16 if seed % 2 else torch.float16
    q, k, v = tensors_of(len(rows), num_blocks, block_size, dtype=dtype)
    tree = tree_of(lengths, rows, block_size, tree_class=PrefixTree if seed % 3 else PrefixTreeCPP)
    out = torch.full_like(q, torch.nan)
    if form == "tree":
        prefix_attn_with_kvcache(q, k, v, tree, 64**-0.5, out)
    else:
        tables = tables_of(tree.kernel_info)
        if form == "foreign tables":
            tables = foreign_copies(tables)
        for _ in range(2):
            prefix_attn_with_kvcache(q, k, v, *tables, 64**-0.5, out, timing_=None)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(out.double(), expected_of(q, k, v, lengths, rows), atol=tolerance, rtol=0)


def test_pats_program_says_its_success_line():
    shrunk = ["--device", "cpu", "--most-sequences", "8", "--nheads-q", "8", "--nheads-kv", "2"]
    # Run from anywhere else, the package is the installed one.
    environment = os.environ | {"PYTHONPATH": str(Path(prefix_attn.__file__).parents[1])}
    program = [sys.executable, EXAMPLES / "pat_program.py", *shrunk]
    run = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.rstrip().endswith("successfully pass")
    assert run.stdout.count(" tables: ") == 15


def check_tree(lengths, rows, num_blocks, block_size, strided_v=False):
    q, k, v = tensors_of(len(rows), num_blocks, block_size)
    if strided_v:
        v = torch.cat([k, v], dim=-1)[..., k.shape[-1] :]
    out = torch.full_like(q, torch.nan)
    prefix_attn_with_kvcache(q, k, v, tree_of(lengths, rows, block_size), 64**-0.5, out)
    torch.testing.assert_close(out.double(), expected_of(q, k, v, lengths, rows), atol=2e-3, rtol=0)


def test_what_pat_gets_wrong_is_right():
    # Uneven splits behind a long prefix: PAT's partials collide.
    prefix, free = list(range(32)), iter(range(32, 1000))
    tails = [2000, 100, 300, 700]
    rows = [prefix + [next(free) for _ in range(-(-tail // 32))] for tail in tails]
    check_tree([1024 + tail for tail in tails], rows, 1000, 32)
    # No sharing, and packs of two tile groups: PAT runs the first group alone.
    check_tree([100, 300], [[0, 1, 2, 3], list(range(4, 14))], 14, 32)
    # A shared last block of which each sequence has another part.
    check_tree([40, 50, 64], [[0, 1], [0, 1], [0, 1]], 2, 32)
    # A sequence without tokens.
    check_tree([0, 33], [[], [0, 1]], 2, 32)
    # More splits than PAT's merge takes.
    short = [[i * 4 + j for j in range(4)] for i in range(6)]
    check_tree([128] * 6 + [20000], short + [list(range(24, 24 + 625))], 649, 32)
    # V's own strides; block sizes that are not a multiple of 16; groups other than 1, 2, 4, 8.
    check_tree([33, 65], [[0, 1], [0, 2, 3]], 4, 32, strided_v=True)
    check_tree([13, 25], [[0, 1, 2], [0, 1, 3, 4, 5]], 6, 5)


def test_trees_are_rebuilt_and_batches_are_taken_over():
    q, k, v = tensors_of(2, 4, 16)
    tree = PrefixTreeCPP(16)
    for lengths, rows in (([20, 30], [[0, 1], [0, 2]]), ([5, 6], [[3], [2]])):
        table = table_of(rows)
        tree.build_radix_tree(torch.tensor(lengths, dtype=torch.int32), table)
        # Again, as a program that schedules twice: PAT then runs every pack twice.
        tree.pack_schedule(None, 4, 2)
        tree.pack_schedule(None, 4, 2)
        later = AsyncTree(16, lengths, table, [[16, 64, 1], [64, 64, 4]], 4, 2, "cpu")
        table.fill_(7)
        for one in (tree, later.tree):
            out = torch.empty_like(q)
            prefix_attn_with_kvcache(q, k, v, one, 64**-0.5, out)
            torch.testing.assert_close(out.double(), expected_of(q, k, v, lengths, rows), atol=2e-3, rtol=0)
    assert [sorted(tile) for tile in later.tree.kernel_info.MNW] == [[1, 16, 64]]


def test_bad_input_names_the_argument():
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)
    tree = tree_of([20, 30], [[0, 1], [0, 2]], 16)

    def call(*, q=q, k=k, v=v, tree=tree, scale=0.125, out=out):
        prefix_attn_with_kvcache(q, k, v, tree, scale, out)

    for name, bad in [
        ("q", {"q": q[:1], "out": out[:1]}),
        ("q, out", {"q": q.expand(2, 3, 8, 64), "out": out.expand(2, 3, 8, 64)}),
        ("q", {"q": q[:, 0]}),
        ("q, out", {"out": out[:1]}),
        ("k_cache_paged", {"k": k[:, :8]}),
        ("out", {"out": out.bfloat16()}),
        ("q: torch.float32", {"q": q.float(), "out": out.float()}),
        ("q: torch.float32", {"q": q.float(), "k": k.float(), "v": v.float(), "out": out.float()}),
        ("v_cache_paged", {"v": v[..., :32]}),
        ("v_cache_paged", {"v": v.float()}),
        ("k_cache_paged", {"k": k.float()}),
        ("out: got memory of k_cache_paged", {"out": k.flatten()[: q.numel()].view(q.shape)}),
        ("softmax_scale", {"scale": "x"}),
        ("softmax_scale", {"scale": torch.tensor([0.5])}),
        ("softmax_scale", {"scale": float("nan")}),
        ("block_tables", {"k": k[:2], "v": v[:2]}),
    ]:
        out.fill_(7)
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            call(**bad)
        assert bool((out == 7).all())
    with pytest.raises(ValueError, match=r"seq_lens\[1\]"):
        tree_of([20, -1], [[0, 1], [0, 2]], 16)
    with pytest.raises(ValueError, match=r"seq_lens\[0\]"):
        tree_of([33, 1], [[0, 1], [0, 2]], 16)
    with pytest.raises(TypeError, match="block_table"):
        PrefixTreeCPP(16).build_radix_tree([1], torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="seq_lens"):
        PrefixTreeCPP(16).build_radix_tree(torch.ones(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="block_size"):
        PrefixTreeCPP(0)
    with pytest.raises(ValueError, match="MNWs"):
        PrefixTreeCPP(16).pack_schedule([[16, 0, 1]])
    with pytest.raises(ValueError, match="tree"):
        generate_tree_seqs("1,3,4_32,32,32", 32)
    with pytest.raises(ValueError, match="seq_lens"):
        AsyncTree(16, [99], torch.zeros(1, 1, dtype=torch.int32), None, 4, 2, "cpu").tree  # noqa: B018


@pytest.mark.parametrize(
    ("name", "group", "position", "value"),
    [
        ("query_tables", 0, 0, 9),
        ("CTA_ranks", 0, 0, 3),
        ("kv_in_CTAs", 0, 0, 1000),
        ("num_seqs_per_CTAs", 0, 0, 7),
        ("num_split_per_seq", slice(None), slice(None), 3),
        ("num_split_per_seq", slice(None), slice(None), 2**31 - 1),
    ],
)
def test_tables_that_are_no_schedule_are_refused(name, group, position, value):
    q, k, v = tensors_of(2, 4, 16)
    info = tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info
    tables = tables_of(info)
    table = getattr(info, name)[group]
    table.view(-1)[position] = value
    with pytest.raises(ValueError, match=name):
        prefix_attn_with_kvcache(q, k, v, *tables, 0.125, torch.empty_like(q))


TABLES = ["num_split_per_seq", "query_tables", "block_tables", "num_seqs_per_CTAs", "CTA_ranks", "kv_in_CTAs", "MNW"]


@pytest.mark.parametrize(("argument", "name"), list(enumerate(TABLES)))
@pytest.mark.parametrize("called_before", [False, True])
def test_a_table_that_is_none_is_named(argument, name, called_before):
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)
    tables = tables_of(tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info)
    if called_before:
        prefix_attn_with_kvcache(q, k, v, *tables, 0.125, out)
    bad = [(None, name if argument == 0 else f"^{name}: NoneType")]
    if 0 < argument < 6:
        bad.append(([*tables[argument][:-1], None], rf"^{name}\[{len(tables[argument]) - 1}\]: NoneType"))
    for value, message in bad:
        out.fill_(7)
        with pytest.raises(TypeError, match=message):
            prefix_attn_with_kvcache(q, k, v, *tables[:argument], value, *tables[argument + 1 :], 0.125, out)
        assert bool((out == 7).all())


class Stub:
    """What no argument of PAT's is."""


MANY = 2**31 - 1
BAD_TABLES = [
    ("num_split_per_seq", ValueError, 0, torch.zeros(1, dtype=torch.int32).expand(MANY)),
    ("num_split_per_seq", TypeError, 0, torch.ones(2)),
    ("num_split_per_seq", TypeError, 0, torch.ones(2, dtype=torch.bool)),
    ("num_split_per_seq", ValueError, 0, torch.ones(2, 1, dtype=torch.int32)),
    ("num_split_per_seq", TypeError, 0, torch.ones(2, dtype=torch.int32).to_sparse()),
    ("num_split_per_seq", ValueError, 0, torch.ones(2, dtype=torch.int32, device="meta")),
    ("num_split_per_seq", TypeError, 0, [1, 1]),
    ("query_tables[0]", TypeError, 1, lambda table: table.float()),
    ("query_tables[0]", TypeError, 1, lambda table: table.to_sparse()),
    ("query_tables[0]", ValueError, 1, lambda table: table.to("meta")),
    ("query_tables", ValueError, 1, lambda table: table[:, :1].expand(-1, MANY)),
    ("block_tables[0]", TypeError, 2, lambda table: table.bool()),
    ("block_tables[0]", TypeError, 2, lambda table: table.float()),
    ("block_tables[0]", ValueError, 2, lambda table: table[None]),
    ("block_tables[0]", ValueError, 2, lambda table: table[0]),
    ("block_tables", ValueError, 2, lambda table: table.long() + 2**62),
    ("block_tables", ValueError, 2, lambda table: table - 9),
    ("block_tables", ValueError, 2, lambda table: table[:, :1].expand(-1, MANY)),
    ("num_seqs_per_CTAs[0]", TypeError, 3, lambda table: table.double()),
    ("num_seqs_per_CTAs", ValueError, 3, lambda table: table.long() + 2**62),
    ("CTA_ranks[0]", TypeError, 4, lambda table: table.bool()),
    ("CTA_ranks", ValueError, 4, lambda table: table.long() + 2**62),
    ("kv_in_CTAs[0]", ValueError, 5, lambda table: table[:, None]),
    ("kv_in_CTAs", ValueError, 5, lambda table: table.long() + 2**62),
    ("tables of", ValueError, 5, lambda table: table[:-1]),
    ("query_tables", TypeError, 1, "ab"),
    ("query_tables", TypeError, 1, torch.tensor(1)),
    ("CTA_ranks", TypeError, 4, 3),
    ("MNW", TypeError, 6, 3),
]


@pytest.mark.parametrize(("name", "error", "position", "bad"), BAD_TABLES, ids=map(str, range(len(BAD_TABLES))))
def test_tables_of_another_kind_are_refused_by_name(name, error, position, bad):
    q, k, v = tensors_of(2, 4, 16)
    out = torch.full_like(q, 7)
    tables = tables_of(tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info)
    tables[position] = [bad(table) for table in tables[position]] if callable(bad) else bad
    with pytest.raises(error) as raised:
        prefix_attn_with_kvcache(q, k, v, *tables, 0.125, out)
    text = str(raised.value)
    assert text.startswith(name) or (position == 0 and name in text)
    assert bool((out == 7).all())


@pytest.mark.parametrize("form", ["tree", "tables"])
@pytest.mark.parametrize("name", ["q", "k_cache_paged", "v_cache_paged", "out"])
def test_tensors_of_another_kind_are_refused_by_name(form, name):
    q, k, v = tensors_of(2, 4, 16)
    given = dict(q=q, k_cache_paged=k, v_cache_paged=v, out=torch.zeros_like(q))
    tree = tree_of([20, 30], [[0, 1], [0, 2]], 16)
    rest = [tree, 0.125] if form == "tree" else [*tables_of(tree.kernel_info), 0.125]
    right = given[name]
    for bad in (None, Stub(), torch.Tensor, [1], right.to_sparse(), right.to("meta"), right[0], right.requires_grad_()):
        arguments = given | {name: bad}
        out = arguments.pop("out")
        with pytest.raises((TypeError, ValueError)) as raised:
            prefix_attn_with_kvcache(*arguments.values(), *rest, out)
        assert str(raised.value).startswith(f"{name}:")


@pytest.mark.parametrize("form", ["tree", "tables"])
def test_missing_arguments_are_those_of_pats_function(form):
    q, k, v = tensors_of(2, 4, 16)
    tree = tree_of([20, 30], [[0, 1], [0, 2]], 16)
    rest = [tree] if form == "tree" else tables_of(tree.kernel_info)
    with pytest.raises(TypeError, match=r"^prefix_attn_with_kvcache\(\) missing 2 .*'softmax_scale' and 'out'"):
        prefix_attn_with_kvcache(q, k, v, *rest)


@pytest.mark.parametrize("tree", [None, 3, Stub(), PrefixTreeCPP, [torch.zeros(1)]])
def test_what_is_no_tree_is_refused_by_name(tree):
    q, k, v = tensors_of(2, 4, 16)
    with pytest.raises(TypeError, match="^tree: "):
        prefix_attn_with_kvcache(q, k, v, tree, 0.125, torch.zeros_like(q))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tables: pickle.loads(pickle.dumps(tables)), copy.copy])
@pytest.mark.parametrize("called_before", [False, True])
def test_tables_are_copied_and_sent_as_any_tensors(copied, called_before):
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)
    info = tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info
    if called_before:
        prefix_attn_with_kvcache(q, k, v, *tables_of(info), 64**-0.5, out)
    given = copied(tables_of(info))
    for change in (False, True):
        for table in given[2] if change else []:
            table[table == 0] = 3
        prefix_attn_with_kvcache(q, k, v, *given, 64**-0.5, out)
        expected = expected_of(q, k, v, [20, 30], [[3, 1], [3, 2]] if change else [[0, 1], [0, 2]])
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree)), copy.copy])
@pytest.mark.parametrize("is_async", [False, True])
def test_trees_are_copied_and_sent_without_their_plans(copied, is_async):
    q, k, v = tensors_of(2, 4, 16)
    tree = tree_of([20, 30], [[0, 1], [0, 2]], 16)
    out = torch.empty_like(q)
    prefix_attn_with_kvcache(q, k, v, tree, 64**-0.5, out)
    if is_async:
        tree = AsyncTree(16, [20, 30], table_of([[0, 1], [0, 2]]), None, 4, 2, "cpu")
    given = copied(tree)
    given = given.tree if is_async else given
    expected = expected_of(q, k, v, [20, 30], [[0, 1], [0, 2]])
    for arguments in ([given], tables_of(given.kernel_info)):
        prefix_attn_with_kvcache(q, k, v, *arguments, 64**-0.5, out.zero_())
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


def test_tables_of_kernel_info_may_be_replaced():
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)
    info = tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info
    info.block_tables = [torch.where(table == 0, 3, table) for table in info.block_tables]
    prefix_attn_with_kvcache(q, k, v, *tables_of(info), 64**-0.5, out)
    expected = expected_of(q, k, v, [20, 30], [[3, 1], [3, 2]])
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


def written_as_numpy(table):
    array = table.numpy()
    array[array == 0] = 3


def written_as_data(table):
    table.data[table == 0] = 3


@pytest.mark.parametrize("write", [written_as_numpy, written_as_data])
@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("called_before", [False, True])
def test_tables_that_change_unseen_by_torch_are_read_again(write, foreign, called_before):
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)
    given = tables_of(tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info)
    if foreign:
        given = foreign_copies(given)
    if called_before:
        prefix_attn_with_kvcache(q, k, v, *given, 64**-0.5, out)
    versions = [table._version for table in given[2]]
    for table in given[2]:
        write(table)
    assert [table._version for table in given[2]] == versions
    prefix_attn_with_kvcache(q, k, v, *given, 64**-0.5, out)
    expected = expected_of(q, k, v, [20, 30], [[3, 1], [3, 2]])
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


TABLE = torch.zeros(1, 2, dtype=torch.int32)


class Unreadable:
    """Raises where it is asked what it holds."""

    @property
    def dtype(self):
        raise RuntimeError("nobody may look")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("block_size", lambda: PrefixTreeCPP(None)),
        ("block_size", lambda: PrefixTreeCPP(True)),
        ("block_size", lambda: PrefixTreeCPP(torch.tensor(True))),
        ("block_size", lambda: PrefixTreeCPP(Unreadable())),
        ("seq_lens[0]", lambda: PrefixTreeCPP(16).build_radix_tree([True], TABLE)),
        ("block_size", lambda: PrefixTreeCPP(16.0)),
        ("block_size", lambda: PrefixTreeCPP(torch.tensor([16]))),
        ("seq_lens", lambda: PrefixTreeCPP(16).build_radix_tree(None, TABLE)),
        ("seq_lens", lambda: PrefixTreeCPP(16).build_radix_tree("a", TABLE)),
        ("seq_lens", lambda: PrefixTreeCPP(16).build_radix_tree((n for n in [1]), TABLE)),
        ("seq_lens", lambda: PrefixTreeCPP(16).build_radix_tree(torch.zeros(1, dtype=torch.int32).expand(MANY), TABLE)),
        ("seq_lens", lambda: PrefixTreeCPP(16).build_radix_tree(torch.ones(1, dtype=torch.int32, device="meta"), TABLE)),
        ("seq_lens[0]", lambda: PrefixTreeCPP(16).build_radix_tree([1.5], TABLE)),
        ("seq_lens[0]", lambda: PrefixTreeCPP(16).build_radix_tree([None], TABLE)),
        ("seq_lens[0]", lambda: PrefixTreeCPP(16).build_radix_tree([2**62], TABLE)),
        ("block_table", lambda: PrefixTreeCPP(16).build_radix_tree([1], None)),
        ("block_table", lambda: PrefixTreeCPP(16).build_radix_tree([1], TABLE.to_sparse())),
        ("block_table", lambda: PrefixTreeCPP(16).build_radix_tree([1], TABLE.to("meta"))),
        ("block_table", lambda: PrefixTreeCPP(16).build_radix_tree([1], TABLE[0])),
        ("HRatio", lambda: PrefixTreeCPP(16).pack_schedule(None, 0, 2)),
        ("HRatio", lambda: PrefixTreeCPP(16).pack_schedule(None, None, 2)),
        ("HRatio", lambda: PrefixTreeCPP(16).pack_schedule(None, 1.5, 2)),
        ("kvHead", lambda: PrefixTreeCPP(16).pack_schedule(None, 4, "2")),
        ("MNWs", lambda: PrefixTreeCPP(16).pack_schedule(3, 4, 2)),
        ("MNWs", lambda: PrefixTreeCPP(16).pack_schedule("abc", 4, 2)),
        ("MNWs[0]", lambda: PrefixTreeCPP(16).pack_schedule([3], 4, 2)),
        ("MNWs[0]", lambda: PrefixTreeCPP(16).pack_schedule([[16, 64]], 4, 2)),
        ("MNWs[0][1]", lambda: PrefixTreeCPP(16).pack_schedule([[16, "a", 1]], 4, 2)),
        ("device", lambda: PrefixTreeCPP(16).kernel_info.to_gpu("xyz")),
        ("device", lambda: PrefixTreeCPP(16).kernel_info.to_gpu("meta")),
        ("device", lambda: PrefixTreeCPP(16).kernel_info.to_gpu(None)),
        ("device", lambda: PrefixTreeCPP(16).kernel_info.to_gpu(-1)),
        ("device", lambda: PrefixTreeCPP(16).kernel_info.to_gpu(1 << 40)),
        ("table", lambda: AsyncTree(16, [1], None, None, 4, 2, "cpu")),
        ("table", lambda: AsyncTree(16, [1], TABLE.float(), None, 4, 2, "cpu")),
        ("seq_lens", lambda: AsyncTree(16, None, TABLE, None, 4, 2, "cpu")),
        ("HRatio", lambda: AsyncTree(16, [1], TABLE, None, 0, 2, "cpu")),
        ("device", lambda: AsyncTree(16, [1], TABLE, None, 4, 2, "xyz")),
        ("tree", lambda: generate_tree_seqs(None, 32)),
        ("block_size", lambda: generate_tree_seqs("1_32", None)),
        ("seed", lambda: generate_tree_seqs("1_32", 32, seed={})),
        ("seed", lambda: generate_tree_seqs("1_32", 32, seed="a")),
        ("tree", lambda: generate_tree_seqs(f"1_{2**62}", 32)),
        ("tree", lambda: generate_tree_seqs(f"{2**62}_32", 32)),
        ("tree", lambda: generate_tree_seqs(f"1,{2**20}_{2**20},32", 32)),
        ("num_blocks", lambda: generate_random_kv_cache("a", 16, 2, 64, device="cpu")),
        ("num_blocks", lambda: generate_random_kv_cache(-1, 16, 2, 64, device="cpu")),
        ("block_size", lambda: generate_random_kv_cache(4, 0, 2, 64, device="cpu")),
        ("nheads_kv", lambda: generate_random_kv_cache(4, 16, None, 64, device="cpu")),
        ("head_dim", lambda: generate_random_kv_cache(4, 16, 2, 2**62, device="cpu")),
        ("num_blocks, block_size, nheads_kv, head_dim", lambda: generate_random_kv_cache(*[2**31] * 4, device="cpu")),
        ("dtype", lambda: generate_random_kv_cache(4, 16, 2, 64, "float16", "cpu")),
        ("dtype", lambda: generate_random_kv_cache(4, 16, 2, 64, torch.int32, "cpu")),
        ("device", lambda: generate_random_kv_cache(4, 16, 2, 64, device="xyz")),
        ("device", lambda: generate_random_kv_cache(4, 16, 2, 64, device=None)),
    ],
)
def test_what_trees_are_not_made_of_is_refused_by_name(name, make):
    with pytest.raises((TypeError, ValueError)) as raised:
        make()
    assert str(raised.value).startswith(f"{name}:")


def test_a_table_of_any_width_is_taken_over_as_far_as_it_is_needed():
    wide = torch.zeros(1, 1, dtype=torch.int32).expand(1, MANY)
    tree = AsyncTree(16, [20], wide, None, 4, 2, "cpu").tree
    q, k, v = tensors_of(1, 4, 16)
    out = torch.zeros_like(q)
    prefix_attn_with_kvcache(q, k, v, tree, 64**-0.5, out)
    torch.testing.assert_close(out.double(), expected_of(q, k, v, [20], [[0, 0]]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("foreign", [False, True])
def test_tables_are_read_in_the_mode_of_inference(made_inside, foreign):
    """Its tensors do not count how often they were written to: what changed must be read again all the same."""
    q, k, v = tensors_of(2, 4, 16)
    out = torch.empty_like(q)

    def tables():
        made = tables_of(tree_of([20, 30], [[0, 1], [0, 2]], 16).kernel_info)
        if foreign:
            made = foreign_copies(made)
        return made

    given = None if made_inside else tables()
    with torch.inference_mode():
        given = given or tables()
        for lengths, rows in (([20, 30], [[0, 1], [0, 2]]), ([20, 30], [[3, 1], [3, 2]])):
            for _ in range(2):
                prefix_attn_with_kvcache(q, k, v, *given, 64**-0.5, out)
                expected = expected_of(q, k, v, lengths, rows)
                torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)
            # The block that both read.
            for table in given[2]:
                table[table == 0] = 3
