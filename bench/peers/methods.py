"""What a method is to the program, and which there are."""

import dataclasses
import typing

import torch

FLASHINFER = (
    "flashinfer_fa2",
    "flashinfer_fa3",
    "flashinfer_cudacore",
    "flashinfer_xqa",
    "flashinfer_persistent",
    "flashinfer_cascade",
)
NAMES = (*FLASHINFER, "fa3", "fa3_scheduled", "codec", "torch_sdpa", "prefix_attn", "pat")


class Unavailable(Exception):
    """Why a method cannot run on this machine."""


class NotRunnable(Exception):
    """Why a method cannot run a configuration."""


@dataclasses.dataclass
class Prepared:
    """A method and a case: `plan` (None: nothing to plan) stands outside of the timed region, `call` in it; `answer` makes
    `[sequences, q_heads, head_dim]`, in the batch's order, of what `call` returns."""

    call: typing.Callable
    plan: typing.Callable | None = None
    answer: typing.Callable = lambda out: out


class Method(typing.Protocol):
    """An implementation of decode attention."""

    version: str
    note: str

    def compile(self, configuration) -> None:
        """Builds kernels ahead of time, so that no measurement waits for a compiler."""

    def prepare(self, case) -> Prepared:
        """Everything that is done once for a batch. Raises NotRunnable."""


def create(name, device):
    """The method of a name. Raises Unavailable."""
    if name in FLASHINFER:
        from flashinfer_methods import create as create_flashinfer

        return create_flashinfer(name, device)
    if name == "torch_sdpa":
        from torch_sdpa import TorchSdpa

        return TorchSdpa()
    if name in ("fa3", "fa3_scheduled"):
        from flash_attention_3 import FlashAttention3

        return FlashAttention3(scheduled=name == "fa3_scheduled")
    from shared_prefix_methods import CoDec, Pat, PrefixAttn

    return {"codec": CoDec, "pat": Pat, "prefix_attn": PrefixAttn}[name]()
