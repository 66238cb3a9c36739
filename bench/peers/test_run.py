"""The program as far as it goes without a GPU: exchange and result files, merging, checking, what is left out. Where torch is
not installed, only the first two. FlashInfer is played by a double that computes attention from the arrays it is given."""

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import tempfile
import types
import unittest
from unittest import mock

import exchange
import results
import run

try:
    import torch
except ImportError:
    torch = None
else:
    import flash_attention_3
    import flashinfer_methods
    import measure
    import methods
    import doubles
    import shared_prefix_methods

# Sequences 0, 2 and 3 share page 5, 0 and 3 also page 1; 1 stands alone.
BATCH = {
    "page_size": 4,
    "num_pages": 8,
    "lengths": [11, 6, 7, 9],
    "block_tables": [[5, 1, 0], [2, 3], [5, 4], [5, 1, 6]],
}


def manifest(**changes):
    shape = {"nheads_q": 4, "nheads_kv": 2, "head_dim": 64, "dtype": "f16", "softmax_scale": 0.125}
    entry = {"name": "tree", "suite": "figure10", "batch": "batch-000.json", **shape}
    entry["sample"] = [[sequence, head] for sequence in range(4) for head in range(2)]
    return {"exchange_version": 1, "seed": 3, "configurations": [{**entry, **changes}]}


def result(**changes):
    record = {"tree": "tree", "nheads_q": 4, "nheads_kv": 2, "head_dim": 64, "dtype": "f16", "block_size": 4}
    record |= {"latencies": {"pat-rs": 0.02}, "correctness": {"pat-rs": {"status": "PASSED"}}, "cold_us": 20.0}
    return {"schema_version": 1, "device": "cpu", "records": [record], **changes}


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name)
        self.write("batch-000.json", BATCH)
        self.write("manifest.json", manifest())
        self.write("result.json", result())

    def write(self, name, value):
        text = value if isinstance(value, str) else json.dumps(value)
        (self.path / name).write_text(text, encoding="utf-8")

    def call(self, *arguments):
        """Exit status and what was printed."""
        printed = io.StringIO()
        arguments = ["--exchange", str(self.path), "--result", str(self.path / "result.json"), *arguments]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = run.main(arguments)
        return status, printed.getvalue()

    def assert_refused(self, part, *arguments):
        status, printed = self.call(*arguments)
        self.assertEqual(status, 2, printed)
        self.assertIn(part, printed)
        self.assertNotIn("Traceback", printed)


class BadInput(Folder):
    def test_exchanges(self):
        for text, part in [
            ("{", "not JSON"),
            ([], "is not a manifest"),
            ({"records": []}, "is not a manifest"),
            (manifest() | {"exchange_version": 2}, "exchange version 2"),
            ({"exchange_version": 1, "seed": 1}, "configurations"),
            (manifest(color="red"), "color"),
            (manifest(batch="none.json"), "none.json"),
        ]:
            self.write("manifest.json", text)
            self.assert_refused(part)
        (self.path / "manifest.json").unlink()
        self.assert_refused("No such file")

    def test_results(self):
        before = None
        for text, part in [
            ("[1", "not JSON"),
            ([], "is not a result file"),
            ({"schema_version": 1, "device": "cpu"}, "is not a result file"),
            (result(schema_version=99), "schema version 99"),
            (result(records=[{"tree": "tree"}]), "a record without 'nheads_q'"),
        ]:
            self.write("result.json", text)
            before = (self.path / "result.json").read_text()
            self.assert_refused(part)
            self.assertEqual((self.path / "result.json").read_text(), before)

    def test_filters_that_find_nothing(self):
        self.assert_refused("no configuration", "--filter", "9/9")

    def test_numbers(self):
        with self.assertRaises(SystemExit) as raised, contextlib.redirect_stderr(io.StringIO()):
            run.parse(["--exchange", "x", "--result", "y", "--repeats", "0"])
        self.assertEqual(raised.exception.code, 2)


def in_turns_ms(calls, repeats, cold_cache):
    """Stands for the clock: every call is made, and takes an eighth of a millisecond."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, 0.125)


class Merging(Folder):
    def test_a_record_is_found_by_its_configuration(self):
        file = results.ResultFile(self.path / "result.json")
        configuration = exchange.load(self.path).configurations[0]
        self.assertIsNotNone(file.record(configuration))
        for changes in ({"suite": "sweeps"}, {"nheads_q": 8}, {"dtype": "bf16"}, {"name": "another"}):
            self.write("manifest.json", manifest(**changes))
            self.assertIsNone(file.record(exchange.load(self.path).configurations[0]))
        self.write("manifest.json", manifest())
        self.write("batch-000.json", {**BATCH, "page_size": 8})
        self.assertIsNone(file.record(exchange.load(self.path).configurations[0]))

    def test_what_is_added_reads_back_and_the_rest_stays(self):
        path = self.path / "result.json"
        file = results.ResultFile(path)
        record = file.content["records"][0]
        self.assertFalse(results.is_measured(record, "peer"))
        times = {"cold_ms": 0.5, "warm_ms": 0.25, "plan_ms": None}
        results.add(record, "peer", {"status": "PASSED", "max_diff": 0.0, "relative_l2": 0.0}, times)
        file.set_method("peer", "1.0", "a note")
        file.save()
        self.assertEqual(os.listdir(self.path).count("result.json.new"), 0)
        again = results.ResultFile(path)
        record = again.content["records"][0]
        self.assertTrue(results.is_measured(record, "peer"))
        self.assertEqual(record["latencies"], {"pat-rs": 0.02, "peer": 0.5})
        self.assertEqual(record["warm_latencies"], {"peer": 0.25})
        self.assertEqual(record["cold_us"], 20.0)
        self.assertEqual(again.version_of("peer"), "1.0")
        self.assertEqual(again.content["schema_version"], results.SCHEMA_VERSION)
        results.forget(record, "peer")
        self.assertFalse(results.is_measured(record, "peer"))
        self.assertIn("pat-rs", record["latencies"])


@unittest.skipIf(torch is None, "torch is not installed")
class OnTheCpu(Folder):
    """With the clock and the compilers replaced, everything else as on a GPU."""

    def setUp(self):
        super().setUp()
        for target, name, value in [
            (measure.timing, "ColdCache", lambda device: None),
            (measure.timing, "in_turns_ms", in_turns_ms),
            (measure.timing, "warm_ms", lambda call, repeats: (call(), 0.0625)[1]),
            (measure.timing, "plan_ms", lambda plan: (plan(), 0.0625)[1]),
            (flashinfer_methods, "WORKSPACE_BYTES", 1),
            (flashinfer_methods, "PERSISTENT_BYTES", 1),
            # The pages of the batch here are smaller than what these libraries take.
            (flashinfer_methods, "XQA_PAGE_SIZES", (4,)),
            (flash_attention_3, "PAGE_SIZE_MULTIPLE", 4),
            (shared_prefix_methods.Pat, "PAGE_SIZE_MULTIPLE", 4),
            (shared_prefix_methods.CoDec, "HEADS", ((4, 2),)),
        ]:
            patch = mock.patch.object(target, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        others = {"codec_gpu": doubles.codec_double(0.125), "prefix_attn": doubles.ours_double()}
        others |= doubles.vllm_double() | doubles.flashinfer_double(flashinfer_methods.VERSION)
        patch = mock.patch.dict("sys.modules", others)
        patch.start()
        self.addCleanup(patch.stop)

    def measure(self, **options):
        defaults = {"methods": None, "filter": "", "repeats": 3, "time_limit": None, "force": False, "json": False}
        arguments = argparse.Namespace(**(defaults | options))
        file = results.ResultFile(self.path / "result.json")
        source = exchange.load(self.path)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            run_ = measure.Measuring(arguments, source.seed, file, torch.device("cpu"))
            passed = run_.run(source.configurations)
        return passed, printed.getvalue(), json.loads((self.path / "result.json").read_text())

    def test_every_method_is_checked_timed_and_merged(self):
        passed, printed, content = self.measure()
        self.assertTrue(passed, printed)
        record = content["records"][0]
        self.assertIn("pat: left out: the package prefix_attn that is found is ours", printed)
        for name in set(methods.NAMES) - {"pat"}:
            self.assertEqual(record["correctness"][name]["status"], "PASSED", name)
            self.assertLess(record["correctness"][name]["relative_l2"], 1e-3, name)
            self.assertEqual(record["latencies"][name], 0.125)
            self.assertIn("version", content["methods"][name])
        self.assertNotIn("torch_sdpa", record["plan_latencies"])
        self.assertEqual(record["plan_latencies"]["flashinfer_cascade"], 0.0625)
        self.assertEqual(record["latencies"]["pat-rs"], 0.02)
        # Ours of the same run counts.
        self.assertIn("1.000", printed)
        _, printed, _ = self.measure(methods="torch_sdpa")
        self.assertIn("0.160", printed)

    def test_pats_package_where_the_name_is_its_own(self):
        with mock.patch.dict("sys.modules", prefix_attn=doubles.pat_double()):
            passed, printed, content = self.measure()
        self.assertTrue(passed, printed)
        self.assertIn("prefix_attn: left out: the package prefix_attn that is found is PAT's", printed)
        self.assertEqual(content["records"][0]["latencies"]["pat"], 0.125)

    def test_json_lines(self):
        messages = io.StringIO()
        with contextlib.redirect_stderr(messages):
            _, text, _ = self.measure(json=True)
        entry, summary = map(json.loads, text.splitlines())
        self.assertEqual(entry["cold_us"]["fa3"], 125.0)
        self.assertEqual(entry["ours_over_best"], 1.0)
        self.assertEqual(summary["summary"]["suites"]["figure10"]["configurations"], 1)
        self.assertIn("building kernels", messages.getvalue())

    def test_a_call_that_fails_while_it_is_timed(self):
        def failing(calls, repeats, cold_cache):
            if "fa3" in calls:
                raise measure.timing.CallFailed("fa3", RuntimeError("too many\nresources"))
            return in_turns_ms(calls, repeats, cold_cache)

        with mock.patch.object(measure.timing, "in_turns_ms", failing), mock.patch.object(measure.Measuring, "_check_device"):
            passed, printed, content = self.measure(methods="fa3,fa3_scheduled")
        self.assertTrue(passed, printed)
        self.assertIn("fa3: not run for tree 4/2: RuntimeError: too many", printed)
        self.assertEqual(list(content["records"][0]["warm_latencies"]), ["fa3_scheduled"])

    def test_bf16_and_another_pool_in_the_same_run(self):
        source = manifest()
        source["configurations"] += manifest(dtype="bf16", nheads_q=16)["configurations"]
        self.write("manifest.json", source)
        content = result()
        content["records"].append({**content["records"][0], "dtype": "bf16", "nheads_q": 16})
        self.write("result.json", content)
        passed, printed, content = self.measure()
        self.assertTrue(passed, printed)
        for name in ("torch_sdpa", "flashinfer_xqa", "fa3", "prefix_attn"):
            self.assertIn(name, content["records"][1]["latencies"])
        self.assertIn("codec: not run for tree 16/2: f16 with heads", printed)

    def test_a_second_run_measures_nothing_unless_forced(self):
        self.measure(methods="torch_sdpa")
        with mock.patch.object(measure, "judge", side_effect=AssertionError("measured again")):
            self.measure(methods="torch_sdpa")
        with mock.patch.object(measure.timing, "in_turns_ms", lambda *_: {"torch_sdpa": 0.5}):
            _, _, content = self.measure(methods="torch_sdpa", force=True)
        self.assertEqual(content["records"][0]["latencies"]["torch_sdpa"], 0.5)

    def test_figures_of_another_version_are_not_mixed_in(self):
        self.write("result.json", result(methods={"torch_sdpa": {"version": "0.1", "note": ""}}))
        with self.assertRaisesRegex(exchange.Refused, "no method"):
            self.measure(methods="torch_sdpa")

    def test_a_wrong_answer_is_recorded_and_not_timed(self):
        wrong = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: q * math.nan)
        with wrong:
            passed, printed, content = self.measure(methods="torch_sdpa")
        self.assertFalse(passed)
        self.assertIn("WRONG", printed)
        record = content["records"][0]
        self.assertEqual(record["correctness"]["torch_sdpa"]["status"], "FAILED")
        self.assertNotIn("torch_sdpa", record["latencies"])

    def test_what_fails_or_cannot_run_is_said_and_the_others_go_on(self):
        self.write("manifest.json", manifest(nheads_q=10))
        content = result()
        content["records"][0]["nheads_q"] = 10
        self.write("result.json", content)
        broken = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", side_effect=RuntimeError("no"))
        with broken, mock.patch.object(measure.Measuring, "_check_device"):
            passed, printed, content = self.measure()
        self.assertTrue(passed)
        self.assertIn("flashinfer_cudacore: not run for tree 10/2: 5 query heads per KV head", printed)
        self.assertIn("not run: RuntimeError: no: tree 10/2", content["methods"]["torch_sdpa"]["note"])
        self.assertIn("flashinfer_fa2", content["records"][0]["latencies"])

    def test_methods_that_are_not_there(self):
        with mock.patch.dict("sys.modules", flashinfer=None):
            _, printed, content = self.measure()
        self.assertIn("flashinfer_fa2: left out: FlashInfer cannot be imported", printed)
        self.assertIn("torch_sdpa", content["records"][0]["latencies"])
        with mock.patch.dict("sys.modules", flashinfer=types.SimpleNamespace(__version__="9.9")):
            _, printed, _ = self.measure()
        self.assertIn("FlashInfer 9.9 is installed", printed)
        with self.assertRaisesRegex(exchange.Refused, "got 'vllm'"):
            self.measure(methods="vllm")

    def test_a_method_that_cannot_be_built_is_left_out(self):
        broken = mock.Mock(side_effect=RuntimeError("ninja:\nnvcc fatal"))
        with mock.patch.object(flashinfer_methods.CudaCoreDecode, "compile", broken):
            passed, printed, content = self.measure()
            self.assertTrue(passed)
            self.assertIn("flashinfer_cudacore: left out: it cannot be built:\nninja:\nnvcc fatal", printed)
            self.assertNotIn("flashinfer_cudacore", content["records"][0]["latencies"])
            self.assertIn("flashinfer_fa2", content["records"][0]["latencies"])
            with self.assertRaisesRegex(exchange.Refused, "no method can be built"):
                self.measure(methods="flashinfer_cudacore")

    def test_the_time_limit(self):
        _, printed, content = self.measure(time_limit=0.0)
        self.assertIn("time limit reached", printed)
        self.assertNotIn("torch_sdpa", content["records"][0]["latencies"])

    def test_a_configuration_without_a_record(self):
        self.write("result.json", result(records=[]))
        with self.assertRaisesRegex(exchange.Refused, "none of the configurations"):
            self.measure()

    def test_without_a_device_or_on_another_one(self):
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            self.assert_refused("no CUDA device")
        here = {"is_available": lambda: True, "current_device": lambda: 0, "get_device_name": lambda _: "NVIDIA X"}
        with mock.patch.multiple(torch.cuda, **here):
            self.assert_refused("was measured on cpu, this is NVIDIA X")


if __name__ == "__main__":
    unittest.main()
