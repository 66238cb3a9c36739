#!/usr/bin/env python3
"""Tests of the in-process serving benchmark, with an engine that computes nothing: python3 bench/serve/test_in_process.py (numpy)."""

import contextlib
import io
import json
import math
import os
import tempfile
import unittest

import in_process
import metrics
import records
from loop import Clock, Fcfs, PrefixGrouped, Window, run
from workload import Refused, Request, Workload, arrival_times

HEADER = {"format": "pat-request-workload", "version": 1, "name": "test", "about": "", "seed": 7, "token_ids": [1000, 101000]}


class Time:
    """A clock that only an engine's work and a loop's waiting move."""

    def __init__(self):
        self.seconds, self.waited = 100.0, 0.0

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds
        self.waited += seconds

    def clock(self, virtual=True):
        return Clock(virtual, self.now, self.sleep)


class FakeEngine:
    """Steps take 5 ms, 0.1 ms for each request and 0.01 ms for each token of a prompt."""

    start_seconds = 0.0

    def __init__(self, time, broken=None):
        self.time, self.broken = time, broken
        self.requests, self.step_log, self.most, self.cleared = {}, [], 0, 0
        self.counted = 7  # steps that starting took

    def add(self, name, token_ids, output_tokens):
        assert name not in self.requests
        self.requests[name] = [len(token_ids), 0, output_tokens]

    def step(self):
        assert self.requests, "an engine without requests is not asked to step"
        self.most = max(self.most, len(self.requests))
        self.counted += 1
        prompt_tokens = sum(prompt for prompt, _, _ in self.requests.values())
        prompts = sum(prompt > 0 for prompt, _, _ in self.requests.values())
        self.time.seconds += 5e-3 + 1e-4 * len(self.requests) + 1e-5 * prompt_tokens
        self.step_log.append((self.time.seconds, len(self.requests), prompt_tokens + len(self.requests), prompts))
        outputs = []
        for name, request in list(self.requests.items()):
            request[0], request[1] = 0, request[1] + 1
            ended = request[1] == (2 if self.broken == "short" else request[2])
            outputs.append((name, 1, ended))
            if ended:
                del self.requests[name]
        return [] if self.broken == "silent" else outputs

    def clear(self, names):
        for name in names:
            del self.requests[name]
        assert not self.requests
        self.cleared += 1
        self.counted += 1

    def profile(self, steps, requests):
        self.counted += steps
        for request in requests:
            self.add(*request)
        return {"step_time": {"requests": 1.0, "steps": steps, "ms": {"attention": 1.0}}}

    def describe(self):
        return {"device": "none"}

    def backend_counters(self):
        counted, self.counted = self.counted, 0
        return {"decode_steps": counted}


def workload(count=4000, prompt=((0, 500), (None, 100)), output=50, more=None):
    def segments(index):
        return [[index + 10 if identity is None else identity, tokens] for identity, tokens in prompt]

    lines = [{"arrival": index, "prompt": segments(index), "output_tokens": output} for index in range(count)]
    return Workload(HEADER, [Request(line) for line in lines + (more or [])])


WINDOW = Window(warm_up=2.0, measured=5.0)


class TokensAndArrivals(unittest.TestCase):
    def test_token_ids_are_those_of_the_rust_side(self):
        ids = workload().token_ids([((3 << 32) + 5, 3)])
        self.assertEqual(ids, [75554, 27624, 9959])

    def test_arrivals_are_those_of_the_rust_side(self):
        times = [time for time, _ in zip(arrival_times(10.0, 0), range(20_000))]
        self.assertAlmostEqual(times[0], ARRIVALS[0], places=12)
        self.assertAlmostEqual(times[99], ARRIVALS[1], places=9)
        self.assertAlmostEqual(times[-1] / 20_000, 0.1, delta=0.003)

    def test_files_that_are_none_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "w.jsonl")
            for text, part in [
                ("", "got format None"),
                ("{}\n", "got format None"),
                (json.dumps({**HEADER, "version": 2}), "version 2, expected"),
                (json.dumps(HEADER), "no requests"),
                (json.dumps(HEADER) + "\n{}\n", "no workload file"),
                ("nonsense", "no workload file"),
                *((json.dumps(HEADER) + "\n" + json.dumps({"arrival": 0, "prompt": [[0, 5]], "output_tokens": 3, **wrong}) + "\n", said)
                  for wrong, said in (
                      ({"prompt": []}, "line 2: prompt: got [], expected segments of at least 1 token"),
                      ({"prompt": [[0, 0]]}, "line 2: prompt: got [(0, 0)]"),
                      ({"output_tokens": 0}, "line 2: output_tokens: got 0, expected at least 1"),
                      ({"arrival": 5}, "line 2: arrival and turn: got 5 and 0, expected 0 and 0"),
                      ({"turn": 1}, "line 2: arrival and turn: got 0 and 1"))),
            ]:
                with open(path, "w") as file:
                    file.write(text)
                with self.assertRaises(Refused) as raised:
                    Workload.read(path)
                self.assertIn(part, str(raised.exception))
            with self.assertRaises(Refused):
                Workload.read(os.path.join(folder, "none"))


class Loop(unittest.TestCase):
    def run_at(self, rate, work=None, *, virtual=True, admission=None, window=WINDOW, broken=None):
        time = Time()
        engine = FakeEngine(time, broken)
        return run(engine, work or workload(), rate, window, clock=time.clock(virtual), admission=admission), engine, time

    def test_at_a_low_rate_the_times_are_the_engines(self):
        result, _, _ = self.run_at(0.5, window=Window(10.0, 100.0, 1000.0))
        figures, counts, _ = metrics.summarise(result)
        alone = 5.1 + 0.01 * 600
        self.assertAlmostEqual(figures["median_ttft_ms"], alone, places=3)
        self.assertAlmostEqual(figures["median_tpot_ms"], 5.1, places=3)
        self.assertAlmostEqual(figures["median_e2el_ms"], alone + 49 * 5.1, places=3)
        self.assertGreater(counts["measured"], 20)
        self.assertEqual(counts["failed"], 0)

    def test_the_rate_and_the_window_are_kept(self):
        result, engine, _ = self.run_at(40.0)
        measured = [sent for sent in result.sent if sent.measured]
        self.assertTrue(all(2.0 <= sent.arrived < 7.0 for sent in measured))
        self.assertAlmostEqual(len(measured) / 5.0, 40.0, delta=8.0)
        self.assertTrue(all(sent.ended is not None for sent in measured))
        self.assertTrue(any(sent.arrived > 7.0 for sent in result.sent), "arrivals go on until the last measured has ended")
        self.assertEqual(len(result.running), len(engine.requests), "what still runs is said, for the engine to drop")
        # Little's law: the requests at a time are the rate times the time of each.
        figures, _, _ = metrics.summarise(result)
        decode = metrics.steps(result)["decode"]
        self.assertAlmostEqual(decode["mean_requests"], 40.0 * figures["mean_e2el_ms"] / 1e3, delta=5.0)

    def test_the_clock_skips_or_waits(self):
        for virtual in (True, False):
            result, _, time = self.run_at(1.0, virtual=virtual)
            self.assertEqual(time.waited > 0, not virtual)
            self.assertGreater(result.seconds, 7.0)
            self.assertEqual(time.seconds - 100.0 > 6.0, not virtual)

    def test_an_overload_is_given_up_and_said(self):
        result, _, _ = self.run_at(500.0, window=Window(2.0, 5.0, 60.0, patience=3.0))
        self.assertIn("waited 3 s", result.stopped)
        result, _, _ = self.run_at(300.0, window=Window(2.0, 5.0, 3.0))
        self.assertIn("after 3 s", result.stopped)
        _, counts, _ = metrics.summarise(result)
        self.assertEqual(counts["failures"]["unfinished"], counts["failed"])

    def test_a_workload_that_ends_is_said(self):
        result, _, _ = self.run_at(40.0, workload(count=100))
        self.assertTrue(result.exhausted)
        self.assertEqual(len(result.sent), 100)
        self.assertFalse(self.run_at(40.0)[0].exhausted)

    def test_wrong_numbers_of_tokens_are_failures(self):
        result, _, _ = self.run_at(10.0, broken="short")
        figures, counts, _ = metrics.summarise(result)
        self.assertEqual(counts["failures"], {"wrong number of tokens": counts["measured"]})
        self.assertIsNone(figures["mean_ttft_ms"])

    def test_turns_follow_each_other(self):
        turn = lambda turn, tokens, think: {"arrival": 1, "turn": turn, "think_ms": think, "prompt": [[0, tokens]], "output_tokens": 10}
        first = {"arrival": 0, "prompt": [[1, 50]], "output_tokens": 10}
        requests = [Request(line) for line in (first, turn(0, 50, 0), turn(0, 50, 0), turn(1, 50, 500), turn(2, 50, 250))]
        result, _, _ = self.run_at(1.0, Workload(HEADER, requests), window=Window(0.0, 60.0))
        self.assertEqual([sent.request.turn for sent in result.sent], [0, 0, 0, 1, 2])
        _, one, two, three, four = result.sent
        self.assertEqual(one.arrived, two.arrived)
        self.assertAlmostEqual(three.arrived, max(one.ended, two.ended) + 0.5)
        self.assertAlmostEqual(four.arrived, three.ended + 0.25)

    def test_grouped_admission_holds_back_and_groups(self):
        more = ((index % 2, 400) for index in range(2000))
        lines = [{"arrival": i, "prompt": [list(head), [100 + i, 50]], "output_tokens": 50} for i, head in enumerate(more)]
        work = Workload(HEADER, [Request(line) for line in lines])
        result, engine, _ = self.run_at(60.0, work, admission=PrefixGrouped(12, work, patience=60.0))
        self.assertEqual(engine.most, 12)
        self.assertGreater(self.run_at(60.0, work, admission=Fcfs())[1].most, 12)
        begun = sorted((sent for sent in result.sent if sent.chunks), key=lambda sent: sent.chunks[0][0])
        changes = sum(a.request.prompt[0] != b.request.prompt[0] for a, b in zip(begun, begun[1:]))
        self.assertLess(changes, len(begun) / 4, "neighbours have the same prefix")

    def test_a_prefix_is_what_other_requests_have_too(self):
        # Private text of one block, of two, of none; nothing shared.
        prompts = [[[0, 512], [1, 512], [10, 512]], [[0, 512], [1, 512], [11, 512], [12, 512]], [[0, 512], [1, 512]], [[13, 512], [14, 512]]]
        work = Workload(HEADER, [Request({"arrival": i, "prompt": prompt, "output_tokens": 5}) for i, prompt in enumerate(prompts)])
        grouped = PrefixGrouped(4, work)
        found = [grouped.prefix(request) for request in work.requests]
        self.assertEqual(found, [((0, 512), (1, 512))] * 3 + [((13, 512), (14, 512))])


class Figures(unittest.TestCase):
    def test_quantiles_are_interpolated(self):
        self.assertEqual(metrics.quantile([1.0, 2.0, 4.0], 0.5), 2.0)
        self.assertAlmostEqual(metrics.quantile([0.0, 100.0], 0.99), 99.0)
        self.assertEqual(metrics.spread([], "itl"), {"mean_itl_ms": None, "median_itl_ms": None, "p99_itl_ms": None})


class Command(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.file = os.path.join(self.folder, "w.jsonl")
        with open(self.file, "w") as file:
            file.write(json.dumps(HEADER) + "\n")
            for index in range(3000):
                line = {"arrival": index, "prompt": [[0, 500], [index + 10, 100]], "output_tokens": 50}
                file.write(json.dumps(line) + "\n")
        self.output = os.path.join(self.folder, "out", "r.jsonl")
        self.engines, self.time = [], Time()

    def make_engine(self, _):
        self.engines.append(FakeEngine(self.time))
        return self.engines[-1]

    def command(self, *more):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            status = in_process.main(
                ["--workload", self.file, "--output", self.output, "--warm-up", "2", "--measured", "5", *more],
                self.make_engine, self.time.clock)
        return status, text.getvalue()

    def test_records_are_pats_and_more_and_runs_are_not_repeated(self):
        status, text = self.command("--rates", "20,40", "--profile", "3")
        self.assertEqual(status, 0, text)
        written = records.read(self.output)
        self.assertEqual([record["config"]["request_rate"] for record in written], ["20", "40"])
        record = written[0]
        self.assertTrue(all(isinstance(value, str) for value in record["config"].values()))
        for name in ("successful_requests", "benchmark_duration", "total_input_tokens", "total_generated_tokens", "request_throughput",
                     "output_token_throughput", "total_token_throughput"):
            self.assertGreater(record["metrics"][name], 0)
        for kind in ("mean", "median", "p99"):
            for name in ("ttft", "tpot", "itl", "e2el"):
                self.assertGreater(record["metrics"][f"{kind}_{name}_ms"], 0)
        # Those of the run alone: neither of what was before it, nor of profile and clearing.
        self.assertEqual(written[1]["backend_counters"]["decode_steps"], len(self.engines[0].step_log))
        self.assertEqual(record["step_time"]["ms"], {"attention": 1.0})
        self.assertGreater(record["machine"]["host_cores"], 0)
        self.assertEqual([engine.cleared for engine in self.engines], [2])
        status, text = self.command("--rates", "20,40,60")
        self.assertEqual((status, text.count("of an earlier run"), len(records.read(self.output))), (0, 2, 3))

    def test_a_run_that_was_cut_off_is_repeated(self):
        self.command("--rates", "20,40")
        with open(self.output) as file:
            whole = file.read()
        with open(self.output, "w") as file:
            file.write(whole[:-40])
        status, _ = self.command("--rates", "20,40")
        self.assertEqual((status, len(records.read(self.output))), (0, 2))

    def test_the_knee_is_found_by_bisection(self):
        # A step takes longer than 6.5 ms when more than 15 requests are there.
        status, text = self.command("--knee", "5:145:20", "--limits", "1000:6.5")
        self.assertIn("highest rate within the limits on this grid: ", text)
        rates = [float(record["config"]["request_rate"]) for record in records.read(self.output)]
        self.assertEqual(rates[0], 65.0)
        self.assertLessEqual(len(rates), 4)
        self.assertEqual(status, 0)

    def test_a_time_limit_leaves_runs_undone(self):
        status, text = self.command("--rates", "20,40", "--time-limit", "2")
        self.assertEqual((status, len(records.read(self.output))), (3, 0))
        self.assertIn("2 runs are left", text)
        self.assertEqual(self.engines, [], "no engine is started for nothing")

    def test_failures_mark_the_record(self):
        status, text = self.command("--rates", "400", "--patience", "1")
        self.assertEqual(status, 1, text)
        [record] = records.read(self.output)
        self.assertEqual(record["status"], "failed")
        self.assertIn("given up", record["error_log"])

    def test_bad_input_is_refused(self):
        for more, part in [
            ((), "neither --rates nor --knee"),
            (("--rates", "0"), "--rates: got '0'"),
            (("--rates", "a"), "--rates: got 'a'"),
            (("--knee", "5:4:1"), "--knee: got 5:4:1"),
            (("--knee", "5:4"), "--knee: got '5:4', expected 3 positive numbers"),
            (("--rates", "1", "--admission", "prefix-grouped"), "--admission: got 'prefix-grouped'"),
            (("--rates", "1", "--measured", "0"), "--measured: got 0"),
            (("--rates", "1", "--layers", "0"), "--layers: got 0, expected at least 1"),
            (("--rates", "1", "--tensor-parallel", "0"), "--tensor-parallel: got 0"),
            (("--rates", "1", "--kv-memory", "-1"), "--kv-memory: got -1, expected more than 0"),
        ]:
            text = io.StringIO()
            with self.assertRaises(SystemExit) as raised, contextlib.redirect_stderr(text):
                in_process.main(["--workload", self.file, "--output", self.output, *more], self.make_engine, self.time.clock)
            self.assertEqual(raised.exception.code, 2, part)
            self.assertIn(part, text.getvalue())
        status, text = self.command("--rates", "1", "--max-model-len", "600")
        self.assertEqual(status, 2)
        self.assertIn("--max-model-len: got 600, expected at least 650", text)


# Of the 1st and the 100th arrival at 10 per second, seed 0, as the Rust side has them.
ARRIVALS = (0.03836220474288234, 9.281170200489752)

if __name__ == "__main__":
    unittest.main()
