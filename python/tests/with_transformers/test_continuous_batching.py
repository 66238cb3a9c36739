"""Continuous batching end to end on the CPU: this library's decode steps against the stock path."""

import pytest
import torch
import transformers
from batching import configurations, generate, llama, prompts, qwen3
from greedy import check_greedy

import prefix_attn
import prefix_attn.hf
from prefix_attn.hf import engine, hooks, steps


def decode_here(model, requests, **settings):
    assert prefix_attn.hf.enable(model) is None
    prefix_attn.hf.reset_stats()
    tokens = generate(model, requests, **settings)
    return tokens, prefix_attn.hf.stats()


@pytest.mark.parametrize(
    ("make_model", "dtype", "count"),
    [(llama, torch.float16, 200), (llama, torch.bfloat16, 40), (qwen3, torch.float16, 40), (qwen3, torch.bfloat16, 40)],
)
def test_requests_that_join_and_leave(make_model, dtype, count, cpu_fast_path, shared_plans):
    """Prompts longer than what is left of a batch are computed in parts."""
    requests = prompts(count)
    stock = generate(make_model(dtype), requests)
    model = make_model(dtype)
    tokens, stats = decode_here(model, requests)
    same = check_greedy(model, requests, tokens, stock)
    assert same >= (0.9 if dtype == torch.float16 else 0.5) * len(requests)
    layers = model.config.num_hidden_layers
    assert stats["decode_steps"] > 20
    assert stats["kernel_calls"] == layers * stats["decode_steps"]
    # Steps with a prefill are transformers' own.
    assert stats["stock_steps"] > 0
    assert stats["kv_bytes_read"] < 0.7 * stats["kv_bytes_flat"]


def test_the_rule_sees_a_missing_token(cpu_fast_path, monkeypatch):
    step = steps.EagerBatch.step

    def short_step(batch, tables, lengths, *rest):
        return step(batch, tables, [length - 1 for length in lengths], *rest)

    monkeypatch.setattr(steps.EagerBatch, "step", short_step)
    requests = prompts(8)
    model = llama()
    tokens, _ = decode_here(model, requests)
    with pytest.raises(AssertionError, match="behind"):
        check_greedy(model, requests, tokens, tokens)


@pytest.mark.parametrize("batches", ["padded_batches", "graph_batches"])
def test_batches_of_fixed_sizes(batches, cpu_fast_path, request):
    request.getfixturevalue(batches)
    requests = prompts(13)
    model = llama()
    tokens, stats = decode_here(model, requests, max_requests_per_batch=7)
    assert stats["kernel_calls"] == 3 * stats["decode_steps"] > 0
    # Of 13: another order of sums may choose between logits that are equal but for rounding, which the rule allows.
    assert check_greedy(model, requests, tokens, generate(llama(), requests)) >= 10


@pytest.mark.parametrize(("page_size", "sharing"), [(4, True), (5, True), (32, False)])
def test_page_sizes_and_unshared_blocks(page_size, sharing, cpu_fast_path, shared_plans):
    requests = prompts(10, system_prompts=1)
    model = qwen3()
    settings = {"page_size": page_size, "allow_block_sharing": sharing, "max_blocks_per_request": 40}
    tokens, stats = decode_here(model, requests, **settings)
    assert stats["decode_steps"] > 0
    assert check_greedy(model, requests, tokens, generate(qwen3(), requests)) >= 9
    assert (stats["kv_bytes_read"] < stats["kv_bytes_flat"]) == sharing


def test_requests_are_offloaded_while_the_cache_is_too_small(cpu_fast_path):
    requests = prompts(8, system_prompts=4, system_tokens=40)
    model = llama()
    tokens, stats = decode_here(model, requests, num_blocks=20, new_tokens=40)
    assert stats["decode_steps"] > 0
    assert check_greedy(model, requests, tokens, generate(llama(), requests, new_tokens=40)) >= 7


def test_block_ids_and_lengths_are_what_transformers_gives_its_own_kernel(cpu_fast_path, monkeypatch):
    """Also where entries that are in use are replaced between two steps."""
    seen, prepared, given = [], [], []
    attend, step, prepare = steps.EagerBatch.attend, steps.EagerBatch.step, steps.DecodeSteps.prepare

    def seeing_attend(batch, q, k_cache, v_cache, k, v, scale):
        seen[-1].append(k_cache.shape[0])
        return attend(batch, q, k_cache, v_cache, k, v, scale)

    def seeing_step(batch, tables, lengths, slots, stream):
        prepared.append(([list(table) for table in tables], list(lengths), list(slots)))
        seen.append([])
        return step(batch, tables, lengths, slots, stream)

    def seeing_prepare(self, runner):
        io = engine.host_io(runner.inputs_and_outputs)
        rows, ends = len(io.requests_in_batch), io.cumulative_seqlens_k
        ends = ends["full_attention"] if isinstance(ends, dict) else ends
        given.append((io.block_table[0, :rows].tolist(), ends[: rows + 1].diff().tolist(), self.view))
        return prepare(self, runner)

    monkeypatch.setattr(steps.EagerBatch, "attend", seeing_attend)
    monkeypatch.setattr(steps.EagerBatch, "step", seeing_step)
    monkeypatch.setattr(steps.DecodeSteps, "prepare", seeing_prepare)
    requests = [prompts(1)[0]] * 4
    decode_here(llama(), requests, max_batch_tokens=512, new_tokens=40)
    assert len(prepared) == len(given) > 5
    for (tables, lengths, slots), (block_table, true_lengths, view), calls in zip(prepared, given, seen):
        assert lengths == true_lengths
        for table, row, length, slot in zip(tables, block_table, lengths, slots):
            assert [block * view.page_stride for block in table] == row[: len(table)]
            assert slot == table[(length - 1) // view.page_size] * view.page_size + (length - 1) % view.page_size
        # Every layer's pool has the blocks that the plan was made for.
        assert {-(-pages // view.page_stride) for pages in calls} == {view.num_blocks}
    replaced = [
        before[position] != after[position]
        for (tables, lengths, _), (next_tables, _, _) in zip(prepared, prepared[1:])
        for before, after, length in zip(tables, next_tables, lengths)
        for position in range(-(-length // view.page_size))
    ]
    # Requests with equal tokens fill equal blocks, of which one is kept.
    assert sum(replaced) >= 3
    assert view.page_stride == (1 if transformers.__version__ < "5.18" else 6)


def test_a_request_is_aborted_in_the_middle(cpu_fast_path, monkeypatch):
    requests = prompts(6)
    model = llama()
    assert prefix_attn.hf.enable(model) is None
    step, counted = steps.EagerBatch.step, []

    def cancelling_step(batch, *args):
        counted.append(args)
        if len(counted) == 4:
            manager.cancel_request("request 1")
        return step(batch, *args)

    monkeypatch.setattr(steps.EagerBatch, "step", cancelling_step)
    results = {}
    with model.continuous_batching_context_manager(**configurations(new_tokens=20)) as manager:
        for index, request in enumerate(requests):
            manager.add_request(request, request_id=f"request {index}")
        while len(results) < len(requests) - 1:
            output = manager.get_result(timeout=60)
            assert output is not None and output.error is None
            if output.request_id != "request 1":
                results[output.request_id] = output.generated_tokens
    left = [index for index in range(len(requests)) if index != 1]
    kept, tokens = [requests[index] for index in left], [results[f"request {index}"] for index in left]
    assert {len(each) for each in tokens} == {20}
    assert check_greedy(model, kept, tokens, generate(llama(), kept, new_tokens=20)) >= 4


@pytest.mark.parametrize("where", ["plan", "layer"])
def test_a_failure_is_the_requests_error_and_the_next_batch_runs(where, cpu_fast_path, monkeypatch):
    requests = prompts(3)
    model = llama()
    assert prefix_attn.hf.enable(model) is None

    def fail(*args, **kwargs):
        raise prefix_attn.CudaError("out of memory")

    with monkeypatch.context() as broken:
        if where == "layer":
            broken.setattr(prefix_attn, "append_kv", fail)
        else:
            broken.setattr(steps.EagerBatch, "step", fail)
        outputs = model.generate_batch(requests, **configurations())
    assert all("out of memory" in str(output.error) for output in outputs.values())
    assert check_greedy(model, requests, generate(model, requests), generate(llama(), requests)) >= 2


def test_models_with_what_the_kernels_lack_keep_their_stock_path(caplog, cpu_fast_path):
    config = transformers.GptOssConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=16,
        attn_implementation="paged|eager",
    )
    torch.manual_seed(3)
    model = transformers.GptOssForCausalLM(config).to(torch.float16).eval()
    assert "sliding_attention" in prefix_attn.hf.enable(model)
    assert caplog.text.count("keeps its stock attention") == 1
    assert model.config._attn_implementation == "paged|eager"
    prefix_attn.hf.reset_stats()
    requests = prompts(6, system_tokens=20)
    assert len(generate(model, requests)) == 6
    assert prefix_attn.hf.stats() == {}


def test_reasons():
    assert "float32" in prefix_attn.hf.unsupported(llama(torch.float32))
    model = llama()
    model.config.head_dim = 80
    assert "80" in prefix_attn.hf.unsupported(model)
    model = llama()
    model.config.sliding_window = 8
    model.config.attn_logit_softcapping = 30.0
    assert prefix_attn.hf.unsupported(model)
    zeros = [torch.zeros(1, 1, 1, 64)] * 5
    with pytest.raises(ValueError, match="window"):
        steps.flash_attn_with_kvcache(*zeros, None, None, window_size=(7, 0))
    with pytest.raises(RuntimeError, match="outside of continuous batching"):
        steps.flash_attn_with_kvcache(*zeros, None, None)


@pytest.mark.parametrize(
    "change", [{"head_dim": 96}, {"head_dim": 512}, {"num_attention_heads": 129, "num_key_value_heads": 1}]
)
def test_head_dims_and_groups_of_any_size_are_served(change):
    model = llama()
    model.config.update(change)
    assert prefix_attn.hf.unsupported(model) is None


@pytest.mark.parametrize("version", ["5.16.1", "5.18.0", "5.25.0", "6.0.0"])
def test_other_versions_are_refused_in_one_line(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(hooks, "_VERSION", hooks.Version(version))
    hooks.install.cache_clear()
    with pytest.raises(RuntimeError) as error:
        prefix_attn.hf.enable(llama())
    assert version in str(error.value) and "5.24" in str(error.value) and "\n" not in str(error.value)


def test_generate_without_continuous_batching_uses_stock_kernels():
    model, stock = llama(), llama()
    assert prefix_attn.hf.enable(model) is None
    stock.set_attn_implementation("sdpa")
    request = torch.tensor([prompts(1)[0]])
    if not prefix_attn.hf.attention_name().startswith("paged|"):
        made, expected = (one.generate(request, max_new_tokens=8, do_sample=False, pad_token_id=0) for one in (model, stock))
        assert torch.equal(made, expected)
