"""Which vLLM versions the plug-in was tested with, and where they differ."""

import importlib.metadata
import re

#: First and last minor version tested (and every known difference between them is handled).
FIRST, LAST = (0, 26), (0, 33)


def installed() -> str:
    """The version of the installed vLLM, or ``none``."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def own() -> str:
    """The version of prefix_attn, or ``unknown`` where it runs from a folder."""
    try:
        return importlib.metadata.version("prefix-attn")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def is_tested(version: str) -> bool:
    """Whether a vLLM version is inside the tested range."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and FIRST <= (int(numbers[1]), int(numbers[2])) <= LAST


def describe() -> str:
    """Both versions and the range, for messages."""
    tested = "tested with {}.{} to {}.{}".format(*FIRST, *LAST)
    return f"vLLM {installed()} (prefix_attn {own()} was {tested})"
