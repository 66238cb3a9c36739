"""The prefix tree of a batch, as PAT programs hold it: block tables and lengths, the plan made of them, PAT's tables."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

import prefix_attn

from .schedule import DEFAULT_TILES, packs, tile_of

_planning = threading.Lock()
_planners: dict[tuple, prefix_attn.Planner] = {}
#: What a program called last with, by (block size, query heads per KV head, KV heads, device): what the next step is
#: planned for before its tensors are there.
_last_geometry: dict[tuple, tuple] = {}
_background: ThreadPoolExecutor | None = None


class PrefixTreeCPP:
    """A decode batch over a paged KV cache with blocks of ``block_size`` tokens."""

    def __init__(self, block_size: int):
        self.block_size = count_of("block_size", block_size)
        self.kernel_info = KernelInfo(self)
        self._lengths: list[int] = []
        self._block_table = torch.empty(0, 0, dtype=torch.int32)
        self._group, self._kv_heads = 1, 8
        self._tiles = list(DEFAULT_TILES)
        self._plans: dict[tuple, prefix_attn.Plan] = {}

    def build_radix_tree(self, seq_lens: Sequence[int] | torch.Tensor, block_table: torch.Tensor) -> None:
        """Takes the batch over; the caller may change its tensors afterwards.

        Args:
            seq_lens: Tokens of each sequence, the one being decoded included: B integers, or an int32 CPU tensor [B].
            block_table: int32 CPU tensor [B, blocks]: block ids, padded on the right with anything.

        Raises:
            TypeError, ValueError: Other types, shapes or devices; a negative length; a row with too few blocks.
        """
        self._take(seq_lens, "block_table", block_table)

    def _take(self, seq_lens: Sequence[int] | torch.Tensor, name: str, table: torch.Tensor) -> None:
        _check_host_int32(name, table, 2)
        _check_lengths(seq_lens)
        if len(seq_lens) != table.shape[0]:
            raise ValueError(f"seq_lens: {len(seq_lens)} lengths, expected one per row of {name} ({table.shape[0]})")
        if hasattr(seq_lens, "tolist"):
            seq_lens = seq_lens.tolist()
        most = table.shape[1] * self.block_size
        lengths = [integer(f"seq_lens[{sequence}]", length) for sequence, length in enumerate(seq_lens)]
        for sequence, length in enumerate(lengths):
            if not 0 <= length <= most:
                raise ValueError(f"seq_lens[{sequence}]: {length}, expected 0 to {most}, what a row of {name} holds")
        self._lengths = lengths
        self._block_table = table[:, : -(-max(lengths, default=0) // self.block_size)].clone()
        self._forget()

    def pack_schedule(
        self,
        MNWs: Sequence[Sequence[int]] | None = None,
        HRatio: int = 1,
        kvHead: int = 8,
        use_compute_model: bool = False,
    ) -> None:
        """Says what the batch is scheduled for: ``HRatio`` query heads for each of ``kvHead`` KV heads. Again: from anew.

        ``MNWs`` (M, N, warps) restricts the tiles that ``kernel_info`` names; ``use_compute_model`` is ignored, as in PAT's
        compiled scheduler. Neither changes what runs.

        Raises:
            TypeError, ValueError: A number is not positive, or ``MNWs`` is no list of triples of such numbers.
        """
        group, kv_heads = count_of("HRatio", HRatio), count_of("kvHead", kvHead)
        self._tiles = _tiles(MNWs)
        self._group, self._kv_heads = group, kv_heads
        self._forget()

    def _forget(self) -> None:
        self._plans = {}
        self.kernel_info._forget()

    def __getstate__(self) -> dict:
        # A copy makes its own plans when it is run: they are this process's.
        return {**self.__dict__, "_plans": {}}

    def _plan_ahead(self, device: torch.device) -> None:
        """Plans for the tensors of the last call, where there was one: a model's do not change from step to step."""
        geometry = _last_geometry.get((self.block_size, self._group, self._kv_heads, device))
        if geometry is not None:
            # Where the guess is wrong, the call will tell what is wrong with the batch, if anything.
            with contextlib.suppress(ValueError):
                self._plan(*geometry)

    def _plan(
        self, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, num_blocks: int
    ) -> prefix_attn.Plan:
        """The plan of the batch for such tensors: made once, for all layers."""
        geometry = (q_heads, kv_heads, head_dim, dtype, device, num_blocks)
        plan = self._plans.get(geometry)
        if plan is None:
            with _planning:
                planner = _planners.get(geometry[:-1])
                if planner is None:
                    shape = prefix_attn.AttentionShape(q_heads, kv_heads, head_dim, dtype)
                    planner = _planners.setdefault(geometry[:-1], prefix_attn.Planner(shape, device))
                plan = planner.plan(self._block_table, self._lengths, self.block_size, num_blocks)
                _last_geometry[self.block_size, q_heads // kv_heads, kv_heads, device] = geometry
            self._plans[geometry] = plan
        return plan


class PrefixTree(PrefixTreeCPP):
    """PAT's Python scheduler: here the same as the compiled one."""


class KernelInfo:
    """PAT's tables of a schedule, made when they are first looked at; what runs does not need them.

    ``num_split_per_seq``: int32 [B]. By group of packs with one tile: ``query_tables`` [packs, queries], ``block_tables``
    [packs, blocks] (padded with 0), ``num_seqs_per_CTAs``, ``CTA_ranks`` and ``kv_in_CTAs`` [packs], all int32, and ``MNW``
    [M, N, warps]. ``max_split_per_seq``, ``max_seqs_in_CTA``, ``max_blocks_in_CTA``: their maxima.
    """

    _TABLES = ("query_tables", "block_tables", "num_seqs_per_CTAs", "CTA_ranks", "kv_in_CTAs")
    _FIELDS = (*_TABLES, "num_split_per_seq", "MNW", "max_split_per_seq", "max_seqs_in_CTA", "max_blocks_in_CTA")

    def __init__(self, tree: PrefixTreeCPP):
        self._tree = tree
        self._device = torch.device("cpu")

    def to_gpu(self, device: torch.device | str | int) -> None:
        """Plans the batch for ``device`` (a CPU is one too), as far as it is known what for, and moves the tables there.

        Raises:
            TypeError, ValueError: ``device`` names no CUDA device and no CPU.
        """
        device = device_of(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device != self._device:
            self._device = device
            self._forget()
        self._tree._plan_ahead(device)

    def __getattr__(self, name: str):
        if name not in self._FIELDS:
            raise AttributeError(f"KernelInfo has no attribute {name!r}")
        self._fill()
        return self.__dict__[name]

    def _forget(self) -> None:
        for name in self._FIELDS:
            self.__dict__.pop(name, None)

    def _fill(self) -> None:
        tree = self._tree
        most_queries = max(1, max(tile[0] for tile in tree._tiles) // tree._group)
        groups: dict[tuple, list] = {}
        splits = [0] * len(tree._lengths)
        for pack in packs(tree._lengths, tree._block_table.tolist(), tree.block_size, most_queries):
            tile = tile_of(len(pack.queries) * tree._group, pack.kv_tokens, tree.block_size, tree._tiles)
            groups.setdefault(tile, []).append(pack)
            for query in pack.queries:
                splits[query] += 1
        order = sorted(groups, key=tree._tiles.index)
        self.MNW = [list(tile) for tile in order]
        self.max_split_per_seq = max(splits, default=0)
        self.max_seqs_in_CTA = max((len(pack.queries) for group in groups.values() for pack in group), default=0)
        self.max_blocks_in_CTA = max((len(pack.blocks) for group in groups.values() for pack in group), default=0)
        self.num_split_per_seq = self._table(splits)
        grouped = [groups[tile] for tile in order]
        self.query_tables = [self._padded([pack.queries for pack in group]) for group in grouped]
        self.block_tables = [self._padded([pack.blocks for pack in group]) for group in grouped]
        self.num_seqs_per_CTAs = [self._table([len(pack.queries) for pack in group]) for group in grouped]
        self.CTA_ranks = [self._table([pack.rank for pack in group]) for group in grouped]
        self.kv_in_CTAs = [self._table([pack.kv_tokens for pack in group]) for group in grouped]
        # A program passes the tables on: the tree is found by them again, if they are as they are now.
        known_of(self.num_split_per_seq).tree = tree

    def _table(self, rows: list) -> torch.Tensor:
        # Of the mode of inference, they would not show whether a program changes them.
        with torch.inference_mode(False):
            table = torch.tensor(rows, dtype=torch.int32).to(self._device)
        known_of(table).mark = mark_of(table)
        return table

    def _padded(self, rows: list[list[int]]) -> torch.Tensor:
        width = max(map(len, rows))
        return self._table([row + [0] * (width - len(row)) for row in rows])


class AsyncTree:
    """A tree that is planned in the background, beside what the GPU does. The batch is checked and taken over at once.

    Args:
        block_size, seq_lens, table: As :class:`PrefixTreeCPP` and its ``build_radix_tree`` take them.
        MNWs, HRatio, kvHead: As ``pack_schedule`` takes them.
        device: Where it is going to run, as ``kernel_info.to_gpu`` takes it.

    Raises:
        TypeError, ValueError: What these raise.
    """

    def __init__(
        self,
        block_size: int,
        seq_lens: Sequence[int] | torch.Tensor,
        table: torch.Tensor,
        MNWs: Sequence[Sequence[int]] | None,
        HRatio: int,
        kvHead: int,
        device: torch.device | str | int,
    ):
        self._tree, self._device = PrefixTreeCPP(block_size), device_of(device)
        self._tree._take(seq_lens, "table", table)
        self._tree.pack_schedule(MNWs, HRatio, kvHead)
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._future: Future[None] = _executor().submit(self._tree.kernel_info.to_gpu, self._device)

    def __getstate__(self) -> dict:
        return {"_tree": self.tree, "_device": self._device}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def tree(self) -> PrefixTreeCPP:
        """The tree; waits until it is planned. A forked child plans it again."""
        if self._process != os.getpid():
            # The thread that plans it is the parent's, and so are the locks that it held at the fork.
            self._start()
        self._future.result()
        return self._tree


def _executor() -> ThreadPoolExecutor:
    global _background
    if _background is None:
        _background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefix_attn-tree")
    return _background


def _forget_other_threads() -> None:
    """In a forked child, which has none of them: they may have held the lock."""
    global _planning, _background
    _planning, _background = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_other_threads)


def kind(value: object) -> str:
    """What a value is, for errors; a class is named itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class Known:
    """What is known of a table, kept at the table itself. Its copies, and what another process gets of it, are other tables.

    Attributes:
        mark: Of a table of ``kernel_info``, as it was made; see :func:`mark_of`.
        tree: The tree that the tables beside it were made of.
        schedule: The tables that were last passed beside it with their marks, and the tree that was read from them.
    """

    def __init__(self):
        self.mark: torch.Tensor | int | None = None
        self.tree: PrefixTreeCPP | None = None
        self.schedule: tuple[list, PrefixTreeCPP | None] = ([], None)

    def __deepcopy__(self, memo: dict) -> Known:
        return Known()

    def __reduce__(self):
        return Known, ()


def known_of(table: torch.Tensor) -> Known:
    known = getattr(table, "_prefix_attn_known", None)
    if known is None:
        known = table._prefix_attn_known = Known()
    return known


def mark_of(table: torch.Tensor) -> torch.Tensor | int | None:
    """What says later whether a table is as it is now. On the CPU a copy: what writes by way of ``.numpy()`` or ``.data`` leaves
    no other trace. On a device, where a comparison would wait for it, torch's count of writes; None of a tensor of the mode of
    inference, whose writes are not counted."""
    if table.device.type == "cpu":
        return table.clone()
    return None if table.is_inference() else table._version


def is_unchanged(table: torch.Tensor, mark: torch.Tensor | int | None) -> bool:
    """Whether a table is as it was when it was marked."""
    if isinstance(mark, torch.Tensor):
        return table.device == mark.device and table.dtype == mark.dtype and torch.equal(table, mark)
    return mark is not None and table.device.type != "cpu" and not table.is_inference() and table._version == mark


def integer(name: str, value: object) -> int:
    """An integer, also numpy's, or a tensor's of no dimensions; no truth value, which Python takes for one."""
    # Whatever it raises while it is looked at, it is no integer.
    with contextlib.suppress(Exception):
        is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("torch.bool", "bool")
        if not isinstance(value, type) and not getattr(value, "ndim", 0) and not is_bool:
            return operator.index(value)
    raise TypeError(f"{name}: {kind(value)}, expected an integer")


def count_of(name: str, value: object) -> int:
    number = integer(name, value)
    if not 0 < number < 1 << 32:
        raise ValueError(f"{name}: {number}, expected a positive number below 2^32")
    return number


def _tiles(MNWs: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    if MNWs is None:
        return list(DEFAULT_TILES)
    expected = "expected [M, N, warps] triples of positive numbers"
    if not isinstance(MNWs, Sequence) or isinstance(MNWs, str):
        raise TypeError(f"MNWs: {kind(MNWs)}, {expected}")
    tiles = []
    for index, tile in enumerate(MNWs):
        if not isinstance(tile, Sequence) or isinstance(tile, str):
            raise TypeError(f"MNWs[{index}]: {kind(tile)}, {expected}")
        if len(tile) != 3:
            raise ValueError(f"MNWs[{index}]: {len(tile)} numbers, {expected}")
        tiles.append(tuple(count_of(f"MNWs[{index}][{position}]", number) for position, number in enumerate(tile)))
    return tiles or list(DEFAULT_TILES)


def device_of(device: torch.device | str | int) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
        raise TypeError(f"device: {kind(device)}, expected a torch.device, a string like 'cuda:0', or a number")
    # torch takes the last byte of a larger one.
    if isinstance(device, int) and not 0 <= device < 128:
        raise ValueError(f"device: {device}, expected the number of a CUDA device")
    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"device: {device!r}, expected 'cpu', 'cuda', 'cuda:N' or N") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {device!r}, expected 'cpu', 'cuda', 'cuda:N' or N")
    return found


def _check_lengths(seq_lens: object) -> None:
    if isinstance(seq_lens, torch.Tensor):
        _check_host_int32("seq_lens", seq_lens, 1)
        return
    is_array = getattr(seq_lens, "ndim", 0) == 1 and hasattr(seq_lens, "tolist")
    if isinstance(seq_lens, str) or not (is_array or isinstance(seq_lens, Sequence)):
        raise TypeError(f"seq_lens: {kind(seq_lens)}, expected a list of integers or an int32 CPU tensor")


def _check_host_int32(name: str, tensor: object, dims: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: {kind(tensor)}, expected an int32 CPU tensor of {dims} dimensions")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: {tensor.layout}, expected a dense tensor")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: {tensor.dtype}, expected torch.int32")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name}: on {tensor.device}, expected on the CPU: planning never waits for a device")
    if tensor.dim() != dims:
        raise ValueError(f"{name}: {tensor.dim()} dimensions, expected {dims}")
