"""When two greedy decodings of one model in 16-bit numbers are equal: the rule is in docs/engine-notes.md."""

import copy

import torch


def check_greedy(model, requests, tokens, stock_tokens):
    """Checks ``tokens``, generated for ``requests``, and ``stock_tokens``, the stock path's: each token is, after those before
    it, the one with the largest logit in float32, or behind it by no more than twice the model's own rounding.

    Returns how many requests have exactly the stock path's tokens.
    """
    exact_model = copy.deepcopy(model).float()
    for one in (model, exact_model):
        one.set_attn_implementation("sdpa")
    for request, generated, stock in zip(requests, tokens, stock_tokens, strict=True):
        for each in (generated, stock):
            exact, rounded = (_logits(one, request, each) for one in (exact_model, model))
            noise = (exact - rounded).abs().max()
            behind = exact.max(dim=1).values - exact.gather(1, torch.tensor(each)[:, None])[:, 0]
            assert (behind <= 2 * noise).all(), f"token {int(behind.argmax())}: {behind.max()} behind, noise {noise}"
            # The rule says something only where logits are further apart than that.
            assert noise < exact.std() / 8
    return sum(generated == stock for generated, stock in zip(tokens, stock_tokens))


@torch.no_grad()
def _logits(model, request, generated):
    """Logits [tokens, vocabulary] before each generated token."""
    everything = torch.tensor([request + generated])
    return model(everything, use_cache=False).logits[0, len(request) - 1 : -1].float()
