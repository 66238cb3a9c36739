"""An engine's decode step in Python: plan, upload, and 36 layers, with CUDA graphs and without, with sharing and without.

    python bench/python/engine_step.py [--layers 36] [--steps 64]

64 sequences of 3,072 tokens, 2,560 of them shared; heads 32/8, head dim 128, bfloat16, pages of 16. Every step all sequences
grow by one token, whose K and V are written. Times are wall-clock times of whole steps, the device waited for at the end of
each. FlashInfer is measured where its package is installed.
"""

import argparse
import statistics
import time

import torch

import prefix_attn as pa

DEVICE, PAGE_SIZE = "cuda:0", 16
Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
WARM_UP = 8  # steps


class Batch:
    """Block tables that grow: as an engine keeps them, int32 and padded."""

    def __init__(self, sequences, tokens, shared, steps):
        own = -(-(tokens + steps - shared) // PAGE_SIZE)
        self.num_pages = shared // PAGE_SIZE + sequences * own
        prefix = torch.arange(shared // PAGE_SIZE, dtype=torch.int32).repeat(sequences, 1)
        rest = torch.arange(shared // PAGE_SIZE, self.num_pages, dtype=torch.int32).view(sequences, own)
        self.tables = torch.cat([prefix, rest], dim=1).contiguous()
        self.lengths = torch.full((sequences,), tokens, dtype=torch.int32)

    def grow(self):
        self.lengths += 1

    def slots(self):
        last = (self.lengths - 1).long()
        pages = self.tables.gather(1, (last // PAGE_SIZE)[:, None])[:, 0].long()
        return pages * PAGE_SIZE + last % PAGE_SIZE


def steps_of(args, graphs, prepare, run_layers):
    """Milliseconds of whole steps: median, least, most, and of them the host's time in `prepare`, median."""
    host = []

    def prepared():
        start = time.perf_counter()
        prepare()
        host.append((time.perf_counter() - start) * 1e3)

    prepared()
    run_layers()
    torch.cuda.synchronize()
    replay = run_layers
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_layers()
        replay = graph.replay
    samples = []
    for _ in range(WARM_UP + args.steps):
        start = time.perf_counter()
        prepared()
        replay()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    samples, host = samples[WARM_UP:], host[-args.steps:]
    return statistics.median(samples), min(samples), max(samples), statistics.median(host)


class Layers:
    """A batch, and the tensors that both kinds of layer work on."""

    def __init__(self, args):
        self.batch = Batch(args.sequences, args.tokens, args.shared, WARM_UP + args.steps + 1)
        self.rows = args.sequences
        self.q = torch.randn((self.rows, Q_HEADS, HEAD_DIM), dtype=DTYPE, device=DEVICE)
        self.out = torch.empty_like(self.q)
        self.new = [torch.randn((self.rows, KV_HEADS, HEAD_DIM), dtype=DTYPE, device=DEVICE) for _ in range(2)]
        self.slots = torch.zeros(self.rows, dtype=torch.int64, device=DEVICE)
        self.pinned = torch.zeros(self.rows, dtype=torch.int64).pin_memory()
        cache = (self.batch.num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self.caches = [[torch.randn(cache, dtype=DTYPE, device=DEVICE) for _ in range(2)] for _ in range(args.layers)]

    def place_new(self):
        """The slots of the new tokens, without waiting for the device."""
        self.pinned.copy_(self.batch.slots())
        self.slots.copy_(self.pinned, non_blocking=True)


def ours(args, mode, graphs):
    on = Layers(args)
    capacity = pa.Capacity(on.rows, on.batch.tables.numel(), DEVICE)
    planner = pa.Planner(pa.AttentionShape(Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE), DEVICE, mode=mode, capacity=capacity)
    buffers, workspace = pa.PlanBuffers(planner, PAGE_SIZE, on.batch.num_pages), pa.Workspace.for_planner(planner)
    runs = [buffers.bind(k, v, on.q, on.out, workspace=workspace) for k, v in on.caches]
    plan = planner.plan(on.batch.tables, on.batch.lengths, PAGE_SIZE, on.batch.num_pages)

    def prepare():
        on.batch.grow()
        planner.advance(plan, on.batch.tables, on.batch.lengths, changed_rows=[])
        buffers.upload(plan)
        on.place_new()

    def run_layers():
        for (k, v), run in zip(on.caches, runs):
            pa.append_kv(*on.new, k, v, on.slots)
            run.run()

    return steps_of(args, graphs, prepare, run_layers)


def flashinfer_step(args, graphs):
    import flashinfer

    on = Layers(args)
    memory = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    options = {}
    if graphs:
        options = dict(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(on.rows + 1, dtype=torch.int32, device=DEVICE),
            paged_kv_indices_buffer=torch.zeros(on.batch.tables.numel(), dtype=torch.int32, device=DEVICE),
            paged_kv_last_page_len_buffer=torch.zeros(on.rows, dtype=torch.int32, device=DEVICE),
        )
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=True, **options)

    def prepare():
        on.batch.grow()
        used = -(-on.batch.lengths // PAGE_SIZE)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int32), used.cumsum(0).int()])
        indices = torch.cat([row[:count] for row, count in zip(on.batch.tables, used)])
        last = (on.batch.lengths - 1) % PAGE_SIZE + 1
        wrapper.plan(
            indptr, indices.to(DEVICE), last, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, q_data_type=DTYPE, data_type=DTYPE
        )
        on.place_new()

    def run_layers():
        for k, v in on.caches:
            pa.append_kv(*on.new, k, v, on.slots)
            wrapper.run(on.q, (k, v), out=on.out)

    return steps_of(args, graphs, prepare, run_layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--shared", type=int, default=2560)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {args.layers} layers, {args.steps} steps")
    print("| step | graphs | median ms | least | most | of it plan and upload |")
    print("|---|---|---|---|---|---|")

    def row(name, graphs, figures):
        median, least, most, host = figures
        print(f"| {name} | {'on' if graphs else 'off'} | {median:.3f} | {least:.3f} | {most:.3f} | {host:.3f} |", flush=True)
        torch.cuda.empty_cache()

    for graphs in (False, True):
        row("sharing (auto)", graphs, ours(args, "auto", graphs))
        row("no sharing (flat)", graphs, ours(args, "flat", graphs))
    try:
        import flashinfer
    except ImportError:
        print("FlashInfer is not installed here: not measured")
        return
    for graphs in (False, True):
        row(f"FlashInfer {flashinfer.__version__}", graphs, flashinfer_step(args, graphs))


if __name__ == "__main__":
    main()
