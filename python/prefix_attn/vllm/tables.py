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

    def rows(self, count: int) -> np.ndarray:
        """Int32: which row of the mirror each of the first ``count`` rows of the batch has. Rows behind the last request, which
        have no tokens, get any."""
        requests = np.zeros(0) if self.is_dummy else self.requests[:count]
        if len(requests) == count:
            return requests.astype(np.int32, copy=False)
        rows = np.zeros(count, dtype=np.int32)
        rows[: len(requests)] = requests
        return rows
