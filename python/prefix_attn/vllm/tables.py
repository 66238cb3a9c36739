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
        #: How often each request's table was written.
        self.writes = np.zeros(max_requests, dtype=np.int64)
        self.block_size = block_size

    def write(self, request: int, start: int, ids) -> None:
        """Repeat one edit of the device table."""
        if ids:
            self.ids[request, start : start + len(ids)] = ids
            self.writes[request] += 1


class RowTables:
    """The tables of a batch's rows, one below the other. From step to step few of them change, and only those are copied.

    Args:
        rows, width: of the largest batch.
    """

    def __init__(self, rows: int, width: int):
        self.ids = np.zeros((rows, width), dtype=np.int32)
        self._mirror = None
        self._requests = np.full(rows, -1, dtype=np.int64)
        self._writes = np.zeros(rows, dtype=np.int64)

    def update(self, mirror: TableMirror, requests: np.ndarray) -> None:
        """Make row ``i`` the table of ``requests[i]``; further rows stay as they are."""
        if mirror is not self._mirror:
            # Another mirror's counts say nothing of these rows.
            self._mirror = mirror
            self._requests.fill(-1)
        count, writes = len(requests), mirror.writes[requests]
        changed = np.flatnonzero((self._requests[:count] != requests) | (self._writes[:count] != writes))
        width = min(mirror.ids.shape[1], self.ids.shape[1])
        self.ids[changed, :width] = mirror.ids[requests[changed], :width]
        self._requests[:count], self._writes[:count] = requests, writes


@dataclasses.dataclass(frozen=True)
class StepTables:
    """What one step's rows are: row ``i`` of the batch has the tables of ``requests[i]``."""

    mirror: TableMirror
    requests: np.ndarray
    #: A run without requests (capture, warm-up, an idle data-parallel rank): its rows have no tables.
    is_dummy: bool

    def rows(self, lengths: np.ndarray, out: RowTables) -> np.ndarray:
        """The tables of the first ``len(lengths)`` rows, as far as the longest length needs.

        Args:
            lengths: tokens of each row in this group's KV cache; 0 for rows behind the last request.
            out: at least as many rows and columns; rows are copied anew where it held another mirror's.

        Returns:
            A part of ``out``; rows behind the last request hold what they held.
        """
        if not self.is_dummy:
            out.update(self.mirror, self.requests[: len(lengths)])
        columns = -(-int(lengths.max(initial=0)) // self.mirror.block_size)
        return out.ids[: len(lengths), :columns]
