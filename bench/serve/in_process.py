#!/usr/bin/env python3
"""The serving benchmark without a server: vLLM's engine in this process, driven by a virtual arrival clock, so that a rate takes about a
minute and the engine stays up between rates. The records are those of `pat bench serve` (docs/serving.md)."""

import argparse
import datetime
import os
import sys
import time

import metrics
import records
from loop import Clock, Fcfs, PrefixGrouped, Window, run
from workload import Refused, Workload


def main(argv=None, make_engine=None, make_clock=Clock):
    """Exit status: 0; 1 where a run has failures; 2 on bad input; 3 where the time limit left rates undone."""
    arguments = parse(argv)
    try:
        return Benchmark(arguments, make_engine or vllm_engine, make_clock).run()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workload", required=True, action="append", metavar="FILE", help="workload file of `pat workload make`; may be repeated")
    add("--rates", metavar="RATE,...", help="arrivals per second")
    add("--knee", action="append", metavar="LOW:HIGH:STEP",
        help="find the highest rate within the limits on the grid of STEP by bisection; once for all workloads, or once for each")
    add("--limits", default="1000:50", metavar="TTFT:TPOT", help="means in ms that --knee looks for (default 1000:50)")
    add("--output", required=True, metavar="FILE", help="records, JSON lines; runs that it has are not repeated")
    add("--backend", default="FLASH_ATTN", help="vLLM's attention backend: FLASH_ATTN, TRITON_ATTN, CUSTOM (default FLASH_ATTN)")
    add("--model", default="qwen3-8b", choices=["qwen3-8b", "llama3-8b"], help="shape of the model (default qwen3-8b)")
    add("--layers", type=int, metavar="N", help="another number of layers, for trying out")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that share the model (default 1)")
    add("--mode", default="graphs", choices=["graphs", "compiled", "eager"],
        help="CUDA graphs of decode steps (default); vLLM's compiler and graphs of all steps of up to 2,048 tokens; neither")
    add("--admission", default="fcfs", metavar="fcfs|prefix-grouped:N",
        help="requests go to the engine as they come (default), or at most N at once and those of one prefix together")
    add("--clock", default="virtual", choices=["virtual", "real"], help="whether idle time is skipped (default) or waited for")
    add("--warm-up", type=float, default=15.0, metavar="SECONDS", help="arrivals that are not measured (default 15)")
    add("--measured", type=float, default=30.0, metavar="SECONDS", help="arrivals that are measured (default 30)")
    add("--patience", type=float, default=20.0, metavar="SECONDS", help="give a rate up when a first token takes longer (default 20)")
    add("--tail", type=float, default=90.0, metavar="SECONDS",
        help="give a rate up when measured requests are open so long after the last of them came (default 90)")
    add("--seed", type=int, default=0, metavar="N", help="of the arrivals (default 0)")
    add("--profile", type=int, default=0, metavar="STEPS", help="after each rate, profile so many decode steps, and steps with a prompt (default 0)")
    add("--time-limit", type=float, metavar="SECONDS", help="begin no rate that may end later")
    add("--max-model-len", type=int, default=8192, metavar="TOKENS", help="longer requests are refused (default 8192)")
    add("--memory", type=float, default=0.9, metavar="PART", help="part of the GPU's memory (default 0.9)")
    add("--kv-memory", type=float, metavar="GIB", help="K and V get so much of each GPU (default: what is left of --memory)")
    arguments = parser.parse_args(argv)
    arguments.rates = floats(parser, "--rates", arguments.rates, ",") if arguments.rates else []
    arguments.knee = [floats(parser, "--knee", text, ":", 3) for text in arguments.knee or []]
    arguments.limits = floats(parser, "--limits", arguments.limits, ":", 2)
    if not arguments.rates and not arguments.knee:
        parser.error("neither --rates nor --knee is given, expected one of them")
    if len(arguments.knee) not in (0, 1, len(arguments.workload)):
        parser.error(f"--knee: got {len(arguments.knee)}, expected one or as many as workloads ({len(arguments.workload)})")
    for low, high, step in arguments.knee:
        if not 0 < low < high or step <= 0:
            parser.error(f"--knee: got {low:g}:{high:g}:{step:g}, expected 0 < LOW < HIGH and STEP above 0")
    name, _, most = arguments.admission.partition(":")
    if not (arguments.admission == "fcfs" or name == "prefix-grouped" and most.isdecimal() and int(most) > 0):
        parser.error(f"--admission: got {arguments.admission!r}, expected fcfs or prefix-grouped:N")
    for option in ("tensor_parallel", "layers"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')}: got {value}, expected at least 1")
    if arguments.kv_memory is not None and arguments.kv_memory <= 0:
        parser.error(f"--kv-memory: got {arguments.kv_memory:g}, expected more than 0")
    for option in ("warm_up", "measured", "patience", "tail"):
        if getattr(arguments, option) < 0 or option == "measured" and arguments.measured == 0:
            parser.error(f"--{option.replace('_', '-')}: got {getattr(arguments, option):g}, expected more")
    return arguments


def floats(parser, option, text, separator, count=None):
    """Positive numbers of an option."""
    try:
        values = [float(part) for part in text.split(separator)]
    except ValueError:
        values = []
    if not values or min(values) <= 0 or count not in (None, len(values)):
        parser.error(f"{option}: got {text!r}, expected {count or 'one or more'} positive numbers separated by {separator!r}")
    return values


def vllm_engine(arguments):
    """The engine, ready to serve."""
    from vllm_engine import SHAPES, VllmEngine

    engine = VllmEngine(arguments.model, arguments.backend, arguments.mode, max_model_len=arguments.max_model_len,
                        layers=arguments.layers, tensor_parallel=arguments.tensor_parallel, memory=arguments.memory,
                        kv_gib=arguments.kv_memory)
    engine.warm_up(min(100_000, SHAPES[arguments.model]["vocab_size"]))
    return engine


class Benchmark:
    """All runs of one engine."""

    def __init__(self, arguments, make_engine, make_clock):
        self.arguments, self.make_engine, self.make_clock, self.engine = arguments, make_engine, make_clock, None
        self.begin = time.monotonic()
        self.workloads = [Workload.read(path) for path in arguments.workload]
        for workload in self.workloads:
            longest = max(request.prompt_tokens + request.output_tokens for request in workload.requests)
            if longest > arguments.max_model_len:
                raise Refused(f"--max-model-len: got {arguments.max_model_len}, expected at least {longest} for {workload.name}")
        self.former = {records.key(record): record for record in records.read(arguments.output)}
        self.failed = False
        self.undone = 0
        self.longest = arguments.warm_up + 2.0 * arguments.measured

    def run(self):
        print(f"{'workload':14} {'backend':12} {'rate':>6} {'TTFT ms':>9} {'TPOT ms':>8} {'P99 TPOT':>8} {'tokens/s':>9} {'failed':>6}")
        for index, workload in enumerate(self.workloads):
            for rate in self.arguments.rates:
                self.rate(workload, rate)
            if self.arguments.knee:
                self.find_knee(workload, *self.arguments.knee[index if len(self.arguments.knee) > 1 else 0])
        if self.undone:
            print(f"time limit: {self.undone} runs are left, the same command goes on with them")
            return 3
        return 1 if self.failed else 0

    def find_knee(self, workload, low, high, step):
        """Bisects the grid, counted from 1 at `low`: `good` is within the limits, `bad` is not."""
        good, bad = 0, round((high - low) / step) + 2
        while bad - good > 1:
            middle = (good + bad) // 2
            record = self.rate(workload, round(low + (middle - 1) * step, 6))
            if record is None:
                return
            if metrics.within(record["metrics"], record["requests"], self.arguments.limits):
                good = middle
            else:
                bad = middle
        print(f"{workload.name}: highest rate within the limits on this grid: {low + (good - 1) * step:g}" if good else
              f"{workload.name}: no rate of the grid is within the limits")

    def rate(self, workload, rate):
        """The record of a run, an earlier one's where the file has it; None where the time does not suffice."""
        record = self.config(workload, rate)
        if records.key(record) in self.former:
            record = self.former[records.key(record)]
            print(row(record) + "  (of an earlier run)")
            return record
        limit = self.arguments.time_limit
        if limit is not None and time.monotonic() - self.begin + self.longest > limit:
            self.undone += 1
            return None
        if self.engine is None:
            self.engine = self.make_engine(self.arguments)
            self.engine.backend_counters()  # what starting it counted is no run's
            print(f"engine up in {self.engine.start_seconds:.1f} s: {self.engine.describe()}", flush=True)
        begin = time.monotonic()
        a = self.arguments
        window = Window(a.warm_up, a.measured, a.warm_up + a.measured + a.tail, a.patience)
        result = run(self.engine, workload, rate, window, clock=self.make_clock(self.arguments.clock == "virtual"), admission=self.admission(workload),
                     seed=self.arguments.seed)
        counted = self.engine.backend_counters()
        tables, begun = {}, []
        if a.profile and not result.stopped:
            begun = [(f"profile-{number}", workload.token_ids(request.prompt), request.output_tokens)
                     for number, request in enumerate(workload.requests[len(result.sent):][:a.profile + 2])]
            tables = self.engine.profile(a.profile, begun)
        self.engine.clear(result.running + [name for name, *_ in begun])
        self.engine.backend_counters()  # nor is what profile and clearing counted
        self.complete(record, result, tables, counted)
        records.append(self.arguments.output, record)
        self.former[records.key(record)] = record
        self.failed |= record["status"] != "success"
        self.longest = max(self.longest, time.monotonic() - begin)
        print(row(record), flush=True)
        return record

    def admission(self, workload):
        name, _, most = self.arguments.admission.partition(":")
        return PrefixGrouped(int(most), workload) if name == "prefix-grouped" else Fcfs()

    def config(self, workload, rate):
        """The record before the run."""
        a = self.arguments
        model = a.model if a.layers is None else f"{a.model}-{a.layers}-layers"
        if a.tensor_parallel > 1:
            model = f"{model} on {a.tensor_parallel} GPUs"
        return {"schema_version": records.SCHEMA_VERSION, "config": {
            "model": model, "max_model_len": str(a.max_model_len), "port": "", "gpu_id": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
            "ATTENTION_BACKEND": a.backend, "request_rate": f"{rate:g}", "trace": workload.name, "block_size": "16",
            "num_prompts": str(len(workload.requests)), "output_file": a.output, "form": "in-process", "mode": a.mode,
            "admission": a.admission, "window": f"{a.warm_up:g}+{a.measured:g}", "arrival_seed": str(a.seed),
            "workload_seed": str(workload.seed), "clock": a.clock,
        }}

    def complete(self, record, result, tables, counted):
        figures, counts, goodput = metrics.summarise(result)
        notes = []
        if result.stopped:
            notes.append(f"given up: {result.stopped}")
        if result.exhausted:
            notes.append("the workload's arrivals ended before the run")
        if not counts["measured"]:
            notes.append("no request was measured")
        good = not (counts["failed"] or notes)
        record.update(
            status="success" if good else "failed", metrics=figures, requests=counts, goodput=goodput, notes=notes,
            steps=metrics.steps(result), machine={**self.engine.describe(), **host()},
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
        record.update(tables)
        if counted:
            record["backend_counters"] = counted
        if not good:
            record["error_log"] = "; ".join(notes + [f"{count} requests: {reason}" for reason, count in counts["failures"].items()])


def host():
    """How quiet the host is: where another program has its cores, steps that run without graphs take longer."""
    return {"host_cores": len(os.sched_getaffinity(0)), "host_load": round(os.getloadavg()[0], 1)}


def row(record):
    """A line of the table."""
    figures, config = record["metrics"], record["config"]
    number = lambda name, digits: "-" if figures[name] is None else f"{figures[name]:.{digits}f}"
    text = (f"{config['trace']:14} {config['ATTENTION_BACKEND']:12} {config['request_rate']:>6} {number('mean_ttft_ms', 1):>9} "
            f"{number('mean_tpot_ms', 2):>8} {number('p99_tpot_ms', 2):>8} {figures['output_token_throughput']:>9.0f} "
            f"{record['requests']['failed']:>6}")
    return text + ("" if record["status"] == "success" else f"  {record['error_log']}")


if __name__ == "__main__":
    sys.exit(main())
