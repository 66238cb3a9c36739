"""vLLM's engine in this process, with random weights of a model's shape. Written against vLLM 0.26."""

import gc
import hashlib
import json
import os
import tempfile
import time

SHAPES = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "sliding_window": None, "use_sliding_window": False,
    },
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    },
}
COMMON = {"hidden_act": "silu", "torch_dtype": "bfloat16", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
          "initializer_range": 0.02}

# Batches that get a graph: between two of them a batch is padded to the larger.
GRAPH_SIZES = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
# Tokens of steps with prompts that get graphs beside those: two or three prompts of a conversation and the rows that decode.
MIXED_SIZES = [*range(1088, 2049, 64)]

ATTENTION = ("flash", "attn", "attention", "pat_forward", "pat_merge", "fmha")
MATMUL = ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk")


def breakdown(profiler, wall_s, steps):
    """Milliseconds a step by what the device did, and without anything on it; together the time that has passed. While two kernels run,
    the time is the earlier one's: a kernel that is launched before its predecessor has ended waits for it."""
    parts = {"attention": 0, "matrix products": 0, "other kernels": 0}
    kernels = []
    for event in profiler.profiler.kineto_results.events():
        if "CUDA" in str(event.device_type()):
            kernels.append((event.start_ns(), event.start_ns() + event.duration_ns(), event.name().lower()))
    reach = 0
    for begin, end, name in sorted(kernels):
        alone = max(0, end - max(begin, reach))
        reach = max(reach, end)
        if any(word in name for word in ATTENTION) and "cache" not in name:
            parts["attention"] += alone
        elif any(word in name for word in MATMUL):
            parts["matrix products"] += alone
        else:
            parts["other kernels"] += alone
    table = {part: round(length / 1e6 / steps, 4) for part, length in parts.items()}
    table["no kernel"] = round(max(0.0, 1e3 * wall_s - sum(parts.values()) / 1e6) / steps, 4)
    return table


def model_folder(config):
    """A folder that holds the configuration, for equal ones the same: its path is part of the key by which vLLM finds what it has
    compiled before."""
    text = json.dumps(config)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = os.path.join(tempfile.gettempdir(), f"pat-serve-{os.getuid()}-{key}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise PermissionError(f"{folder}: another user's folder, expected one of this process's user")
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        file.write(text)
    os.replace(file.name, os.path.join(folder, "config.json"))  # another process may read it now
    return folder


def counters(worker=None):
    """In a worker: which steps of vLLM's CUSTOM backend ran on plans."""
    import dataclasses
    import sys

    metrics = sys.modules.get("prefix_attn.vllm.metrics")
    return dataclasses.asdict(metrics.totals()) if metrics and metrics.GROUPS else {}


class VllmEngine:
    """What `loop.run` drives."""

    def __init__(self, shape, backend, mode, *, max_model_len, layers=None, tensor_parallel=1, max_sequences=1024, batched_tokens=8192,
                 memory=0.9, kv_gib=None, block_size=16):
        # The scheduler stays in this process, whatever number of workers there is: its steps are noted here.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        self.tensor_parallel = tensor_parallel
        begin = time.perf_counter()
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = {**COMMON, **SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
        sizes = [size for size in GRAPH_SIZES if size <= max_sequences]
        options = {}
        if mode == "graphs":
            options["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
        elif mode == "compiled":
            sizes += [size for size in MIXED_SIZES if size <= batched_tokens]
            options["compilation_config"] = {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": sizes}
        else:
            options["enforce_eager"] = True
        if tensor_parallel > 1:
            options["tensor_parallel_size"] = tensor_parallel
        if kv_gib:
            options["kv_cache_memory_bytes"] = int(kv_gib * 2**30)
        self.engine = LLM(
            model=model_folder(config), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", seed=0, block_size=block_size,
            enable_prefix_caching=True, enable_chunked_prefill=True, max_model_len=max_model_len, max_num_seqs=max_sequences,
            max_num_batched_tokens=batched_tokens, gpu_memory_utilization=memory, attention_config={"backend": backend},
            disable_log_stats=True, **options,
        ).llm_engine
        self.parameters = lambda tokens: SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        self.counted = {}
        self.core = self.engine.engine_core.engine_core
        self.step_log = []
        self.log_steps()
        gc.collect()
        gc.freeze()  # a collection that walks through vLLM's modules would stand in a step's time
        self.start_seconds = time.perf_counter() - begin

    def log_steps(self):
        """Notes each step when the scheduler gets its result, which with asynchronous scheduling is one `step` after it was begun."""
        scheduler, update = self.core.scheduler, self.core.scheduler.update_from_output

        def noted(scheduled, output, *rest, **more):
            tokens = scheduled.num_scheduled_tokens
            if tokens:
                prompts = sum(count > 1 for count in tokens.values())
                self.step_log.append((time.perf_counter(), len(tokens), scheduled.total_num_scheduled_tokens, prompts))
            return update(scheduled, output, *rest, **more)

        scheduler.update_from_output = noted

    def describe(self):
        """What vLLM made of the settings, for the record."""
        import torch
        import vllm

        vc = self.engine.vllm_config
        layers = vc.compilation_config.static_forward_context.values()
        impl = sorted({f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers if hasattr(layer, "impl")})
        return {
            "vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name(),
            "attention": ", ".join(impl), "kv_tokens": vc.cache_config.num_gpu_blocks * vc.cache_config.block_size,
            "tensor_parallel": self.tensor_parallel, "async_scheduling": bool(vc.scheduler_config.async_scheduling),
            "cudagraph_mode": str(vc.compilation_config.cudagraph_mode), "compilation_mode": int(vc.compilation_config.mode or 0),
            "most_graph_tokens": vc.compilation_config.max_cudagraph_capture_size, "start_seconds": round(self.start_seconds, 1),
            "max_num_seqs": vc.scheduler_config.max_num_seqs, "max_num_batched_tokens": vc.scheduler_config.max_num_batched_tokens,
        }

    def backend_counters(self):
        """What the backend counts of itself since the last call, of the first worker; nothing of backends that do not count."""
        # With one GPU the worker lives in this process.
        now = counters() if self.tensor_parallel == 1 else self.engine.collective_rpc(counters)[0]
        before, self.counted = self.counted, now
        return {name: count - before.get(name, 0) for name, count in now.items()}

    def add(self, name, token_ids, output_tokens):
        self.engine.add_request(name, {"prompt_token_ids": token_ids}, self.parameters(output_tokens))

    def step(self):
        return [(o.request_id, len(o.outputs[0].token_ids), o.finished) for o in self.engine.step()]

    def clear(self, names):
        """Drops requests, and forgets every prefix."""
        if names:
            self.engine.abort_request(list(names))
        for _ in range(100):
            self.engine.step()
            if self.engine.reset_prefix_cache():
                return
        raise RuntimeError("vLLM's prefix cache cannot be reset: it still holds blocks of some request")

    def warm_up(self, vocabulary_end):
        """Compiles what the first steps compile: prompts of several lengths, decode at several batch sizes."""
        import random

        draw = random.Random(0)
        for number, count in enumerate((1, 8, 48)):
            for index in range(count):
                length = draw.randrange(200, 3000)
                tokens = [draw.randrange(1000, vocabulary_end) for _ in range(length)]
                self.add(f"warm-up-{number}-{index}", tokens, 12)
            while self.engine.has_unfinished_requests():
                self.engine.step()
        self.clear([])

    def profile(self, steps, requests):
        """What the device does in `steps` decode steps of the present batch, and in as many steps with a prompt in each, for which
        `requests`, arguments of `add`, are begun one by one: a table of each kind, none where the steps were of another kind."""
        if self.tensor_parallel > 1:
            return {}  # the kernels run in other processes
        self.settle()
        tables = {"step_time": self.profiled(steps, False, lambda: None)}
        requests = iter(requests)

        def begin_one():
            request = next(requests, None)
            if request:
                self.add(*request)

        # With asynchronous scheduling the first steps' prompts come later.
        for _ in range(2):
            begin_one()
            self.engine.step()
        tables["mixed_step_time"] = self.profiled(steps, True, begin_one)
        return {name: table for name, table in tables.items() if table}

    def profiled(self, steps, has_prompts, before_step):
        """Mean milliseconds of steps by what the device did; none where some have prompts and some do not."""
        import torch

        self.step_log.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            begin = time.perf_counter()
            while len(self.step_log) < steps and self.engine.has_unfinished_requests():
                before_step()
                self.engine.step()
            torch.cuda.synchronize()
            wall = time.perf_counter() - begin
        count = len(self.step_log)
        if count < steps or any((prompts > 0) != has_prompts for *_, prompts in self.step_log):
            return None
        mean = lambda column: round(sum(row[column] for row in self.step_log) / count, 1)
        return {"requests": mean(1), "tokens": mean(2), "steps": count, "ms": breakdown(profiler, wall, count)}

    def settle(self):
        """Steps until no prompt is left, so that steps are of decode alone. The first of them is not enough: with asynchronous
        scheduling a request that has just come is in the step behind it."""
        quiet = 0
        for _ in range(500):
            before = len(self.step_log)
            self.engine.step()
            for *_, prompts in self.step_log[before:]:
                quiet = 0 if prompts else quiet + 1
            if quiet >= 2 or not self.engine.has_unfinished_requests():
                return
