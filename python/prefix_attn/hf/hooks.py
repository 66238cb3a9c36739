"""Where this library stands in transformers: a name for an attention, and two functions that are wrapped.

Every tested version calls ``flash_attn_with_kvcache`` in its decode fast path; what surrounds the call changes from version
to version. So that function is what is supplied, and the versions' own code around it stays in use.
"""

from __future__ import annotations

import functools

import transformers
from packaging.version import Version
from transformers import modeling_flash_attention_utils as flash
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.modeling_utils import AttentionInterface

from . import stock
from .steps import flash_attn_with_kvcache, forward_pass

#: transformers that the tests run with.
TESTED_VERSIONS = ("5.17.0", "5.19.0", "5.24.0")
#: Of the versions between them, the one whose names and cache are neither those before nor those after it.
_UNTESTED_SERIES = (5, 18)

#: "flash" and the 2 at its end let it pass the checks of the decode fast path.
_NAME = "flash_prefix_attn_2"
_VERSION = Version(transformers.__version__)


def attention_name() -> str:
    """What the attention is called in this version."""
    return _NAME if _VERSION >= Version("5.19") else f"paged|{_NAME}"


@functools.cache
def install() -> None:
    """Registers the attention, once.

    Raises:
        RuntimeError: The version is outside the tested range.
    """
    first, last = (Version(version).release[:2] for version in (TESTED_VERSIONS[0], TESTED_VERSIONS[-1]))
    if not first <= _VERSION.release[:2] <= last or _VERSION.release[:2] == _UNTESTED_SERIES:
        raise RuntimeError(
            f"prefix_attn.hf: transformers {transformers.__version__} is installed, tested are {', '.join(TESTED_VERSIONS)}"
        )
    if _VERSION >= Version("5.19"):
        from transformers.integrations.flash_attention import flash_attention_forward as forward
    else:
        from transformers.integrations.flash_paged import paged_attention_forward as forward
    AttentionInterface.register(attention_name(), forward)

    imports = flash._lazy_imports

    @functools.wraps(imports)
    def lazy_imports(implementation, *args, **kwargs):
        if implementation != attention_name():
            return imports(implementation, *args, **kwargs)
        stock_functions = (stock.flash_attn_func, stock.flash_attn_varlen_func)
        return *stock_functions, flash_attn_with_kvcache, flash._pad_input, flash._unpad_input

    flash._lazy_imports = lazy_imports

    compute = ModelRunner.compute_batch

    @functools.wraps(compute)
    def compute_batch(self, model, batch_data):
        if model.config._attn_implementation != attention_name():
            return compute(self, model, batch_data)
        # A graph runs no Python of the layers: what a replay needs is uploaded here.
        with forward_pass(self, model):
            return compute(self, model, batch_data)

    ModelRunner.compute_batch = compute_batch
