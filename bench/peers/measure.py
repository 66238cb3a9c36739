"""Configuration by configuration: draw the tensors, check and time every method, write the result file, print a line."""

import collections
import concurrent.futures
import time

import torch

import methods
import timing
from exchange import Refused
from reference import judge
from results import OURS, add, forget, is_measured
from tensors import DTYPES, Tensors, measuring_order


class Measuring:
    """One run of the program, from the methods that it can use to the last line of its table."""

    def __init__(self, arguments, seed, file, device):
        self._begin = time.monotonic()
        self._arguments, self._file, self._device = arguments, file, device
        self._methods = self._available()
        self._tensors = Tensors(seed, device)
        # By method and reason, the configurations that were not run.
        self._not_run = {name: collections.defaultdict(list) for name in self._methods}
        self._all_passed = True

    def run(self, configurations):
        """Whether every answer was right."""
        work = [(c, record) for c in configurations if (record := self._file.record(c)) is not None]
        if len(work) < len(configurations):
            missing = len(configurations) - len(work)
            print(f"{missing} configurations are not in the result file: pat bench kernels measures them first")
        if not work:
            raise Refused(f"{self._file.path} has none of the configurations")
        pending = [c for c, record in work if self._pending(record)]
        print(f"{len(work)} configurations, {len(pending)} of them to be measured", flush=True)
        if pending:
            self._compile({(DTYPES[c.dtype], c.head_dim) for c in pending})
            self._cold_cache = timing.ColdCache(self._device)
        self._print_header()
        for configuration in measuring_order([c for c, _ in work]):
            limit = self._arguments.time_limit
            if limit is not None and time.monotonic() - self._begin > limit:
                print("time limit reached: the same command continues")
                break
            record = self._file.record(configuration)
            names = self._pending(record)
            if names:
                self._measure(configuration, record, names)
                self._file.save()
            self._print_line(configuration, record)
        self._describe_methods()
        self._file.save()
        return self._all_passed

    def _available(self):
        asked = self._arguments.methods.split(",") if self._arguments.methods else methods.NAMES
        found = {}
        for name in asked:
            if name not in methods.NAMES:
                raise Refused(f"--methods: got {name!r}, expected some of {', '.join(methods.NAMES)}")
            try:
                method = methods.create(name, self._device)
            except methods.Unavailable as error:
                print(f"{name}: left out: {error}")
                continue
            measured_with = self._file.version_of(name)
            if measured_with not in (None, method.version) and not self._arguments.force:
                print(f"{name}: left out: the file has figures of {measured_with}, here is {method.version} (--force)")
                continue
            found[name] = method
        if not found:
            raise Refused("no method can be measured here")
        return found

    def _pending(self, record):
        return [name for name in self._methods if self._arguments.force or not is_measured(record, name)]

    def _compile(self, shapes):
        """All modules at once: compilers wait for nothing but each other."""
        begin = time.monotonic()
        print("building kernels (minutes where it is the first time)", flush=True)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = {
                pool.submit(method.compile, *shape): name for name, method in self._methods.items() for shape in shapes
            }
            for job in concurrent.futures.as_completed(jobs):
                name = jobs[job]
                if (error := job.exception()) is None:
                    print(f"{name}: built after {time.monotonic() - begin:.0f} s", flush=True)
                elif self._methods.pop(name, None):
                    # What a compiler says stands at the end of much else.
                    print(f"{name}: left out: it cannot be built:\n{str(error)[-2000:]}", flush=True)
        if not self._methods:
            raise Refused("no method can be built here")

    def _measure(self, configuration, record, names):
        for name in names:
            forget(record, name)
        try:
            case = self._tensors.case(configuration)
        except torch.OutOfMemoryError as error:
            for name in names:
                self._leave_out(name, configuration, f"Q, K and V do not fit: {_first_line(error)}")
            return
        for name in names:
            try:
                self._measure_method(name, case, record)
            except methods.NotRunnable as error:
                self._leave_out(name, configuration, str(error))
            except Exception as error:  # Whatever another library raises must not end the run.
                self._leave_out(name, configuration, f"{type(error).__name__}: {_first_line(error)}")
                self._check_device()

    def _measure_method(self, name, case, record):
        prepared = self._methods[name].prepare(case)
        plan_ms = timing.plan_ms(prepared.plan) if prepared.plan else None
        # The allocator gives this memory to the answer next: what a method does not write stays NaN.
        torch.full_like(case.q, float("nan"))
        correctness = judge(case, prepared.answer(prepared.call()))
        if correctness["status"] != "PASSED":
            self._all_passed = False
            add(record, name, correctness, None)
            return
        repeats = self._arguments.repeats
        times = {
            "cold_ms": timing.call_ms(prepared.call, repeats, self._cold_cache),
            "warm_ms": timing.call_ms(prepared.call, repeats),
            "plan_ms": plan_ms,
        }
        add(record, name, correctness, times)

    def _check_device(self):
        """An illegal access leaves a process without a usable device."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Refused(f"the device is lost to this process ({_first_line(error)}): start again") from error

    def _leave_out(self, name, configuration, reason):
        self._not_run[name][reason].append(configuration.title)
        print(f"{name}: not run for {configuration.title}: {reason}", flush=True)

    def _describe_methods(self):
        for name, method in self._methods.items():
            left_out = [f"not run: {reason}: {'; '.join(titles)}" for reason, titles in self._not_run[name].items()]
            self._file.set_method(name, method.version, ". ".join([method.note, *left_out]))

    def _print_header(self):
        columns = "".join(f" {name.removeprefix('flashinfer_'):>10}" for name in self._methods)
        print(f"{'cold us':48} {'heads':>6} {OURS:>9}{columns} {'ours/best':>9}")

    def _print_line(self, configuration, record):
        def cell(name, width):
            if record.get("correctness", {}).get(name, {}).get("status", "PASSED") != "PASSED":
                return f"{'WRONG':>{width}}"
            milliseconds = record.get("latencies", {}).get(name)
            return f"{'-' if milliseconds is None else f'{milliseconds * 1e3:.1f}':>{width}}"

        latencies = record.get("latencies", {})
        peers = [latencies[name] for name in self._methods if name in latencies]
        ratio = f"{latencies[OURS] / min(peers):.3f}" if peers and OURS in latencies else "-"
        heads = f"{configuration.nheads_q}/{configuration.nheads_kv}"
        columns = "".join(f" {cell(name, 10)}" for name in self._methods)
        print(f"{configuration.name:48} {heads:>6} {cell(OURS, 9)}{columns} {ratio:>9}", flush=True)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
