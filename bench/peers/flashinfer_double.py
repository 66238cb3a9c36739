"""A double of FlashInfer for tests: the same calls, attention computed by torch from the arrays that were planned with."""

import types

import torch


class _Attention:
    """Attention of groups of queries over pages."""

    def __init__(self, _workspace, layout, backend="auto", use_tensor_cores=False):
        assert layout == "NHD"
        assert backend == "fa2" or not use_tensor_cores

    def _plan(self, qo_indptr, kv_indptr, kv_indices, last_page_len, q_heads, kv_heads, page_size, sm_scale):
        for array in (qo_indptr, kv_indptr, kv_indices, last_page_len):
            assert array.dtype == torch.int32
        self._groups = []
        for group in range(len(kv_indptr) - 1):
            pages = kv_indices[kv_indptr[group] : kv_indptr[group + 1]].long()
            tokens = max(len(pages) - 1, 0) * page_size + int(last_page_len[group])
            self._groups.append((slice(int(qo_indptr[group]), int(qo_indptr[group + 1])), pages, tokens))
        self._group_size, self._scale = q_heads // kv_heads, sm_scale

    def run(self, q, kv, return_lse=False):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for rows, pages, tokens in self._groups:
            k, v = (x[pages].flatten(0, 1)[:tokens].float().repeat_interleave(self._group_size, 1) for x in kv)
            scores = torch.einsum("bhd,thd->bht", q[rows].float(), k) * self._scale
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("bht,thd->bhd", scores.softmax(-1), v).to(q.dtype)
        return (out, lse) if return_lse else out


class _Decode(_Attention):
    def plan(self, indptr, indices, last, q_heads, kv_heads, _head_dim, page_size, *, sm_scale, q_data_type, kv_data_type):
        assert q_data_type == kv_data_type
        rows = torch.arange(len(last) + 1, dtype=torch.int32)
        self._plan(rows, indptr, indices, last, q_heads, kv_heads, page_size, sm_scale)


class _Prefill(_Attention):
    def plan(self, *arrays, sm_scale, **_types):
        qo_indptr, kv_indptr, kv_indices, last_page_len, q_heads, kv_heads, _head_dim, page_size = arrays
        self._plan(qo_indptr, kv_indptr, kv_indices, last_page_len, q_heads, kv_heads, page_size, sm_scale)


class _Cascade:
    def __init__(self, levels, workspace, layout):
        self._batch_prefill_wrappers = [_Prefill(workspace, layout) for _ in range(levels)]

    def plan(self, qo, kv, indices, last, *shape, **options):
        for wrapper, *arrays in zip(self._batch_prefill_wrappers, qo, kv, indices, last, strict=True):
            wrapper.plan(*arrays, *shape, **options)

    def run(self, q, kv):
        outs, lses = zip(*(wrapper.run(q, kv, return_lse=True) for wrapper in self._batch_prefill_wrappers))
        weights = torch.stack(lses).softmax(0)
        return sum(weight[..., None] * out.float() for weight, out in zip(weights, outs)).to(q.dtype)


def flashinfer_double(version):
    """Stands for the module."""
    built = types.SimpleNamespace(build_and_load=lambda: None)
    return types.SimpleNamespace(
        __version__=version,
        BatchDecodeWithPagedKVCacheWrapper=_Decode,
        BatchPrefillWithPagedKVCacheWrapper=_Prefill,
        MultiLevelCascadeAttentionWrapper=_Cascade,
        jit=types.SimpleNamespace(
            gen_batch_decode_module=lambda *_: built,
            gen_batch_prefill_module=lambda *_: built,
            cascade=types.SimpleNamespace(gen_cascade_module=lambda: built),
        ),
    )
