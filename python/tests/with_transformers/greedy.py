"""When two greedy decodings of one model in 16-bit numbers are equal: docs/engine-notes.md has the rule."""

import copy

import torch


def check_greedy(model, requests, tokens, stock_tokens):
    """Checks ``tokens`` of ``model``, generated for ``requests``: each is, after those before it, the one with the largest
    logit in float32, or as good as that one within twice the model's own rounding; and where two decodings part, both are.

    Returns how many requests have exactly the stock path's tokens.
    """
    exact_model = copy.deepcopy(model).float()
    for one in (model, exact_model):
        one.set_attn_implementation("sdpa")
    for request, generated, stock in zip(requests, tokens, stock_tokens, strict=True):
        for each in (generated, stock):
            logits, rounded = (_logits(one, request, each) for one in (exact_model, model))
            # What rounding to 16 bits does to this model's logits anyway.
            noise = (logits - rounded).abs().max()
            chosen = logits.gather(1, torch.tensor(each)[:, None])[:, 0]
            behind = logits.max(dim=1).values - chosen
            assert (behind <= 4 * noise).all(), f"token {int(behind.argmax())}: {behind.max()} behind, noise {noise}"
            # The rule says something only where logits are further apart than that.
            assert noise < logits.std() / 8
    return sum(generated == stock for generated, stock in zip(tokens, stock_tokens))


@torch.no_grad()
def _logits(model, request, generated):
    """Logits [tokens, vocabulary] before each generated token."""
    everything = torch.tensor([request + generated])
    return model(everything, use_cache=False).logits[0, len(request) - 1 : -1].float()
