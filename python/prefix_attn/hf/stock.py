"""What serves the steps with a prefill: flash-attn where it is installed, else torch's own kernels, behind flash-attn's
signatures."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F


@functools.cache
def _installed():
    try:
        import flash_attn
    except ImportError:
        return None
    return flash_attn


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None):
    """Attention of [B, T, H, d] tensors."""
    _refuse(window_size, softcap, s_aux)
    installed = _installed()
    if installed is not None and q.is_cuda:
        return installed.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal)
    return _sdpa(q, k, v, softmax_scale, causal, dropout_p)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    s_aux=None,
):
    """Attention of sequences that stand one behind the other in [tokens, H, d] tensors; the last queries of a sequence stand
    at its last keys."""
    _refuse(window_size, softcap, s_aux)
    installed = _installed()
    if installed is not None and q.is_cuda:
        return installed.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal
        )
    if q.is_cuda:
        return _torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = torch.zeros_like(q)
    for begin_q, end_q, begin_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        if end_q > begin_q:
            queries, keys, values = q[None, begin_q:end_q], k[None, begin_k:end_k], v[None, begin_k:end_k]
            out[begin_q:end_q] = _sdpa(queries, keys, values, softmax_scale, causal, dropout_p)[0]
    return out


def _torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]
    options = {"scale": softmax_scale, "window_size": (-1, 0) if causal else (-1, -1)}
    if group > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def _sdpa(q, k, v, softmax_scale, causal, dropout_p):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None
    if causal and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def _refuse(window_size, softcap, s_aux) -> None:
    if tuple(window_size) not in {(-1, -1), (-1, 0)} or softcap or s_aux is not None:
        raise ValueError("prefix_attn.hf: a window, soft cap or sinks; prefix_attn.hf.enable(model) would have said so")
