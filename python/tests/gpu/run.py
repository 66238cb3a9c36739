"""Runs the device tests and counts: a skipped test has not passed. Exit status 0 only if all ran and passed."""

import pathlib
import sys

import pytest


class Counts:
    def __init__(self):
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def main():
    counts = Counts()
    folder = str(pathlib.Path(__file__).parent)
    status = pytest.main(["-q", "-ra", "--rootdir", folder, folder, *sys.argv[1:]], plugins=[counts])
    print("device tests: {passed} passed, {failed} failed, {skipped} skipped".format(**counts.outcomes))
    complete = counts.outcomes["passed"] > 0 and counts.outcomes["failed"] == counts.outcomes["skipped"] == 0
    return 0 if status == 0 and complete else 1


if __name__ == "__main__":
    sys.exit(main())
