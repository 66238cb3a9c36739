#!/usr/bin/env python3
"""One engine, several tasks: tokens with log-probs, step times, a profile. Writes JSON; `compare.py` judges.

  drive.py OUT.json --backend CUSTOM --shape small --mode eager|graph|piecewise TASK ...

Tasks, run in order:
  tokens:PROMPTSxSHARED+OWN:OUT[:BATCH]   greedy tokens with their log-probs; BATCH prompts at a time (default: all)
  again:... (as tokens)                   the same once more
  broken:... (as tokens)                  negative control: every row misses its newest token
  float32:... (as tokens)                 decode rows are served by float32 attention, without graphs
  layers:PROMPTSxSHARED+OWN:OUT[:broken]  each layer's attention beside float32 attention (--compare; `exactness.py` judges)
  forced:PROMPTSxSHARED+OWN:OUT:SERVER    log-probs of decode steps whose tokens are given; SERVER serves decode rows: ours, stock and
                                          float32 (both without graphs), broken (ours without a row's newest token), or engine
  churn:OUT:SCHEDULE                      200 requests with 4 system prompts: joins, leaves, aborts, preemption, chunked prefill;
                                          SCHEDULE seeds when they arrive and are aborted
  time:PROMPTSxSHARED+OWN:OUT             median time of the steps in which every prompt yields a token
  profile:PROMPTSxSHARED+OWN              kernels and idle time of a few such steps
  host:PROMPTSxSHARED+OWN                 what Python's time goes to in 30 such steps
  restart:[PROMPTSxSHARED+OWN]            this engine goes, in the middle of such requests; another one does the tasks behind
  fail:HOW:PROMPTSxSHARED+OWN:OUT         when each request has OUT tokens, HOW happens: the engine must say so, within half a
                                          minute, in the words of `FAULTS`; its prompts are those of the task `tokens`. A killed
                                          worker is one of several: `parallel.py` kills an engine's only process
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time

SHAPES = {
    "small": dict(
        hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=3072, vocab_size=32000,
    ),
    "1.7b": dict(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=6144, vocab_size=151936,
    ),
    "oss": dict(
        hidden_size=2880, num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=11520, vocab_size=201088,
    ),
    "gemma": dict(
        hidden_size=3584, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=8,
        intermediate_size=14336, vocab_size=151936,
    ),
    "8b": dict(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=12288, vocab_size=151936,
    ),
}


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--backend", default="CUSTOM")
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--model", default="qwen3", choices=["qwen3", "llama", "gpt-oss", "gemma"])
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--mode", default="eager", choices=["eager", "graph", "piecewise", "both"],
                        help="CUDA graphs: FULL ones of decode steps, PIECEWISE ones, or both as vLLM has it by default")
    parser.add_argument("--no-inductor", action="store_true",
                        help="the pieces between attention run as torch has them: no compiler")
    parser.add_argument("--sizes", default="8,64", help="captured batch sizes")
    parser.add_argument("--seqs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--kv-gib", type=float, default=0)
    parser.add_argument("--kv-dtype", default="auto", help="type of the KV cache; with fp8, factors of Q, K and V are not 1")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dcp", type=int, default=1)
    parser.add_argument("--max-len", type=int, default=4096)
    parser.add_argument("--compare", action="store_true", help="compare each layer's decode rows with float32 attention")
    parser.add_argument("--drafts", type=int, default=0, help="drafts of a sequence in each step (`drafts.py`)")
    parser.add_argument("--known", help="record of the engine whose tokens are drafted, in tasks that are among its own")
    parser.add_argument("--wait", help="tasks begin when this file exists: until then other engines have the device")
    parser.add_argument("--turns", nargs=3, metavar=("OWN", "OTHER", "PLACE"), help="two engines do one task each in turn, that at "
                        "place 0 first: what each is called, as files")
    parser.add_argument("--apart", action="store_true", help="the engine in a process of its own, as in a server")
    return parser.parse_args(given)


def config(a):
    c = dict(
        SHAPES[a.shape], head_dim=128, hidden_act="silu", max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000,
        attention_bias=False, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.02,
    )  # fmt: skip
    if a.kv_heads:
        c["num_key_value_heads"] = a.kv_heads
    if a.model == "gpt-oss":
        # Its attention: heads of 64 elements, eight queries for a KV head, a sink per head, windows in every other layer.
        c.update(head_dim=64, num_key_value_heads=c["num_attention_heads"] // 8)
    if a.model == "gemma":
        # As Gemma 2: heads of 256 elements, soft cap, windows in every other layer.
        c.update(head_dim=256, num_key_value_heads=c["num_attention_heads"] // 2)
    if a.model != "llama":
        c.update(architectures=["Qwen3ForCausalLM"], model_type="qwen3", sliding_window=None, use_sliding_window=False)
    else:
        c.update(architectures=["LlamaForCausalLM"], model_type="llama")
    return c


def engine_arguments(a, c):
    """What vLLM is told."""
    folder = "/tmp/pat-vllm-%s-%s-%d" % (a.shape, a.model, c["num_key_value_heads"])
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/config.json.%d" % os.getpid(), "w") as f:
        json.dump(c, f)
    os.replace(f.name, folder + "/config.json")
    sizes = sorted({int(size) for size in a.sizes.split(",")})
    more = {}
    if a.mode == "eager":
        more["enforce_eager"] = True
    elif a.mode == "graph":
        more["compilation_config"] = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=sizes)
    else:
        kinds = "PIECEWISE" if a.mode == "piecewise" else "FULL_AND_PIECEWISE"
        more["compilation_config"] = dict(cudagraph_mode=kinds, cudagraph_capture_sizes=sizes)
        if a.no_inductor:
            more["compilation_config"]["backend"] = "eager"
    if a.kv_gib:
        more["kv_cache_memory_bytes"] = int(a.kv_gib * 2**30)
    if a.kv_dtype != "auto":
        more["kv_cache_dtype"] = a.kv_dtype
    if a.tp > 1:
        more["tensor_parallel_size"] = a.tp
    if a.dcp > 1:
        more["decode_context_parallel_size"] = a.dcp
    if a.drafts:
        more["speculative_config"] = dict(method="ngram", num_speculative_tokens=a.drafts, prompt_lookup_max=2)
    return dict(
        model=folder, skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0, enable_prefix_caching=True,
        max_model_len=a.max_len, max_num_seqs=a.seqs, max_num_batched_tokens=a.tokens,
        # With a KV cache of a given size this is only what must be free at the start.
        gpu_memory_utilization=0.85 if not a.kv_gib else 0.16 / a.tp if a.shape == "8b" else 0.02,
        attention_config={"backend": a.backend}, disable_log_stats=True, **more,
    )  # fmt: skip


def make_engine(a, c):
    from vllm import LLM

    return LLM(**engine_arguments(a, c)).llm_engine


def prompts(count, shared, own, tag, vocab):
    r = random.Random(tag)
    prefix = [r.randrange(10, vocab) for _ in range(shared)]
    return [prefix + [r.randrange(10, vocab) for _ in range(own)] for _ in range(count)]


def read_size(text):
    count, _, rest = text.partition("x")
    shared, _, own = rest.partition("+")
    return int(count), int(shared), int(own)


class Requests:
    """Adds requests and keeps what they yield."""

    def __init__(self, engine, logprobs):
        self.engine, self.logprobs = engine, logprobs
        self.made, self.result, self.order, self.cached = {}, {}, [], 0
        self.newest = {}

    def add(self, name, prompt, out):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False, logprobs=self.logprobs)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self.order.append(name)

    def step(self):
        """Returns the seconds and the number of requests that got tokens."""
        start = time.perf_counter()
        outputs = self.engine.step()
        took = time.perf_counter() - start
        came = 0
        for output in outputs:
            completion = output.outputs[0]
            came += len(completion.token_ids) > self.made.get(output.request_id, 0)
            self.made[output.request_id] = len(completion.token_ids)
            self.newest[output.request_id] = completion
            if output.finished:
                self.cached += output.num_cached_tokens or 0
                self.result[output.request_id] = dict(tokens=list(completion.token_ids), top=self.top(completion))
        return took, came

    @staticmethod
    def top(completion):
        """Per token: log-prob of the token taken, and the lead over the next one."""
        if not completion.logprobs:
            return None
        top = []
        for token, candidates in zip(completion.token_ids, completion.logprobs):
            others = [c.logprob for t, c in candidates.items() if t != token]
            top.append((candidates[token].logprob, candidates[token].logprob - max(others)))
        return top

    def drain(self):
        while self.engine.has_unfinished_requests():
            self.step()

    def so_far(self):
        """What each has got until now."""
        newest = (self.newest[name] for name in self.order)
        return [dict(tokens=list(completion.token_ids), top=self.top(completion)) for completion in newest]

    def in_order(self):
        return [self.result.get(name) for name in self.order]


def tokens(engine, vocab, text):
    size, out, *rest = text.split(":")
    count, shared, own = read_size(size)
    batch = int(rest[0]) if rest else count
    every = prompts(count, shared, own, "tokens", vocab)
    result = []
    for begin in range(0, count, batch):
        requests = Requests(engine, 2)
        for i, prompt in enumerate(every[begin : begin + batch]):
            requests.add("tokens-%s-%d" % (text, begin + i), prompt, int(out))
        requests.drain()
        result += requests.in_order()
    engine.reset_prefix_cache()
    return dict(requests=result)


def churn(engine, vocab, text):
    """Requests arrive, finish, are aborted and preempted, the same way for every backend."""
    out, schedule = map(int, text.split(":"))
    happened = count_events(engine)
    r = random.Random("churn")
    systems = [[r.randrange(10, vocab) for _ in range(n)] for n in (1500, 700, 333, 64)]
    requests, waiting, aborted = Requests(engine, 2), [], set()
    for i in range(200):
        own = [r.randrange(10, vocab) for _ in range(r.choice([3, 17, 90, 400, 1200]))]
        waiting.append(("churn-%d" % i, r.choice(systems) + own, r.randint(2, 2 * out)))
    r = random.Random(schedule)
    step = 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(r.choice([0, 0, 1, 2, 5])):
            if waiting:
                requests.add(*waiting.pop(0))
        if step % 9 == 5 and requests.made:
            name = r.choice(requests.order)
            if name not in requests.result and name not in aborted:
                aborted.add(name)
                engine.abort_request([name])
        if engine.has_unfinished_requests():
            requests.step()
        step += 1
    engine.reset_prefix_cache()
    happened.update(aborted=len(aborted), cached_tokens=requests.cached)
    return dict(requests=requests.in_order(), steps=step, **happened)


def count_events(engine) -> dict:
    """Preemptions, evictions from the prefix cache and prompts that were computed in parts, from now on."""
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    happened = dict(preempted=0, evicted=0, chunks=0)
    preempt, evict, schedule = scheduler._preempt_request, pool._maybe_evict_cached_block, scheduler.schedule

    def counted_preempt(*args, **kwargs):
        happened["preempted"] += 1
        return preempt(*args, **kwargs)

    def counted_evict(block):
        is_evicted = evict(block)
        happened["evicted"] += is_evicted
        return is_evicted

    def counted_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for name, tokens in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            happened["chunks"] += tokens > 1 and request.num_computed_tokens < request.num_prompt_tokens
        return output

    scheduler._preempt_request, pool._maybe_evict_cached_block = counted_preempt, counted_evict
    scheduler.schedule = counted_schedule
    return happened


def full_steps(engine, vocab, text, tag, at_full=None):
    size, _, out = text.partition(":")
    count, shared, own = read_size(size)
    requests = Requests(engine, None)
    for i, prompt in enumerate(prompts(count, shared, own, tag, vocab)):
        requests.add("%s-%s-%d" % (tag, text, i), prompt, int(out or 40))
    times, marks = [], []
    while engine.has_unfinished_requests():
        took, came = requests.step()
        if came == count:
            times.append(took)
            marks.append((time.perf_counter(), sum(requests.made.values()) / count))
            if at_full and at_full(len(times), requests):
                at_full = None
    engine.reset_prefix_cache()
    return count, times, marks


def time_steps(engine, vocab, text):
    count, times, marks = full_steps(engine, vocab, text, "time")
    times, (begin, *_, end) = times[4:], marks[3:]
    median = statistics.median(times)
    spread = sorted(times)[len(times) // 10], sorted(times)[len(times) * 9 // 10]
    result = dict(sequences=count, steps=len(times), step_ms=1e3 * median, p10_ms=1e3 * spread[0], p90_ms=1e3 * spread[1])
    # By the clock, too: a step may return without tokens, and another with those of two.
    result["token_ms"] = 1e3 * (end[0] - begin[0]) / (end[1] - begin[1])
    if "probe" in sys.modules:
        # Those of the steps that were timed, about.
        result["build_us"] = 1e6 * statistics.median(sys.modules["probe"].STATE.built[-len(times) :])
    return result


def profile(engine, vocab, text):
    """CUDA activity of 6 full steps: kernels of ours and of FlashAttention, and how long the device idles in each step."""
    import torch
    from torch.profiler import ProfilerActivity

    found = {}

    def at_full(index, requests):
        if index < 6:
            return False
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as prof:
            start = time.perf_counter()
            for _ in range(6):
                requests.step()
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
        spans = sorted(
            (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
            for e in prof.profiler.kineto_results.events()
            if "CUDA" in str(e.device_type())
        )
        names = {}
        for begin, end, name in spans:
            calls, ns = names.get(name, (0, 0))
            names[name] = calls + 1, ns + end - begin
        # Idle: between the first and the last activity, what no activity covers; gaps under 2 us lie inside graphs, those over
        # 20 us are where the device waits for the host.
        first, reach, before = spans[0][0], spans[0][1], spans[0][2]
        gaps = []
        for begin, end, name in spans:
            if begin > reach:
                gaps.append((begin - reach, reach - first, before, name))
            if end > reach:
                reach, before = end, name
        idle = sum(gap for gap, *_ in gaps if gap > 2000)
        waits = [gap for gap in gaps if gap[0] > 20000]
        found.update(
            wall_ms=1e3 * wall, span_ms=(reach - first) / 1e6, idle_ms=idle / 1e6,
            longest_gap_us=max((gap for gap, *_ in gaps), default=0) / 1e3, gaps_over_20us=len(waits),
            waits_ms=sum(gap for gap, *_ in waits) / 1e6, small_gaps_ms=sum(gap for gap, *_ in gaps if gap <= 2000) / 1e6,
            waits=[(gap / 1e3, at / 1e6, before[:60], behind[:60]) for gap, at, before, behind in waits],
            kernels=sorted(([name[:90], *calls] for name, calls in names.items()), key=lambda k: -k[2])[:25],
        )  # fmt: skip
        return True

    full_steps(engine, vocab, text + ":40", "profile", at_full)
    return found


def host_profile(engine, vocab, text):
    """By function: calls, own and cumulative seconds of this thread."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()

    def at_full(index, requests):
        if index == 6:
            profiler.enable()
        elif index == 36:
            profiler.disable()
            return True
        return False

    full_steps(engine, vocab, text + ":48", "host", at_full)
    stats = pstats.Stats(profiler)
    functions = [
        ["%s:%d %s" % ("/".join(where[0].split("/")[-2:]), *where[1:]), calls, own, cumulative]
        for where, (_, calls, own, cumulative, _) in stats.stats.items()
    ]
    for order in (3, 2):
        print("host, 30 steps of %s by %s seconds:" % (text, ("own", "cumulative")[order - 2]))
        for name, calls, own, cumulative in sorted(functions, key=lambda f: -f[order])[:45]:
            print("  %7d calls %8.4f own %8.4f cumulative  %s" % (calls, own, cumulative, name))
    return dict(functions=functions)


@contextlib.contextmanager
def without_newest_token():
    from prefix_attn.vllm.builder import Builder

    right = Builder._lengths
    Builder._lengths = lambda self, *args: (right(self, *args) - 1).clip(0)
    try:
        yield
    finally:
        Builder._lengths = right


def broken(engine, vocab, text):
    with without_newest_token():
        return tokens(engine, vocab, text)


def exact_tokens(engine, vocab, text):
    import probe

    probe.STATE.is_eager, probe.STATE.server = True, "float32"
    try:
        return tokens(engine, vocab, text)
    finally:
        probe.STATE.is_eager, probe.STATE.server = False, "ours"


def layers(engine, vocab, text):
    import probe

    size, out, *rest = text.split(":")
    probe.take_errors()
    (broken if rest == ["broken"] else tokens)(engine, vocab, f"{size}:{out}")
    return dict(errors=probe.take_errors())


def forced(engine, vocab, text, save_as):
    import probe
    import torch

    size, out, server = text.split(":")
    count, shared, own = read_size(size)
    every = prompts(count, shared, own, "forced", vocab)
    for i, prompt in enumerate(every):
        prompt[-1] = probe.FIRST_TOKEN + i
    requests = Requests(engine, None)
    for i, prompt in enumerate(every):
        # The first token comes from the prefill.
        requests.add("forced-%s-%d" % (server, i), prompt, int(out) + 1)
    state = probe.STATE
    state.is_forcing, state.is_eager = True, server in ("stock", "float32")
    state.server = server if state.is_eager else "ours"
    with without_newest_token() if server == "broken" else contextlib.nullcontext():
        requests.drain()
    state.is_forcing, state.is_eager, state.server = False, False, "ours"
    torch.save(probe.take_scores(every, int(out)), save_as)
    engine.reset_prefix_cache()
    return {}


def begin_decoding(engine, vocab, text, tag, out=1):
    """Requests that all decode, each with `out` tokens or more, and many to go."""
    count, shared, own = read_size(text)
    requests = Requests(engine, 2)
    for i, prompt in enumerate(prompts(count, shared, own, tag, vocab)):
        requests.add("%s-%d" % (tag, i), prompt, 800)
    while len(requests.made) < count or min(requests.made.values()) < out:
        requests.step()
    return requests


#: By what happens: words of the exception that a step raises. An engine in a process of its own ends, and logs them there.
FAULTS = {
    "memory": "out of memory",
    "rows": "plans are sized for",
    "plan": "expected at most capacity.max_",
    "upload": "expected at most the capacity's 1",
    "kill": "",
}


def arrange(worker, how):
    """In the process of a worker: the next step meets the fault. Returns the process's id."""
    import dataclasses

    import prefix_attn as pa
    from prefix_attn.vllm.decoder import DecodeRows, _Capacity

    advance, plan = _Capacity.advance, DecodeRows.plan

    def least(group):
        capacity = pa.Capacity(1, 1, group.device)
        return pa.Planner(group.shape, group.device, capacity=capacity, **group.visible)

    def without_memory(self, *args):
        # A batch size that the engine has not had, which needs a workspace: there is no device with so much memory.
        self._capacities.clear()
        self._workspace = None
        return plan(self, *args)

    def of_short_rows(self, *args):
        self.group = dataclasses.replace(self.group, max_row_pages=1)
        return plan(self, *args)

    def with_least_planner(self, *args):
        self.planner, self.plan = least(self.group), None
        return advance(self, *args)

    def with_least_buffers(self, *args):
        self.buffers = pa.PlanBuffers(least(self.group), self.group.page_size, self.group.num_pages)
        return own_advance(self, *args)

    if how == "memory":
        DecodeRows.plan = without_memory
        DecodeRows.workspace = lambda self: pa.Workspace(1 << 46, self.group.device)
    elif how == "rows":
        DecodeRows.plan = of_short_rows
    elif how == "plan":
        _Capacity.advance = with_least_planner
    elif how == "upload":
        from prefix_attn.vllm.decoder import _DeviceCapacity

        own_advance, _DeviceCapacity.advance = _DeviceCapacity.advance, with_least_buffers
    return os.getpid()


def fail(engine, vocab, text):
    """Returns what came before the fault, and the engine's own error."""
    import signal
    import threading

    how, size, out = text.split(":")
    requests = begin_decoding(engine, vocab, size, "tokens", int(out))
    worker = engine.collective_rpc(arrange, args=(how,))[-1]
    assert worker != os.getpid(), "a fault in this process would stay"
    if how == "kill":
        os.kill(worker, signal.SIGKILL)
    ends = []

    def drain():
        try:
            requests.drain()
        except Exception as error:
            ends.append(error)
        else:
            ends.append(None)

    start = time.time()
    # A thread, because one that waits in vLLM cannot be interrupted.
    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    thread.join(30)
    seconds = time.time() - start
    assert ends, "no error after %.0f s" % seconds
    assert ends != [None], "the engine went on"
    return dict(error=repr(ends[0])[:300], seconds=seconds, fault=how, words=FAULTS[how], requests=requests.so_far())


def restart(engine, vocab, text, again):
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine.core_client import InprocClient

    if text:
        begin_decoding(engine, vocab, text, "restart").step()
    engine.engine_core.shutdown()
    if isinstance(engine.engine_core, InprocClient):
        cleanup_dist_env_and_memory()
    return again()


TASKS = dict(
    tokens=tokens, again=tokens, broken=broken, churn=churn, time=time_steps, profile=profile, fail=fail, layers=layers,
    forced=forced, float32=exact_tokens, host=host_profile,
)  # fmt: skip


def counters(worker=None):
    """What a process has counted."""
    import dataclasses

    from prefix_attn.vllm import metrics

    return dataclasses.asdict(metrics.totals())


def main():
    a = arguments()
    c = config(a)
    # For `weights.py`.
    os.environ["PAT_ATTENTION"] = a.model
    if a.kv_dtype != "auto":
        os.environ["PAT_FACTORS"] = "1"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    is_here = a.tp == 1 and not a.apart
    if is_here:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    else:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # For `counters`.
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    if is_here:
        import probe

        probe.install(a.compare, c["vocab_size"], a.drafts)
    if a.drafts:
        import drafts

        drafts.install()
    start = time.time()
    engine = make_engine(a, c)
    print("engine up after %.1f s" % (time.time() - start), flush=True)
    while a.wait and not os.path.exists(a.wait):
        time.sleep(0.05)
    record = dict(args=vars(a), tasks={})
    for index, task in enumerate(a.tasks):
        if a.turns:
            behind = index - 1 + int(a.turns[2])
            while behind >= 0 and not os.path.exists("%s.%d" % (a.turns[1], behind)):
                time.sleep(0.02)
        kind, _, text = task.partition(":")
        if kind == "fail":
            count(record, a, engine)
        if a.known:
            know(a.known, "tokens:" + text)
        start = time.time()
        if kind == "restart":
            engine = restart(engine, c["vocab_size"], text, lambda: make_engine(a, c))
            result = {}
        elif kind == "forced":
            result = forced(engine, c["vocab_size"], text, "%s.%s.pt" % (a.out[:-5], task.replace(":", "-")))
        else:
            result = TASKS[kind](engine, c["vocab_size"], text)
        record["tasks"][task] = result
        shown = {key: round(value, 3) for key, value in result.items() if isinstance(value, (int, float))}
        print("%s: %s%s %.1f s" % (task, shown, result.get("error", ""), time.time() - start), flush=True)
        save(a.out, record)
        if a.turns:
            save("%s.%d" % (a.turns[0], index), {})
    count(record, a, engine)
    save(a.out, record)
    print("DONE", flush=True)
    if not is_here:
        # Engines of other processes outlive this one.
        engine.engine_core.shutdown(timeout=5)


def know(path, task):
    """Draft what an engine has chosen, if it has the task."""
    import drafts

    while not os.path.exists(path):
        time.sleep(0.1)
    with open(path) as f:
        done = json.load(f)["tasks"].get(task)
    drafts.known = dict(enumerate(request["tokens"] for request in done["requests"])) if done else {}
    drafts.prompt_length = sum(read_size(task.split(":")[1])[1:])


def count(record, a, engine):
    """Ours must have run, in each worker process."""
    if a.backend != "CUSTOM" or "metrics" in record:
        return
    is_here = a.tp == 1 and not a.apart
    record["metrics"] = [counters()] if is_here else engine.collective_rpc(counters)
    print("metrics", record["metrics"], flush=True)
    assert len(record["metrics"]) == a.tp and all(m["decode_steps"] and m["kernel_calls"] for m in record["metrics"])


def save(path, record):
    """Whole or not at all: what was measured before a failure is not lost."""
    with open(path + ".part", "w") as f:
        json.dump(record, f)
    os.replace(f.name, path)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # engines of this process have nothing left to save
