"""Doubles of other libraries for tests: the same calls, attention computed by torch from the arrays that they are given."""

import types

import torch


class _Attention:
    """Attention of groups of queries over pages."""

    def __init__(self, _workspace, layout, backend="auto", use_tensor_cores=False):
        assert layout == "NHD"
        assert backend in ("fa2", "fa3") or not use_tensor_cores

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


class _Persistent(_Attention):
    def __init__(self, layout, _device):
        super().__init__(None, layout)

    def plan(self, *arrays, sm_scale, **_types):
        rows, indptr, indices, lengths, q_heads, kv_heads, _, _, page_size = arrays
        last = lengths - (indptr[1:] - indptr[:-1] - 1) * page_size
        self._plan(rows, indptr, indices, last, q_heads, kv_heads, page_size, sm_scale)

    def run(self, q, kv):
        return super().run(q, kv, return_lse=True)


def _xqa(q, kv, workspace, tables, lengths, _longest, *, bmm1_scale, bmm2_scale, out, kv_layout):
    assert kv_layout == "NHD" and bmm2_scale == 1.0 and not workspace[:1].any()
    attention, page_size = _Attention(None, kv_layout), kv[0].shape[1]
    pages = (lengths + page_size - 1) // page_size
    indptr = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    indices = torch.cat([table[:count] for table, count in zip(tables, pages)])
    rows = torch.arange(len(lengths) + 1, dtype=torch.int32)
    last = lengths - (pages - 1) * page_size
    attention._plan(rows, indptr, indices, last.int(), q.shape[1], kv[0].shape[2], page_size, bmm1_scale)
    return out.copy_(attention.run(q, kv))


def flashinfer_double(version):
    """Modules by name: FlashInfer."""

    def built(*_arguments):
        return types.SimpleNamespace(build_and_load=lambda: None)

    flashinfer = types.SimpleNamespace(
        __version__=version,
        BatchAttention=_Persistent,
        BatchDecodeWithPagedKVCacheWrapper=_Decode,
        BatchPrefillWithPagedKVCacheWrapper=_Prefill,
        MultiLevelCascadeAttentionWrapper=_Cascade,
        attention=types.SimpleNamespace(_core=types.SimpleNamespace(_gen_batch_attention_primary_module=built)),
        cascade=types.SimpleNamespace(gen_cascade_module=built),
        decode=types.SimpleNamespace(gen_batch_decode_module=built, xqa_batch_decode_with_kv_cache=_xqa),
        prefill=types.SimpleNamespace(gen_batch_prefill_module=built, _gen_batch_prefill_primary_module=built),
    )
    jit = {"flashinfer.jit": types.SimpleNamespace(), "flashinfer.jit.xqa": types.SimpleNamespace(gen_xqa_module=built)}
    return {"flashinfer": flashinfer, **jit}


def _paged_attention(q, k, v, tables, lengths, scale):
    """Of int32 tables and lengths, padded rows of pages."""
    page_size, group = k.shape[1], q.shape[1] // k.shape[2]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths.tolist()):
        pages = tables[row, : -(-length // page_size)].long()
        keys, values = (x[pages].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("hd,thd->ht", q[row].float(), keys) * scale
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values).to(q.dtype)
    return out


def vllm_double():
    """Modules by name: vLLM as far as its FlashAttention 3 is called."""

    def attend(*, q, k, v, out, seqused_k, block_table, softmax_scale, scheduler_metadata, fa_version, causal, **arguments):
        assert fa_version == 3 and causal and arguments["max_seqlen_q"] == 1
        assert scheduler_metadata in (None, "metadata")
        return out.copy_(_paged_attention(q, k, v, block_table, seqused_k, softmax_scale))

    def schedule(*, cache_seqlens, qkv_dtype, headdim, **_arguments):
        assert cache_seqlens.dtype == torch.int32 and qkv_dtype.itemsize == 2 and headdim
        return "metadata"

    interface = types.SimpleNamespace(FA3_AVAILABLE=True, FA3_UNAVAILABLE_REASON=None)
    attention = types.SimpleNamespace(
        flash_attn_varlen_func=attend, get_scheduler_metadata=schedule, flash_attn_interface=interface
    )
    return {
        "vllm": types.SimpleNamespace(__version__="0.0", vllm_flash_attn=attention),
        "vllm.vllm_flash_attn": attention,
        "vllm.vllm_flash_attn.flash_attn_interface": interface,
    }


def ours_double():
    """The package prefix_attn, ours."""

    class Planner:
        def __init__(self, shape, _device):
            assert shape[0] % shape[1] == 0

        def plan(self, tables, lengths, _page_size, _num_pages):
            assert tables.dtype == lengths.dtype == torch.int32
            return tables, lengths

    def run(plan, q, k, v, out, lse, *, scale):
        assert lse.shape == q.shape[:2]
        return out.copy_(_paged_attention(q, k, v, *plan, scale))

    return types.SimpleNamespace(AttentionShape=lambda *shape: shape, Planner=Planner, PlanBuffers=None, run=run)


def pat_double():
    """The package prefix_attn, PAT's."""

    class Tree:
        def __init__(self, _block_size):
            self.kernel_info = types.SimpleNamespace(to_gpu=lambda device: None)

        def build_radix_tree(self, lengths, tables):
            assert isinstance(lengths, list)
            self.batch = tables, torch.tensor(lengths)

        def pack_schedule(self, _tiles, group, kv_heads):
            self.heads = group * kv_heads

    def attend(q, k, v, tree, scale, out):
        assert q.shape[1] == 1 and q.shape[2] == tree.heads
        out.copy_(_paged_attention(q.squeeze(1), k, v, *tree.batch, scale).unsqueeze(1))

    return types.SimpleNamespace(PrefixTreeCPP=Tree, prefix_attn_with_kvcache=attend)


def codec_double(scale):
    """The package codec_gpu."""

    def build(lengths, tables, _page_size, sequences_per_node):
        assert sequences_per_node == 16 and tables.tolist() == sorted(tables.tolist())
        return tables, lengths

    return types.SimpleNamespace(
        build_prefix_tree=build, tree_attn=lambda q, k, v, tables, lengths: _paged_attention(q, k, v, tables, lengths, scale)
    )
