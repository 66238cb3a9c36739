#!/usr/bin/env python3
"""Tests of what stands between the benchmark and vLLM, with a module that has vLLM's names: python3 bench/serve/test_vllm_engine.py."""

import contextlib
import json
import os
import sys
import types
import unittest
from types import SimpleNamespace

import vllm_engine


class Scheduler:
    """As vLLM's: told of a step's result after the step."""

    def update_from_output(self, scheduled, output):
        return output


class Engine:
    """As vLLM's LLMEngine in one process: a prompt takes a step of its own tokens, then each step yields a token."""

    def __init__(self):
        self.scheduler = Scheduler()
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=self.scheduler))
        self.requests, self.aborted, self.refusals = {}, [], 2
        self.vllm_config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={"a": SimpleNamespace(impl=self)}, cudagraph_mode="FULL_DECODE_ONLY", mode=None,
                max_cudagraph_capture_size=8),
            cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16),
            scheduler_config=SimpleNamespace(async_scheduling=True, max_num_seqs=8, max_num_batched_tokens=64))

    def add_request(self, name, prompt, parameters):
        self.requests[name] = [len(prompt["prompt_token_ids"]), parameters.max_tokens]

    def step(self):
        scheduled = {name: max(prompt, 1) for name, (prompt, _) in self.requests.items()}
        outputs = []
        for name, request in list(self.requests.items()):
            request[0], request[1] = 0, request[1] - 1
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[5])], finished=request[1] == 0))
            if request[1] == 0:
                del self.requests[name]
        self.scheduler.update_from_output(
            SimpleNamespace(num_scheduled_tokens=scheduled, total_num_scheduled_tokens=sum(scheduled.values())), None)
        return outputs

    def has_unfinished_requests(self):
        return bool(self.requests)

    def abort_request(self, names):
        self.aborted += names
        for name in names:
            del self.requests[name]

    def reset_prefix_cache(self):
        """Blocks are free a while after their requests."""
        self.refusals -= 1
        return self.refusals <= 0 and not self.requests


class Vllm(unittest.TestCase):
    def setUp(self):
        self.made = {}
        vllm = types.ModuleType("vllm")
        vllm.__version__ = "0"

        def make(**arguments):
            with open(os.path.join(arguments["model"], "config.json")) as file:
                self.made = {**arguments, "config": json.load(file)}
            return SimpleNamespace(llm_engine=Engine())

        vllm.LLM = make
        vllm.SamplingParams = lambda **arguments: SimpleNamespace(**arguments)
        parameters = types.ModuleType("vllm.sampling_params")
        parameters.RequestOutputKind = SimpleNamespace(DELTA="delta")
        torch = types.ModuleType("torch")
        torch.__version__, torch.cuda = "0", SimpleNamespace(get_device_name=lambda: "none", synchronize=lambda: None)
        nothing = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=list)))
        torch.profiler = SimpleNamespace(
            ProfilerActivity=SimpleNamespace(CUDA=0), profile=lambda **arguments: contextlib.nullcontext(nothing))
        for name, module in (("vllm", vllm), ("vllm.sampling_params", parameters), ("torch", torch)):
            before = sys.modules.get(name)
            sys.modules[name] = module
            self.addCleanup(lambda name=name, before=before: sys.modules.__setitem__(name, before) if before else sys.modules.pop(name))

    def engine(self, **more):
        return vllm_engine.VllmEngine("qwen3-8b", "CUSTOM", "graphs", max_model_len=8192, **more)

    def test_the_engine_is_what_was_asked_for(self):
        engine = self.engine(max_sequences=96)
        self.assertEqual(self.made["attention_config"], {"backend": "CUSTOM"})
        self.assertEqual(self.made["compilation_config"]["cudagraph_capture_sizes"][-2:], [80, 96])
        self.assertTrue(self.made["enable_prefix_caching"] and self.made["enable_chunked_prefill"])
        self.assertEqual(self.made["config"]["num_hidden_layers"], 36)
        self.assertFalse({"tensor_parallel_size", "kv_cache_memory_bytes"} & set(self.made))
        self.assertEqual(engine.describe()["kv_tokens"], 1600)
        folder = self.made["model"]
        vllm_engine.VllmEngine("qwen3-8b", "CUSTOM", "compiled", max_model_len=8192)
        self.assertEqual(self.made["compilation_config"]["cudagraph_mode"], "FULL_AND_PIECEWISE")
        self.assertEqual(self.made["compilation_config"]["cudagraph_capture_sizes"][-1], 2048)
        self.assertEqual(self.made["model"], folder, "what was compiled for a model is found by its path, too")
        vllm_engine.VllmEngine("llama3-8b", "FLASH_ATTN", "eager", max_model_len=64, tensor_parallel=2, layers=3, kv_gib=1.5)
        self.assertTrue(self.made["enforce_eager"])
        self.assertEqual((self.made["tensor_parallel_size"], self.made["config"]["num_hidden_layers"]), (2, 3))
        self.assertEqual(self.made["kv_cache_memory_bytes"], 3 * 2**29)

    def test_steps_are_noted_and_tokens_handed_on(self):
        engine = self.engine()
        engine.add("a", [1, 2, 3], 3)
        self.assertEqual(engine.step(), [("a", 1, False)])
        engine.add("b", [4, 5], 1)
        self.assertEqual(engine.step(), [("a", 1, False), ("b", 1, True)])
        self.assertEqual(engine.step(), [("a", 1, True)])
        self.assertEqual([row[1:] for row in engine.step_log], [(1, 3, 1), (2, 3, 1), (1, 1, 0)])

    def test_clearing_drops_requests_and_waits_until_the_cache_is_empty(self):
        engine = self.engine()
        engine.add("a", [1, 2, 3], 300)
        engine.step()
        engine.clear(["a"])
        self.assertEqual((engine.engine.aborted, engine.engine.refusals), (["a"], 0))

    def test_warming_up_leaves_nothing_behind(self):
        engine = self.engine()
        engine.warm_up(2000)
        self.assertFalse(engine.engine.requests)

    def test_settling_ends_with_a_step_of_decode_alone(self):
        engine = self.engine()
        engine.add("a", [1, 2, 3], 9)
        engine.settle()
        self.assertEqual([prompts for *_, prompts in engine.step_log], [1, 0, 0])

    def test_steps_with_and_without_prompts_are_profiled_apart(self):
        engine = self.engine()
        for name in ("a", "b"):
            engine.add(name, [1, 2, 3], 90)
        tables = engine.profile(4, [(f"p{number}", [7] * 10, 50) for number in range(6)])
        self.assertEqual({name: (table["steps"], table["requests"], table["tokens"]) for name, table in tables.items()},
            {"step_time": (4, 2.0, 2.0), "mixed_step_time": (4, 6.5, 15.5)})
        # Without a prompt for each step there is no table of such steps.
        self.assertEqual(list(engine.profile(4, [("q", [7], 50)])), ["step_time"])

    def test_a_breakdown_shares_the_time_out_among_kernels_and_gaps(self):
        event = lambda name, begin, length, device="CUDA": SimpleNamespace(
            name=lambda: name, start_ns=lambda: begin, duration_ns=lambda: length, device_type=lambda: f"DeviceType.{device}")
        # The merge is there early and waits.
        events = [event("pat_forward_wgmma64_d128_bf16", 0, 4_000_000), event("pat_merge_d128_bf16", 500_000, 3_700_000),
                  event("void cutlass::flash::sm90", 4_200_000, 800_000),
                  event("nvjet_tst_128x64", 5_000_000, 2_000_000), event("reshape_and_cache_flash", 8_000_000, 1_000_000),
                  event("cudaLaunch", 0, 99_000_000, "CPU")]
        profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
        table = vllm_engine.breakdown(profiler, 0.010, 2)
        self.assertEqual(table, {"attention": 2.5, "matrix products": 1.0, "other kernels": 0.5, "no kernel": 1.0})


if __name__ == "__main__":
    unittest.main()
