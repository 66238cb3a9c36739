"""The examples and the Python snippets of the README and the guide run."""

import json
import pathlib
import re
import runpy
import sys
import types

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


def test_the_notebook_runs_and_its_pictures_are_the_plans():
    notebook = json.loads((EXAMPLES / "pictures.ipynb").read_text())
    names, pictures = {}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        exec(compile(source, "notebook", "exec"), names)
        for output in cell["outputs"]:
            kept = "".join(output["data"]["image/svg+xml"])
            assert kept == names[source.splitlines()[-1]].svg()
            pictures += 1
    assert pictures == 2


def snippets():
    for name in ("README.md", "docs/guide.md"):
        text = (ROOT / name).read_text()
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)):
            yield pytest.param(code, id=f"{name}-{number}")


@pytest.mark.parametrize("code", list(snippets()))
def test_snippets_run(code, monkeypatch):
    """On the CPU: what names a CUDA device is run with the CPU instead."""
    snippet = types.ModuleType("snippet")
    # torch.compile of 2.9 looks modules up by name.
    monkeypatch.setitem(sys.modules, "snippet", snippet)
    exec(compile(code.replace('"cuda:0"', '"cpu"'), "snippet", "exec"), vars(snippet))


def test_there_are_snippets():
    assert sum(1 for _ in snippets()) >= 4 and pa.__doc__
