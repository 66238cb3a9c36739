"""The same calls as torch custom operators, for ``torch.compile`` and piecewise CUDA graphs.

An operator takes tensors and numbers, no plans. So a model holds a :class:`PlanSlot`, a number as far as the compiler is
concerned, and the engine puts the plan of each step into it::

    slot = torch_op.PlanSlot()

    class Attention(torch.nn.Module):
        def forward(self, q, k_cache, v_cache):
            return torch_op.decode(q, k_cache, v_cache, slot)

    slot.plan = planner.plan(...)   # before each step

Importing this module imports torch (2.9 or later) and registers ``torch.ops.prefix_attn.decode``, ``decode_out`` and
``append_kv``, with fake implementations and with the arguments they write to.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from . import _native

_slots: weakref.WeakValueDictionary[int, PlanSlot] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class PlanSlot:
    """Where compiled code finds the plan of the step.

    A copy, also a deep one, is a slot of its own that holds the same plan until it is given another: a copied model runs its
    own plans. A pickled slot comes back as a new one without a plan: plans stay in their process.

    Attributes:
        number: what the operators are called with; no two slots of a process share it.
        plan: the plan that the next runs use. Setting it recompiles nothing.
    """

    def __init__(self, plan: _native.Plan | None = None):
        self.number = next(_numbers)
        self.plan = plan
        _slots[self.number] = self

    def __copy__(self) -> PlanSlot:
        return type(self)(self.plan)

    def __deepcopy__(self, memo: dict) -> PlanSlot:
        return type(self)(self.plan)

    def __reduce__(self):
        return type(self), ()


def _plan(number: int) -> _native.Plan:
    slot = _slots.get(number)
    if slot is None:
        raise ValueError(f"slot: got number {number}, expected that of a PlanSlot that is alive")
    if slot.plan is None:
        raise ValueError("slot: got a PlanSlot without a plan, expected slot.plan = planner.plan(...) before the step")
    return slot.plan


def _joined(k_scale: float | None, k_scales: Tensor | None, v_scale: float | None, v_scales: Tensor | None) -> dict:
    """Factors as functions take them. An argument of an operator is a number or a tensor."""
    return dict(k_scale=k_scale if k_scales is None else k_scales, v_scale=v_scale if v_scales is None else v_scales)


def _parted(k_scale: float | Tensor | None, v_scale: float | Tensor | None) -> list:
    """Factors as operators take them: both numbers, then both tensors."""
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    numbers = [None if isinstance(scale, Tensor) else _number(name, scale) for name, scale in scales.items()]
    return numbers + [scale if isinstance(scale, Tensor) else None for scale in scales.values()]


def _check(kind: type, **values: object) -> None:
    """Ahead of the operators, whose schemas do not refuse by the names of the functions here."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected {kind.__name__}")


def _number(name: str, value: object) -> float | Tensor | None:
    """A number if there is one; arrays and tensors are numbers without dimensions only. A schema takes any of one element."""
    if value is None or isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        # A tensor stays one: to read it would break a graph.
        if isinstance(value, Tensor):
            if value.dtype is not torch.bool:
                return value
        elif isinstance(value.item(), (int, float)) and not isinstance(value.item(), bool):
            return value.item()
    raise TypeError(f"{name}: got {type(value).__name__}, expected a number")


@torch.library.custom_op("prefix_attn::decode", mutates_args=())
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: int,
    scale: float | None = None,
    kv_layout: str = "NHD",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    options = dict(scale=scale, softcap=softcap, sinks=sinks, kv_layout=kv_layout)
    options |= _joined(k_scale, k_scales, v_scale, v_scales)
    return _native.run(_plan(slot), q, k_cache, v_cache, return_lse=True, **options)


@_decode.register_fake
def _(q, k_cache, v_cache, slot, *options):
    v_dim = v_cache.shape[-1]
    out = torch.empty_like(q) if v_dim == q.shape[-1] else q.new_empty((*q.shape[:2], v_dim))
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("prefix_attn::decode_out", mutates_args=("out", "lse"))
def _decode_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    # No default: torch 2.9 counts on every tensor that is written to be passed, and leaves out what equals its default.
    lse: Tensor | None,
    slot: int,
    scale: float | None = None,
    kv_layout: str = "NHD",
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    options = dict(scale=scale, softcap=softcap, sinks=sinks, kv_layout=kv_layout)
    options |= _joined(k_scale, k_scales, v_scale, v_scales)
    _native.run(_plan(slot), q, k_cache, v_cache, out, lse, **options)


@_decode_out.register_fake
def _(q, k_cache, v_cache, out, lse, slot, *options):
    return None


@torch.library.custom_op("prefix_attn::append_kv", mutates_args=("k_cache", "v_cache"))
def _append_kv(
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    kv_layout: str = "NHD",
    kv_dtype: str | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    options = dict(kv_layout=kv_layout, kv_dtype=kv_dtype) | _joined(k_scale, k_scales, v_scale, v_scales)
    _native.append_kv(k_new, v_new, k_cache, v_cache, slots, **options)


@_append_kv.register_fake
def _(k_new, v_new, k_cache, v_cache, slots, *options):
    return None


def _options(slot, scale, softcap, sinks, k_scale, v_scale, kv_layout) -> list:
    """What both decoding operators take behind their tensors."""
    _check(PlanSlot, slot=slot)
    _check(str, kv_layout=kv_layout)
    if sinks is not None:
        _check(Tensor, sinks=sinks)
    numbers = _number("scale", scale), kv_layout, _number("softcap", softcap)
    return [slot.number, *numbers, sinks, *_parted(k_scale, v_scale)]


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: PlanSlot,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    return_lse: bool = False,
    kv_layout: str = "NHD",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`prefix_attn.run` of the slot's plan, for compiled code.

    Args:
        q: ``[rows, q_heads, head_dim]``.
        k_cache, v_cache, scale, softcap, sinks, k_scale, v_scale, return_lse, kv_layout: as in :func:`prefix_attn.run`.
        slot: holds the plan of the step.

    Returns:
        out, or ``(out, lse)``.

    Raises:
        TypeError: an argument has another type.
        ValueError: the slot has no plan; and what :func:`prefix_attn.run` raises.
    """
    _check(Tensor, q=q, k_cache=k_cache, v_cache=v_cache)
    options = _options(slot, scale, softcap, sinks, k_scale, v_scale, kv_layout)
    out, lse = torch.ops.prefix_attn.decode(q, k_cache, v_cache, *options)
    return (out, lse) if return_lse else out


def decode_out(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    slot: PlanSlot,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    kv_layout: str = "NHD",
) -> None:
    """As :func:`decode`, into memory that is there: ``out`` as q and perhaps ``lse``, float32 ``[rows, q_heads]``.

    Raises:
        TypeError, ValueError: as :func:`decode`.
    """
    _check(Tensor, q=q, k_cache=k_cache, v_cache=v_cache, out=out)
    if lse is not None:
        _check(Tensor, lse=lse)
    options = _options(slot, scale, softcap, sinks, k_scale, v_scale, kv_layout)
    torch.ops.prefix_attn.decode_out(q, k_cache, v_cache, out, lse, *options)


def append_kv(
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    kv_dtype: torch.dtype | str | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    kv_layout: str = "NHD",
) -> None:
    """:func:`prefix_attn.append_kv` for compiled code, with the same arguments.

    Raises:
        TypeError, ValueError: as :func:`prefix_attn.append_kv`.
    """
    _check(Tensor, k_new=k_new, v_new=v_new, k_cache=k_cache, v_cache=v_cache, slots=slots)
    _check(str, kv_layout=kv_layout)
    stored, scales = None if kv_dtype is None else str(kv_dtype), _parted(k_scale, v_scale)
    torch.ops.prefix_attn.append_kv(k_new, v_new, k_cache, v_cache, slots, kv_layout, stored, *scales)
