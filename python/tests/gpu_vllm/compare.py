#!/usr/bin/env python3
"""Judges the tokens of two engines: the rule of docs/engine-notes.md.

  compare.py SAME.json OTHER.json TASK [--self TASK] [--expect-different]

Both decode the same prompts greedily. A request is compared up to its first differing token: up to there both engines have seen the
same tokens. Noise is what the stock backend makes of the same prompts at another batch size (--self, of SAME.json).
"""

import argparse
import json
import statistics
import sys


def judge(ours, stock):
    """Differences of log-probs up to the first differing token, and the stock backend's lead at those tokens."""
    differences, leads, compared, total = [], [], 0, 0
    for a, b in zip(ours, stock):
        if a is None or b is None:
            continue
        total += len(b["tokens"])
        for (x, y, (p, _), (q, lead)) in zip(a["tokens"], b["tokens"], a["top"], b["top"]):
            if x != y:
                leads.append(lead)
                break
            differences.append(abs(p - q))
            compared += 1
    return differences, leads, compared, total


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stock")
    parser.add_argument("ours")
    parser.add_argument("task")
    parser.add_argument("--self", dest="other_batch", required=True)
    parser.add_argument("--expect-different", action="store_true")
    a = parser.parse_args()
    stock, ours = (json.load(open(name))["tasks"] for name in (a.stock, a.ours))
    assert len(stock[a.task]["requests"]) == len(ours[a.task]["requests"])
    noise, noise_leads, noise_compared, noise_total = judge(stock[a.other_batch]["requests"], stock[a.task]["requests"])
    differences, leads, compared, total = judge(ours[a.task]["requests"], stock[a.task]["requests"])
    limits = dict(mean=2 * statistics.mean(noise), largest=2 * max(noise))
    lead_limit = 2 * max(noise + noise_leads)
    faults = []
    if statistics.mean(differences) > limits["mean"]:
        faults.append("mean difference above twice the noise")
    if max(differences) > limits["largest"]:
        faults.append("largest difference above twice the noise's")
    if leads and max(leads) > lead_limit:
        faults.append("a token differs that was not tied")
    if compared / total < 0.5 * noise_compared / noise_total:
        faults.append("tokens differ far earlier than in the stock backend's own runs")
    print(
        "  noise of stock: mean %.5f largest %.4f, %d of %d tokens compared, %d requests diverge"
        % (statistics.mean(noise), max(noise), noise_compared, noise_total, len(noise_leads))
    )
    print(
        "  difference:     mean %.5f largest %.4f, %d of %d tokens compared, %d requests diverge, largest lead there %.4f (limit %.4f)"
        % (statistics.mean(differences), max(differences), compared, total, len(leads), max(leads, default=0), lead_limit)
    )
    print("  " + ("; ".join(faults) or "equal within the noise"))
    sys.exit(bool(faults) != a.expect_different)


if __name__ == "__main__":
    main()
