"""What a run prints, from records alone: no torch, no numpy."""

import contextlib
import io
import json
import types
import unittest

from report import Report, summarise


def configuration(**changes):
    fields = {"suite": "figure10", "name": "tree", "nheads_q": 32, "nheads_kv": 8, "head_dim": 128, "dtype": "f16"}
    return types.SimpleNamespace(**{**fields, **changes})


def printed(as_json, *records, names=("prefix_attn", "fa3", "flashinfer_fa2")):
    report, text = Report(list(names), as_json), io.StringIO()
    with contextlib.redirect_stdout(text):
        report.header()
        for record in records:
            report.configuration(configuration(), record)
        report.summary()
    return text.getvalue()


class Printed(unittest.TestCase):
    def test_ours_of_the_same_run_counts(self):
        text = printed(False, {"latencies": {"pat-rs": 0.2, "prefix_attn": 0.1, "fa3": 0.1}})
        self.assertIn("1.000", text)
        text = printed(False, {"latencies": {"pat-rs": 0.2, "fa3": 0.1}})
        self.assertIn("behind: tree 32/8: ours 200.0 us, fa3 100.0 us, 2.0000", text)

    def test_a_wrong_answer_is_no_peer(self):
        record = {"latencies": {"pat-rs": 0.2, "fa3": 0.1}, "correctness": {"fa3": {"status": "FAILED"}}}
        text = printed(False, record)
        self.assertIn("WRONG", text)
        self.assertNotIn("behind:", text)

    def test_nothing_to_compare(self):
        self.assertNotIn("suite", printed(False, {"latencies": {"pat-rs": 0.2}}, {}))

    def test_json(self):
        lines = printed(True, {"latencies": {"pat-rs": 0.25, "fa3": 0.5, "flashinfer_fa2": 1.0}}).splitlines()
        entry, summary = map(json.loads, lines)
        self.assertEqual((entry["best"], entry["ours"], entry["ours_over_best"]), ("fa3", "pat-rs", 0.5))
        self.assertEqual(entry["cold_us"]["flashinfer_fa2"], 1000.0)
        self.assertEqual(summary, {"summary": {"suites": summary["summary"]["suites"], "behind": []}})


class Summary(unittest.TestCase):
    def test_means_by_suite_and_who_is_behind(self):
        def entry(suite, ratio):
            us = {"prefix_attn": 100.0 * ratio, "fa3": 100.0}
            named = {"suite": suite, "tree": "t", "nheads_q": 8, "nheads_kv": 8}
            return {**named, "cold_us": us, "ours": "prefix_attn", "best": "fa3", "ours_over_best": ratio}

        entries = [entry("a", 0.5), entry("b", 1.01), entry("a", 2.0), entry("b", 1.004)]
        entries.append({**entry("c", 1.0), "ours_over_best": None})
        summary = summarise(entries)
        self.assertEqual(list(summary["suites"]), ["a", "b"])
        self.assertAlmostEqual(summary["suites"]["a"]["mean"], 1.0)
        self.assertEqual([row["behind"] for row in summary["suites"].values()], [1, 1])
        self.assertEqual([line["ratio"] for line in summary["behind"]], [2.0, 1.01])


if __name__ == "__main__":
    unittest.main()
