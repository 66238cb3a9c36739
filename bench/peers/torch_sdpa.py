"""PyTorch's scaled_dot_product_attention: what one has without any paged kernel."""

import torch

from methods import NotRunnable, Prepared

MEMORY_SHARE = 0.9
"""Of the free memory, what the contiguous copy may take."""


class TorchSdpa:
    """Attention over a contiguous, padded copy of K and V.

    The query heads of a KV head are passed as its queries: without a causal mask that is the same, and every backend of
    PyTorch then reads K and V once per group.
    """

    version = torch.__version__
    note = (
        "scaled_dot_product_attention over a contiguous, padded copy of each sequence's K and V; making the copy is not in its "
        "times; a mask only where lengths differ"
    )

    def compile(self, configuration):
        """Nothing to build."""

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        kv_heads, head_dim, longest = configuration.nheads_kv, configuration.head_dim, max(batch.lengths, default=0)
        if min(batch.lengths, default=0) == 0:
            raise NotRunnable("a sequence is empty")
        shape = (len(batch.lengths), kv_heads, longest, head_dim)
        needed = 2 * case.q.element_size() * torch.Size(shape).numel()
        if case.q.is_cuda:
            # What the caching allocator holds and does not use is not free for the driver.
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(case.q.device)
            if needed > MEMORY_SHARE * free:
                raise NotRunnable(f"the contiguous copy takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        k, v = (torch.zeros(shape, dtype=case.q.dtype, device=case.q.device) for _ in range(2))
        for sequence, (length, table) in enumerate(zip(batch.lengths, batch.block_tables)):
            pages = torch.tensor(table[: -(-length // batch.page_size)], device=case.q.device)
            for contiguous, pool in ((k, case.k), (v, case.v)):
                tokens = pool[pages].reshape(-1, kv_heads, head_dim)[:length]
                contiguous[sequence, :, :length] = tokens.transpose(0, 1)
        q = case.q.reshape(len(batch.lengths), kv_heads, -1, head_dim)
        mask = None
        if min(batch.lengths) != longest:
            lengths = torch.tensor(batch.lengths, device=q.device)
            mask = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
        scale = configuration.softmax_scale

        def call():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        return Prepared(call=call, answer=lambda out: out.reshape(case.q.shape))
