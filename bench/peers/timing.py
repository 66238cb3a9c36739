"""Times by CUDA events, and of planning by the host's clock; medians in milliseconds."""

import statistics
import time

import torch

COLD_BYTES = 1 << 30
COLD_READS = 4
"""The buffer is read more often than the cache needs: about a millisecond, in which the host enqueues the call whatever
Python makes of it, so that the events stand around device work alone."""

WARM_UPS = 5


class ColdCache:
    """Makes the L2 cold by reading. Writing would leave dirty lines, whose write-back is then measured too."""

    def __init__(self, device):
        self._buffer = torch.ones(COLD_BYTES // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def read(self):
        """Enqueues the reads."""
        for _ in range(COLD_READS):
            torch.sum(self._buffer, dim=0, out=self._sum)


def call_ms(call, repeats, cold_cache=None):
    """Median time of a call: with a cold L2, or each behind the last with the device idle in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for repeat in range(WARM_UPS + repeats):
        if cold_cache is not None:
            cold_cache.read()
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UPS:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def plan_ms(plan, repeats=5):
    """Median host time of a plan until the device has what it copies there."""
    times = []
    for _ in range(1 + repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        plan()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[1:])
