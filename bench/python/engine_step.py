"""An engine's decode step in Python: plan, upload, and 36 layers, with CUDA graphs and without, with sharing and without.

    python bench/python/engine_step.py [--layers 36] [--steps 64]

64 sequences of 3,072 tokens, 2,560 of them shared; heads 32/8, head dim 128, bfloat16, pages of 16. Every step all sequences
grow by one token, whose K and V are written. Times are wall-clock times of whole steps, the device waited for at the end of
each. FlashInfer is measured where its package is installed: decode and the cascade of two levels, both with the backend fa2 (its
default on Hopper does not pack the query heads of a group). The cascade is told what is shared. Every method's last output is
compared with that of the first.
"""

import argparse
import statistics
import time

import torch

import prefix_attn as pa

DEVICE, PAGE_SIZE = "cuda:0", 16
Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
WARM_UP = 8
# Outputs are rounded to bfloat16, those of the cascade's levels too: up to two units in the last place.
TOLERANCE = dict(atol=2e-3, rtol=2 * torch.finfo(DTYPE).eps)


class Batch:
    """Block tables that grow: as an engine keeps them, int32 and padded."""

    def __init__(self, args):
        steps = args.steps + WARM_UP + 2
        self.rows = args.sequences
        self.shared_pages = args.shared // PAGE_SIZE
        own = -(-(args.tokens + steps - args.shared) // PAGE_SIZE)
        self.num_pages = self.shared_pages + self.rows * own
        prefix = torch.arange(self.shared_pages, dtype=torch.int32).repeat(self.rows, 1)
        rest = torch.arange(self.shared_pages, self.num_pages, dtype=torch.int32).view(self.rows, own)
        self.tables = torch.cat([prefix, rest], dim=1).contiguous()
        self.lengths = torch.full((self.rows,), args.tokens, dtype=torch.int32)

    def grow(self):
        self.lengths += 1

    def slots(self):
        last = (self.lengths - 1).long()
        pages = self.tables.gather(1, (last // PAGE_SIZE)[:, None])[:, 0].long()
        return pages * PAGE_SIZE + last % PAGE_SIZE

    def paged(self, first_page):
        """FlashInfer's form of the tables from `first_page` on: (indptr, page ids, tokens of the last pages), on the host."""
        used = -(-self.lengths // PAGE_SIZE) - first_page
        indptr = torch.zeros(self.rows + 1, dtype=torch.int32)
        indptr[1:] = used.cumsum(0)
        columns = torch.arange(self.tables.shape[1] - first_page)
        return indptr, self.tables[:, first_page:][columns < used[:, None]], (self.lengths - 1) % PAGE_SIZE + 1


class Ours:
    """`plan` plans and uploads; `run` attends in one layer."""

    def __init__(self, mode, batch, caches, q, out, graphs):
        self.batch = batch
        capacity = pa.Capacity(batch.rows, batch.tables.numel(), DEVICE)
        shape = pa.AttentionShape(Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE)
        self.planner = pa.Planner(shape, DEVICE, mode=mode, capacity=capacity)
        self.buffers = pa.PlanBuffers(self.planner, PAGE_SIZE, batch.num_pages)
        workspace = pa.Workspace.for_planner(self.planner)
        self.bound = [self.buffers.bind(k, v, q, out, workspace=workspace) for k, v in caches]
        self.out = out
        self.planned = self.planner.plan(batch.tables, batch.lengths, PAGE_SIZE, batch.num_pages)

    def plan(self):
        self.planner.advance(self.planned, self.batch.tables, self.batch.lengths, changed_rows=[])
        self.buffers.upload(self.planned)

    def run(self, layer):
        self.bound[layer].run()
        return self.out


def zeros(*size):
    return torch.zeros(size, dtype=torch.int32, device=DEVICE)


TERMS = dict(q_data_type=DTYPE, kv_data_type=DTYPE)


class FlashInferDecode:
    def __init__(self, batch, caches, q, out, graphs):
        import flashinfer

        self.batch, self.caches, self.q, self.out = batch, caches, q, out
        buffers = {}
        if graphs:
            buffers = dict(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=zeros(batch.rows + 1),
                paged_kv_indices_buffer=zeros(batch.tables.numel()),
                paged_kv_last_page_len_buffer=zeros(batch.rows),
            )
        memory = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            memory, "NHD", use_tensor_cores=True, backend="fa2", **buffers
        )

    def plan(self):
        indptr, pages, last = self.batch.paged(0)
        self.wrapper.plan(indptr, pages.to(DEVICE), last, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, **TERMS)

    def run(self, layer):
        return self.wrapper.run(self.q, self.caches[layer], out=self.out)


class FlashInferCascade:
    def __init__(self, batch, caches, q, out, graphs):
        import flashinfer

        self.batch, self.caches, self.q = batch, caches, q
        memory = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
        self.wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, memory, "NHD")
        # It has no argument for the backend of its levels.
        levels = []
        for requests in (1, batch.rows):
            buffers = {}
            if graphs:
                buffers = dict(
                    use_cuda_graph=True,
                    qo_indptr_buf=zeros(requests + 1),
                    paged_kv_indptr_buf=zeros(requests + 1),
                    paged_kv_indices_buf=zeros(batch.tables.numel()),
                    paged_kv_last_page_len_buf=zeros(requests),
                )
            memory = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
            levels.append(flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, "NHD", backend="fa2", **buffers))
        self.wrapper._batch_prefill_wrappers = levels
        prefix = batch.shared_pages
        self.queries = [torch.tensor([0, batch.rows], dtype=torch.int32), torch.arange(batch.rows + 1, dtype=torch.int32)]
        self.prefix = (
            torch.tensor([0, prefix], dtype=torch.int32),
            torch.arange(prefix, dtype=torch.int32, device=DEVICE),
            torch.tensor([PAGE_SIZE], dtype=torch.int32),
        )

    def plan(self):
        indptr, pages, last = self.batch.paged(self.batch.shared_pages)
        levels = zip(self.prefix, (indptr, pages.to(DEVICE), last))
        self.wrapper.plan(self.queries, *map(list, levels), Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, **TERMS)

    def run(self, layer):
        return self.wrapper.run(self.q, self.caches[layer])


def timed(step, steps):
    samples = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return statistics.median(samples), min(samples), max(samples)


def measure(args, make, graphs):
    """Milliseconds of a step (median, least, most), those of plan and upload, and the last layer's last output."""
    torch.manual_seed(0)
    batch = Batch(args)
    rows, cache = batch.rows, (batch.num_pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    randn = lambda *size: torch.randn(size, dtype=DTYPE, device=DEVICE)  # noqa: E731
    new, q = [randn(rows, KV_HEADS, HEAD_DIM) for _ in range(2)], randn(rows, Q_HEADS, HEAD_DIM)
    slots, pinned = torch.zeros(rows, dtype=torch.int64, device=DEVICE), torch.zeros(rows, dtype=torch.int64).pin_memory()
    caches = [(randn(*cache), randn(*cache)) for _ in range(args.layers)]
    attention = make(batch, caches, q, torch.empty_like(q), graphs)
    host, last = [], []

    def prepare():
        batch.grow()
        start = time.perf_counter()
        attention.plan()
        host.append((time.perf_counter() - start) * 1e3)
        pinned.copy_(batch.slots())
        slots.copy_(pinned, non_blocking=True)

    def run_layers():
        for layer, (k, v) in enumerate(caches):
            pa.append_kv(*new, k, v, slots)
            out = attention.run(layer)
        last[:] = [out]

    prepare()
    run_layers()
    torch.cuda.synchronize()
    replay = run_layers
    if graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_layers()
        replay = graph.replay

    def step():
        prepare()
        replay()

    timed(step, WARM_UP)
    host.clear()
    return *timed(step, args.steps), statistics.median(host), last[0].float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--shared", type=int, default=2560)
    args = parser.parse_args()
    methods = {f"ours, {mode}": lambda *a, mode=mode: Ours(mode, *a) for mode in ("auto", "flat")}
    try:
        import flashinfer
    except ImportError:
        print("FlashInfer is not installed here: not measured")
    else:
        methods[f"FlashInfer {flashinfer.__version__}, decode"] = FlashInferDecode
        methods[f"FlashInfer {flashinfer.__version__}, cascade"] = FlashInferCascade
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, {args.layers} layers, {args.steps} steps")
    print("| step | graphs | median ms | least | most | of it plan and upload |")
    print("|---|---|---|---|---|---|")
    expected = None
    for graphs in (False, True):
        for name, make in methods.items():
            *figures, out = measure(args, make, graphs)
            expected = out if expected is None else expected
            # A method that computes something else has no time.
            torch.testing.assert_close(out, expected, **TOLERANCE)
            median, least, most, host = figures
            print(f"| {name} | {'on' if graphs else 'off'} | {median:.3f} | {least:.3f} | {most:.3f} | {host:.3f} |", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
