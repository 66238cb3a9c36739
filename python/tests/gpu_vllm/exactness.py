#!/usr/bin/env python3
"""Judges an engine beside float32 attention: the second rule of docs/engine-notes.md.

  exactness.py layers RECORD.json TASK [--at-most ERROR] [--expect-different]
  exactness.py scores RECORD.json TASK --exact TASK --stock TASK [--also RECORD.json TASK] [--expect-different]

layers: what each layer's attention gave in the steps of a task, beside float32 attention over the same queries and the same cache;
the stock kernel's own error over these is the yardstick, and --at-most where that rounds more (queries to FP8). scores: the
log-probs of the same tokens in the same contexts, beside an engine whose decode steps have float32 attention.
"""

import argparse
import json
import sys

#: How much farther from float32 than the stock kernel a kernel may be that rounds as it does: in the mean, and at the worst place.
MEAN, LARGEST = 1.25, 2.0


def layers(a):
    import math

    with open(a.record) as f:
        by_layer = json.load(f)["tasks"][a.task]["errors"]
    faults = []
    count = ours = stock = 0
    worst = [0.0, 0.0]
    for name, (n, ours_squares, stock_squares, ours_largest, stock_largest) in by_layer.items():
        assert n > 0, f"{name}: nothing was compared"
        if math.sqrt(ours_squares / stock_squares) > MEAN:
            faults.append(name)
        count, ours, stock = count + n, ours + ours_squares, stock + stock_squares
        worst = [max(worst[0], ours_largest), max(worst[1], stock_largest)]
    ratio = math.sqrt(ours / stock)
    print(
        "  %d layers, %d outputs of a row and head; relative error, root mean square: ours %.3e, stock %.3e (%.3f); largest: "
        "ours %.3e, stock %.3e" % (len(by_layer), count, math.sqrt(ours / count), math.sqrt(stock / count), ratio, *worst)
    )
    text = []
    if faults:
        text.append(f"{len(faults)} layers farther from float32 than {MEAN} x stock's")
    if math.sqrt(ours / count) > a.at_most:
        text.append(f"root mean square above {a.at_most}")
    if worst[0] > LARGEST * worst[1]:
        text.append(f"largest error above {LARGEST} x stock's")
    return text


def scores(a):
    import torch

    def read(record, task):
        return torch.load(f"{record[:-5]}.{task.replace(':', '-')}.pt")

    right, right_best, leads = read(a.record, a.exact)

    def distance(record, task):
        """Root mean square over the candidates, of each prompt's each step."""
        other, best, _ = read(record, task)
        return (other - right).square().mean(-1).sqrt(), (other - right).abs().max().item(), best

    stock, stock_largest, _ = distance(a.record, a.stock)
    ours, ours_largest, best = distance(a.record, a.task)
    for record, task in a.also:
        other, largest, _ = distance(record, task)
        print("  %-52s mean %.5f largest %.4f" % (record.split("/")[-1][:-5] + " " + task, other.mean(), largest))
    print("  stock %46s mean %.5f largest %.4f" % ("", stock.mean(), stock_largest))
    # A token may differ where the two best are nearer than the stock kernel's own largest error to either.
    is_clear = leads > 2 * stock_largest
    differing = int((best != right_best)[is_clear].sum())
    print(
        "  ours %47s mean %.5f largest %.4f (%.3f of stock's mean); %d steps of %d have a clear best token, %d of these differ"
        % ("", ours.mean(), ours_largest, ours.mean() / stock.mean(), int(is_clear.sum()), is_clear.numel(), differing)
    )
    text = []
    if ours.mean() > MEAN * stock.mean():
        text.append(f"mean distance to float32 above {MEAN} x stock's")
    if ours_largest > LARGEST * stock_largest:
        text.append(f"largest distance above {LARGEST} x stock's")
    if differing:
        text.append("a clear best token differs")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=["layers", "scores"])
    parser.add_argument("record")
    parser.add_argument("task")
    parser.add_argument("--exact")
    parser.add_argument("--stock")
    parser.add_argument("--also", nargs=2, action="append", default=[])
    parser.add_argument("--at-most", type=float, default=float("inf"))
    parser.add_argument("--expect-different", action="store_true")
    a = parser.parse_args()
    faults = layers(a) if a.rule == "layers" else scores(a)
    print("  " + ("; ".join(faults) or "as near to float32 as stock"))
    sys.exit(bool(faults) != a.expect_different)


if __name__ == "__main__":
    main()
