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


def _starts(counts):
    """Where each of them begins, and the last one ends."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = torch.cumsum(torch.tensor(counts), 0)
    return starts


class FlashAttention3:
    """vLLM's build of FlashAttention 3: paged decode."""

    name = "fa3"
    sums_in_float32 = True
    HEAD_DIMS = (64, 96, 128, 192, 256)
    MOST_HEADS_WITH_SINKS = 64

    def __init__(self, device):
        if device.type != "cuda":
            raise RuntimeError("a CUDA device is needed")
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        self.call = flash_attn_varlen_func

    def check(self, case):
        """Raises NotExpressible."""
        if case.kv_dtype:
            raise NotExpressible("8-bit K and V where Q has 16")
        if case.chunk:
            raise NotExpressible("chunks")
        if case.head_dim not in self.HEAD_DIMS or case.value_head_dim != case.head_dim:
            raise NotExpressible("other head dims than 64 to 256")
        if case.page_size % 16:
            raise NotExpressible("pages that are no multiple of 16 tokens")
        if max(case.lengths) == 0:
            raise NotExpressible("no tokens")
        if case.has_sinks and case.q_heads > self.MOST_HEADS_WITH_SINKS:
            raise NotExpressible(f"sinks of more than {self.MOST_HEADS_WITH_SINKS} query heads")

    def run(self, case, tensors):
        """Out and log-sum-exp. Raises NotExpressible."""
        self.check(case)
        more = {"s_aux": tensors.sinks.to(torch.bfloat16)} if tensors.sinks is not None else {}
        if more and not torch.equal(more["s_aux"].float(), tensors.sinks):
            raise NotExpressible("sinks that bf16, the only type that FlashAttention 3 takes, does not hold")
        rows = len(case.row_lengths)
        out, lse = self.call(
            q=tensors.q,
            k=tensors.k_clean,
            v=tensors.v_clean,
            max_seqlen_q=max(case.query_tokens),
            cu_seqlens_q=_starts(case.query_tokens).to(tensors.q.device),
            max_seqlen_k=max(case.lengths),
            seqused_k=_on(tensors.q.device, case.lengths),
            block_table=torch.from_numpy(case.padded_tables()).to(tensors.q.device),
            softmax_scale=case.scale,
            causal=True,
            window_size=[case.window - 1, 0] if case.window else [-1, -1],
            softcap=case.softcap,
            return_softmax_lse=True,
            fa_version=3,
            **more,
        )
        # [heads, rows] -> [rows, heads]. Whether it contains the sinks is its own matter.
        return out, None if more else lse.transpose(0, 1)[:rows]


class FlashInfer:
    """FlashInfer's kernels for several query tokens, which those for one share on tensor cores. Each kind of case is a module of
    its own that takes a minute or more to compile."""

    name = "flashinfer"
    sums_in_float32 = False
    """Log-sum-exps are those of weights that are rounded to 16 bits: they are counted, and do not make a case wrong."""
    WORKSPACE_BYTES = 1 << 30
    """Partial outputs of a decode batch with several query tokens and large groups take more than the 128 MiB of its examples."""
    MODULES = (
        ("float16", "", 128, False, False),
        ("bfloat16", "", 64, False, False),
        ("bfloat16", "", 128, True, False),
        ("float16", "", 64, False, True),
        ("bfloat16", "", 64, True, True),
        ("float16", "float8_e4m3fn", 128, False, False),
    )
    """Q's type, the type of K and V where that is another one, head dim, whether there is a window, and a soft cap."""

    def __init__(self, device):
        if device.type != "cuda":
            raise RuntimeError("a CUDA device is needed")
        import flashinfer

        workspace = torch.zeros(self.WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")

    @staticmethod
    def module(case):
        """The one that computes a case. Raises NotExpressible."""
        if case.has_sinks:
            raise NotExpressible("sinks")
        if case.chunk:
            raise NotExpressible("chunks")
        if any(len(set(scales)) > 1 for scales in case.scales):
            raise NotExpressible("factors of heads")
        if case.value_head_dim != case.head_dim:
            raise NotExpressible("V of another head dim")
        return case.dtype, case.kv_dtype, case.head_dim, bool(case.window), bool(case.softcap)

    def check(self, case):
        """Raises NotExpressible."""
        if self.module(case) not in self.MODULES:
            raise NotExpressible("modules that are not compiled here")
        if max(case.lengths) == 0:
            raise NotExpressible("no tokens")

    def run(self, case, tensors):
        """Out and log-sum-exp. Raises NotExpressible."""
        self.check(case)
        counts = [len(table) for table in case.block_tables]
        last = [length - (count - 1) * case.page_size if count else 0 for length, count in zip(case.lengths, counts)]
        self.wrapper.plan(
            _starts(case.query_tokens).to(tensors.q.device),
            _starts(counts).to(tensors.q.device),
            _on(tensors.q.device, [page for table in case.block_tables for page in table]),
            _on(tensors.q.device, last),
            case.q_heads,
            case.kv_heads,
            case.head_dim,
            case.page_size,
            causal=True,
            sm_scale=case.scale,
            window_left=case.window - 1 if case.window else -1,
            logits_soft_cap=case.softcap or None,
            q_data_type=tensors.q.dtype,
            kv_data_type=tensors.k_clean.dtype,
        )
        k_scale, v_scale = (scales[0] if scales else None for scales in case.scales)
        out, lse = self.wrapper.run(
            tensors.q, (tensors.k_clean, tensors.v_clean), k_scale=k_scale, v_scale=v_scale, return_lse=True
        )
        # FlashInfer's is to the base of 2.
        return out, lse * 0.6931471805599453
