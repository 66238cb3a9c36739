#!/usr/bin/env python3
"""200 requests with 4 system prompts in continuous batching of transformers: this library's decode steps beside the stock path.

  drive.py OUT.json [--modes eager,graph,async] [--model llama|qwen3] [--size 8b|tiny] [--layers 8] [--device cuda|cpu]

Requests join and leave, some are aborted, prompts begin as others do, are computed in parts, and wait for a cache that is too
small for all. Modes: `eager`; `graph`, decode steps in CUDA graphs; `async`, the same, and the next batch is prepared while one
runs (nothing is aborted: transformers 5.24 ends then); `default`, what transformers does unless told otherwise, steps with
prompts in graphs, too, which wants flash-attn.

Tokens are judged by the rule of docs/engine-notes.md ("When tokens count as equal there"), and a run in which each row misses its
newest token must fail it. `stock`, transformers' own path, eager, does a quarter of the requests: its masks take time. A profile
counts the launches of our kernels, those from graphs too. Exit status 0 only if all holds; what came out is in OUT.json as soon
as it is there.
"""

import argparse
import contextlib
import json
import pathlib
import random
import sys
import threading
import time
import traceback
from collections import Counter, deque

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import prefix_attn
import prefix_attn.hf
from prefix_attn.hf import engine, steps

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "with_transformers"))
from batching import PAGE_SIZE_NAME, STOCK
from greedy import NOISE, Yardstick

SHAPES = {
    ("8b", "llama"): dict(hidden_size=4096, intermediate_size=14336, vocab_size=128256),
    ("8b", "qwen3"): dict(hidden_size=4096, intermediate_size=12288, vocab_size=151936),
    ("tiny", "llama"): dict(hidden_size=256, intermediate_size=512, vocab_size=2048),
    ("tiny", "qwen3"): dict(hidden_size=256, intermediate_size=512, vocab_size=2048),
}
HEADS = {"8b": (32, 8), "tiny": (4, 1)}
#: Tokens of the system prompts, and of what stands behind one.
PROMPTS = {"8b": ((1500, 700, 333, 64), (3, 17, 90, 400)), "tiny": ((150, 70, 33, 8), (3, 9, 40))}
#: Tokens of a block; blocks, fewer than all requests need at a time, so that some lose theirs; tokens of a batch, fewer than the
#: longest prompt's.
CACHES = {"8b": (32, 200, 1024), "tiny": (8, 80, 96)}
MODES = {
    "stock": (eager := dict(use_cuda_graph=(False, False), use_async_batching=False)),
    "eager": eager,
    "broken": eager,
    "graph": dict(use_cuda_graph=(False, True), use_async_batching=False),
    "async": dict(use_cuda_graph=(False, True), use_async_batching=True),
    "default": {},
}
#: Modes in which requests are aborted.
ABORTING = ("eager", "graph")


def make_model(a):
    """Random weights that make tokens depend on attention, as `gpu_vllm/weights.py` has them."""
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[a.model]
    q_heads, kv_heads = HEADS[a.size]
    config = config_class(
        **SHAPES[a.size, a.model], num_hidden_layers=a.layers, num_attention_heads=q_heads, num_key_value_heads=kv_heads,
        head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False, attn_implementation=STOCK,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )  # fmt: skip
    config.dtype = torch.bfloat16
    torch.manual_seed(1)
    with torch.device(a.device):
        model = model_class(config).to(torch.bfloat16).eval()
    out = (2 * a.layers) ** -0.5
    for name, weights in model.named_parameters():
        weights = weights.data
        if weights.dim() == 1:
            weights.fill_(2.0 if "q_norm" in name or "k_norm" in name else 1.0)
            continue
        gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else 1.0
        gain = out if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.5 if "lm_head" in name else gain
        weights.normal_(0.0, gain * (1 if "embed" in name else weights.shape[1]) ** -0.5)
    for layer in model.model.layers:
        # A token attends to itself more than to another, so that one left out is seen.
        query, key = (part.weight.data.view(kv_heads, -1, 128, config.hidden_size) for part in (
            layer.self_attn.q_proj, layer.self_attn.k_proj))  # fmt: skip
        query.mul_(0.91**0.5).add_(key, alpha=0.3)
    return model


def make_requests(a, vocab):
    """Prompts, and how many tokens each asks for."""
    draw = random.Random("requests")
    system_tokens, own_tokens = PROMPTS[a.size]
    systems = [[draw.randrange(vocab) for _ in range(tokens)] for tokens in system_tokens]
    requests = []
    for _ in range(a.requests):
        own = [draw.randrange(vocab) for _ in range(draw.choice(own_tokens))]
        requests.append((draw.choice(systems) + own, draw.randint(2, 64)))
    return requests


class Flow:
    """Requests that come while others run, step by step; some are aborted. Called by transformers' thread and by ours."""

    def __init__(self, manager, requests, with_aborts):
        self.manager, self.requests, self.with_aborts = manager, requests, with_aborts
        self.draw = random.Random("flow")
        self.waiting = deque(range(len(requests)))
        self.lock = threading.Lock()
        self.running, self.results, self.aborted = set(), {}, set()
        self.steps = 0

    def add(self, count):
        with self.lock:
            for _ in range(min(count, len(self.waiting))):
                index = self.waiting.popleft()
                prompt, tokens = self.requests[index]
                self.running.add(index)
                self.manager.add_request(prompt, request_id=str(index), max_new_tokens=tokens)

    def before_step(self, states):
        self.add(self.draw.choice([0, 0, 2, 5, 10]))
        self.steps += 1
        decoding = sorted(int(state.request_id) for state in states if state.generated_len() > 1)
        if self.with_aborts and self.steps % 7 == 5 and decoding:
            with self.lock:
                index = self.draw.choice(decoding)
                if index in self.running:
                    self.running.remove(index)
                    self.aborted.add(index)
                    self.manager.cancel_request(str(index))

    def run(self, seconds):
        self.add(5)
        deadline = time.time() + seconds
        while self.waiting or self.running:
            output = self.manager.get_result(timeout=0.2)
            if output is not None:
                assert output.error is None, output.error
                index = int(output.request_id)
                with self.lock:
                    # One that was aborted may have been ready.
                    if index in self.running:
                        self.running.remove(index)
                        self.results[index] = output.generated_tokens
            elif not self.running:
                self.add(5)
            assert self.manager.is_running(), "transformers' thread has ended"
            assert time.time() < deadline, f"{len(self.running)} requests still run after {seconds} s"


class Watch:
    """Counts what happens to requests, and tells a flow of each forward pass."""

    def __init__(self):
        self.flow, self.counts = None, Counter()
        compute, match = ModelRunner.compute_batch, PagedAttentionCache.search_prefix_match
        offload = OffloadingManager.offload_requests
        watch = self

        def compute_batch(runner, model, batch_data):
            requests = engine.host_io(runner.inputs_and_outputs).requests_in_batch
            if watch.flow is not None:
                watch.counts["steps"] += 1
                watch.counts["chunks"] += sum(not request.has_new_token for request in requests)
                watch.flow.before_step([request.state for request in requests])
            return compute(runner, model, batch_data)

        def search_prefix_match(cache, *args, **kwargs):
            tokens = match(cache, *args, **kwargs)
            watch.counts["prefix_hits"] += tokens > 0
            watch.counts["cached_tokens"] += tokens
            return tokens

        def offload_requests(manager):
            before = set(manager.scheduler.active_requests)
            done = offload(manager)
            watch.counts["preempted"] += len(before - set(manager.scheduler.active_requests))
            return done

        ModelRunner.compute_batch, PagedAttentionCache.search_prefix_match = compute_batch, search_prefix_match
        OffloadingManager.offload_requests = offload_requests
        if hasattr(PagedAttentionCache, "evict_cached_blocks"):
            evict = PagedAttentionCache.evict_cached_blocks

            def evict_cached_blocks(cache):
                is_evicted = evict(cache)
                watch.counts["evictions"] += is_evicted
                return is_evicted

            PagedAttentionCache.evict_cached_blocks = evict_cached_blocks


@contextlib.contextmanager
def without_newest_token():
    step = steps.EagerBatch.step

    def short_step(batch, tables, lengths, *rest):
        return step(batch, tables, [max(length - 1, 0) for length in lengths], *rest)

    steps.EagerBatch.step = short_step
    try:
        yield
    finally:
        steps.EagerBatch.step = step


@contextlib.contextmanager
def fast_path_on_the_cpu():
    """transformers takes its decode fast path on GPUs only."""
    original = initialization.ensure_decode_fast_path_is_available

    def ensure(config, *args, **kwargs):
        if config._attn_implementation != prefix_attn.hf.attention_name():
            original(config, *args, **kwargs)

    initialization.ensure_decode_fast_path_is_available = ensure
    yield
    initialization.ensure_decode_fast_path_is_available = original


def serve(a, model, requests, mode, watch):
    """Tokens by request, and what was counted."""
    page_size, blocks, batch_tokens = CACHES[a.size]
    settings = dict(
        MODES[mode], max_requests_per_batch=48, max_batch_tokens=batch_tokens, max_blocks_per_request=64, num_blocks=blocks,
        # Requests are admitted as long as there is room at all: those that grow then lose theirs.
        safety_margin=0.0,
    )  # fmt: skip
    settings[PAGE_SIZE_NAME] = page_size
    if hasattr(ContinuousBatchingConfig, "auto_switch_to_flash"):
        settings["auto_switch_to_flash"] = False
    if mode == "stock":
        model.set_attn_implementation(STOCK)
    else:
        assert prefix_attn.hf.enable(model) is None
    is_cuda = a.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA]
    profile = torch.profiler.profile(activities=activities) if is_cuda else contextlib.nullcontext()
    start = time.time()
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    ) as manager:
        made = time.time() - start
        prefix_attn.hf.reset_stats()
        watch.counts.clear()
        flow = Flow(manager, requests, with_aborts=mode in ABORTING)
        with profile:
            watch.flow = flow
            try:
                flow.run(a.limit)
            finally:
                watch.flow = None
            # What was aborted last may still run: a step is counted whole.
            manager.stop(block=True, timeout=30)
            if is_cuda:
                torch.cuda.synchronize()
            counts = dict(watch.counts, **prefix_attn.hf.stats())
    counts["aborted"] = len(flow.aborted)
    if is_cuda and mode != "stock":
        names = [event.name() for event in profile.profiler.kineto_results.events() if "CUDA" in str(event.device_type())]
        for kernel in ("forward", "append"):
            counts[f"{kernel}_launches"] = sum(f"pat_{kernel}" in name for name in names)
    counts["seconds"] = {"until_up": round(made, 1), "all": round(time.time() - start, 1)}
    return flow.results, counts


def judge_counts(a, mode, counts):
    """Faults of a run of ours, in words."""
    expected = a.layers * counts["decode_steps"]
    wanted = ["prefix_hits", "chunks", "preempted", "decode_steps", "stock_steps"] + ["aborted"] * (mode in ABORTING)
    wanted += ["evictions"] * hasattr(PagedAttentionCache, "evict_cached_blocks")
    faults = [f"no {event}" for event in wanted if not counts.get(event)]
    if mode == "eager" and counts["kernel_calls"] != expected:
        faults.append(f"{counts['kernel_calls']} calls of layers, expected {expected}")
    if "append_launches" in counts and (
        counts["append_launches"] != expected or counts["forward_launches"] < expected
    ):
        faults.append(f"launches of our kernels beside {expected} decode steps of layers")
    if counts["kv_bytes_read"] >= counts["kv_bytes_flat"]:
        faults.append("nothing was read once for several requests")
    return faults


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--modes", default="eager,graph,async")
    parser.add_argument("--model", default="llama", choices=["llama", "qwen3"])
    parser.add_argument("--size", default="8b", choices=["8b", "tiny"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=90, help="seconds that the requests of a mode may take")
    a = parser.parse_args(given)
    start = time.time()
    watch, model, failed = Watch(), make_model(a), False
    requests = make_requests(a, model.config.vocab_size)
    record = dict(args=vars(a), transformers=transformers.__version__, torch=torch.__version__, modes={})
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: model after {time.time() - start:.1f} s", flush=True)
    yardstick, some = Yardstick(model), requests[: max(4, a.requests // 4)]
    with fast_path_on_the_cpu() if a.device == "cpu" else contextlib.nullcontext():
        for mode in ["stock", *a.modes.split(","), "broken"]:
            try:
                with without_newest_token() if mode == "broken" else contextlib.nullcontext():
                    tokens, counts = serve(a, model, some if mode in ("stock", "broken") else requests, mode, watch)
            except Exception:
                # The other modes have their own say.
                traceback.print_exc()
                failed = True
                continue
            result = record["modes"][mode] = dict(counts=counts, tokens=tokens)
            save(a, record)
            print(f"{mode} has run: {json.dumps(counts)}", flush=True)
            stock = record["modes"].get("stock", result)["tokens"]
            result["faults"] = judge(a, mode, result, requests, stock, yardstick)
            save(a, record)
            print(
                f"{mode}: {len(tokens)} requests, {result['equal']} of {result['common']} with the stock path's tokens; furthest "
                f"behind {result['behind'][0]:.2f} of the noise (2 are allowed), {result['beyond']} beyond that: "
                f"{'; '.join(result['faults']) or 'as it should be'}", flush=True,
            )  # fmt: skip
    failed |= any(result["faults"] for result in record["modes"].values()) or yardstick.largest_noise >= NOISE
    print(
        f"largest noise {yardstick.largest_noise:.4f} of the logits' deviation (less than {NOISE} is allowed); "
        f"{time.time() - start:.0f} s"
    )
    print("SOMETHING FAILED" if failed else "ALL GOOD", flush=True)
    return failed


def judge(a, mode, result, requests, stock, yardstick):
    """Faults of a run, in words."""
    tokens = result["tokens"]
    faults = judge_counts(a, mode, result["counts"]) if mode not in ("stock", "broken") else []
    behind = sorted((yardstick.behind(requests[i][0], tokens[i]) for i in tokens), reverse=True)
    # NaN is beyond, too.
    beyond = sum(not one <= 2 for one in behind)
    if mode == "broken" and beyond < len(behind) / 2:
        faults.append("a missing token was not found")
    elif mode != "broken" and beyond:
        faults.append("tokens that the rule does not allow")
    common = tokens.keys() & stock.keys()
    result.update(behind=behind, beyond=beyond, common=len(common), equal=sum(tokens[i] == stock[i] for i in common))
    return faults


def save(a, record):
    pathlib.Path(a.out).write_text(json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())
