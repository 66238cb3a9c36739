"""The numerics rule of `workloads/src/numerics.rs`, in torch: what an output may differ from the exact one by."""

import math

import torch

EPSILON = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


class Expected:
    """Of all rows: the exact output and log-sum-exp in float64, and what a plain two-pass implementation in float32 that rounds P
    and O makes of the same inputs."""

    def __init__(self, case, q, k, v, sinks=None):
        """q `[rows, q_heads, head_dim]`, k and v `[pages, page_size, kv_heads, head_dim]`, without NaN, before their factors."""
        device, group = q.device, case.q_heads // case.kv_heads
        self.lengths = torch.from_numpy(case.row_lengths).to(device)
        sequences = torch.from_numpy(case.row_sequences).to(device)
        tables = torch.from_numpy(case.padded_tables()).to(device).long()[sequences]
        tokens = tables.shape[1] * case.page_size
        gathered = [pool[tables].reshape(len(self.lengths), tokens, case.kv_heads, -1) for pool in (k, v)]
        positions = torch.arange(tokens, device=device)[None, :]
        first = torch.from_numpy(case.first_tokens()).to(device)
        visible = (positions < self.lengths[:, None]) & (positions >= first[:, None])
        factors = [
            torch.tensor(scales or (1.0,), dtype=torch.float32, device=device)[None, None, :, None]
            for scales in case.scales
        ]

        def attend(dtype, rounded):
            qd = q.to(dtype).reshape(len(q), case.kv_heads, group, -1)
            kd, vd = (pool.to(dtype) * factor.to(dtype) for pool, factor in zip(gathered, factors))
            scores = torch.einsum("bhgd,bthd->bhgt", qd, kd) * torch.tensor(case.scale, dtype=torch.float32).to(dtype)
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores.masked_fill(~visible[:, None, None, :], -math.inf)
            peak = scores.amax(-1, keepdim=True)
            if sinks is not None:
                sink = sinks.to(dtype).reshape(1, case.kv_heads, group, 1)
                peak = torch.maximum(peak, sink)
            peak = peak.masked_fill(peak == -math.inf, 0)
            weights = torch.exp(scores - peak)
            total = weights.sum(-1, keepdim=True)
            # A sink is one more term of the denominator; the log-sum-exp is that of the scores and the sink.
            if sinks is not None:
                total = total + torch.exp(sink - peak)
            if rounded:
                weights = weights.to(q.dtype).to(dtype)
            out = torch.einsum("bhgt,bthd->bhgd", weights, vd) / total.masked_fill(total == 0, 1)
            lse = (peak + torch.log(total)).squeeze(-1).reshape(len(q), -1)
            return out.reshape(len(q), case.q_heads, -1), lse

        self.out, self.lse = attend(torch.float64, False)
        self.plain = attend(torch.float32, True)[0].to(q.dtype).double()
        magnitude = torch.einsum(
            "bhgd,bthd->bhgt",
            q.double().abs().reshape(len(q), case.kv_heads, group, -1),
            (gathered[0].double() * factors[0]).abs(),
        )
        magnitude = magnitude.masked_fill(~visible[:, None, None, :], 0).amax(-1).reshape(len(q), -1)
        # A cap adds the rounding errors of its own arithmetic.
        self.score_magnitude = case.scale * magnitude + case.softcap / case.head_dim
        self.epsilon = EPSILON[q.dtype]

    def worst_ratio(self, out, lse=None, rows=None):
        """Largest error over its allowance, at most 1 where all is within the rule; inf for NaN. `rows` is a mask of the rows
        that count."""
        rows = torch.ones_like(self.lengths, dtype=torch.bool) if rows is None else rows
        if not bool(rows.any()):
            return 0.0
        exact, plain, out = self.out[rows], self.plain[rows], out[rows].double()
        error, plain_error = (out - exact).abs(), (plain - exact).abs()
        largest = exact.abs().amax(-1).clamp_min(2.0**-14)
        unit = torch.exp2(torch.floor(torch.log2(largest))) * self.epsilon
        ratios = [(error.amax(-1) / (2 * plain_error.amax(-1) + unit)).amax()]
        norm = exact.norm()
        allowed = 2 * plain_error.norm() + self.epsilon * norm
        # Where nothing is allowed, all that is not exactly right is infinitely wrong.
        ratios.append(torch.where(error.norm() > 0, error.norm() / allowed, 0.0))
        if lse is not None:
            exact_lse, actual = self.lse[rows], lse[rows].double()
            tokens = self.lengths[rows].double()[:, None]
            unit = 2.0**-23
            finite = exact_lse.masked_fill(exact_lse == -math.inf, 0)
            allowed = unit * (
                self.out.shape[-1] * self.score_magnitude[rows] + 8 + 4 * tokens.sqrt() + 4 * finite.abs()
            )
            difference = torch.where(exact_lse == actual, 0.0, (actual - exact_lse).abs())
            ratios.append((difference / allowed).amax())
        ratios = torch.stack([ratio.double() for ratio in ratios])
        return float(torch.where(ratios.isnan(), math.inf, ratios).amax())
