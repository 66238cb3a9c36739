"""Host time of one run from Python, beside Rust's (`host_cost`, the example of pat-bench, whose first batch this is).

    python bench/python/host_cost.py

The device is kept ahead of: each timed call is enqueued, and the stream is waited for after every 50. FlashInfer's `run`
(decode, tensor cores, backend fa2) is measured where its package is installed.
"""

import itertools
import statistics
import time

import torch

import prefix_attn as pa

CALLS, IN_FLIGHT = 5_000, 50
DEVICE, PAGE_SIZE = "cuda:0", 32


def tree():
    """1,10_4096,416: ten sequences behind 4096 shared tokens."""
    shared = list(range(4096 // PAGE_SIZE))
    own = 416 // PAGE_SIZE
    tables = [shared + [len(shared) + row * own + page for page in range(own)] for row in range(10)]
    return tables, [4096 + 416] * 10, len(shared) + 10 * own


def times_us(call):
    for _ in range(200):
        call()
    torch.cuda.synchronize()
    samples = []
    for index in range(CALLS):
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
        if index % IN_FLIGHT == IN_FLIGHT - 1:
            torch.cuda.synchronize()
    return samples


def flashinfer_calls(tables, lengths, q, k, v, out):
    """FlashInfer's `run` on the same tensors, by name."""
    try:
        import flashinfer
    except ImportError:
        return {}
    memory = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=True, backend="fa2")
    host = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    indptr = host([0, *itertools.accumulate(map(len, tables))])
    pages = host([page for table in tables for page in table]).to(DEVICE)
    last = host([(length - 1) % PAGE_SIZE + 1 for length in lengths])
    wrapper.plan(indptr, pages, last, 32, 8, 128, PAGE_SIZE, q_data_type=q.dtype, kv_data_type=k.dtype)
    name = f"FlashInfer {flashinfer.__version__} run"
    return {f"{name}, out": lambda: wrapper.run(q, (k, v), out=out), name: lambda: wrapper.run(q, (k, v))}


def main():
    shape = pa.AttentionShape(32, 8, 128, torch.float16)
    tables, lengths, num_pages = tree()
    planner = pa.Planner(shape, DEVICE)
    plan = planner.plan(tables, lengths, PAGE_SIZE, num_pages)
    capacity = pa.Capacity(len(lengths), sum(map(len, tables)), DEVICE)
    fixed = pa.Planner(shape, DEVICE, capacity=capacity)
    buffers = pa.PlanBuffers(fixed, PAGE_SIZE, num_pages)
    buffers.upload(fixed.plan(tables, lengths, PAGE_SIZE, num_pages))
    q = torch.randn((10, 32, 128), dtype=torch.float16, device=DEVICE)
    k, v = (torch.randn((num_pages, PAGE_SIZE, 8, 128), dtype=torch.float16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(q)
    bound = buffers.bind(k, v, q, out, workspace=pa.Workspace.for_planner(fixed))
    q_ptr, out_ptr = q.data_ptr(), out.data_ptr()
    slots = torch.arange(10, device=DEVICE)
    new = torch.randn((10, 8, 128), dtype=torch.float16, device=DEVICE)
    calls = {
        "an empty Python call": lambda: None,
        "torch.empty_like(q)": lambda: torch.empty_like(q),
        "q.add_(0)": lambda: q.add_(0),
        "bound.run_ptr(q, out)": lambda: bound.run_ptr(q_ptr, out_ptr),
        "bound.run()": bound.run,
        "run(plan, q, k, v, out)": lambda: pa.run(plan, q, k, v, out),
        "run(plan, q, k, v)": lambda: pa.run(plan, q, k, v),
        "append_kv": lambda: pa.append_kv(new, new, k, v, slots),
        **flashinfer_calls(tables, lengths, q, k, v, out),
    }
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}: host time in us, median of {CALLS} (quartiles)")
    for name, call in calls.items():
        low, middle, high = statistics.quantiles(times_us(call), n=4)
        print(f"| {name:<24} | {middle:6.2f} ({low:.2f} to {high:.2f}) |")


if __name__ == "__main__":
    main()
