"""The program of the GPU runs (`gpu_transformers/drive.py`), small and on the CPU."""

import json
import pathlib
import subprocess
import sys

PROGRAM = pathlib.Path(__file__).parent.parent / "gpu_transformers" / "drive.py"
#: Plans read shared pages once, also where it does not pay: batches here are small.
START = """
import functools, runpy, sys, prefix_attn
prefix_attn.Planner = functools.partial(prefix_attn.Planner, mode="packed")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_requests_of_the_gpu_runs(tmp_path):
    # In a process of its own, as on a GPU machine: what it wraps and counts is then its own alone.
    out = tmp_path / "out.json"
    size = ["--size", "tiny", "--layers", "1", "--device", "cpu", "--requests", "48"]
    command = [sys.executable, "-P", "-c", START, str(PROGRAM), str(out), *size, "--modes", "eager", "--limit", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    modes = json.loads(out.read_text())["modes"]
    assert set(modes) == {"stock", "eager", "broken"} and modes["broken"]["beyond"] > 0
