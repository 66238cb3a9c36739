#!/usr/bin/env python3
"""Judges the tokens of two engines: the rule of docs/engine-notes.md.

  compare.py STOCK.json OURS.json TASK --noise RECORD.json TASK ... [--expect-different] [--task-of-ours TASK]

Both decode the same prompts greedily. A request is compared up to its first differing token: up to there both engines have
seen the same tokens. The noise is what another correct engine makes of the same prompts, given by --noise: the stock engine at
another batch size, another stock backend; the largest counts.
"""

import argparse
import json
import math
import statistics
import sys


class Comparison:
    """Differences of log-probs up to the first differing token, and the stock backend's lead at those tokens."""

    def __init__(self, others, stock):
        self.differences, self.leads, self.total = [], [], 0
        assert len(others) == len(stock)
        for a, b in zip(others, stock):
            if a is None or b is None:
                continue
            self.total += len(b["tokens"])
            for x, y, (p, _), (q, lead) in zip(a["tokens"], b["tokens"], a["top"], b["top"]):
                if x != y:
                    self.leads.append(lead)
                    break
                self.differences.append(abs(p - q))
        self.mean = statistics.mean(self.differences or [math.inf])
        self.largest = max(self.differences, default=math.inf)
        self.share = len(self.differences) / self.total

    def line(self):
        return "mean %.5f largest %.4f, %d of %d tokens compared, %d requests diverge, largest lead there %.4f" % (
            self.mean, self.largest, len(self.differences), self.total, len(self.leads), max(self.leads, default=0),
        )  # fmt: skip


def read(name, task):
    with open(name) as f:
        return json.load(f)["tasks"][task]["requests"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stock")
    parser.add_argument("ours")
    parser.add_argument("task")
    parser.add_argument("--task-of-ours")
    parser.add_argument("--noise", nargs=2, action="append", required=True)
    parser.add_argument("--expect-different", action="store_true")
    a = parser.parse_args()
    stock = read(a.stock, a.task)
    noises = []
    for name, task in a.noise:
        noise = Comparison(read(name, task), stock)
        assert noise.differences, "the noise is made of no token"
        noises.append(noise)
        print("  noise, %-40s %s" % (name.split("/")[-1][:-5] + " " + task, noise.line()))
    ours = Comparison(read(a.ours, a.task_of_ours or a.task), stock)
    print("  ours %42s %s" % ("", ours.line()))
    largest = max(max([noise.largest, *noise.leads]) for noise in noises)
    faults = []
    if ours.mean > 2 * max(noise.mean for noise in noises):
        faults.append("mean difference above twice the noise")
    if ours.largest > 2 * max(noise.largest for noise in noises):
        faults.append("largest difference above twice the noise's")
    if max(ours.leads, default=0) > 2 * largest:
        faults.append("a token differs that was not tied")
    if ours.share < 0.5 * min(noise.share for noise in noises):
        faults.append("tokens differ far earlier than in the stock backends' own runs")
    print("  " + ("; ".join(faults) or "equal within the noise"))
    sys.exit(bool(faults) != a.expect_different)


if __name__ == "__main__":
    main()
