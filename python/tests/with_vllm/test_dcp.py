"""Decode context parallelism: two ranks, each in a thread with its part of the cache, against SDPA over all of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import simulated
import stock
import torch
from vllm.distributed import parallel_state
from vllm.v1.attention.backends import flash_attn
from world import LAYERS, SCALE, TOLERANCE, World

RANKS = 2
#: Query heads of a rank. All of them share one KV head, which every rank has: what vLLM asks for.
HEADS = 4


class Ranks:
    """A process group of threads."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.given = [None] * RANKS
        self.rank = threading.local()

    def exchange(self, value):
        """What each rank gave."""
        self.given[self.rank.value] = value
        self.barrier.wait()
        given = list(self.given)
        self.barrier.wait()
        return given


class Group:
    """What vLLM asks of its decode context parallel group."""

    world_size = RANKS

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    @property
    def rank_in_group(self) -> int:
        return self.ranks.rank.value

    def all_gather(self, tensor, dim):
        return torch.cat(self.ranks.exchange(tensor), dim)


def combine(out, lse, group, return_lse):
    """`cp_lse_ag_out_rs`: the softmax-weighted sum over ranks, and this rank's heads of it."""
    outs, lses = zip(*group.ranks.exchange((out.float(), lse)))
    total = torch.logsumexp(torch.stack(lses), 0)
    weights = [(lse - total).exp().nan_to_num(0.0) for lse in lses]
    mixed = sum(out * weight[..., None] for out, weight in zip(outs, weights))
    heads = slice(HEADS * group.rank_in_group, HEADS * (group.rank_in_group + 1))
    return mixed[:, heads].to(out.dtype), total[:, heads]


def merge(output, prefix, prefix_lse, suffix, suffix_lse):
    """`merge_attn_states`: LSEs are [heads, rows]."""
    both = torch.stack([prefix_lse, suffix_lse]).transpose(1, 2)
    weights = torch.softmax(both, 0)[..., None]
    output.copy_((weights * torch.stack([prefix, suffix]).float()).sum(0))


@pytest.fixture
def ranks(monkeypatch):
    """The group, in vLLM's place."""
    ranks = Ranks()
    group = Group(ranks)
    monkeypatch.setattr(parallel_state, "_DCP", group)
    monkeypatch.setattr(flash_attn, "get_dcp_group", lambda: group)
    monkeypatch.setattr(flash_attn, "merge_attn_states", merge)
    return ranks


@pytest.mark.parametrize("interleave", [1, 16])
def test_two_ranks_are_one(monkeypatch, model_folder, seeded, ranks, stock_kernels, interleave):
    worlds = []
    for rank in range(RANKS):
        ranks.rank.value = rank
        config = {
            "parallel_config.decode_context_parallel_size": RANKS,
            "parallel_config.cp_kv_cache_interleave_size": interleave,
        }
        world = World(monkeypatch, model_folder, heads=(HEADS, 1), config=config)
        for layer in world.layers:
            layer.impl.dcp_combine = combine
        assert world.builder.dcp_world_size == RANKS and world.builder._stock_reason is None
        worlds.append(world)

    # Tokens so far, the new one included: empty contexts, ranks without a token, shared blocks of 16 x 2 tokens.
    lengths = [200, 230, 201, 64, 33, 2, 1]
    pool = torch.randn(2, 400, 1, 64).to(torch.bfloat16)
    own = torch.randn(len(lengths), 2, 400, 1, 64).to(torch.bfloat16)
    shared_tokens = 5 * simulated.BLOCK * RANKS
    shared = list(range(1, 6))
    requests, histories = [], []
    for i, length in enumerate(lengths):
        is_sharing = length > shared_tokens
        begin = shared_tokens if is_sharing else 0
        history = torch.cat([pool[:, :begin], own[i, :, begin:length]], 1)
        blocks = (shared if is_sharing else []) + [10 + 20 * i + k for k in range(20)]
        requests.append(simulated.Request(i, length - 1, blocks, length - 1))
        histories.append(history)
    for rank, world in enumerate(worlds):
        for request, history in zip(requests, histories):
            world.tables.append_block_ids(request.slot, (request.blocks,), overwrite=True)
            tokens = torch.arange(history.shape[1])
            local = tokens[tokens // interleave % RANKS == rank]
            places = local // (interleave * RANKS) * interleave + local % interleave
            blocks = torch.tensor(request.blocks)[places // simulated.BLOCK]
            for layer in world.layers:
                # [blocks, heads, tokens, K and V]
                layer.kv_cache[blocks, :, places % simulated.BLOCK] = torch.cat([*history[:, local]], -1)
        world.tables.apply_staged_writes()

    scheduled = [(request, 1) for request in requests]
    queries = [torch.randn(len(lengths), HEADS, 64).to(torch.bfloat16) for _ in range(RANKS)]
    key, value = (torch.stack([history[i, -1] for history in histories]) for i in (0, 1))
    metadata = []
    for rank, world in enumerate(worlds):
        ranks.rank.value = rank
        step, _, _ = simulated.prepare(world.tables, scheduled, world.groups)
        metadata.append(step[LAYERS[0]])
        assert metadata[-1].prefix_attn.decode_rows == len(lengths)

    def run(rank):
        ranks.rank.value = rank
        layer = worlds[rank].layers[0]
        out = torch.full_like(queries[rank], float("nan"))
        return layer.impl.forward(layer, queries[rank], key, value, layer.kv_cache, metadata[rank], out)

    with ThreadPoolExecutor(RANKS) as pool:
        outs = list(pool.map(run, range(RANKS)))
    for out, query in zip(outs, queries):
        for row, history in enumerate(histories):
            want = stock.attend(query[row : row + 1], *history, SCALE)
            torch.testing.assert_close(out[row : row + 1].float(), want.float(), atol=TOLERANCE, rtol=0)
    assert [world.builder.metrics.kernel_calls for world in worlds] == [1, 1]
    assert stock_kernels == []


def test_steps_with_prefill_rows_are_stock(monkeypatch, model_folder, seeded, ranks):
    ranks.rank.value = 0
    world = World(monkeypatch, model_folder, heads=(HEADS, 1), config={"parallel_config.decode_context_parallel_size": RANKS})
    running = world.joined(40, 50)
    running[0].computed = 40
    metadata, _, _ = simulated.prepare(world.tables, [(running[0], 1), (running[1], 10)], world.groups)
    assert not hasattr(metadata[LAYERS[0]], "prefix_attn")
    assert world.builder.metrics.stock_steps == 1
