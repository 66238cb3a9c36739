"""vLLM's scheduler and runner in small: random joins, leaves, preemptions, prefix hits, chunked prefills and moves of rows.

Block tables, their edits, the preparation of metadata, builders and layers are vLLM's own; the device tables are CPU tensors.
"""

import dataclasses
import random
from inspect import signature
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu import block_table
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

BLOCK = 16


class DeviceTable:
    """`StagedWriteTensor` with CPU memory."""

    def __init__(self, size, dtype, device):
        self.gpu = torch.zeros(size, dtype=dtype)
        self.staged = []

    def stage_write(self, index, start, x):
        self.staged.append((index, start, list(x)))

    def apply_write(self):
        for index, start, x in self.staged:
            self.gpu[index, start : start + len(x)] = torch.tensor(x, dtype=torch.int32)
        self.staged.clear()


class Counts:
    """`UvaBackedTensor` with CPU memory."""

    def __init__(self, size, dtype):
        self.gpu = torch.zeros(size, dtype=dtype)
        self.np = self.gpu.numpy()

    def copy_to_uva(self):
        pass


#: Block tables by the address that vLLM gives its kernel.
by_address = {}


class Gather:
    """The kernel that gives a batch's rows their tables."""

    def __getitem__(self, grid):
        return self

    def __call__(self, idx_mapping, addresses, *_, **__):
        tables = by_address[addresses.tolist()[0]]
        for row, request in enumerate(idx_mapping.tolist()):
            used = tables.num_blocks.np[0, request]
            tables.input_block_tables[0][row, :used] = tables.block_tables[0].gpu[request, :used]


def make_tables(monkeypatch, requests: int, width: int) -> BlockTables:
    """vLLM's block tables of one group."""
    # Importing the backend has wrapped BlockTables before any is made, as in a worker process.
    import prefix_attn.vllm.backend  # noqa: F401

    monkeypatch.setattr(block_table, "StagedWriteTensor", DeviceTable)
    monkeypatch.setattr(block_table, "UvaBackedTensor", Counts)
    # vLLM 0.26 asks for the kernels' block sizes too.
    kernel_blocks = {"kernel_block_sizes": [BLOCK]} if "kernel_block_sizes" in signature(BlockTables).parameters else {}
    tables = BlockTables([BLOCK], requests, 4096, [width], torch.device("cpu"), **kernel_blocks)

    by_address[tables.block_tables[0].gpu.data_ptr()] = tables
    monkeypatch.setattr(block_table, "_gather_block_tables_kernel", Gather())
    return tables


@dataclasses.dataclass
class Request:
    slot: int
    prompt: int
    blocks: list
    computed: int = 0


class Engine:
    """Schedules random steps over a pool of blocks."""

    def __init__(self, tables: BlockTables, seed: int, blocks: int, longest: int, drafts: int = 0):
        self.tables, self.rng, self.drafts = tables, random.Random(seed), drafts
        self.free_blocks = list(range(1, blocks))
        self.references = [0] * blocks
        self.free_slots = list(range(tables.max_num_reqs))
        self.running: list[Request] = []
        self.longest = longest

    def take(self, count: int) -> list:
        taken = [self.free_blocks.pop(self.rng.randrange(len(self.free_blocks))) for _ in range(count)]
        for block in taken:
            self.references[block] += 1
        return taken

    def leave(self, request: Request) -> None:
        """Finished, aborted or preempted: the runner forgets it, and its tables stay as they are."""
        self.running.remove(request)
        self.free_slots.append(request.slot)
        for block in request.blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free_blocks.append(block)

    def join(self) -> Request | None:
        """A new or resumed request; maybe with a prefix hit: full blocks of a running one."""
        prompt = self.rng.randint(1, self.longest // 2)
        hit, hit_tokens = [], 0
        if self.running and self.rng.random() < 0.7:
            other = self.rng.choice(self.running)
            full = min(other.computed, prompt - 1) // BLOCK
            hit = other.blocks[: self.rng.randint(0, full)]
            hit_tokens = len(hit) * BLOCK
        needed = -(-prompt // BLOCK) - len(hit)
        if not self.free_slots or needed > len(self.free_blocks) - 4:
            return None
        for block in hit:
            self.references[block] += 1
        slot = self.free_slots.pop(self.rng.randrange(len(self.free_slots)))
        request = Request(slot, prompt, hit + self.take(needed), hit_tokens)
        self.running.append(request)
        self.tables.append_block_ids(slot, (request.blocks,), overwrite=True)
        return request

    def step(self) -> list[tuple[Request, int]]:
        """Schedule: each running request with a number of tokens, decodes first."""
        for request in list(self.running):
            if self.rng.random() < 0.04 or request.computed >= self.longest - 1:
                self.leave(request)
        for _ in range(self.rng.randint(0, 3)):
            self.join()
        scheduled = []
        for request in list(self.running):
            if self.rng.random() < 0.1:
                continue
            chunk = min(request.prompt - request.computed, self.rng.choice([7, 16, 40, 500]))
            if chunk <= 0:
                chunk = 1 + self.rng.randint(0, self.drafts)
            extra = -(-(request.computed + chunk) // BLOCK) - len(request.blocks)
            if extra > len(self.free_blocks):
                self.leave(request)  # preempted: it comes back as a new one
                continue
            if extra > 0:
                new = self.take(extra)
                request.blocks += new
                self.tables.append_block_ids(request.slot, (new,), overwrite=False)
            scheduled.append((request, chunk))
        self.rng.shuffle(scheduled)
        scheduled.sort(key=lambda pair: pair[1] > 1 + self.drafts)
        self.tables.apply_staged_writes()
        return scheduled

    def count(self, request: Request, chunk: int) -> None:
        """The step is done: some of the drafts are refused, and the next step writes over them."""
        is_decode = request.computed >= request.prompt
        request.computed += self.rng.randint(1, chunk) if is_decode else chunk


def prepare(
    tables: BlockTables, scheduled, attn_groups, pad_to=0, mode=CUDAGraphMode.NONE, is_dummy=False, each=1, for_capture=False
):
    """The runner's preparation of a step, padded to `pad_to` rows of `each` tokens; of a dummy run, which has no requests, with
    `is_dummy`.

    Returns:
        Metadata by layer, slot mapping, and the step's input batch.
    """
    counts = np.array([chunk for _, chunk in scheduled], dtype=np.int32)
    computed = np.array([request.computed for request, _ in scheduled], dtype=np.int32)
    rows = max(len(scheduled), pad_to)
    starts = np.full(rows + 1, counts.sum(), dtype=np.int32)
    starts[0] = 0
    np.cumsum(counts, out=starts[1 : len(scheduled) + 1])
    lengths = np.zeros(rows, dtype=np.int32)
    lengths[: len(scheduled)] = computed + counts
    slots = np.array([request.slot for request, _ in scheduled], dtype=np.int32)
    positions = np.concatenate([np.arange(c, c + n) for c, n in zip(computed, counts)])
    slot_mapping = [
        request.blocks[p // BLOCK] * BLOCK + p % BLOCK
        for request, chunk in scheduled
        for p in range(request.computed, request.computed + chunk)
    ]
    tokens = max(len(positions), pad_to * each)
    slot_mapping += [-1] * (tokens - len(slot_mapping))
    batch = SimpleNamespace(
        req_ids=[str(slot) for slot in slots],
        num_reqs=len(scheduled),
        num_reqs_after_padding=rows,
        num_tokens=len(positions),
        num_tokens_after_padding=tokens,
        idx_mapping_np=slots,
        query_start_loc_np=starts,
        query_start_loc=torch.from_numpy(starts),
        num_scheduled_tokens=counts,
        max_query_len=int(counts.max()),
        seq_lens=torch.from_numpy(lengths),
        seq_lens_cpu_upper_bound=torch.from_numpy(lengths.copy()),
        dcp_local_seq_lens=None,
        positions=torch.from_numpy(positions),
        is_prefilling_np=np.array([r.computed < r.prompt for r, _ in scheduled]),
        prompt_lens=None,
        fast_prefill=None,
        pcp=None,
    )
    if is_dummy:
        block_tables = tables.get_dummy_block_tables(rows)
    else:
        block_tables = tables.gather_block_tables(torch.from_numpy(slots), rows)
    slot_mappings = torch.tensor([slot_mapping], dtype=torch.int64)
    state = SimpleNamespace(
        max_model_len=1024, supports_mm_inputs=False, encoder_cache=None, model_config=SimpleNamespace(is_mm_prefix_lm=False)
    )
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=g[0].kv_cache_spec) for g in attn_groups])
    step = batch, mode, block_tables, slot_mappings, attn_groups, groups
    metadata = DefaultModelState.prepare_attn(state, *step, for_capture=for_capture)
    return metadata, slot_mappings[0], batch
