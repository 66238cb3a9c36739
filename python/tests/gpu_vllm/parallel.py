#!/usr/bin/env python3
"""vLLM's engines in processes of their own behind the front end of its server; with several ranks data parallel, one a device.

  parallel.py OUT.json --ranks 2 --backend CUSTOM --shape small TASK ...

Tasks, as those of drive.py; requests go to the ranks in turn:
  tokens:PROMPTSxSHARED+OWN:OUT[:BATCH]   greedy tokens with their log-probs
  again:... (as tokens)                   the same once more
  time:PROMPTSxSHARED+OWN:OUT             time per token while all decode: that of OUT tokens less that of one, prompts cached
  fail:kill:PROMPTSxSHARED+OWN:OUT        when each request has OUT tokens, the engine's process is killed: each request must end
                                          in the engine's error within 30 s; its prompts are those of the task `tokens`
  restart:                                another engine does the tasks behind
"""

import argparse
import asyncio
import json
import os
import signal
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


async def generate(engine, a, name, prompts, out, logprobs=None, newest=None):
    """Every request's tokens. With `newest`, a list as long as `prompts`, each request's completion so far is kept there, and a
    request that fails has its error as result."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=out, ignore_eos=True, detokenize=False, logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY if newest is None else RequestOutputKind.CUMULATIVE,
    )  # fmt: skip

    async def one(i, prompt):
        given = engine.generate(
            {"prompt_token_ids": prompt}, params, f"{name}-{i}", data_parallel_rank=i % a.ranks
        )
        async for output in given:
            completion = output.outputs[0]
            if newest is not None:
                newest[i] = completion
        return of(completion)

    every = [one(i, prompt) for i, prompt in enumerate(prompts)]
    return await asyncio.gather(*every, return_exceptions=newest is not None)


def of(completion):
    return dict(tokens=list(completion.token_ids), top=drive.Requests.top(completion))


async def fail(engine, a, prompts, out):
    """Kills the engine's process. Returns what came before that, and the error that the requests ended in."""
    from vllm.v1.engine.exceptions import EngineDeadError

    newest = [None] * len(prompts)
    requests = asyncio.ensure_future(generate(engine, a, "fail", prompts, 800, 2, newest))
    while not all(completion and len(completion.token_ids) >= out for completion in newest):
        assert not requests.done(), requests.result()
        await asyncio.sleep(0.005)
    [process] = engine.engine_core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGKILL)
    start = time.time()
    ends = await asyncio.wait_for(requests, 30)
    seconds = time.time() - start
    assert all(isinstance(end, EngineDeadError) for end in ends), ends
    so_far = [of(completion) for completion in newest]
    return dict(error=repr(ends[0])[:300], seconds=seconds, fault="kill", words="", requests=so_far)


def make_engine(a, arguments):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    start = time.time()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(data_parallel_size=a.ranks, **arguments))
    print("engine up after %.1f s" % (time.time() - start), flush=True)
    return engine


async def count_calls(record, a, engine):
    """Ours must have run, in each worker process."""
    if a.backend != "CUSTOM":
        return
    folder = tempfile.mkdtemp()
    await engine.collective_rpc(count_into, args=(folder,))
    counted = []
    for name in os.listdir(folder):
        with open(f"{folder}/{name}") as f:
            counted.append(json.load(f))
    print("metrics", counted, flush=True)
    assert len(counted) == a.ranks, "a rank has not counted"
    assert all(m["decode_steps"] and m["kernel_calls"] for m in counted)
    record.setdefault("metrics", []).extend(counted)


async def run(a):
    c = drive.config(a)
    arguments = drive.engine_arguments(a, c)
    engine = make_engine(a, arguments)
    while a.wait and not os.path.exists(a.wait):
        await asyncio.sleep(0.05)
    record = dict(args=vars(a), tasks={})
    for task in a.tasks:
        kind, _, text = task.partition(":")
        if kind == "restart":
            engine.shutdown()
            engine = make_engine(a, arguments)
            continue
        size, out, *batch = text.removeprefix("kill:").split(":")
        prompts = drive.prompts(*drive.read_size(size), "time" if kind == "time" else "tokens", c["vocab_size"])
        if kind == "fail":
            await count_calls(record, a, engine)
            result = await fail(engine, a, prompts, int(out))
        elif kind in ("tokens", "again"):
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
        drive.save(a.out, record)
        print(task, {key: value for key, value in result.items() if key != "requests"}, flush=True)
    await count_calls(record, a, engine)
    drive.save(a.out, record)
    print("DONE", flush=True)
    # Engines outlive this process.
    engine.shutdown(timeout=5)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    asyncio.run(run(arguments()))
    sys.stdout.flush()
    os._exit(0)
