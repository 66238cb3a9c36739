"""Forked children: what the parent was planning is there, nothing hangs, nothing ends the process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import SHAPE

import prefix_attn as pa

#: Long enough to plan that a fork meets it.
ROWS, PAGES = 400, 300
TABLES = torch.arange(ROWS * PAGES, dtype=torch.int32).view(ROWS, PAGES)
TABLES[:, : PAGES // 2] = TABLES[0, : PAGES // 2]
LENGTHS = torch.full((ROWS,), PAGES * 16, dtype=torch.int32)
BATCH = (TABLES, LENGTHS, 16, ROWS * PAGES)


def in_child(check):
    """Forks; the child runs `check` and ends. None of it may hang or die."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def test_plans_that_were_pending_are_there_in_the_child(planner):
    futures = [planner.plan_async(*BATCH) for _ in range(8)]
    expected = planner.plan(*BATCH).summary()

    def check():
        assert all(future.done() for future in futures)
        assert all(future.result().summary() == expected for future in futures)
        del futures[:]
        assert planner.plan(*BATCH).summary() == expected
        assert planner.plan_async(*BATCH).result().summary() == expected

    in_child(check)
    assert all(future.result().summary() == expected for future in futures)


def test_what_planning_raised_is_raised_in_the_child(planner):
    future = planner.plan_async([[0] * 10**5], [16 * 10**5], 16, 1, query_tokens=5 * 10**4)

    def check():
        for _ in range(2):
            with pytest.raises(ValueError, match="query_tokens"):
                future.result()

    in_child(check)


def test_threads_that_plan_and_wait_leave_nothing_locked_in_children(planner):
    """Forks while other threads plan, advance, wait for futures and start new ones."""
    stop = threading.Event()
    plan = planner.plan(*BATCH)
    last = [planner.plan_async(*BATCH)]

    def advance():
        grown = LENGTHS.clone()
        while not stop.is_set():
            grown[:: ROWS // 2] = PAGES * 16 - 15 - grown[:: ROWS // 2] % 2
            planner.advance(plan, TABLES, grown)

    def plan_on():
        while not stop.is_set():
            last[0] = planner.plan_async(*BATCH)
            last[0].result()

    threads = [threading.Thread(target=work) for work in (advance, plan_on, plan_on)]
    for thread in threads:
        thread.start()

    def check():
        assert last[0].result().sequence_count == ROWS
        assert planner.plan(*BATCH).sequence_count == ROWS
        assert planner.advance(plan, *BATCH[:2]) in ("nothing", "lengths", "pages", "forest")
        assert plan.summary()["sequences"] == ROWS

    try:
        for _ in range(20):
            in_child(check)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


PROGRAM = """
import os, sys, torch, prefix_attn as pa
planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), "cpu")
tables = torch.arange(120_000, dtype=torch.int32).view(400, 300)
futures = [planner.plan_async(tables, [4800] * 400, 16, 120_000) for _ in range(6)]
child = os.fork()
if child == 0:
    if "use" in sys.argv:
        assert futures[2].result().sequence_count == 400
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child died"
assert futures[5].result().sequence_count == 400
"""


@pytest.mark.parametrize("argument", ["use", "leave"])
def test_the_interpreter_ends_in_child_and_parent(argument, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(pa.__file__))}
    program = [sys.executable, "-c", PROGRAM, argument]
    ended = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr


def planned_in_worker(seed):
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), "cpu")
    return seed, planner.plan_async([[0, 1], [0, 2]], [32, 20], 16, 8).result().sequence_count


def test_workers_of_multiprocessing_plan(planner):
    pending = planner.plan_async(*BATCH)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(planned_in_worker, range(4)).get(60) == [(seed, 2) for seed in range(4)]
    assert pending.result().sequence_count == ROWS


def pats_tree():
    table = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    return pa.AsyncTree(16, [32, 20], table, None, 4, 2, "cpu")


def outputs(tree):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 1, 8, 64, generator=generator).half()
    k, v = torch.randn(2, 3, 16, 2, 64, generator=generator).half()
    out = torch.zeros_like(q)
    pa.prefix_attn_with_kvcache(q, k, v, tree, 0.125, out)
    return out


def test_pats_trees_are_there_in_the_child():
    expected = outputs(pats_tree().tree)
    taken = pats_tree()
    assert taken.tree is taken.tree

    def check():
        assert all(torch.equal(outputs(tree.tree), expected) for tree in (taken, *pending, pats_tree()))

    for _ in range(5):
        pending = [pats_tree() for _ in range(20)]
        in_child(check)


def test_pats_planning_in_a_thread_is_not_locked_in_the_child():
    stop = threading.Event()

    def call():
        while not stop.is_set():
            outputs(pats_tree().tree)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            in_child(lambda: outputs(pats_tree().tree))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
