"""vLLM's ``CUSTOM``: FlashAttention's backend with another builder and another implementation."""

from vllm.logger import init_logger
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from prefix_attn.vllm import versions
from prefix_attn.vllm.builder import Builder
from prefix_attn.vllm.impl import Impl

logger = init_logger("vllm.prefix_attn")

if not versions.is_tested(versions.installed()):
    logger.warning("%s: untested together, decode rows may be wrong or the engine may fail", versions.describe())


class Backend(FlashAttentionBackend):
    """Chosen by ``--attention-backend CUSTOM``."""

    @staticmethod
    def get_name() -> str:
        """The registry's name, which vLLM looks up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """Runs the layers."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Plans the steps."""
        return Builder
