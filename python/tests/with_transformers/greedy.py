"""When two greedy decodings of one model in 16-bit numbers are equal: the rule is in docs/engine-notes.md."""

import copy

import torch


#: Of the logits' standard deviation.
NOISE = 1 / 8


class Yardstick:
    """A model in float32 and in its own dtype, both on the stock path: how far a decoding is from the exact one."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.exact_model = copy.deepcopy(model).float()
        for one in (self.model, self.exact_model):
            one.set_attn_implementation("sdpa")
        self._seen: dict[tuple, float] = {}
        #: The largest noise of a request, as a part of the standard deviation of its logits.
        self.largest_noise = 0.0

    def behind(self, request, generated) -> float:
        """How far the logit of a generated token is behind the largest one in float32, after the tokens before it, at most; as
        a part of the model's own rounding."""
        key = tuple(request), tuple(generated)
        if key not in self._seen:
            exact, rounded = (self._logits(one, request, generated) for one in (self.exact_model, self.model))
            noise = (exact - rounded).abs().max()
            assert 0 < noise < float("inf"), noise
            chosen = torch.tensor(generated, device=exact.device)[:, None]
            behind = (exact.max(dim=1).values - exact.gather(1, chosen)[:, 0]).max()
            self.largest_noise = max(self.largest_noise, float(noise / exact.std()))
            self._seen[key] = float(behind / noise)
        return self._seen[key]

    @torch.no_grad()
    def _logits(self, model, request, generated):
        """Logits [tokens, vocabulary] before each generated token."""
        everything = torch.tensor([request + generated], device=model.device)
        kept = len(generated) + 1
        return model(everything, use_cache=False, logits_to_keep=kept).logits[0, :-1].float()


def check_greedy(model, requests, tokens, stock_tokens, yardstick=None):
    """Checks ``tokens``, generated for ``requests``, and ``stock_tokens``, the stock path's: each token is, after those before
    it, the one with the largest logit in float32, or behind it by no more than twice the model's own rounding.

    Returns how many requests have exactly the stock path's tokens.
    """
    yardstick = yardstick or Yardstick(model)
    for request, generated, stock in zip(requests, tokens, stock_tokens, strict=True):
        for each in (generated, stock):
            behind = yardstick.behind(request, each)
            assert behind <= 2, f"a token is {behind} times the noise behind"
    # The rule says something only where logits are further apart than that.
    assert yardstick.largest_noise < NOISE
    return sum(generated == stock for generated, stock in zip(tokens, stock_tokens))
