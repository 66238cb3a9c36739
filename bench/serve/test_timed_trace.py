"""Tests of timed_trace.py; no engine, no GPU."""

import json
import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import timed_trace
from workload import arrival_times

HEADER = {"format": "pat-request-workload", "version": 1, "name": "w", "about": "", "seed": 1, "token_ids": [1000, 2000]}


def trace(lines, *options):
    """(status, rows) of a workload with these lines."""
    with tempfile.TemporaryDirectory() as folder:
        workload, output = os.path.join(folder, "w.jsonl"), os.path.join(folder, "trace.jsonl")
        with open(workload, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in [HEADER, *lines])
        status = timed_trace.main([workload, "--rate", "5", "--output", output, *options])
        if status:
            return status, None
        with open(output) as file:
            return status, [json.loads(line) for line in file]


LINES = [{"arrival": index, "prompt": [[0, 40], [index + 1, 25]], "output_tokens": 7} for index in range(3)]


class TimedTrace(unittest.TestCase):
    def test_lengths_sharing_and_times_are_the_workloads(self):
        status, rows = trace(LINES, "--chunk", "20", "--requests", "2", "--seed", "3")
        self.assertEqual((status, len(rows)), (0, 2))
        times = arrival_times(5.0, 3)
        self.assertEqual([row["timestamp"] for row in rows], [next(times), next(times)])
        self.assertEqual([(row["input_length"], row["output_length"]) for row in rows], [(65, 7)] * 2)
        # Two chunks of 20 are shared; the private 25 tokens are one and a part.
        self.assertEqual([row["hash_ids"] for row in rows], [[0, 1, 2, 3], [0, 1, 4, 5]])
        self.assertEqual(len(trace(LINES)[1][0]["hash_ids"]), 65)

    def test_what_a_trace_cannot_say_is_refused(self):
        self.assertEqual(trace(LINES, "--chunk", "16")[0], 2)
        self.assertEqual(trace([*LINES, {"arrival": 2, "turn": 1, "prompt": [[9, 5]], "output_tokens": 1}])[0], 2)
        for options in (("--chunk", "0"), ("--requests", "0"), ("--rate", "-1")):
            with self.assertRaises(SystemExit) as raised:
                trace(LINES, *options)
            self.assertEqual(raised.exception.code, 2)


if __name__ == "__main__":
    unittest.main()
