#!/usr/bin/env python3
"""A workload as a `timed_trace` of vLLM's own `bench serve`: the same lengths, the same sharing, the same arrival times as `pat bench serve`
sends, so that the two clients can be held against each other (docs/serving.md)."""

import argparse
import itertools
import json
import sys

from workload import Refused, Workload, arrival_times


def rows(workload, rate, seed, count, chunk):
    """The first `count` requests. vLLM draws the text of each id, `chunk` tokens; equal ids have equal text."""
    numbers = {}
    for group, seconds in zip(itertools.islice(workload.arrivals(), count), arrival_times(rate, seed)):
        request = group[0]
        if len(group) > 1:
            raise Refused(f"{workload.name}: got {len(group)} requests of arrival {request.arrival}, expected 1: a trace has a time for each")
        for segment, tokens in request.prompt[:-1]:
            if tokens % chunk:
                raise Refused(f"--chunk: got {chunk}, expected a divisor of the {tokens} tokens of a shared segment of {workload.name}")
        chunks = [(segment, index) for segment, tokens in request.prompt for index in range(-(-tokens // chunk))]
        yield {"timestamp": seconds, "input_length": request.prompt_tokens, "output_length": request.output_tokens,
               "hash_ids": [numbers.setdefault(key, len(numbers)) for key in chunks]}


def main(argv=None):
    """Exit status: 0; 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", help="workload file of `pat workload make`")
    parser.add_argument("--rate", type=float, required=True, help="arrivals per second")
    parser.add_argument("--requests", type=int, default=120, metavar="N", help="how many (default 120)")
    parser.add_argument("--chunk", type=int, default=1, metavar="TOKENS", help="tokens of an id, --timed-trace-chunk-hash-size (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals (default 0)")
    parser.add_argument("--output", required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.rate <= 0 or arguments.requests < 1 or arguments.chunk < 1:
        parser.error("--rate, --requests, --chunk: expected positive numbers")
    try:
        workload = Workload.read(arguments.workload)
        made = list(rows(workload, arguments.rate, arguments.seed, arguments.requests, arguments.chunk))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with open(arguments.output, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
