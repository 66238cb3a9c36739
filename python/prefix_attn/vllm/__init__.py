"""Attention backend for vLLM: the decode rows of every batch run on prefix-aware plans, the rest on vLLM's FlashAttention.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``; ``--attention-backend CUSTOM`` chooses the
backend. Nothing here imports vLLM before vLLM calls.
"""

import logging


def register() -> None:
    """Make this package's backend vLLM's ``CUSTOM``. vLLM calls it in each of its processes, maybe more than once.

    Never raises: an exception here would keep vLLM from loading the plug-ins behind this one.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CUSTOM, "prefix_attn.vllm.backend.Backend")
    except Exception as error:  # whatever another version of vLLM raises
        from prefix_attn.vllm.versions import describe

        logging.getLogger("vllm.prefix_attn").warning("prefix_attn cannot register with %s: %s", describe(), error)
