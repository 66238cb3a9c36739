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


class CallFailed(Exception):
    """A call that was timed among others has raised."""

    def __init__(self, name, error):
        super().__init__(f"{name}: {error}")
        self.name, self.error = name, error


def in_turns_ms(calls, repeats, cold_cache):
    """Median time of each of the named calls with a cold L2, in turns: what the card's clock and its neighbours do meanwhile is
    the same for all of them. Raises CallFailed."""
    times = {name: [] for name in calls}
    events = _events()
    for repeat in range(WARM_UPS + repeats):
        for name, call in calls.items():
            cold_cache.read()
            try:
                elapsed = _elapsed_ms(call, *events)
            except Exception as error:
                raise CallFailed(name, error) from error
            if repeat >= WARM_UPS:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def warm_ms(call, repeats):
    """Median time of calls behind each other, the device idle in between."""
    events = _events()
    times = [_elapsed_ms(call, *events) for _ in range(WARM_UPS + repeats)]
    return statistics.median(times[WARM_UPS:])


def _events():
    return tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))


def _elapsed_ms(call, start, end):
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
