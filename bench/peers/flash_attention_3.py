"""FlashAttention 3 as vLLM builds and calls it: paged decode, the query heads of a GQA group packed into one tile."""

import torch

from methods import NotRunnable, Prepared, Unavailable

PAGE_SIZE_MULTIPLE = 16


class FlashAttention3:
    """`flash_attn_varlen_func` with `fa_version=3`. `scheduled`: with the metadata that a kernel of its own computes from the
    lengths, once for all layers of a step, as vLLM's backend does; without, each call runs that kernel."""

    def __init__(self, scheduled):
        try:
            from vllm import __version__ as vllm_version
            from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
            from vllm.vllm_flash_attn.flash_attn_interface import FA3_AVAILABLE, FA3_UNAVAILABLE_REASON
        except ImportError as error:
            raise Unavailable(f"vLLM's FlashAttention cannot be imported ({error})") from error
        if not FA3_AVAILABLE:
            raise Unavailable(f"vLLM has no FlashAttention 3 here ({FA3_UNAVAILABLE_REASON})")
        self._attend, self._schedule, self._scheduled = flash_attn_varlen_func, get_scheduler_metadata, scheduled
        self.version = f"vLLM {vllm_version} (torch {torch.__version__})"
        what = "get_scheduler_metadata in its plan time" if scheduled else "no scheduler metadata"
        self.note = f"flash_attn_varlen_func of vLLM, fa_version=3, paged, {what}"

    def compile(self, configuration):
        """Nothing to build."""

    def prepare(self, case):
        configuration, batch, device = case.configuration, case.configuration.batch, case.q.device
        if max(batch.lengths, default=0) == 0:
            raise NotRunnable("no sequence has tokens")
        if batch.page_size % PAGE_SIZE_MULTIPLE:
            raise NotRunnable(f"pages of {batch.page_size} tokens, a multiple of {PAGE_SIZE_MULTIPLE} is needed")
        rows, longest = len(batch.lengths), max(batch.lengths)
        tables = case.tables
        lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=device)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        out = torch.full_like(case.q, float("nan"))
        metadata = None

        def plan():
            nonlocal metadata
            metadata = self._schedule(
                batch_size=rows,
                max_seqlen_q=1,
                max_seqlen_k=longest,
                num_heads_q=configuration.nheads_q,
                num_heads_kv=configuration.nheads_kv,
                headdim=configuration.head_dim,
                cache_seqlens=lengths,
                qkv_dtype=case.q.dtype,
                cu_seqlens_q=starts,
                page_size=batch.page_size,
                causal=True,
                num_splits=0,
            )

        def call():
            return self._attend(
                q=case.q,
                k=case.k,
                v=case.v,
                out=out,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lengths,
                max_seqlen_k=longest,
                softmax_scale=configuration.softmax_scale,
                causal=True,
                block_table=tables,
                scheduler_metadata=metadata,
                fa_version=3,
                num_splits=0,
            )

        return Prepared(call=call, plan=plan if self._scheduled else None)
