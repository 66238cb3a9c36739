"""FlashAttention's kernels in torch, for the stock path of the tests."""

import torch
from vllm.v1.attention.backends import flash_attn

FP8 = torch.float8_e4m3fn


def install(monkeypatch) -> list:
    """Put the stand-ins where `flash_attn` would have the kernels.

    Returns:
        A list that grows by (sequences, longest query) with each call of the attention kernel.
    """
    calls = []

    def attention(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, block_table, softmax_scale, causal, **kwargs):
        calls.append((len(cu_seqlens_q) - 1, max_seqlen_q))
        assert causal is True
        ends = cu_seqlens_q.tolist()
        for row, (begin, end) in enumerate(zip(ends, ends[1:])):
            tokens = int(seqused_k[row])
            pages = block_table[row, : -(-tokens // k.shape[1])].long()
            keys, values = (cache[pages].flatten(0, 1)[:tokens] for cache in (k, v))
            rows = q[begin:end]
            if k.dtype == FP8:
                assert q.dtype == FP8, "as FlashAttention 3 asks"
                factors = [kwargs[f"{name}_descale"][row][:, None] for name in "qkv"]
                keys, values = keys.float() * factors[1], values.float() * factors[2]
                rows = rows.float() * factors[0].repeat_interleave(q.shape[1] // k.shape[2], 0)
            else:
                assert q.dtype == k.dtype
            scores = softmax_scale, kwargs["softcap"], kwargs.get("s_aux"), kwargs["window_size"][0]
            out[begin:end] = attend(rows, keys, values, *scores)
        return out

    def write(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
        if kv_cache_dtype.startswith("fp8"):
            key, value = (
                (rows.float() / s.reshape(-1, 1)).to(FP8).view(torch.uint8) for rows, s in ((key, k_scale), (value, v_scale))
            )
        page_size = key_cache.shape[1]
        is_real = slot_mapping >= 0
        slots = slot_mapping[is_real]
        key_cache[slots // page_size, slots % page_size] = key[: len(is_real)][is_real]
        value_cache[slots // page_size, slots % page_size] = value[: len(is_real)][is_real]

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", attention, raising=False)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write, raising=False)
    monkeypatch.setattr(flash_attn.FlashAttentionImpl, "vllm_flash_attn_version", property(_three, _ignore), raising=False)
    return calls


def attend(q, keys, values, scale, softcap=0, sinks=None, behind=-1):
    """The last ``len(q)`` tokens of a sequence against all of it, or against themselves and ``behind`` tokens, in float32."""
    queries, tokens, groups = len(q), len(keys), q.shape[1] // keys.shape[1]
    places = torch.arange(tokens)[None, :] - torch.arange(tokens - queries, tokens)[:, None]
    mask = (places <= 0) & ((behind < 0) | (places >= -behind))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys.float().repeat_interleave(groups, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, queries, 1)], -1)
    weights = scores.softmax(-1)[..., :tokens]
    return torch.einsum("hqk,khd->qhd", weights, values.float().repeat_interleave(groups, 1)).to(q.dtype)


def _three(self):
    return 3


def _ignore(self, value):
    pass
