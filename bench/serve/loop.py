"""One run at one rate: requests arrive by a clock and are given to an engine between its steps.

An engine has
  add(name, token_ids, output_tokens)   begins a request
  step() -> [(name, new tokens, ended)] one step; blocks while it works
It may have `step_log`, a list to which it appends (end by perf_counter, requests, tokens, requests of a prompt) for each step.
"""

import heapq
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import takewhile

from workload import arrival_times


class Clock:
    """Seconds since the start of a run. Where the engine has nothing to do, the virtual clock jumps to the next arrival, the real
    one waits for it."""

    def __init__(self, virtual, now=time.perf_counter, sleep=time.sleep):
        self.virtual, self.real_now, self.sleep = virtual, now, sleep
        self.origin = now()

    def now(self):
        return self.real_now() - self.origin

    def of(self, real):
        """What the clock showed at a reading of the underlying one."""
        return real - self.origin

    def wait_until(self, seconds):
        """What the clock then shows, at least `seconds`."""
        missing = seconds - self.now()
        if missing > 0 and self.virtual:
            self.origin -= missing
        elif missing > 0:
            self.sleep(missing)
        return max(seconds, self.now())


@dataclass
class Window:
    """Requests that are sent between `warm_up` and `warm_up + measured` seconds are measured; arrivals go on until the last of them has
    ended. After `limit` seconds, or when one of them has waited `patience` seconds for its first token, the run is given up."""

    warm_up: float = 15.0
    measured: float = 30.0
    limit: float = 180.0
    patience: float = 20.0

    def holds(self, seconds):
        return self.warm_up <= seconds < self.warm_up + self.measured


@dataclass
class Sent:
    """A request that has arrived. Times in seconds of the run's clock."""

    name: str
    order: int  # of its arrival
    request: object
    arrived: float
    measured: bool
    chunks: list = field(default_factory=list)  # (time, tokens)
    ended: float = None

    @property
    def tokens(self):
        return sum(tokens for _, tokens in self.chunks)


@dataclass
class Run:
    """What happened."""

    sent: list
    window: Window
    seconds: float
    stopped: str = None  # why the run was given up
    exhausted: bool = False  # the workload ended before the run
    steps: list = field(default_factory=list)  # (end, requests, tokens, requests of a prompt), seconds of the run's clock
    running: list = field(default_factory=list)  # names of requests that the engine still has


class Fcfs:
    """Every request goes to the engine as it comes."""

    name = "fcfs"

    def __init__(self):
        self.waiting = []

    def put(self, sent):
        self.waiting.append(sent)

    def take(self, now):
        ready, self.waiting = self.waiting, []
        return ready

    def ended(self, sent):
        pass


class PrefixGrouped:
    """At most `most` requests are in the engine; next comes one of the prefix that most of them have, unless one has waited longer than
    `patience` seconds. A prefix is the beginning of a prompt that other requests of the workload have in theirs."""

    name = "prefix-grouped"

    def __init__(self, most, workload, patience=0.5):
        self.most, self.patience = most, patience
        times = Counter(identity for request in workload.requests for identity, _ in request.prompt)
        self.shared = {identity for identity, count in times.items() if count > 1}
        self.waiting, self.prefixes, self.running = [], {}, Counter()

    def prefix(self, request):
        return tuple(takewhile(lambda segment: segment[0] in self.shared, request.prompt)) or request.prompt

    def put(self, sent):
        self.waiting.append(sent)
        self.prefixes[sent.name] = self.prefix(sent.request)

    def take(self, now):
        ready = []
        while self.waiting and self.running.total() < self.most:
            place = 0  # the oldest
            if now - self.waiting[0].arrived <= self.patience:
                place = max(range(len(self.waiting)), key=lambda i: (self.running[self.prefixes[self.waiting[i].name]], -i))
            sent = self.waiting.pop(place)
            self.running[self.prefixes[sent.name]] += 1
            ready.append(sent)
        return ready

    def ended(self, sent):
        self.running[self.prefixes.pop(sent.name)] -= 1


def run(engine, workload, rate, window, *, clock=None, admission=None, seed=0):
    """Drives the engine at `rate` arrivals per second until all measured requests have ended."""
    clock, admission = clock or Clock(virtual=True), admission or Fcfs()
    log = getattr(engine, "step_log", None)
    if log is not None:
        log.clear()
    arrivals = list(zip(arrival_times(rate, seed), workload.arrivals()))
    due = [(seconds, order, requests) for order, (seconds, requests) in enumerate(arrivals)]
    sent, running, open_turns = [], {}, {}
    unanswered, measured_open, stopped = deque(), 0, None

    while True:
        now = clock.now()
        if not running and not admission.waiting:
            if not due:
                break
            now = clock.wait_until(due[0][0])
        while due and due[0][0] <= now:
            seconds, order, requests = heapq.heappop(due)
            turn = [request for request in requests if request.turn == requests[0].turn]
            open_turns[order] = [len(turn), requests[len(turn):]]
            for request in turn:
                record = Sent(str(len(sent)), order, request, seconds, window.holds(seconds))
                sent.append(record)
                admission.put(record)
                if record.measured:
                    measured_open += 1
                    unanswered.append(record)
        for record in admission.take(now):
            running[record.name] = record
            engine.add(record.name, workload.token_ids(record.request.prompt), record.request.output_tokens)
        if measured_open == 0 and now >= window.warm_up + window.measured:
            break
        while unanswered and unanswered[0].chunks:
            unanswered.popleft()
        if unanswered and now - unanswered[0].arrived > window.patience:
            stopped = f"a request had waited {window.patience:g} s for its first token"
            break
        if now > window.limit:
            stopped = f"the measured requests had not ended after {window.limit:g} s"
            break
        outputs = engine.step()
        now = clock.now()
        for name, tokens, ended in outputs:
            record = running.get(name)
            if record is None:
                continue
            if tokens:
                record.chunks.append((now, tokens))
            if ended:
                record.ended = now
                measured_open -= record.measured
                del running[name]
                admission.ended(record)
                turn = open_turns[record.order]
                turn[0] -= 1
                if turn[0] == 0 and turn[1]:
                    heapq.heappush(due, (now + turn[1][0].think_s, record.order, turn[1]))
    steps = [(clock.of(end), *rest) for end, *rest in log or ()]
    return Run(sent, window, clock.now(), stopped, bool(arrivals) and clock.now() > arrivals[-1][0], steps, list(running))
