#!/usr/bin/env python3
"""Step times of two engines side by side, and what their profiles say: table.py STOCK.json OURS.json"""

import json
import sys

stock, ours = (json.load(open(name)) for name in sys.argv[1:3])
titles = "sequences x (shared + own)", "stock ms (p10-p90)", "ours ms (p10-p90)", "ours / stock", "us of the builders", "ms a token"
print("%-28s %-25s %-25s %-14s %-20s %s" % titles)
for task, a in stock["tasks"].items():
    if task.startswith("time"):
        b = ours["tasks"][task]
        cells = ["%8.3f" % t["step_ms"] + (" (%.3f-%.3f)" % (t["p10_ms"], t["p90_ms"]) if "p10_ms" in t else "") for t in (a, b)]
        built = "%.0f %.0f" % (a["build_us"], b["build_us"]) if "build_us" in a else ""
        clock = "%.3f %.3f" % (a["token_ms"], b["token_ms"]) if "token_ms" in a else ""
        cells += "%.3f" % (b["step_ms"] / a["step_ms"]), built, clock
        print("%-28s %-25s %-25s %-14s %-20s %s" % (task.split(":")[1], *cells))
for name, record in (("stock", stock), ("ours", ours)):
    for task, p in record["tasks"].items():
        if not task.startswith("profile"):
            continue
        print(
            "%s, 6 steps of %s: wall %.2f ms, device span %.2f ms, idle %.3f ms (gaps over 2 us), %.3f ms in smaller gaps, "
            "longest gap %.1f us, %d gaps over 20 us, together %.3f ms"
            % (
                name, task[8:], p["wall_ms"], p["span_ms"], p["idle_ms"], p["small_gaps_ms"], p["longest_gap_us"],
                p["gaps_over_20us"], p["waits_ms"],
            )  # fmt: skip
        )
        for microseconds, at_ms, before, behind in p["waits"]:
            print("    %9.1f us at %8.2f ms, between %s and %s" % (microseconds, at_ms, before, behind))
        for kernel, calls, ns in p["kernels"][:7]:
            print("    %6d calls %9.2f us each  %s" % (calls, ns / calls / 1e3, kernel))
for task, a in stock["tasks"].items():
    if not task.startswith("host"):
        continue
    seconds = [{f[0]: f[2] for f in record["tasks"][task]["functions"]} for record in (stock, ours)]
    print("host, 30 steps of %s: %.1f ms of functions with stock, %.1f with ours; what differs most:" % (
        task[5:], *(1e3 * sum(own.values()) for own in seconds)
    ))  # fmt: skip
    more = {name: seconds[1].get(name, 0) - seconds[0].get(name, 0) for own in seconds for name in own}
    for name in sorted(more, key=lambda name: -abs(more[name]))[:10]:
        print("    %+8.2f ms  %s" % (1e3 * more[name], name))
own = [k for t, p in ours["tasks"].items() if t.startswith("profile") for k in p["kernels"]]
our_kernels = [k for k in own if k[0].startswith("pat_forward")]
stock_kernels = [k for k in own if "FlashAttn" in k[0] or "flash::" in k[0]]
if own:
    counts = [sum(k[1] for k in kernels) for kernels in (our_kernels, stock_kernels)]
    print("our kernels: %d calls; FlashAttention: %d calls" % tuple(counts))
    sys.exit(not our_kernels or bool(stock_kernels))
