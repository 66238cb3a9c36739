"""Planning: invariants that can be seen from Python, steps, background planning, other threads."""

import json
import random
import re
import threading
import time

import numpy as np
import pytest
import torch
from support import SHAPE, Batch, caches, draw_trees, queries, random_forest, reference, seen_by, written_out

import prefix_attn as pa


@pytest.mark.parametrize("seed", range(40))
def test_figures_of_random_forests(planner, seed):
    batch = random_forest(seed)
    plan = planner.plan(batch.block_tables, batch.lengths, batch.page_size, batch.num_pages)
    summary = plan.summary()
    token_bytes = 2 * 2 * SHAPE["kv_heads"] * SHAPE["head_dim"]
    # Full pages under one prefix count once; every other token counts for its sequence.
    prefixes, partial = set(), 0
    for ids, length in zip(batch.block_tables, batch.lengths):
        full = length // batch.page_size
        prefixes |= {tuple(ids[: page + 1]) for page in range(full)}
        partial += length % batch.page_size
    assert summary["sequences"] == plan.sequence_count == len(batch.lengths)
    assert summary["flat_kv_bytes"] == sum(batch.lengths) * token_bytes
    assert summary["unique_kv_bytes"] == (len(prefixes) * batch.page_size + partial) * token_bytes
    assert summary["unique_kv_bytes"] <= summary["planned_kv_bytes"] <= summary["flat_kv_bytes"]
    flat = pa.Planner(planner.shape, "cpu", mode="flat").plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    assert flat.summary()["planned_kv_bytes"] == summary["flat_kv_bytes"]
    assert summary["predicted_us"] <= flat.summary()["predicted_us"] * (1 + 1e-9)


def test_the_order_of_sequences_changes_nothing(planner):
    batch = random_forest(8)
    order = torch.randperm(len(batch.lengths), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = Batch([batch.block_tables[i] for i in order], [batch.lengths[i] for i in order], 16, batch.num_pages)
    one, two = (planner.plan(b.block_tables, b.lengths, 16, b.num_pages).summary() for b in (batch, permuted))
    assert one == two


def test_advance_is_as_good_as_planning_from_scratch(planner):
    batch = random_forest(21)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    fresh = pa.Planner(planner.shape, "cpu")
    seen, pages = set(), batch.num_pages
    for step in range(40):
        generation = plan.generation
        if step % 7 == 6:
            # A page in the middle of a table is replaced by another one.
            row = max(range(len(batch.lengths)), key=lambda row: len(batch.block_tables[row]))
            batch.block_tables[row] = [pages, *batch.block_tables[row][1:]]
            pages += 1
        elif step % 5 != 0:
            for row in range(len(batch.lengths)):
                if batch.lengths[row] == len(batch.block_tables[row]) * 16:
                    batch.block_tables[row] = [*batch.block_tables[row], pages]
                    pages += 1
                batch.lengths[row] += 1
        if pages > batch.num_pages:
            batch.num_pages = 2 * pages
            plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
            continue
        change = planner.advance(plan, batch.block_tables, batch.lengths)
        seen.add(change)
        assert (plan.generation == generation) == (change == "nothing")
        expected = fresh.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
        step, scratch = plan.summary(), expected.summary()
        for what in ("sequences", "sharing_factor", "unique_kv_bytes", "flat_kv_bytes"):
            assert step[what] == scratch[what]
        assert step["predicted_us"] <= 1.05 * scratch["predicted_us"]
    assert {"nothing", "lengths", "forest"} <= seen


def test_tables_of_more_requests_than_the_batch_has(planner):
    """Sequences name their rows; any order, and any number of times."""
    every = np.arange(24, dtype=np.int32).reshape(6, 4)
    every[:, 0] = 0
    rows, lengths = [4, 1, 1, 5], np.array([50, 64, 33, 17], dtype=np.int32)
    plan = planner.plan(every, lengths, 16, 24, table_rows=rows)
    again = planner.plan(torch.from_numpy(every[rows]), lengths, 16, 24)
    assert plan.summary() == again.summary() and plan.summary()["unique_kv_bytes"] < plan.summary()["flat_kv_bytes"]
    plan = planner.plan(every, lengths, 16, 24, table_rows=np.array(rows, dtype=np.int32))
    every[1, 2:] = [22, 23]
    assert planner.advance(plan, every, lengths, table_rows=rows) == "forest"
    assert planner.advance(plan, every, lengths, table_rows=torch.tensor(rows, dtype=torch.int32)) == "nothing"
    again = planner.plan_async(every, lengths, 16, 24, table_rows=rows).result()
    assert again.summary()["unique_kv_bytes"] == plan.summary()["unique_kv_bytes"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0], "table_rows: got 1 rows, expected one per length (2)"),
        ([0, 3], "table_rows[1]: got 3, expected one of the 3 rows of block_tables"),
        ([-1, 0], "table_rows[0]: got -1, expected one of the 3 rows of block_tables"),
        ([2, 1], "block_tables[2][1]: got 8, expected a page id below num_pages = 8"),
    ],
)
def test_rows_of_tables_that_are_not_there(planner, rows, message):
    every = np.array([[0, 1], [2, 3], [4, 8]], dtype=np.int32)
    plan = planner.plan(every[:2], [20, 20], 16, 8)
    for call in (planner.plan, lambda *args, **rest: planner.advance(plan, *args[:2], **rest)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(every, [20, 20], 16, 8, table_rows=rows)
    with pytest.raises(TypeError, match="table_rows: got a tensor of int64"):
        planner.plan(every, [20, 20], 16, 8, table_rows=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="^table_rows: got some, expected None"):
        planner.plan([[0, 1], [2, 3]], [20, 20], 16, 8, table_rows=[0, 1])
    assert planner.advance(plan, every[:2], [20, 20]) == "nothing"


@pytest.mark.parametrize("other", [{"window": 64}, {"chunk": 128}, {"query_tree": True}, {"softcap": 30.0}])
def test_advance_refuses_the_plan_of_another_problem(planner, other):
    batch = random_forest(3)
    pool = batch.page_size, batch.num_pages
    plan = planner.plan(batch.block_tables, batch.lengths, *pool)
    stranger = pa.Planner(pa.AttentionShape(**SHAPE, dtype=torch.float16), device="cpu", **other)
    with pytest.raises(ValueError, match="^plan: got one for another window"):
        stranger.advance(plan, batch.block_tables, batch.lengths)
    assert planner.advance(plan, batch.block_tables, batch.lengths) == "nothing"


def test_advance_takes_the_rows_that_changed(planner):
    tables, lengths = [[0, 1], [0, 2]], [20, 20]
    plan = planner.plan(tables, lengths, 16, 8)
    assert planner.advance(plan, tables, [21, 21], changed_rows=[]) == "lengths"
    assert planner.advance(plan, [[0, 1], [0, 3]], [21, 21], changed_rows=[1]) == "pages"
    with pytest.raises(ValueError, match=r"changed_rows\[0\]: got -1"):
        planner.advance(plan, tables, [22, 22], changed_rows=[-1])
    with pytest.raises(TypeError, match="changed_rows: got a tensor of int64"):
        planner.advance(plan, tables, [22, 22], changed_rows=torch.tensor([1]))
    other = pa.Planner(pa.AttentionShape(4, 2, 64, "float16"), "cpu")
    with pytest.raises(ValueError, match="^plan: got one for"):
        other.advance(plan, tables, [22, 22])


@pytest.mark.parametrize("how", ["newest", "older", "window", "query_tokens"])
def test_rows_that_are_not_in_the_batch_have_not_changed(planner, how):
    if how == "window":
        planner = pa.Planner(planner.shape, "cpu", window=8)
    more = {"query_tokens": 2} if how == "query_tokens" else {}
    plan = planner.plan([[0], [1]], [3, 4], 16, 8, **more)
    if how == "older":
        planner.plan([[0]], [3], 16, 8)
    with pytest.raises(ValueError, match=r"^changed_rows\[1\]: got 2, expected a row of the batch, 0 to below 2"):
        planner.advance(plan, [[0], [1]], [4, 5], [1, 2], **more)


def test_a_refused_step_leaves_the_plan(planner):
    plan = planner.plan([[0, 1], [0, 2]], [20, 20], 16, 8)
    before = plan.summary(), plan.generation
    with pytest.raises(ValueError, match=r"block_tables\[1\]\[0\]"):
        planner.advance(plan, [[0, 1], [9, 2]], [20, 20])
    assert (plan.summary(), plan.generation) == before


def test_capacity_bounds_batches():
    shape = pa.AttentionShape(**SHAPE, dtype="float16")
    planner = pa.Planner(shape, "cpu", capacity=pa.Capacity(2, 4, "cpu"))
    assert planner.plan([[0, 1], [0, 2]], [20, 20], 16, 8).sequence_count == 2
    with pytest.raises(ValueError, match="max_sequences = 2"):
        planner.plan([[0], [1], [2]], [1, 1, 1], 16, 8)
    with pytest.raises(ValueError, match="max_pages = 4"):
        planner.plan([[0, 1, 2], [3, 4]], [48, 32], 16, 8)


def large_batch():
    rows, columns = 512, 400
    tables = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    tables[:, :100] = torch.arange(100, dtype=torch.int32)
    return tables, torch.full((rows,), columns * 16, dtype=torch.int32), 16, rows * columns


def test_plan_async_reads_its_arguments_at_once(planner):
    tables, lengths, page_size, num_pages = large_batch()
    expected = planner.plan(tables, lengths, page_size, num_pages).summary()
    future = planner.plan_async(tables, lengths, page_size, num_pages)
    tables.fill_(-1)
    plan = future.result()
    assert plan.summary() == expected and future.done() and future.result() is plan


def test_results_of_one_future_in_many_threads(planner):
    future = planner.plan_async(*large_batch())
    plans = []
    threads = [threading.Thread(target=lambda: plans.append(future.result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not future.done():
        time.sleep(0)
    for thread in threads:
        thread.join(timeout=60)
    assert len(plans) == 8 and all(plan is plans[0] for plan in plans)


def test_other_threads_run_while_planning(planner):
    """The interpreter is free while a plan is made: a thread that waits for it counts on meanwhile."""
    batch, counted, stop = large_batch(), 0, threading.Event()

    def count():
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0)

    # Larger than any plan: without release the other thread would not run at all between two plans.
    interval = __import__("sys").getswitchinterval()
    __import__("sys").setswitchinterval(1000)
    try:
        thread = threading.Thread(target=count)
        thread.start()
        before, deadline = counted, time.monotonic() + 30
        # On a busy machine the other thread may not get a core in the time of a few plans.
        while counted == before and time.monotonic() < deadline:
            planner.plan(*batch)
        during = counted - before
    finally:
        stop.set()
        thread.join()
        __import__("sys").setswitchinterval(interval)
    assert during > 0


def test_threads_share_a_planner_and_plans(planner):
    batches = [random_forest(seed) for seed in range(8)]
    expected = [planner.plan(b.block_tables, b.lengths, 16, b.num_pages).summary() for b in batches]
    failures = []

    def work(index):
        batch = batches[index]
        for _ in range(30):
            plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
            planner.advance(plan, batch.block_tables, batch.lengths)
            if plan.summary() != expected[index]:
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_reprs_say_what_it_is(planner):
    plan = planner.plan([[0, 1]], [20], 16, 8)
    assert repr(planner.shape) == 'AttentionShape(q_heads=8, kv_heads=2, head_dim=64, dtype="float16")'
    assert "device=\"cpu\"" in repr(planner) and repr(plan).startswith("Plan(sequences=1, generation=")
    assert plan.page_size == 16 and plan.num_pages == 8 and planner.capacity is None
    assert "h200" not in repr(planner.profile) and planner.profile.sm_count == 132


def test_shapes_are_values():
    one, two = (pa.AttentionShape(8, 2, 64, dtype) for dtype in ("float16", torch.float16))
    assert one == two and hash(one) == hash(two) and one != pa.AttentionShape(8, 2, 64, "bfloat16")


def test_profiles_are_read_back():
    profile = pa.DeviceProfile.named("h100-sxm")
    assert pa.DeviceProfile.from_json(profile.to_json()) == profile and profile.compute_capability == 90
    # To the last bit, as measured numbers need it.
    numbers, rng = json.loads(profile.to_json()), random.Random(1)
    for _ in range(100):
        numbers["launch_us"] = rng.uniform(1, 4)
        assert json.loads(pa.DeviceProfile.from_json(json.dumps(numbers)).to_json()) == numbers


def test_padding_rows_give_zero_and_minus_infinity(planner):
    batch = Batch([[0, 1], [], [0, 2]], [20, 0, 32], 16, 4)
    plan = planner.plan(batch.padded, batch.lengths, 16, 4)
    q, (k, v) = queries(3), caches(batch)
    out, lse = pa.run(plan, q, k, v, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
    torch.testing.assert_close(out.double(), reference(batch, q, k, v)[0], atol=3e-3, rtol=0)


@pytest.mark.parametrize("seed", range(8))
def test_query_tokens_are_rows_that_see_up_to_themselves(planner, seed):
    batch = random_forest(seed)
    ragged = [min(length, 1 + row % 5) for row, length in enumerate(batch.lengths)]
    least = min(length for length in batch.lengths if length > 0)
    for query_tokens, counts in [(ragged, ragged), (torch.tensor(ragged, dtype=torch.int32), ragged), (1, None)]:
        rows = written_out(batch, counts or [1] * len(batch.lengths))
        expected = planner.plan(rows.block_tables, rows.lengths, 16, rows.num_pages)
        plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=query_tokens)
        assert plan.sequence_count == len(rows.lengths)
        assert plan.summary() == expected.summary()
        later = planner.plan_async(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=query_tokens)
        assert later.result().summary() == expected.summary()
        q, (k, v) = queries(len(rows.lengths)), caches(batch)
        torch.testing.assert_close(pa.run(plan, q, k, v), pa.run(expected, q, k, v), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"query_tokens: got {least + 1}, expected at most lengths"):
        planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=least + 1)


@pytest.mark.parametrize("seed", range(8))
def test_query_tokens_of_a_tree_see_their_ancestors(seed):
    batch = random_forest(seed)
    trees = draw_trees(batch, seed)
    shape = pa.AttentionShape(**SHAPE, dtype="float16")
    assert pa.supports(shape, 16, query_tokens=9, query_tree=True) is None
    planner = pa.Planner(shape, "cpu", query_tree=True)
    rows = written_out(batch, [len(tree) for tree in trees])
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, parents=trees)
    q, (k, v) = queries(len(rows.lengths)), caches(batch)
    out, lse = pa.run(plan, q, k, v, return_lse=True)
    expected, expected_lse = reference(rows, q, k, v, visible=list(seen_by(batch, trees)))
    torch.testing.assert_close(out.double(), expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=0)
    assert "<svg" in plan.svg() and plan.explain()
    # -1 is none, and a tensor a tree; a step is planned from scratch.
    as_integers = [torch.tensor([-1 if parent is None else parent for parent in tree], dtype=torch.int32) for tree in trees]
    assert planner.advance(plan, batch.block_tables, batch.lengths, parents=as_integers) == "forest"
    assert torch.equal(pa.run(plan, q, k, v), out)


def test_one_tree_serves_all_sequences():
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu", query_tree=True)
    batch = Batch([[0, 1, 2], [0, 3]], [40, 20], 16, 4)
    tree = [None, 0, 0, 1]
    integers = [-1, 0, 0, 1]
    arrays = [torch.tensor(integers), torch.tensor(integers, dtype=torch.int32), np.array(integers), np.array(integers, "int32")]
    plans = [
        planner.plan(batch.block_tables, batch.lengths, 16, 4, parents=parents).summary()
        for parents in (tree, [tree, tree], *arrays)
    ]
    assert all(plan == plans[0] for plan in plans) and plans[0]["sequences"] == 8


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_rows_of_an_array_are_trees(make):
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu", query_tree=True)
    batch = Batch([[0, 1, 2], [0, 3]], [40, 20], 16, 4)
    trees = [[-1, 0, 1], [-1, 0, 0]]
    q, (k, v) = queries(6), caches(batch)

    def run(parents):
        return pa.run(planner.plan(batch.block_tables, batch.lengths, 16, 4, parents=parents), q, k, v)

    columns = make([[-1, -1], [0, 0], [1, 0]])
    for parents in (make(trees), columns.T, make([[9, *tree, 9] for tree in trees])[:, 1:-1]):
        assert torch.equal(run(parents), run(trees))
    assert not torch.equal(run(make(trees[0])), run(trees))


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (ValueError, {"parents": [0]}, r"parents\[0\]: got 0, expected none"),
        (ValueError, {"parents": [None, 1]}, r"parents\[1\]: got 1, expected none, or at most 0"),
        (ValueError, {"parents": [None, -2]}, r"parents\[1\]: got -2, expected None, -1"),
        (ValueError, {"parents": [[None], [None, 0, 5]]}, r"parents\[1\]\[2\]: got 5"),
        (ValueError, {"parents": [[None]]}, "parents: got 1 trees, expected one per sequence"),
        (ValueError, {"parents": [None] * 21}, "parents: got 21 query tokens, expected at most lengths"),
        (ValueError, {"parents": []}, "parents: got 0"),
        (ValueError, {"parents": [None], "query_tokens": 1}, "parents: got some, expected None beside query_tokens"),
        (TypeError, {"parents": 3}, "parents: got int, expected a list of parents"),
        (TypeError, {"parents": [0.5]}, r"parents\[0\]: got float, expected an integer or None"),
        (TypeError, {"parents": [True]}, r"parents\[0\]: got bool, expected an integer or None"),
        (TypeError, {"parents": [None, "a"]}, r"parents\[1\]: got str, expected an integer or None"),
        (TypeError, {"parents": [[None], 3]}, r"parents\[1\]: got int, expected a list"),
        (TypeError, {"parents": torch.tensor([-1.0])}, "parents: got a tensor of float32, expected int32 or int64"),
        (TypeError, {"parents": [[None], np.zeros(1)]}, r"parents\[1\]: got a tensor of float64, expected int32 or int64"),
        (ValueError, {"parents": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"parents: got shape \[1, 1, 1\], expected one dim"),
        (ValueError, {"parents": [[None], torch.tensor([[-1]])]}, r"parents\[1\]: got shape \[1, 1\], expected one dimension"),
        (ValueError, {"parents": torch.tensor([[-1, 0]])}, "parents: got 1 trees, expected one per sequence"),
        (ValueError, {"parents": np.array([[-1, 0], [-1, -2]])}, r"parents\[1\]\[1\]: got -2, expected None, -1"),
        (ValueError, {"parents": [[None], torch.tensor([-1, -2])]}, r"parents\[1\]\[1\]: got -2, expected None, -1"),
        (ValueError, {"parents": np.array([-1, 1 << 32])}, r"parents\[1\]: got 4294967296"),
        (ValueError, {"parents": [[None], np.array([0, -1])[::-1]]}, r"parents\[1\]: got strides \[-1\], expected none below"),
        (ValueError, {"parents": [[None], torch.zeros(1, device="meta")]}, r"parents\[1\]: got a tensor on meta, expected"),
        (ValueError, {"parents": [[None], torch.tensor([-1, 0, 5], dtype=torch.int32)]}, r"parents\[1\]\[2\]: got 5"),
        (ValueError, {"parents": torch.tensor([-1, -2], dtype=torch.int32)}, r"parents\[1\]: got -2, expected None, -1"),
    ],
)
def test_what_is_no_tree_is_refused(planner, error, arguments, message):
    trees = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu", query_tree=True)
    with pytest.raises(error, match=message):
        trees.plan([[0, 1, 2], [0, 3]], [40, 20], 16, 4, **arguments)
    with pytest.raises(ValueError, match="query_tree=True"):
        planner.plan([[0, 1, 2], [0, 3]], [40, 20], 16, 4, parents=[None])


def test_a_step_with_query_tokens_advances(planner):
    batch = random_forest(3)
    batch.lengths = [max(length, 4) for length in batch.lengths]
    batch.block_tables = [[*table, *range(batch.num_pages - 1, batch.num_pages)] for table in batch.block_tables]
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=4)
    changed = planner.advance(plan, batch.block_tables, batch.lengths, [0], query_tokens=2)
    expected = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=2).summary()
    assert changed == "forest" and plan.summary()["sequences"] == expected["sequences"]
    assert plan.summary()["unique_kv_bytes"] == expected["unique_kv_bytes"]
    for bad in (0, -1, [1]):
        with pytest.raises(ValueError, match="query_tokens"):
            planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=bad)
    with pytest.raises(TypeError, match="query_tokens"):
        planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages, query_tokens=["two"] * len(batch.lengths))


def test_a_plan_explains_itself(planner):
    batch = random_forest(5)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    text = plan.explain()
    assert "this plan" in text and "no sharing" in text and "Sharing" in text
    picture = plan.svg()
    assert picture.startswith("<svg") and picture.rstrip().endswith("</svg>") and picture == plan._repr_svg_()
    assert f"{len(batch.lengths)} sequences" in picture
    # It is the batch of the last step that is shown.
    planner.advance(plan, [[0]], [3])
    assert "1 sequences" in plan.svg() and plan.sequence_count == 1


@pytest.mark.parametrize(
    "argument, call",
    [
        ("window", lambda: pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu", window=-1)),
        ("chunk", lambda: pa.supports(pa.AttentionShape(**SHAPE, dtype="float16"), 16, chunk=-5)),
        ("max_sequences", lambda: pa.Capacity(-1, 16, pa.DeviceProfile.named("h200"))),
        ("max_slots", lambda: pa.Capacity(1, 16, pa.DeviceProfile.named("h200"), max_slots=-2)),
        ("kv_heads", lambda: pa.AttentionShape(8, -2, 64, "float16")),
    ],
)
def test_numbers_below_0_are_refused_by_name(argument, call):
    with pytest.raises(ValueError, match=rf"^{argument}: got -\d, expected"):
        call()


@pytest.mark.parametrize("seed", range(4))
def test_pages_of_one_token_in_runs_give_the_same_results(seed):
    rng = random.Random(seed)
    # Each goes on for a run at least: what is in none would take a launch of its own.
    prompt, lengths = list(range(160)), [rng.randint(176, 300) for _ in range(9)]
    ends = [160 + sum(lengths[: row + 1]) for row in range(len(lengths))]
    tables = [prompt + list(range(end - length, end - 160)) for length, end in zip(lengths, ends)]
    # A run is read whole, behind its last token too.
    batch = Batch(tables, lengths, 1, ends[-1] + 16)
    q, (k, v) = queries(len(lengths)), caches(batch)
    default, in_runs = (pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu", page_runs=runs) for runs in (False, True))
    results, summaries = [], []
    for planner in (default, in_runs, pa.Planner(default.shape, "cpu")):
        plan = planner.plan(tables, lengths, 1, batch.num_pages)
        results.append(pa.run(plan, q, k, v, return_lse=True))
        summaries.append(plan.summary())
    assert [summary["run_tokens"] > 0 for summary in summaries] == [False, True, False]
    assert summaries[0] == summaries[2]
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=3e-3, rtol=0)
