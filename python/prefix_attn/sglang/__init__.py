"""SGLang's plug-in: ``--attention-backend prefix_attn``.

Loaded through the entry point group ``sglang.srt.plugins``. Decode batches of full-attention layers run here, the rest on a
stock backend. Its tests run on the CPU; 0.5.16 ran on a GPU, eager.
"""

from __future__ import annotations

import logging

#: The attention backend's name.
NAME = "prefix_attn"
#: The first is the newest that asks for torch 2.11.
TESTED_VERSIONS = ("0.5.16", "0.5.23")

_log = logging.getLogger("prefix_attn.sglang")


def register() -> None:
    """Adds the backend to SGLang; of another version than the tested ones it says so in one line, and adds nothing."""
    import sglang

    if sglang.__version__ not in TESTED_VERSIONS:
        tested = ", ".join(TESTED_VERSIONS)
        _log.warning("prefix_attn: sglang %s is installed, tested is %s: backend not registered", sglang.__version__, tested)
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in choices().ATTENTION_BACKEND_CHOICES:
        choices().add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_create)


def choices():
    """SGLang's module of what its arguments may be."""
    try:
        from sglang.srt.arg_groups import choices
    except ImportError:  # 0.5.16
        from sglang.srt import server_args as choices
    return choices


def _create(runner):
    """The backend for a model runner, over the stock backend of its device."""
    from .backend import backend_over

    if runner.use_mla_backend:
        raise ValueError("prefix_attn: MLA models are not supported, choose another --attention-backend")
    return backend_over(_stock(str(runner.device)))(runner)


def _stock(device: str):
    if device.startswith("cuda"):
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        return TritonAttnBackend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return TorchNativeAttnBackend
