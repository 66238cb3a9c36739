"""Configuration by configuration: draw the tensors, check and time every method, write the result file, print a line."""

import collections
import concurrent.futures
import dataclasses
import sys
import time

import torch

import methods
import timing
from exchange import Refused
from reference import judge
from report import Report
from results import add, forget, is_measured
from tensors import Tensors, measuring_order


@dataclasses.dataclass
class Checked:
    """A method whose answer is right."""

    prepared: methods.Prepared
    correctness: dict
    plan_ms: float | None


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
            self._say(f"{missing} configurations are not in the result file: pat bench kernels measures them first")
        if not work:
            raise Refused(f"{self._file.path} has none of the configurations")
        pending = [c for c, record in work if self._pending(record)]
        self._say(f"{len(work)} configurations, {len(pending)} of them to be measured")
        if pending:
            self._compile(pending)
            self._cold_cache = timing.ColdCache(self._device)
        report = Report(list(self._methods), self._arguments.json)
        report.header()
        for configuration in measuring_order([c for c, _ in work]):
            limit = self._arguments.time_limit
            if limit is not None and time.monotonic() - self._begin > limit:
                self._say("time limit reached: the same command continues")
                break
            record = self._file.record(configuration)
            names = self._pending(record)
            if names:
                self._measure(configuration, record, names)
                self._file.save()
            report.configuration(configuration, record)
        report.summary()
        self._describe_methods()
        self._file.save()
        return self._all_passed

    def _say(self, text):
        """To people: beside the JSON lines where these are asked for."""
        print(text, file=sys.stderr if self._arguments.json else sys.stdout, flush=True)

    def _available(self):
        asked = self._arguments.methods.split(",") if self._arguments.methods else methods.NAMES
        found = {}
        for name in asked:
            if name not in methods.NAMES:
                raise Refused(f"--methods: got {name!r}, expected some of {', '.join(methods.NAMES)}")
            try:
                method = methods.create(name, self._device)
            except methods.Unavailable as error:
                self._say(f"{name}: left out: {error}")
                continue
            measured_with = self._file.version_of(name)
            if measured_with not in (None, method.version) and not self._arguments.force:
                self._say(f"{name}: left out: the file has figures of {measured_with}, here is {method.version} (--force)")
                continue
            found[name] = method
        if not found:
            raise Refused("no method can be measured here")
        return found

    def _pending(self, record):
        return [name for name in self._methods if self._arguments.force or not is_measured(record, name)]

    def _compile(self, configurations):
        """All modules at once: compilers wait for nothing but each other. Modules are made for a type, a head dim, and some for a
        page size and a group."""
        kinds = {(c.dtype, c.head_dim, c.batch.page_size, c.nheads_q // c.nheads_kv): c for c in configurations}
        begin = time.monotonic()
        self._say("building kernels (minutes where it is the first time)")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = {
                pool.submit(method.compile, kind): name for name, method in self._methods.items() for kind in kinds.values()
            }
            for job in concurrent.futures.as_completed(jobs):
                name = jobs[job]
                if (error := job.exception()) is None:
                    self._say(f"{name}: built after {time.monotonic() - begin:.0f} s")
                elif self._methods.pop(name, None):
                    # What a compiler says stands at the end of much else.
                    self._say(f"{name}: left out: it cannot be built:\n{str(error)[-2000:]}")
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
        checked = {}
        for name in names:
            try:
                if (method := self._check(name, case, record)) is not None:
                    checked[name] = method
            except methods.NotRunnable as error:
                self._leave_out(name, configuration, str(error))
            except Exception as error:  # Whatever another library raises must not end the run.
                self._fail(name, configuration, error)
        while checked:
            try:
                cold_ms = timing.in_turns_ms(
                    {name: method.prepared.call for name, method in checked.items()}, self._arguments.repeats, self._cold_cache
                )
                break
            except timing.CallFailed as failed:
                self._fail(failed.name, configuration, failed.error)
                del checked[failed.name]
        for name, method in checked.items():
            try:
                warm_ms = timing.warm_ms(method.prepared.call, self._arguments.repeats)
            except Exception as error:
                self._fail(name, configuration, error)
                continue
            times = {"cold_ms": cold_ms[name], "warm_ms": warm_ms, "plan_ms": method.plan_ms}
            add(record, name, method.correctness, times)

    def _check(self, name, case, record):
        """A method that is ready to be timed; None where its answer is wrong."""
        prepared = self._methods[name].prepare(case)
        plan_ms = timing.plan_ms(prepared.plan) if prepared.plan else None
        # What a method does not write stays NaN: outputs of its own begin so, and the allocator gives this memory to others next.
        torch.full_like(case.q, float("nan"))
        correctness = judge(case, prepared.answer(prepared.call()))
        if correctness["status"] != "PASSED":
            self._all_passed = False
            add(record, name, correctness, None)
            return None
        return Checked(prepared, correctness, plan_ms)

    def _fail(self, name, configuration, error):
        self._leave_out(name, configuration, f"{type(error).__name__}: {_first_line(error)}")
        self._check_device()

    def _check_device(self):
        """An illegal access leaves a process without a usable device."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise Refused(f"the device is lost to this process ({_first_line(error)}): start again") from error

    def _leave_out(self, name, configuration, reason):
        self._not_run[name][reason].append(configuration.title)
        self._say(f"{name}: not run for {configuration.title}: {reason}")

    def _describe_methods(self):
        for name, method in self._methods.items():
            left_out = [f"not run: {reason}: {'; '.join(titles)}" for reason, titles in self._not_run[name].items()]
            self._file.set_method(name, method.version, ". ".join([method.note, *left_out]))


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

