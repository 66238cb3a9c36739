"""Workload files of `pat workload` (docs/request-workloads.md): requests, token ids, arrival times."""

import json
import math

import numpy as np

FORMAT, VERSION = "pat-request-workload", 1
MASK = 0xFFFFFFFF


class Refused(Exception):
    """Input that cannot be used; the message names what, what came, what is accepted."""


def mix(value):
    """The bijection lowbias32, of an int or of an array of uint32."""
    if isinstance(value, int):
        value ^= value >> 16
        value = value * 0x7FEB352D & MASK
        value ^= value >> 15
        value = value * 0x846CA68B & MASK
        return value ^ (value >> 16)
    value = value ^ (value >> np.uint32(16))
    value = value * np.uint32(0x7FEB352D)
    value = value ^ (value >> np.uint32(15))
    value = value * np.uint32(0x846CA68B)
    return value ^ (value >> np.uint32(16))


class Request:
    """One line of the file."""

    __slots__ = ("arrival", "turn", "think_s", "prompt", "output_tokens")

    def __init__(self, fields):
        self.arrival = fields["arrival"]
        self.turn = fields.get("turn", 0)
        self.think_s = fields.get("think_ms", 0) / 1e3
        self.prompt = tuple((segment, tokens) for segment, tokens in fields["prompt"])
        self.output_tokens = fields["output_tokens"]

    @property
    def prompt_tokens(self):
        return sum(tokens for _, tokens in self.prompt)


def check(path, requests):
    """Refuses what no run can be made of: the lines that `pat workload` refuses, too."""
    before = (-1, 0)
    for line, request in enumerate(requests, 2):
        place = (request.arrival, request.turn)
        arrival, turn = before
        if place not in (before, (arrival, turn + 1), (arrival + 1, 0)) or request.arrival < 0:
            raise Refused(f"{path}: line {line}: arrival and turn: got {place[0]} and {place[1]}, expected {arrival + 1} and 0, or the same "
                          "arrival and its turn or the next")
        if not request.prompt or min(tokens for _, tokens in request.prompt) < 1:
            raise Refused(f"{path}: line {line}: prompt: got {list(request.prompt)}, expected segments of at least 1 token")
        if request.output_tokens < 1:
            raise Refused(f"{path}: line {line}: output_tokens: got {request.output_tokens}, expected at least 1")
        before = place


class Workload:
    """A file's header and its requests, by arrival."""

    def __init__(self, header, requests):
        self.name, self.seed = header["name"], header["seed"]
        self.first, self.end = header["token_ids"]
        self.requests = requests
        self.segments = {}

    @classmethod
    def read(cls, path):
        try:
            with open(path) as lines:
                header = json.loads(next(lines, "") or "{}")
                if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
                    raise Refused(f"{path}: got format {header.get('format')!r} version {header.get('version')!r}, "
                                  f"expected {FORMAT!r} version {VERSION}")
                requests = [Request(json.loads(line)) for line in lines if line.strip()]
                check(path, requests)
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{path} is no workload file: {error!r}") from error
        if not requests:
            raise Refused(f"{path} has no requests, expected at least 1")
        return cls(header, requests)

    def token_ids(self, prompt):
        """The token ids of a prompt, a list."""
        return [token for segment in prompt for token in self.segment(*segment)]

    def segment(self, identity, tokens):
        """Those of a segment. Kept: most segments stand in many prompts or are drawn for one run after the other."""
        ids = self.segments.get(identity)
        if ids is None:
            key = mix(mix(mix(self.seed) + (identity & MASK) & MASK) + (identity >> 32) & MASK)
            offsets = np.arange(tokens, dtype=np.uint32) + np.uint32(key)
            ids = (np.uint32(self.first) + mix(offsets) % np.uint32(self.end - self.first)).tolist()
            self.segments[identity] = ids
        return ids

    def arrivals(self):
        """Lists of requests that arrive together or follow each other."""
        groups = []
        for request in self.requests:
            if request.arrival == len(groups):
                groups.append([])
            groups[request.arrival].append(request)
        return groups


def arrival_times(rate, seed):
    """Seconds from the beginning to each arrival of a Poisson process of `rate` arrivals per second."""
    key, seconds, index = mix(seed ^ 0x9E3779B9), 0.0, 0
    while True:
        uniform = (mix(key + index & MASK) + 0.5) / 2**32
        seconds -= math.log(uniform) / rate
        yield seconds
        index += 1
