"""The examples and the Python snippets of the README and the guide run."""

import pathlib
import re
import runpy

import pytest

import prefix_attn as pa

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = ROOT / "python" / "examples"


def test_the_quick_start_runs(capsys):
    runpy.run_path(str(EXAMPLES / "quick_start.py"), run_name="__main__")
    assert "largest difference from torch" in capsys.readouterr().out


def test_the_decode_loop_frees_all_pages_and_advances():
    changes, free = runpy.run_path(str(EXAMPLES / "decode_loop.py"))["main"]()
    assert free == 256 and {"lengths", "pages", "forest"} <= set(changes)


def snippets():
    for name in ("README.md", "docs/guide.md"):
        text = (ROOT / name).read_text()
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
            yield pytest.param(code, id=f"{name}-{number}")


@pytest.mark.parametrize("code", list(snippets()))
def test_snippets_run(code):
    """On the CPU: what names a CUDA device is run with the CPU instead."""
    exec(compile(code.replace('"cuda:0"', '"cpu"'), "snippet", "exec"), {"__name__": "snippet"})


def test_there_are_snippets():
    assert sum(1 for _ in snippets()) >= 4 and pa.__doc__
