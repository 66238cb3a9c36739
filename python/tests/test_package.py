"""What the package says of itself: docstrings, stubs, ABI."""

import ast
import importlib.metadata
import inspect
import pathlib
import re
import sys
import sysconfig

import pytest
from packaging import tags

import prefix_attn as pa
from prefix_attn import _native

STUB = ast.parse((pathlib.Path(pa.__file__).parent / "_native.pyi").read_text())


def members(owner):
    return [name for name in vars(owner) if not name.startswith("_")]


def public():
    for name in pa.__all__:
        yield name, getattr(pa, name)
        if inspect.isclass(getattr(pa, name)):
            for member in members(getattr(pa, name)):
                yield f"{name}.{member}", getattr(getattr(pa, name), member)


@pytest.mark.parametrize("name, thing", [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_everything_public_is_described(name, thing):
    text = inspect.getdoc(thing)
    assert text and len(text) > 10, f"{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in pa.__all__ if callable(getattr(_native, n, None))])
def test_descriptions_name_the_parameters_and_errors(name):
    thing = getattr(_native, name)
    try:
        parameters = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]
    except ValueError:
        # A class that is not made by its constructor.
        return
    text = inspect.getdoc(thing)
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert not missing, f"{name}: {missing} are not in its docstring"
    assert not parameters or name in ("supports",) or "Raises:" in text


def test_the_stub_has_what_the_extension_has():
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef)}
    exported = {name for name in vars(_native) if not name.startswith("_")}
    assert exported == set(classes) | functions
    for name, node in classes.items():
        stubbed = {item.name for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")}
        assert stubbed == set(members(getattr(_native, name))), name


def test_the_stub_says_what_has_a_hash():
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            without = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            is_unhashable = getattr(_native, node.name).__hash__ is None
            assert ("__hash__" in without) == is_unhashable, node.name
    with pytest.raises(TypeError, match="unhashable"):
        hash(pa.DeviceProfile.named("h200"))


def test_the_extension_is_one_of_the_stable_abi():
    """Free-threaded builds of Python do not load it; one that does has its lock on again."""
    assert _native.__file__.endswith(".abi3.so")
    assert not sysconfig.get_config_var("Py_GIL_DISABLED")
    is_enabled = getattr(sys, "_is_gil_enabled", lambda: True)
    assert is_enabled()


def test_pip_takes_the_wheel_for_builds_with_the_lock_alone():
    text = importlib.metadata.distribution("prefix-attn").read_text("WHEEL")
    of_wheel = set().union(*map(tags.parse_tag, re.findall(r"^Tag: (\S+)$", text, re.M)))
    platforms = {tag.platform for tag in of_wheel}
    accepted = lambda version, abi: of_wheel & set(tags.cpython_tags(version, [abi], platforms))  # noqa: E731
    assert accepted((3, 10), "cp310") and accepted((3, 14), "cp314")
    assert not accepted((3, 13), "cp313t") and not accepted((3, 14), "cp314t")


def test_importing_it_does_not_import_torch(tmp_path):
    import subprocess

    code = "import sys, prefix_attn; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    paths = [str(pathlib.Path(pa.__file__).parents[1])]
    # Elsewhere: from python/ the source package, which has no extension, would be found first.
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": paths[0]}, cwd=tmp_path).returncode == 0


def test_doctor_finds_this_machine_healthy():
    report = pa.doctor()
    assert report["healthy"] is True and report["kernels"] > 30 and report["cpu_threads"] >= 1
    assert isinstance(report["cuda"], str) and isinstance(report["devices"], list)


def test_supports_answers_without_a_device():
    shape = pa.AttentionShape(32, 8, 128, "bfloat16")
    assert pa.supports(shape, 16) is None
    for refused in (dict(alibi=True), dict(page_size=0), dict(kv_dtype="float16")):
        reason = pa.supports(shape, refused.pop("page_size", 16), **refused)
        assert isinstance(reason, str) and "expected" in reason
