#!/usr/bin/env python3
"""Measures other libraries on the batches of `pat bench export` and merges the figures into a result file of
`pat bench kernels`. README.md beside this file says how and against what."""

import argparse
import os
import subprocess
import sys

from exchange import Refused, load
from results import ResultFile


def main(argv=None):
    """Exit status: 0, 1 where an answer is wrong, 2 on bad input or where nothing can be measured."""
    arguments = parse(argv)
    try:
        exchange = load(arguments.exchange)
        file = ResultFile(arguments.result)
        configurations = [c for c in exchange.configurations if arguments.filter in c.title]
        if not configurations:
            raise Refused(f"--filter {arguments.filter!r}: no configuration of the exchange has that in its name")
        try:
            import torch
        except ImportError as error:
            raise Refused(f"PyTorch cannot be imported ({error}): pip install -r requirements.txt") from error
        from measure import Measuring

        if not torch.cuda.is_available():
            raise Refused("PyTorch finds no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())
        name = torch.cuda.get_device_name(device)
        if name != file.device:
            raise Refused(f"{arguments.result} was measured on {file.device}, this is {name}")
        passed = Measuring(arguments, exchange.seed, file, device).run(configurations)
        if arguments.pat:
            passed = measure_pat(arguments) and passed
        return 0 if passed else 1
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure_pat(arguments):
    """PAT's package has the import name of ours: the program runs once more, in a process in which that name is PAT's."""
    command = [sys.executable, __file__, "--exchange", arguments.exchange, "--result", arguments.result, "--methods", "pat"]
    command += ["--filter", arguments.filter, "--repeats", str(arguments.repeats)]
    command += ["--json"] * arguments.json + ["--force"] * arguments.force
    paths = [arguments.pat, *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode == 0


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--exchange", required=True, metavar="DIR", help="folder that pat bench export has written")
    add("--result", required=True, metavar="FILE", help="result file of pat bench kernels, extended in place")
    add("--methods", metavar="NAME,...", help="only these (default: all that run here)")
    add("--filter", default="", metavar="TEXT", help="only configurations whose `tree Q/KV` contains this text")
    add("--repeats", type=int, default=20, metavar="N", help="timed calls of each kind (default 20)")
    add("--time-limit", type=float, metavar="SECONDS", help="begin no configuration after this time")
    add("--force", action="store_true", help="measure again what the result file has")
    add("--pat", metavar="DIR", help="folder that holds PAT's package, as its own instructions have built it")
    add("--json", action="store_true", help="an object per configuration and a summary, a line each, instead of the table")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats: got {arguments.repeats}, expected at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
