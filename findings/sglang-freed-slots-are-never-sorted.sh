#!/usr/bin/env bash
# sglang 0.5.23, torch 2.14.0 (PyPI). The allocator of KV slots with page size 1, which is the default, on the CPU.
#
# A new pool gives a prompt consecutive slots, so its KV can be copied, or read by a kernel, in long pieces. The free list is a
# queue: slots are taken from its front, and a request that ends appends its own in the order in which it got them, a prompt and
# then one slot for each decode step, which lie apart. Nothing sorts that list where prefill and decode run in one server (the
# constructor's `need_sort` is for servers that are split), not even when every slot is free again. So the pool ages: once it has
# been gone through a few times, prompts are scattered token by token, and stay so until the server starts anew. Where
# `need_sort` is set, freed slots are sorted when the front runs short: most of a prompt is consecutive for good.
#
# Seen on 2026-11-28: as asserted below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps sglang==0.5.23
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import sys
import types
from pathlib import Path

import torch

# The allocator needs torch alone: the packages above it, which import a whole server, are not executed.
root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.mem_cache.allocator"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

SLOTS, REQUESTS, PROMPT, STEPS, RUN = 65536, 32, 512, 8000, 16


def part_in_runs(slots):
    """Which part of the tokens lies in runs of 16 consecutive slots."""
    slots, found, at = slots.tolist(), 0, 0
    while at + RUN <= len(slots):
        is_run = slots[at : at + RUN] == list(range(slots[at], slots[at] + RUN))
        found += RUN * is_run
        at += RUN if is_run else 1
    return found / len(slots)


def serve(need_sort):
    """32 requests at a time, each a prompt and a slot per step; one that ends makes room for the next."""
    pool = TokenToKVPoolAllocator(SLOTS, torch.float16, "cpu", None, need_sort)
    parts = []

    def prompt(row):
        slots = pool.alloc(PROMPT)
        parts.append(part_in_runs(slots))
        return [slots], 100 + 10 * row

    running = [prompt(row) for row in range(REQUESTS)]
    for _ in range(STEPS):
        new = pool.alloc(REQUESTS)
        for row, (slots, left) in enumerate(running):
            slots.append(new[row : row + 1])
            running[row] = slots, left - 1
            if left == 1:
                pool.free(torch.cat(slots))
                running[row] = prompt(7 * row % REQUESTS)
    for slots, _ in running:
        pool.free(torch.cat(slots))
    assert pool.available_size() == SLOTS
    return parts[0], sum(parts[-REQUESTS:]) / REQUESTS, part_in_runs(pool.alloc(PROMPT))


for need_sort in (False, True):
    first, aged, of_an_empty_pool = serve(need_sort)
    print(f"need_sort={need_sort}: of a prompt in runs of {RUN}: first {first:.2f}, last {aged:.2f}, "
          f"all slots free again {of_an_empty_pool:.2f}")
    if not (first == 1 and of_an_empty_pool == 0 and (aged > 0.5 if need_sort else aged < 0.05)):
        sys.exit("changed")
PY
