"""Figures of a run, by PAT's names (docs/serving.md): milliseconds, requests and tokens per second."""

import math

# (TTFT, TPOT) in milliseconds: the service that capacity and goodput are counted at.
LIMITS = ((1000.0, 100.0), (1000.0, 50.0))


def quantile(values, part):
    """Of sorted values, interpolated between neighbours."""
    position = part * (len(values) - 1)
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


def spread(values, name):
    """mean_, median_ and p99_ of a list in seconds; null where it is empty."""
    values = sorted(values)
    figures = (None, None, None)
    if values:
        figures = (sum(values) / len(values), quantile(values, 0.5), quantile(values, 0.99))
    return {f"{kind}_{name}_ms": figure and round(1e3 * figure, 4) for kind, figure in zip(("mean", "median", "p99"), figures)}


def times(sent):
    """(TTFT, TPOT or None, gaps between chunks, end to end) of an ended request, in seconds."""
    first, last = sent.chunks[0][0], sent.chunks[-1][0]
    tpot = (last - first) / (sent.tokens - 1) if sent.tokens > 1 else None
    gaps = [after - before for (before, _), (after, _) in zip(sent.chunks, sent.chunks[1:])]
    return first - sent.arrived, tpot, gaps, last - sent.arrived


def failure(sent):
    """Why a measured request does not count; None where it does."""
    if sent.ended is None:
        return "unfinished"
    if sent.tokens != sent.request.output_tokens:
        return "wrong number of tokens"
    return None


def summarise(run):
    """(metrics, counts of requests, goodput) of a run."""
    window = run.window
    measured = [sent for sent in run.sent if sent.measured]
    good = [sent for sent in measured if failure(sent) is None]
    failures = {}
    for sent in measured:
        reason = failure(sent)
        if reason:
            failures[reason] = failures.get(reason, 0) + 1
    of = [times(sent) for sent in good]
    in_window = [tokens for sent in run.sent for at, tokens in sent.chunks if window.holds(at)]
    ended = [sent for sent in run.sent if sent.ended is not None and window.holds(sent.ended)]
    input_tokens = sum(sent.request.prompt_tokens for sent in ended)
    metrics = {
        "successful_requests": len(good),
        "benchmark_duration": round(run.seconds, 3),
        "total_input_tokens": sum(sent.request.prompt_tokens for sent in good),
        "total_generated_tokens": sum(sent.tokens for sent in good),
        "request_throughput": round(len(ended) / window.measured, 4),
        "output_token_throughput": round(sum(in_window) / window.measured, 2),
        "total_token_throughput": round((sum(in_window) + input_tokens) / window.measured, 2),
        **spread([ttft for ttft, _, _, _ in of], "ttft"),
        **spread([tpot for _, tpot, _, _ in of if tpot is not None], "tpot"),
        **spread([gap for _, _, gaps, _ in of for gap in gaps], "itl"),
        **spread([whole for _, _, _, whole in of], "e2el"),
    }
    counts = {"sent": len(run.sent), "measured": len(measured), "failed": len(measured) - len(good), "failures": failures}
    goodput = []
    for ttft_ms, tpot_ms in LIMITS:
        met = sum(1e3 * ttft <= ttft_ms and (tpot is None or 1e3 * tpot <= tpot_ms) for ttft, tpot, _, _ in of)
        goodput.append({"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "requests_per_s": round(met / window.measured, 4)})
    return metrics, counts, goodput


def within(metrics, counts, limits):
    """Whether means are within (TTFT, TPOT) limits, and every measured request ended well."""
    ttft, tpot = metrics["mean_ttft_ms"], metrics["mean_tpot_ms"]
    if counts["failed"] or ttft is None:
        return False
    return ttft <= limits[0] and (tpot is None or tpot <= limits[1])


def steps(run):
    """What the engine did in the measured window: steps of decode alone and steps with prompts in them, and seconds without a step."""
    kinds = {"decode": [], "mixed": []}
    ends = [0.0] + [end for end, *_ in run.steps]
    for begin, (end, requests, tokens, prompts) in zip(ends, run.steps):
        if run.window.holds(end):
            kinds["mixed" if prompts else "decode"].append((end - begin, requests, tokens))
    table = {}
    for kind, rows in kinds.items():
        if rows:
            count = len(rows)
            seconds = sorted(row[0] for row in rows)
            table[kind] = {
                "count": count,
                "seconds": round(sum(seconds), 3),
                "median_ms": round(1e3 * quantile(seconds, 0.5), 3),
                "mean_requests": round(sum(row[1] for row in rows) / count, 1),
                "mean_tokens": round(sum(row[2] for row in rows) / count, 1),
            }
    return table
