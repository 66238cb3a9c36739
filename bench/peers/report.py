"""What a run prints: a table for people, or a JSON object per line, and at the end who was faster where."""

import json
import math

from results import OURS, OURS_HERE

NOISE = 0.005
"""Two times that differ by less are called equal."""


class Report:
    """Prints configurations as they are measured, then a summary of them all."""

    def __init__(self, names, as_json):
        self._names, self._as_json = names, as_json
        self._entries = []

    def header(self):
        """What stands above the table."""
        if not self._as_json:
            columns = "".join(f" {_short(name):>10}" for name in self._names)
            print(f"{'cold us':48} {'heads':>6} {OURS:>9}{columns} {'ours/best':>9}")

    def configuration(self, configuration, record):
        """One configuration with all that its record has of the methods."""
        entry = self._entry(configuration, record)
        self._entries.append(entry)
        if self._as_json:
            print(json.dumps(entry), flush=True)
            return

        def cell(name, width):
            if name in entry["wrong"]:
                return f"{'WRONG':>{width}}"
            us = entry["cold_us"].get(name)
            return f"{'-' if us is None else f'{us:.1f}':>{width}}"

        ratio = "-" if entry["ours_over_best"] is None else f"{entry['ours_over_best']:.3f}"
        columns = "".join(f" {cell(name, 10)}" for name in self._names)
        heads = f"{entry['nheads_q']}/{entry['nheads_kv']}"
        print(f"{entry['tree']:48} {heads:>6} {cell(OURS, 9)}{columns} {ratio:>9}", flush=True)

    def summary(self):
        """By suite the geometric mean of ours over the best peer, and where a peer is faster."""
        summary = summarise(self._entries)
        if self._as_json:
            print(json.dumps({"summary": summary}))
            return
        if not summary["suites"]:
            return
        print(f"\n{'suite':16} {'measured':>9} {'ours/best':>9} {'largest':>9} {'behind':>7}   (by more than {NOISE:.1%})")
        for suite, row in summary["suites"].items():
            print(f"{suite:16} {row['configurations']:9} {row['mean']:9.3f} {row['largest']:9.3f} {row['behind']:7}")
        for line in summary["behind"]:
            times = f"ours {line['ours_us']:.1f} us, {line['best']} {line['best_us']:.1f} us"
            print(f"behind: {line['title']}: {times}, {line['ratio']:.4f}")

    def _entry(self, configuration, record):
        latencies = record.get("latencies", {})
        shown = (OURS, *self._names)
        wrong = [n for n in shown if record.get("correctness", {}).get(n, {}).get("status", "PASSED") != "PASSED"]
        cold_us = {name: latencies[name] * 1e3 for name in shown if name in latencies and name not in wrong}
        ours = OURS_HERE if OURS_HERE in cold_us else OURS
        peers = {name: us for name, us in cold_us.items() if name not in (OURS, OURS_HERE)}
        best = min(peers, key=peers.get, default=None)
        return {
            "suite": configuration.suite,
            "tree": configuration.name,
            "nheads_q": configuration.nheads_q,
            "nheads_kv": configuration.nheads_kv,
            "head_dim": configuration.head_dim,
            "dtype": configuration.dtype,
            "cold_us": cold_us,
            "wrong": wrong,
            "ours": ours,
            "best": best,
            "ours_over_best": cold_us[ours] / peers[best] if best is not None and ours in cold_us else None,
        }


def summarise(entries):
    """The suites of `entries` in the order they come in, and the configurations in which a peer is faster, the worst first."""
    by_suite, behind = {}, []
    for entry in entries:
        ratio = entry["ours_over_best"]
        if ratio is None:
            continue
        by_suite.setdefault(entry["suite"], []).append(ratio)
        if ratio > 1 + NOISE:
            title = f"{entry['tree']} {entry['nheads_q']}/{entry['nheads_kv']}"
            us = entry["cold_us"]
            line = {"title": title, "ours_us": us[entry["ours"]], "best": entry["best"], "best_us": us[entry["best"]]}
            behind.append({**line, "ratio": ratio})
    suites = {
        suite: {
            "configurations": len(ratios),
            "mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "largest": max(ratios),
            "behind": sum(ratio > 1 + NOISE for ratio in ratios),
        }
        for suite, ratios in by_suite.items()
    }
    return {"suites": suites, "behind": sorted(behind, key=lambda line: -line["ratio"])}


def _short(name):
    return name.removeprefix("flashinfer_")[:10]
