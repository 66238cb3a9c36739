"""SGLang's plug-in without a GPU: it is found, registers, and its decode batches equal the stock backend's on the CPU."""

import logging
from types import SimpleNamespace

import pytest
import sglang
import torch
from sglang.srt.beam_search import batch_tail, fork
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.plugins import load_plugins_by_group

import prefix_attn.sglang
from prefix_attn.sglang import backend

Q_HEADS, KV_HEADS, HEAD_DIM, PAGES = 8, 2, 64, 64


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    backend.stats.clear()


def runner_of(page_size, dtype=torch.bfloat16):
    pool = MHATokenToKVPool(
        PAGES * page_size, page_size, dtype, KV_HEADS, HEAD_DIM, layer_num=2, device="cpu", enable_memory_saver=False
    )
    generator = torch.Generator().manual_seed(page_size)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    rows = ReqToTokenPool(8, 1024, "cpu", enable_memory_saver=False)
    return SimpleNamespace(
        device="cpu", req_to_token_pool=rows, token_to_kv_pool=pool, page_size=page_size, use_mla_backend=False
    )


def decode_batch(runner, tables, lengths):
    """Requests in rows 1 and up; the token that is decoded stands last."""
    page_size = runner.page_size
    for row, table in enumerate(tables, start=1):
        slots = torch.cat([torch.arange(page * page_size, (page + 1) * page_size) for page in table])
        runner.req_to_token_pool.write((row, slice(0, len(slots))), slots.to(torch.int32))
    rows = torch.arange(1, 1 + len(tables))
    lengths = torch.tensor(lengths)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(tables),
        req_pool_indices=rows,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        out_cache_loc=runner.req_to_token_pool.req_to_token[rows, lengths - 1].long(),
        encoder_lens=None,
        spec_info=None,
    )


def decode(attention_backend, layer, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = batch.batch_size
    q, k, v = (torch.randn(rows, heads, HEAD_DIM, generator=generator).bfloat16() for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    attention_backend.init_forward_metadata(batch)
    return attention_backend.forward_decode(q.flatten(1), k, v, layer, batch)


def layer_of(layer_id=0, **options):
    return RadixAttention(Q_HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id, **options)


def test_the_entry_point_registers_the_backend():
    plugins = load_plugins_by_group("sglang.srt.plugins")
    register, distribution = plugins["prefix_attn"]
    assert (register, distribution) == (prefix_attn.sglang.register, "prefix-attn")
    register()
    register()
    assert prefix_attn.sglang.choices().ATTENTION_BACKEND_CHOICES.count("prefix_attn") == 1
    made = ATTENTION_BACKENDS["prefix_attn"](runner_of(16))
    assert isinstance(made, TorchNativeAttnBackend) and type(made) is not TorchNativeAttnBackend


def test_other_versions_are_named_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(sglang, "__version__", "0.6.0")
    monkeypatch.delitem(ATTENTION_BACKENDS, "prefix_attn", raising=False)
    with caplog.at_level(logging.WARNING):
        prefix_attn.sglang.register()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0.6.0" in caplog.text and "0.5.23" in caplog.text
    assert "prefix_attn" not in ATTENTION_BACKENDS


@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_batches_equal_the_stock_backend(page_size):
    # A radix cache's requests: a prompt that all share, beams that share more, a page that each has alone.
    tables = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7], [8], [1, 2, 3, 9]]
    lengths = [page_size * len(table) - (1 if page_size > 1 and row % 2 else 0) for row, table in enumerate(tables)]
    results = []
    for stock in (True, False):
        runner = runner_of(page_size)
        batch = decode_batch(runner, tables, lengths)
        made = TorchNativeAttnBackend(runner) if stock else backend.backend_over(TorchNativeAttnBackend)(runner)
        outs = [decode(made, layer_of(layer_id), batch, seed=layer_id) for layer_id in range(2)]
        pools = [buffer.clone() for buffer in (*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer)]
        results.append((outs, pools))
    (stock_outs, stock_pools), (outs, pools) = results
    for one, other in zip(outs, stock_outs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=0)
    assert all(torch.equal(one, other) for one, other in zip(pools, stock_pools, strict=True))
    assert backend.stats == {"decode_batches": 2, "kernel_calls": 2}


@pytest.mark.parametrize("options", [{"sliding_window_size": 7}, {"is_cross_attention": True}, {"logit_cap": 30.0}])
def test_layers_with_more_go_to_the_stock_backend(options, monkeypatch):
    called = []
    monkeypatch.setattr(TorchNativeAttnBackend, "forward_decode", lambda *args, **kwargs: called.append(args) or "stock")
    runner = runner_of(16)
    made = backend.backend_over(TorchNativeAttnBackend)(runner)
    assert decode(made, layer_of(**options), decode_batch(runner, [[1]], [9])) == "stock"
    assert len(called) == 1 and backend.stats == {"decode_batches": 1, "stock_calls": 1}


@pytest.fixture
def forgetful():
    """What was asked of kernels is asked again."""
    backend._has_kernels.cache_clear()
    yield
    backend._has_kernels.cache_clear()


def test_heads_without_a_kernel_go_to_the_stock_backend(forgetful, caplog):
    assert backend._has_kernels(8, 2, 128, torch.bfloat16, 16) and caplog.text == ""
    assert not backend._has_kernels(8, 2, 80, torch.bfloat16, 16)
    assert not backend._has_kernels(8, 2, 128, torch.float32, 16)
    assert "80" in caplog.text and "float32" in caplog.text


@pytest.mark.parametrize("heads", [(8, 2, 96), (8, 2, 512), (129, 1, 64), (65, 1, 256)])
def test_head_dims_and_groups_of_any_size_have_kernels(heads, forgetful, caplog):
    assert backend._has_kernels(*heads, torch.bfloat16, 16) and caplog.text == ""


def test_cuda_graphs_and_mla_are_refused_at_start():
    made = backend.backend_over(TorchNativeAttnBackend)(runner_of(16))
    with pytest.raises(ValueError, match="--disable-cuda-graph"):
        made.init_cuda_graph_state(8, 8)
    prefix_attn.sglang.register()
    mla = runner_of(16)
    mla.use_mla_backend = True
    with pytest.raises(ValueError, match="MLA"):
        ATTENTION_BACKENDS["prefix_attn"](mla)


def test_beams_that_share_a_prompt_and_change_parents():
    """SGLang's beam search forks rows behind a prompt, puts them behind the batch's, and gives survivors their parents' slots."""
    width, prompt, steps = 6, 24, 4
    leader, members, other = 1, torch.arange(2, 1 + width), 7
    results = []
    for stock in (True, False):
        runner = runner_of(1)
        table = runner.req_to_token_pool.req_to_token
        made = TorchNativeAttnBackend(runner) if stock else backend.backend_over(TorchNativeAttnBackend)(runner)
        free = iter(torch.randperm(PAGES, generator=torch.Generator().manual_seed(1)).add(1).tolist())
        group = SimpleNamespace(member_rows=members, member_rows_cpu=members, num_member_rows=width - 1, retired=False)
        for row, length in ((leader, prompt), (other, 5)):
            table[row, :length] = torch.tensor([next(free) for _ in range(length)], dtype=torch.int32)
        fork.alias_members_prompt_kv(table, members, leader, prompt)
        rows = torch.cat([torch.tensor([leader]), members])
        outs, parents = [], torch.Generator().manual_seed(2)
        for step in range(steps):
            lengths = torch.tensor([prompt + step + 1, 5 + step + 1])
            batch = SimpleNamespace(
                reqs=[SimpleNamespace(beam_group=group), SimpleNamespace(beam_group=None)],
                beam_tail=None,
                device="cpu",
                req_pool_indices=torch.tensor([leader, other]),
                req_pool_indices_cpu=torch.tensor([leader, other]),
                seq_lens=lengths,
                seq_lens_cpu=lengths,
                orig_seq_lens=lengths,
                forward_mode=ForwardMode.DECODE,
                encoder_lens=None,
                spec_info=None,
            )
            batch_tail.append_beam_tail(batch)
            batch.batch_size = len(batch.seq_lens)
            assert batch.batch_size == width + 1
            for row, length in zip(batch.req_pool_indices, batch.seq_lens):
                table[row, length - 1] = next(free)
            batch.out_cache_loc = table[batch.req_pool_indices, batch.seq_lens - 1].long()
            outs += [decode(made, layer_of(layer_id), batch, seed=2 * step + layer_id) for layer_id in range(2)]
            survivors = torch.randint(width, (width,), generator=parents)
            fork.remap_kv_mapping(table, rows, survivors, prompt, prompt + step + 1)
        results.append(outs)
        if not stock:
            [plan] = made._plans.values()
            summary = plan.summary()
            # The prompt counts once for the six rows.
            assert summary["unique_kv_bytes"] < 0.5 * summary["flat_kv_bytes"]
    for one, other_out in zip(*results, strict=True):
        torch.testing.assert_close(one, other_out, atol=2e-2, rtol=0)
    assert backend.stats == {"decode_batches": 2 * steps, "kernel_calls": 2 * steps}
