"""Host copies of vLLM's block tables.

vLLM's model runner V2 keeps block tables on the device; reading them back would stall it. All edits come from the host, though,
so that the same edits on a numpy array give the same tables.
"""

import dataclasses

import numpy as np


class TableMirror:
    """The block tables of one KV cache group: ``ids[request, position]``, as on the device.

    Entries behind a request's own are what earlier requests left there.

    Args:
        max_requests: rows of the device table.
        width: its columns.
        block_size: tokens that one entry stands for.
    """

    def __init__(self, max_requests: int, width: int, block_size: int):
        self.ids = np.zeros((max_requests, width), dtype=np.int32)
        self.block_size = block_size

    def write(self, request: int, start: int, ids) -> None:
        """Repeat one edit of the device table."""
        if ids:
            self.ids[request, start : start + len(ids)] = ids


@dataclasses.dataclass(frozen=True)
class StepTables:
    """What one step's rows are: row ``i`` of the batch has the tables of ``requests[i]``."""

    mirror: TableMirror
    requests: np.ndarray
    #: A run without requests (capture, warm-up, an idle data-parallel rank): its rows have no tables.
    is_dummy: bool

    def rows(self, lengths: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The tables of the first ``len(lengths)`` rows, as far as the longest length needs, written to ``out``.

        Args:
            lengths: tokens of each row in this group's KV cache; 0 for rows behind the last request.
            out: int32, at least that many rows and columns.

        Returns:
            The part of ``out`` that was written; rows behind the last request hold what they held.
        """
        count = min(len(lengths), len(self.requests))
        columns = -(-int(lengths.max(initial=0)) // self.mirror.block_size)
        part = out[: len(lengths), :columns]
        part[:count] = self.mirror.ids[self.requests[:count], :columns]
        return part
