"""Implementations by others, as far as they are installed and can express a case."""

import torch


class NotExpressible(Exception):
    """The case is beyond what the implementation computes; the message says why."""


def installed(names, device):
    """Those of `names` that can be imported; says which cannot."""
    found = []
    for name in names:
        try:
            found.append({"fa3": FlashAttention3, "flashinfer": FlashInfer}[name](device))
        except (ImportError, RuntimeError) as error:
            print(f"{name}: not here ({error})")
    return found


def _on(device, values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def _require_plain(case):
    if any(count != 1 for count in case.query_tokens):
        raise NotExpressible("several query tokens, of which ours are rows")


class FlashAttention3:
    """vLLM's build of FlashAttention 3: paged decode."""

    name = "fa3"

    def __init__(self, device):
        if device.type != "cuda":
            raise RuntimeError("a CUDA device is needed")
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        self.call = flash_attn_varlen_func

    def run(self, case, tensors):
        """Out and log-sum-exp. Raises NotExpressible."""
        _require_plain(case)
        if case.page_size % 16:
            raise NotExpressible("pages that are no multiple of 16 tokens")
        if max(case.lengths) == 0:
            raise NotExpressible("no tokens")
        more = {"s_aux": tensors.sinks.to(torch.bfloat16)} if tensors.sinks is not None else {}
        if more and not torch.equal(more["s_aux"].float(), tensors.sinks):
            raise NotExpressible("sinks that bf16, the only type that FlashAttention 3 takes, does not hold")
        rows = len(case.lengths)
        out, lse = self.call(
            q=tensors.q,
            k=tensors.k_clean,
            v=tensors.v_clean,
            max_seqlen_q=1,
            cu_seqlens_q=_on(tensors.q.device, list(range(rows + 1))),
            max_seqlen_k=max(case.lengths),
            seqused_k=_on(tensors.q.device, case.lengths),
            block_table=torch.from_numpy(case.padded_tables()).to(tensors.q.device),
            softmax_scale=case.scale,
            causal=True,
            softcap=case.softcap,
            return_softmax_lse=True,
            fa_version=3,
            **more,
        )
        # [heads, rows] -> [rows, heads]. Whether it contains the sinks is its own matter.
        return out, None if more else lse.transpose(0, 1)[:rows]


class FlashInfer:
    """FlashInfer's decode on tensor cores."""

    name = "flashinfer"
    WORKSPACE_BYTES = 128 << 20

    def __init__(self, device):
        if device.type != "cuda":
            raise RuntimeError("a CUDA device is needed")
        import flashinfer

        workspace = torch.zeros(self.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )

    def run(self, case, tensors):
        """Out and log-sum-exp. Raises NotExpressible."""
        _require_plain(case)
        if max(case.lengths) == 0:
            raise NotExpressible("no tokens")
        if case.has_sinks:
            raise NotExpressible("sinks")
        if case.softcap or case.head_dim > 128:
            raise NotExpressible("soft caps and head dims above 128: modules of their own, which take a minute to compile")
        counts = [len(table) for table in case.block_tables]
        indptr = torch.zeros(len(counts) + 1, dtype=torch.int32)
        indptr[1:] = torch.cumsum(torch.tensor(counts), 0)
        last = [length - (count - 1) * case.page_size if count else 0 for length, count in zip(case.lengths, counts)]
        self.wrapper.plan(
            indptr,
            _on(tensors.q.device, [page for table in case.block_tables for page in table]),
            torch.tensor(last, dtype=torch.int32),
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            case.page_size,
            q_data_type=tensors.q.dtype,
            kv_data_type=tensors.q.dtype,
            sm_scale=case.scale,
        )
        out, lse = self.wrapper.run(tensors.q, (tensors.k_clean, tensors.v_clean), return_lse=True)
        # FlashInfer's is to the base of 2.
        return out, lse * 0.6931471805599453
