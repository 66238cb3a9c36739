"""Looks into an engine of this process: what each layer's attention gives beside float32, and log-probs of given tokens.

`install()` wraps `Impl.forward` and vLLM's sampler before the engine is made. Under FULL graphs the comparison is captured with
the layers, so that every replay adds to it.
"""

import functools
import time

import torch

#: Candidates whose log-probs are kept: enough that their mean over a step has little noise of its own.
CANDIDATES = 256
#: The first id of a token that prompts use.
FIRST_TOKEN = 10


class State:
    """What the wrapped methods do."""

    def __init__(self):
        #: Who serves decode rows of steps without graphs: "ours", "stock" or "float32".
        self.server = "ours"
        #: Steps run without graphs.
        self.is_eager = False
        #: Each layer's decode rows are compared with float32.
        self.is_comparing = False
        #: The sampler's tokens are replaced by those of `next_token`, and log-probs kept.
        self.is_forcing = False
        self.vocab = self.drafts = 0
        self.errors: dict[str, torch.Tensor] = {}
        self.kept: list[tuple] = []
        #: Seconds that the metadata builders of all groups took on the host, by step.
        self.built: list[float] = []


STATE = State()


def install(is_comparing: bool, vocab: int, drafts: int) -> None:
    """Once, before the engine is made."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from prefix_attn.vllm.impl import Impl

    STATE.is_comparing, STATE.vocab, STATE.drafts = is_comparing, vocab, drafts
    own_forward, own_sample, own_dispatch = Impl.forward, Sampler.sample, CudaGraphManager.dispatch
    own_prepare = DefaultModelState.prepare_attn

    def forward(self, layer, query, key, value, kv_cache, metadata, output, **scales):
        inputs = layer, query, key, value, kv_cache, metadata
        split = getattr(metadata, "prefix_attn", None)
        if split is not None and STATE.server == "stock":
            stock_forward(self, inputs, output, scales)
        else:
            own_forward(self, *inputs, output=output, **scales)
        if split is None or (not STATE.is_comparing and STATE.server != "float32"):
            return output
        tokens = split.decode_tokens
        if tokens not in (split.decode_rows, split.decode_rows * (1 + STATE.drafts)):
            return output  # rows with unequal numbers of drafts, the steps in which requests begin or end
        behind = (self.sliding_window or (-1, -1))[0]
        scores = self.scale, self.sinks, behind + 1 if behind >= 0 else None, self.logits_soft_cap
        factors = layer._k_scale, layer._v_scale
        right, is_real = exact(query[:tokens], self._caches(kv_cache), factors, metadata, split.decode_rows, *scores)
        if STATE.server == "float32":
            output[:tokens] = torch.where(is_real[:, None, None], right, 0).to(output.dtype)
        else:
            stock = torch.empty_like(output)
            stock_forward(self, inputs, stock, scales)
            add_errors(layer.layer_name, output[:tokens], stock[:tokens], right, is_real)
        return output

    def stock_forward(impl, inputs, output, scales):
        # Over an FP8 cache FlashAttention's queries are FP8.
        impl._stock(*inputs, output, scales.get("output_scale"), scales.get("output_block_scale"))

    def sample(self, logits, expanded_idx_mapping, idx_mapping_np, pos, input_ids, *args, **kwargs):
        sampled, processed = own_sample(self, logits, expanded_idx_mapping, idx_mapping_np, pos, input_ids, *args, **kwargs)
        if STATE.is_forcing:
            scores = logits.float()[:, candidates(logits.device)]
            STATE.kept.append((pos.clone(), input_ids.clone(), scores - scores.mean(-1, keepdim=True), logits.float().topk(2)))
            sampled = next_token(input_ids.long(), pos.long()).to(sampled.dtype).view_as(sampled)
        return sampled, processed

    def dispatch(self, num_reqs, num_tokens, uniform_token_count, *args, **kwargs):
        # In FULL_DECODE_ONLY no graph is captured for batches that are not uniform.
        return own_dispatch(self, num_reqs, num_tokens, None if STATE.is_eager else uniform_token_count, *args, **kwargs)

    def prepare_attn(self, *args, **kwargs):
        start = time.perf_counter()
        prepared = own_prepare(self, *args, **kwargs)
        STATE.built.append(time.perf_counter() - start)
        return prepared

    Impl.forward, Sampler.sample, CudaGraphManager.dispatch = forward, sample, dispatch
    DefaultModelState.prepare_attn = functools.wraps(own_prepare)(prepare_attn)


def candidates(device) -> torch.Tensor:
    """Ids of tokens spread over the vocabulary."""
    return torch.arange(CANDIDATES, device=device) * (STATE.vocab // CANDIDATES)


def next_token(token, position):
    """The token behind `token` at `position`: other rows have other tokens, at any time, if they differ at first."""
    count = STATE.vocab - FIRST_TOKEN
    return ((token - FIRST_TOKEN) * 48271 + position * 69621 + 11) % count + FIRST_TOKEN


def exact(query, caches, factors, metadata, rows: int, scale: float, sinks=None, window=None, softcap=None):
    """Attention of the first rows' query tokens in float32, by the device's own tables and lengths.

    Args:
        query: ``[tokens, q_heads, head_dim]``, equally many tokens for each row.
        caches: K and V ``[pages, page_size, kv_heads, head_dim]``; of 8 bits as uint8.
        factors: what K and V of 8 bits are multiplied with.
        sinks: ``[q_heads]``, one more score of each head, without a value.
        window: tokens that a query token sees at most.
        softcap: scores are ``softcap * tanh(score / softcap)``, where it is not 0.

    Returns:
        ``[tokens, q_heads, head_dim]``, and which of these tokens are a request's.
    """
    tokens, q_heads, head_dim = query.shape
    each = tokens // rows
    kv_heads = caches[0].shape[2]
    out = torch.empty(tokens, q_heads, head_dim, device=query.device)
    is_real = torch.empty(tokens, dtype=torch.bool, device=query.device)
    table, lengths = metadata.block_table, metadata.seq_lens
    newest = torch.arange(1 - each, 1, device=query.device)
    for begin in range(0, rows, 16):
        part = slice(begin, min(begin + 16, rows))
        keys, values = (
            as_float32(cache[table[part].long()].flatten(1, 2), factor) for cache, factor in zip(caches, factors)
        )
        seen = lengths[part, None] + newest
        places = torch.arange(keys.shape[1], device=query.device)
        mask = places < seen[:, :, None]
        if window is not None:
            mask &= places >= seen[:, :, None] - window
        # What no query token sees may be anything, infinities and NaN included.
        held = mask.any(1)[:, :, None, None]
        keys, values = keys.where(held, 0), values.where(held, 0)
        q = query[part.start * each : part.stop * each].float().view(-1, each, kv_heads, q_heads // kv_heads, head_dim)
        scores = torch.einsum("rnhgd,rthd->rnhgt", q, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask[:, :, None, None, :], -torch.inf)
        if sinks is not None:
            further = sinks.float().view(kv_heads, -1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, further], -1)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        got = torch.einsum("rnhgt,rthd->rnhgd", weights, values)
        span = slice(part.start * each, part.stop * each)
        out[span] = got.flatten(2, 3).flatten(0, 1)
        is_real[span] = (seen > 0).flatten()
    return out, is_real


def as_float32(tensor, factor):
    """What a cache's elements stand for."""
    return tensor.view(torch.float8_e4m3fn).float() * factor if tensor.dtype == torch.uint8 else tensor.float()


def add_errors(layer: str, ours, stock, right, is_real) -> None:
    """Per row and head: the norm of the difference to float32, as a part of the norm of what is right."""
    if layer not in STATE.errors:
        # Made by the warm-up that comes before each capture.
        with torch.inference_mode(False):  # `take_errors` is outside of vLLM's
            STATE.errors[layer] = torch.zeros(5, dtype=torch.float64, device=right.device)
    sums, size = STATE.errors[layer], right.norm(dim=-1)
    is_counted = is_real[:, None].expand_as(size)
    sums[0] += is_counted.sum()
    for i, got in enumerate((ours, stock)):
        error = torch.where(is_counted, (got.float() - right).norm(dim=-1) / size, 0).double()
        sums[1 + i] += error.square().sum()
        sums[3 + i] = torch.maximum(sums[3 + i], error.max())


def take_errors() -> dict:
    """What was added since the last call: by layer, the number of row-heads, the sums of squares and the largest, ours and stock."""
    torch.cuda.synchronize()
    taken = {name: sums.tolist() for name, sums in STATE.errors.items()}
    for sums in STATE.errors.values():
        sums.zero_()
    return taken


def take_scores(prompts: list, steps: int):
    """The kept scores of decode steps, by prompt and step.

    Returns:
        Centred logits of the candidates ``[prompts, steps, CANDIDATES]``, the best tokens ``[prompts, steps]`` and their leads.
    """
    where = {}
    for i, prompt in enumerate(prompts):
        token = prompt[-1]
        for step in range(steps + 1):
            position = len(prompt) - 1 + step
            where[position, token] = i, step - 1
            token = next_token(token, position)
    scores = torch.full((len(prompts), steps, CANDIDATES), torch.nan)
    best = torch.zeros(len(prompts), steps, dtype=torch.int64)
    leads = torch.zeros(len(prompts), steps)
    for positions, tokens, kept, top in STATE.kept:
        kept, values, ids = kept.cpu(), top.values.cpu(), top.indices.cpu()
        for row, key in enumerate(zip(positions.tolist(), tokens.tolist())):
            i, step = where.get(key, (0, -1))
            # The first token of a request comes from its prefill.
            if step >= 0:
                scores[i, step], best[i, step], leads[i, step] = kept[row], ids[row, 0], values[row, 0] - values[row, 1]
    STATE.kept.clear()
    assert not scores.isnan().any(), "a decode step's scores are missing"
    return scores, best, leads
