#!/usr/bin/env python3
"""Data parallel: vLLM's own engines, one on each device, behind one front end.

  parallel.py OUT.json --ranks 2 --backend CUSTOM --shape small TASK ...

Tasks, as those of drive.py; requests go to the ranks in turn:
  tokens:PROMPTSxSHARED+OWN:OUT[:BATCH]   greedy tokens with their log-probs
  time:PROMPTSxSHARED+OWN:OUT             time per token while all decode: that of OUT tokens less that of one, prompts cached
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time

import drive


def count_into(worker, folder):
    """Each worker writes what it has counted: of a call of all engines, vLLM returns the first one's result alone."""
    with open(f"{folder}/{os.getpid()}.json", "w") as f:
        json.dump(drive.counters(), f)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    own, rest = parser.parse_known_args()
    a = drive.arguments(rest)
    a.ranks = own.ranks
    return a


async def generate(engine, a, name, prompts, out, logprobs=None):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False, logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip

    async def one(i, prompt):
        given = engine.generate(
            {"prompt_token_ids": prompt}, params, f"{name}-{i}", data_parallel_rank=i % a.ranks
        )
        async for output in given:
            completion = output.outputs[0]
        return dict(tokens=list(completion.token_ids), top=drive.Requests.top(completion))

    return await asyncio.gather(*[one(i, prompt) for i, prompt in enumerate(prompts)])


async def run(a):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    start = time.time()
    c = drive.config(a)
    arguments = drive.engine_arguments(a, c)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(data_parallel_size=a.ranks, **arguments))
    print("engine up after %.1f s" % (time.time() - start), flush=True)
    while a.wait and not os.path.exists(a.wait):
        await asyncio.sleep(0.05)
    record = dict(args=vars(a), tasks={})
    for task in a.tasks:
        kind, _, text = task.partition(":")
        size, out, *batch = text.split(":")
        prompts = drive.prompts(*drive.read_size(size), kind, c["vocab_size"])
        if kind == "tokens":
            batch, requests = int(batch[0]) if batch else len(prompts), []
            for begin in range(0, len(prompts), batch):
                requests += await generate(engine, a, f"{task}-{begin}", prompts[begin : begin + batch], int(out), 2)
            result = dict(requests=requests)
        else:
            took = []
            for name, count in (("warm", 1), ("one", 1), ("all", int(out))):
                start = time.perf_counter()
                await generate(engine, a, task + name, prompts, count)
                took.append(time.perf_counter() - start)
            result = dict(sequences=len(prompts), step_ms=1e3 * (took[2] - took[1]) / (int(out) - 1))
        record["tasks"][task] = result
        print(task, {key: value for key, value in result.items() if key != "requests"}, flush=True)
    if a.backend == "CUSTOM":
        folder = tempfile.mkdtemp()
        await engine.collective_rpc(count_into, args=(folder,))
        record["metrics"] = []
        for name in os.listdir(folder):
            with open(f"{folder}/{name}") as f:
                record["metrics"].append(json.load(f))
        print("metrics", record["metrics"], flush=True)
        assert len(record["metrics"]) == a.ranks, "a rank has not counted"
        assert all(m["decode_steps"] and m["kernel_calls"] for m in record["metrics"])
    drive.save(a.out, record)
    print("DONE", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    asyncio.run(run(arguments()))
    sys.stdout.flush()
    os._exit(0)
