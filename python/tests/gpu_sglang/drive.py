#!/usr/bin/env python3
"""SGLang's engine, radix cache on, eager: greedy tokens and log-probs as JSON, as python/tests/gpu_vllm/compare.py reads them.

  drive.py OUT.json BACKEND TASK ...      TASK: PROMPTSxSHARED+OWN:OUT[:BATCH]
"""

import glob
import json
import os
import random
import sys
import time

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, VOCAB = 4, 1024, 16, 4, 64, 32000


def make_model(folder):
    """Random weights that make tokens depend on attention: scores of standard deviation about 3."""
    import torch
    from safetensors.torch import save_file

    os.makedirs(folder, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns, gain=1.0, fan_in=None):
        return (torch.randn(rows, columns, generator=generator) * gain * (fan_in or columns) ** -0.5).bfloat16()

    out = (2 * LAYERS) ** -0.5
    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 1.0, 1), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
    weights["lm_head.weight"] = matrix(VOCAB, HIDDEN, 1.5)
    for i in range(LAYERS):
        name = f"model.layers.{i}."
        key = matrix(KV_HEADS * DIM, HIDDEN, 1.8)
        query = matrix(HEADS * DIM, HIDDEN, 1.8)
        # A token attends to itself more than to another, so that one left out is seen.
        shared = key.view(KV_HEADS, 1, DIM, HIDDEN).expand(-1, HEADS // KV_HEADS, -1, -1).reshape(HEADS * DIM, HIDDEN)
        weights[name + "self_attn.q_proj.weight"] = (query.float() * 0.91**0.5 + shared.float() * 0.3).bfloat16()
        weights[name + "self_attn.k_proj.weight"] = key
        weights[name + "self_attn.v_proj.weight"] = matrix(KV_HEADS * DIM, HIDDEN, 2.0)
        weights[name + "self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * DIM, out)
        weights[name + "mlp.gate_proj.weight"] = matrix(3072, HIDDEN)
        weights[name + "mlp.up_proj.weight"] = matrix(3072, HIDDEN)
        weights[name + "mlp.down_proj.weight"] = matrix(HIDDEN, 3072, out)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[name + norm + ".weight"] = torch.ones(HIDDEN).bfloat16()
    save_file(weights, folder + "/model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=HIDDEN, num_hidden_layers=LAYERS, head_dim=DIM,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=3072, vocab_size=VOCAB, hidden_act="silu",
        max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=False,
        torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )
    with open(folder + "/config.json", "w") as file:
        json.dump(config, file)


def main():
    path, backend, *tasks = sys.argv[1:]
    folder = os.environ["PAT_MODEL"]
    stats = os.environ["PAT_STATS"] = path[:-5] + ".stats"
    import sglang

    start = time.time()
    engine = sglang.Engine(
        model_path=folder, skip_tokenizer_init=True, attention_backend=backend, page_size=16, disable_cuda_graph=True,
        sampling_backend="pytorch", disable_custom_all_reduce=True, mem_fraction_static=0.25, max_total_tokens=60000,
        max_running_requests=64, context_length=4096, random_seed=0, dtype="bfloat16", log_level="info",
        chunked_prefill_size=2048,
    )
    print("engine up after %.1f s, sglang %s" % (time.time() - start, sglang.__version__), flush=True)
    record = dict(tasks={})
    for task in tasks:
        size, out, *batch = task.split(":")
        count, rest = size.split("x")
        shared, own = map(int, rest.split("+"))
        r = random.Random("tokens")
        prefix = [r.randrange(10, VOCAB) for _ in range(shared)]
        prompts = [prefix + [r.randrange(10, VOCAB) for _ in range(own)] for _ in range(int(count))]
        batch = int(batch[0]) if batch else len(prompts)
        params = dict(temperature=0.0, max_new_tokens=int(out), ignore_eos=True)
        engine.flush_cache()
        engine.generate(input_ids=[prefix + [11]], sampling_params=dict(params, max_new_tokens=1))
        requests, cached, start = [], 0, time.time()
        for begin in range(0, len(prompts), batch):
            given = engine.generate(
                input_ids=prompts[begin : begin + batch], sampling_params=params, return_logprob=True, top_logprobs_num=2,
            )
            for one in given:
                meta = one["meta_info"]
                cached += meta["cached_tokens"]
                tokens = [entry[1] for entry in meta["output_token_logprobs"]]
                top = []
                for (own_lp, token, *_), candidates in zip(meta["output_token_logprobs"], meta["output_top_logprobs"]):
                    top.append((own_lp, own_lp - max(c[0] for c in candidates if c[1] != token)))
                assert len(tokens) == int(out), len(tokens)
                requests.append(dict(tokens=tokens, top=top))
        record["tasks"]["tokens:" + task] = dict(requests=requests)
        print(task, "%.2f s, %d cached prompt tokens" % (time.time() - start, cached), flush=True)
    time.sleep(0.3)
    record["stats"] = [json.load(open(name)) for name in glob.glob(stats + ".*") if not name.endswith(".part")]
    print("stats", record["stats"], flush=True)
    if backend == "prefix_attn":
        assert any(s.get("kernel_calls", 0) >= LAYERS * 20 for s in record["stats"]), "our kernels were not called"
    with open(path, "w") as file:
        json.dump(record, file)
    print("DONE", flush=True)
    engine.shutdown()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make_model(sys.argv[2])
    else:
        main()
