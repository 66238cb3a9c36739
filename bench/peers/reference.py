"""Judges an answer by rows of the exact one, computed in float64 from the same 16-bit tensors."""

import math
import sys

import torch

LARGEST_DIFFERENCE = 1e-2
"""An answer that is further off anywhere is wrong: the threshold of PAT's benchmark."""


def judge(case, answer):
    """The `correctness` entry of an answer `[sequences, q_heads, head_dim]`."""
    configuration, batch = case.configuration, case.configuration.batch
    largest, squares, norm = 0.0, 0.0, 0.0
    for (sequence, kv_head), exact in case.exact.items():
        difference = answer[sequence, _heads(configuration, kv_head)].double() - exact
        row_largest = difference.abs().max().item()
        # NaN would vanish in max, and JSON has no infinity.
        largest = max(largest, row_largest) if math.isfinite(row_largest) else sys.float_info.max
        squares += difference.square().sum().item()
        norm += exact.square().sum().item()
    relative = math.sqrt(squares / norm) if norm > 0 else math.sqrt(squares)
    return {
        "status": "PASSED" if largest < LARGEST_DIFFERENCE else "FAILED",
        "max_diff": largest,
        "relative_l2": relative if math.isfinite(relative) else sys.float_info.max,
        "sample": f"{len(configuration.sample)} of {len(batch.lengths) * configuration.nheads_kv} (sequence, KV head) pairs",
    }


def _heads(configuration, kv_head):
    group = configuration.nheads_q // configuration.nheads_kv
    return slice(kv_head * group, (kv_head + 1) * group)


def exact_rows(case, sequence, kv_head):
    """The outputs of the query heads of a KV head, in float64."""
    configuration, batch = case.configuration, case.configuration.batch
    length = batch.lengths[sequence]
    q = case.q[sequence, _heads(configuration, kv_head)].double()
    pages = batch.block_tables[sequence][: -(-length // batch.page_size)]
    pages = torch.tensor(pages, dtype=torch.int64, device=case.q.device)
    k, v = (
        pool[pages, :, kv_head].reshape(-1, configuration.head_dim)[:length].double() for pool in (case.k, case.v)
    )
    return torch.softmax(configuration.softmax_scale * (q @ k.T), dim=-1) @ v
