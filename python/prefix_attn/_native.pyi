# Made by `cargo xtask stubs` from the compiled extension.

"""
The compiled part of prefix_attn.
"""

import torch
from typing import Any, ClassVar, SupportsIndex, final

__all__ = ["AttentionShape", "BoundRun", "Capacity", "DeviceProfile", "Plan", "PlanBuffers", "PlanFuture", "Planner", "Workspace", "append_kv", "calibrate", "doctor", "merge_states", "run", "supports"]

@final
class AttentionShape:
    """
    Head counts, head dimension and element type of a model's attention; the same for all layers that share plans.

    Args:
        q_heads: query heads, a positive multiple of ``kv_heads``.
        kv_heads: KV heads, at least 1.
        head_dim: elements per head of Q and K.
        dtype: element type of Q and O, and of K and V where they have no other: a torch dtype, or ``"float16"`` or
            ``"bfloat16"``.
        kv_dtype: element type of K and V where it is another: ``"float8_e4m3fn"`` or ``"float8_e5m2"``, or torch's.
        value_head_dim: elements per head of V and O, where they are not those of K.

    Raises:
        ValueError: a type or a number that no attention has; the message names the argument. Whether there are kernels for a
            shape, :func:`supports` says.
    """
    def __eq__(self, value: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __new__(cls, /, q_heads: SupportsIndex, kv_heads: SupportsIndex, head_dim: SupportsIndex, dtype: "torch.dtype | str", *, kv_dtype: "torch.dtype | str | None" = None, value_head_dim: "SupportsIndex | None" = None) -> AttentionShape: ...
    def __repr__(self, /) -> str: ...
    @property
    def dtype(self, /) -> str:
        """
        Element type: ``"float16"`` or ``"bfloat16"``.
        """
    @property
    def head_dim(self, /) -> int:
        """
        Elements per head of Q and K.
        """
    @property
    def kv_dtype(self, /) -> str:
        """
        Element type of K and V.
        """
    @property
    def kv_heads(self, /) -> int:
        """
        KV heads, each for ``q_heads / kv_heads`` query heads.
        """
    @property
    def q_heads(self, /) -> int:
        """
        Query heads.
        """
    @property
    def value_head_dim(self, /) -> int:
        """
        Elements per head of V and O.
        """

@final
class BoundRun:
    """
    One layer's run, checked once (:meth:`PlanBuffers.bind`). It keeps its tensors, its workspace and the plan's memory.
    """
    def __repr__(self, /) -> str: ...
    def run(self, /) -> None:
        """
        Runs the plan that was uploaded last, on torch's current stream. A CUDA graph can capture it.

        Raises:
            ValueError: nothing was uploaded; or a tensor has been resized since it was bound.
            CudaError: the driver refuses a launch.
        """
    def run_ptr(self, /, q_ptr: SupportsIndex, out_ptr: SupportsIndex) -> None:
        """
        As :meth:`run`, with other memory for q and out: the fastest form.

        Nothing is checked: the caller vouches that both addresses are those of memory on the run's device with the strides,
        the type and at least the rows of the bound q and out, aligned to 16 bytes, that out shares no memory with an input,
        and that both live until the stream has passed. Anything else is undefined behaviour.

        Args:
            q_ptr: address of q, as ``q.data_ptr()`` gives it.
            out_ptr: address of out.

        Raises:
            ValueError: nothing was uploaded, an address is not aligned, or the run is one on the CPU.
            CudaError: the driver refuses a launch.
        """

@final
class Capacity:
    """
    What the plans of a planner need at most, so that device memory and launches are sized once: for CUDA graphs and engines.

    Args:
        max_sequences: rows of a batch, padding rows included.
        max_pages: pages of all rows together, a shared page counted for each row that names it.
        device_or_profile: for what the work items are sized: ``"cuda:0"``, a torch.device, or a :class:`DeviceProfile`.
        max_items: work items of a plan, at least ``max_sequences``; by default enough to fill the device several times.
        max_slots: partial results of a plan; 0 means that no sequence is cut; by default as many as fill the device.

    Raises:
        ValueError: ``max_items`` is below ``max_sequences``.
        CudaUnavailable: the device is not there.
    """
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __new__(cls, /, max_sequences: SupportsIndex, max_pages: SupportsIndex, device_or_profile: "DeviceProfile | torch.device | str", max_items: SupportsIndex | None = None, max_slots: SupportsIndex | None = None) -> Capacity: ...
    def __repr__(self, /) -> str: ...
    @property
    def max_items(self, /) -> int:
        """
        Work items of a plan.
        """
    @property
    def max_pages(self, /) -> int:
        """
        Pages of all rows together.
        """
    @property
    def max_sequences(self, /) -> int:
        """
        Rows of a batch.
        """
    @property
    def max_slots(self, /) -> int:
        """
        Partial results of a plan.
        """

@final
class DeviceProfile:
    """
    What the planner's cost model knows of a device.
    """
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __repr__(self, /) -> str: ...
    @property
    def compute_capability(self, /) -> int:
        """
        Compute capability, major * 10 + minor.
        """
    @staticmethod
    def detect(device: "torch.device | str | None" = None) -> "DeviceProfile":
        """
        The profile of a CUDA device of this machine, by default of the current one: measured where the device is known, else scaled from one that is. For
        ``"cpu"`` it is the H200's: the plan that is executed there is the one that a GPU would get.

        Raises:
            CudaUnavailable: there is no such device, or no driver.
        """
    @staticmethod
    def from_json(text: "str") -> DeviceProfile:
        """
        A profile that was written by :meth:`to_json` or by ``pat calibrate --output``.

        Raises:
            ValueError: the text is no profile, or its numbers are those of no device.
        """
    @property
    def name(self, /) -> str:
        """
        The driver's name of the device.
        """
    @staticmethod
    def named(name: "str") -> DeviceProfile:
        """
        The profile of a known device.

        Args:
            name: ``"a100-40"``, ``"a100-80"``, ``"h100-sxm"``, ``"h100-pcie"``, ``"h200"``, or the driver's name of one.

        Raises:
            ValueError: the name is none of these; the message lists them.
        """
    @property
    def sm_count(self, /) -> int:
        """
        Streaming multiprocessors.
        """
    def to_json(self, /) -> str:
        """
        The profile as JSON.
        """

@final
class Plan:
    """
    Who is served together in one decode step, for all layers. Made by :meth:`Planner.plan`.
    """
    def __repr__(self, /) -> str: ...
    def _repr_svg_(self, /) -> str: ...
    def explain(self, /) -> str:
        """
        Why the batch is planned so: what planning it from scratch gives, which an advanced plan may differ from, beside no
        sharing and beside the widest tiles, in predicted us, what bounds it, and how often the largest shared runs are read. As
        text; plans the batch again.
        """
    @property
    def generation(self, /) -> int:
        """
        A number that no two results of planning in this process share; :meth:`Planner.advance` changes it unless it returns
        ``"nothing"``.
        """
    @property
    def num_pages(self, /) -> int:
        """
        Pages of the K and V caches.
        """
    @property
    def page_size(self, /) -> int:
        """
        Tokens per page.
        """
    @property
    def sequence_count(self, /) -> int:
        """
        Rows of the batch, empty ones included.
        """
    def summary(self, /) -> "dict[str, object]":
        """
        The plan in numbers: sequences, sharing factor, KV bytes read with sharing and without, work items by tile variant,
        predicted time in us.
        """
    def svg(self, /) -> str:
        """
        A picture of the batch, as SVG: every shared run a bar, as long as its tokens and as high as its sequences; lines between
        the sequences that are served together where the batch is planned from scratch. Notebooks show it for a plan that ends a
        cell. Plans the batch again.
        """

@final
class PlanBuffers:
    """
    Memory for a plan at an address that never changes, sized by the planner's capacity, with launches that do not depend on
    the plan: runs that a CUDA graph has captured serve every plan that is uploaded later.

    Args:
        planner: with ``capacity=`` and for a device. On the CPU the buffers hold a copy, so that programs run alike.
        page_size: tokens per page.
        num_pages: pages of the K and V caches.

    Raises:
        ValueError: the planner has no capacity or no device.
        CudaError: the driver cannot allocate.
    """
    def __new__(cls, /, planner: "Planner", page_size: SupportsIndex, num_pages: SupportsIndex) -> PlanBuffers: ...
    def __repr__(self, /) -> str: ...
    def bind(self, /, k_cache: "torch.Tensor", v_cache: "torch.Tensor", q: "torch.Tensor", out: "torch.Tensor", lse: "torch.Tensor | None" = None, *, scale: "float | None" = None, softcap: "float | None" = None, sinks: "torch.Tensor | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, kv_layout: "str" = "NHD", workspace: "Workspace | None" = None) -> "BoundRun":
        """
        A run of one layer whose arguments are checked here, once, and whose tensors are kept alive.

        Args:
            k_cache, v_cache, q, out, lse, scale, softcap, sinks, k_scale, v_scale, kv_layout: as in :func:`run`; q, out and lse
                have at least the capacity's ``max_sequences`` rows.
            workspace: memory for partial results, at least that of :meth:`Workspace.for_planner`; layers that run in the
                order of a stream share one.

        Raises:
            TypeError, ValueError: as :func:`run`.
        """
    def upload(self, /, plan: "Plan", stream: SupportsIndex | None = None) -> None:
        """
        Makes ``plan`` the one that later runs use: enqueues one copy. Between the replays of a graph it goes to the stream
        that the graph is replayed on.

        Args:
            plan: of the planner that the buffers were made for, of the same page size and pool.
            stream: handle of the CUDA stream, instead of torch's current one.

        Raises:
            ValueError: the plan is of another shape, page size or pool, or exceeds the capacity: the former plan stays.
            CudaError: the copy cannot be enqueued.
        """

@final
class PlanFuture:
    """
    A plan in the making (:meth:`Planner.plan_async`).
    """
    def done(self, /) -> bool:
        """
        Whether :meth:`result` would not wait.
        """
    def result(self, /) -> "Plan":
        """
        The plan; waits for it, and lets other threads of the program run meanwhile.

        Raises:
            ValueError: what :meth:`Planner.plan` raises.
        """

@final
class Planner:
    """
    Makes plans for one shape on one device: once per decode step, for all layers. It keeps its scratch memory, so that a step
    of a batch that does not grow allocates little.

    Args:
        shape: the model's attention.
        device: where plans will run: ``"cuda:0"``, ``"cpu"``, a torch.device. A :class:`DeviceProfile` plans for that device;
            such plans run wherever the tensors are. By default the current CUDA device.
        mode: ``"auto"`` takes what is predicted to be fastest; ``"flat"`` shares nothing; ``"packed"`` and ``"per-node"``
            share as much as tiles hold; ``"fixed-chunk:TOKENS"`` cuts every TOKENS tokens and shares whole chunks alone, so
            that the bits of a sequence's output do not depend on the rest of the batch.
        capacity: bounds of the plans; needed for :class:`PlanBuffers`.
        variants: names of the only tile variants to use; by default the best of those that the device runs.
        softcap: the cap of the runs' scores, if they have one: not every kernel can cap. Runs without a cap may use the plans,
            too.
        window: tokens that each sequence sees, the last ones, under a sliding window. Pages in front of it are neither planned
            nor read; their entries in the block tables must still be page ids.
        chunk: instead of a window, the tokens of a chunk: each sequence sees those since the last multiple of it (Llama 4).
        query_tree: whether batches may come with query trees (``parents=`` of :meth:`plan`).
        page_runs: whether pages of one token, at least half of which lie in runs of consecutive ids, are planned as pages of 16
            tokens where running the plan is predicted to take no longer. It changes nothing for other page sizes, under a capacity,
            and with fixed chunks, windows, chunks or query trees.

    Raises:
        ValueError: a mode or variant that is not known, or not possible on the device.
        CudaUnavailable: the device is not there.
    """
    def __new__(cls, /, shape: "AttentionShape", device: "DeviceProfile | torch.device | str | None" = None, *, mode: "str" = "auto", capacity: "Capacity | None" = None, variants: "list[str] | None" = None, softcap: "float | None" = None, window: "SupportsIndex | None" = None, chunk: "SupportsIndex | None" = None, query_tree: "bool" = False, page_runs: "bool" = False) -> Planner: ...
    def __repr__(self, /) -> str: ...
    def advance(self, /, plan: "Plan", block_tables: Any, lengths: Any, changed_rows: Any | None = None, *, query_tokens: Any | None = None, parents: Any | None = None, table_rows: Any | None = None) -> "str":
        """
        Makes ``plan``, the plan that this planner made last, the plan of the next decode step, in place: with many sequences much
        faster than planning from scratch, and predicted to be about as fast on the device. With fixed chunks the two are equal.

        Args:
            plan: a plan of this planner. An older one than the last is planned from scratch.
            block_tables, lengths: as in :meth:`plan`, for pages of the plan's size and a pool of its number of pages.
            changed_rows: the rows whose table entries *that were in use before* may differ: a list or 1-D int32 tensor. A
                row that only grew is not among them. ``None``: all entries are compared, as with query_tokens.
            query_tokens, parents, table_rows: as in :meth:`plan`. A planner with a window, chunks or query trees plans from
                scratch.

        Returns:
            ``"nothing"``, ``"lengths"``, ``"pages"`` or ``"forest"``: how much has changed.

        Raises:
            TypeError, ValueError: as :meth:`plan`; the plan is as before.
        """
    @property
    def capacity(self, /) -> Capacity | None:
        """
        The bounds of its plans, or None.
        """
    @property
    def device(self, /) -> str | None:
        """
        Where its plans run: ``"cpu"``, ``"cuda:N"``, or None where it was made from a profile.
        """
    def plan(self, /, block_tables: Any, lengths: Any, page_size: SupportsIndex, num_pages: SupportsIndex, *, query_tokens: Any | None = None, parents: Any | None = None, table_rows: Any | None = None) -> "Plan":
        """
        Plans a batch. The interpreter is free for other threads meanwhile.

        Args:
            block_tables: the page ids of each sequence, in order: a list of lists; a 2-D int32 CPU tensor or array
                ``[rows, columns]``, where anything may stand behind the pages that a length needs; or a tuple
                ``(indptr, ids)`` of 1-D int32 arrays. Data on a CUDA device is refused: a copy would have to wait for it.
            lengths: tokens of each sequence, the one being decoded included: a list or a 1-D int32 CPU tensor. Rows of
                length 0 are allowed; their output is 0 and their LSE -inf.
            page_size: tokens per page.
            num_pages: pages of the K and V caches.
            query_tokens: query tokens of each sequence, its last tokens, each of which sees the tokens up to itself: one number
                for all or one per sequence, as lengths are given; by default 1. A query token is a row of the plan and of q,
                out and lse: those of the first sequence come first.
            parents: instead of query_tokens, the query tokens of each sequence as a tree, for speculative trees: for each of its
                last tokens the index of its parent among them, or None (or -1) where it comes right behind the tokens in front
                of them. One list for all sequences, or a list of one list per sequence. A list may also be a 1-D CPU tensor or
                array of int32 or int64; a 2-D one holds one tree per row. A query token sees the tokens in front of the query
                tokens, its ancestors and itself; parents come before their children.
            table_rows: the row of block_tables that each sequence has, where they are a 2-D tensor or array of more requests
                than are in the batch, or of others in between: a list or a 1-D int32 CPU tensor, one per length. By default
                sequence i has row i.

        Raises:
            TypeError: an argument is of another type (integers of another width included).
            ValueError: an argument has a value that is not accepted: the message names it, with its index.
        """
    def plan_async(self, /, block_tables: Any, lengths: Any, page_size: SupportsIndex, num_pages: SupportsIndex, *, query_tokens: Any | None = None, parents: Any | None = None, table_rows: Any | None = None) -> "PlanFuture":
        """
        As :meth:`plan`, on a thread of its own. The arguments are read before this returns, and may be changed then. A fork of
        the process (``os.fork``, multiprocessing) waits for it: the child has the plan, too.

        Returns:
            An object with ``done()`` and ``result()``; ``result()`` waits, and raises what planning raised.

        Raises:
            TypeError, ValueError: an argument cannot be read.
        """
    @property
    def profile(self, /) -> DeviceProfile:
        """
        The profile that plans are made for.
        """
    @property
    def shape(self, /) -> AttentionShape:
        """
        The shape that is planned for.
        """

@final
class Workspace:
    """
    Device memory for partial results. One serves all layers that run in the order of a stream; runs that may overlap need one
    each.

    Args:
        bytes: its size. :meth:`for_planner` computes it.
        device: where, for example ``"cuda:0"``. On the CPU none is needed, and nothing is allocated.

    Raises:
        CudaError: the driver cannot allocate.
    """
    def __new__(cls, /, bytes: SupportsIndex, device: "torch.device | str") -> Workspace: ...
    def __repr__(self, /) -> str: ...
    @property
    def bytes(self, /) -> int:
        """
        Its size in bytes.
        """
    @property
    def device(self, /) -> str:
        """
        Where it is: ``"cpu"`` or ``"cuda:N"``.
        """
    @staticmethod
    def for_planner(planner: "Planner") -> Workspace:
        """
        Memory for every plan of a planner with a capacity, on the planner's device.

        Raises:
            ValueError: the planner has no capacity, or no device (it was made from a profile).
            CudaError: the driver cannot allocate.
        """

def append_kv(k_new: "torch.Tensor", v_new: "torch.Tensor", k_cache: "torch.Tensor", v_cache: "torch.Tensor", slots: "torch.Tensor", *, kv_dtype: "torch.dtype | str | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, kv_layout: "str" = "NHD", stream: "SupportsIndex | None" = None) -> None:
    """
    Writes new rows of K and V into their slots of a paged cache, in place.

    Into an 8-bit cache, elements are divided by their factor (in float32) and rounded to nearest even. What is too large,
    infinities among it, becomes the largest finite element, NaN the code 0x7f: what vLLM's ``reshape_and_cache_flash`` writes.
    So a factor of 1, the default, keeps elements up to 448 of float8_e4m3fn and 57344 of float8_e5m2; larger ones ask for a
    factor.
    On CUDA it enqueues one launch on torch's current stream.

    Args:
        k_new, v_new: ``[rows, kv_heads, head_dim]``, float16 or bfloat16. V may have another head dim than K; each is a multiple
            of 8.
        k_cache, v_cache: as in :func:`run`, of the same type, or of 8 bits. They may share storage, but no element.
        slots: int64 ``[rows]`` beside the tensors: ``page * page_size + token in the page``. Rows with a negative slot are
            not written. A slot beyond the cache is refused on the CPU; on CUDA, where the host cannot look at it, the row is
            not written. No two rows have the same slot.
        kv_dtype: type of the caches, which uint8 tensors do not say: "float8_e4m3fn" or "float8_e5m2", or torch's.
        k_scale, v_scale: factors of an 8-bit cache's elements as in :func:`run`, 1 by default.
        kv_layout: order of the dimensions of the caches, "NHD" or "HND".
        stream: handle of a CUDA stream, instead of torch's current one.

    Raises:
        TypeError: another element type, or no tensor.
        ValueError: a shape, stride, device or address that is not accepted; the message names the argument, and nothing has
            been written.
        CudaError: the driver refuses the launch.
    """

def calibrate(device: "torch.device | str | None" = None) -> "DeviceProfile":
    """
    Measures the terms of the planner's cost model on a CUDA device, as ``pat calibrate`` does. Takes some seconds to a minute, in
    which nothing else should run on the device.

    Args:
        device: for example ``"cuda:0"``; by default the current CUDA device.

    Returns:
        A profile for :class:`Planner`; :meth:`DeviceProfile.to_json` keeps it.

    Raises:
        ValueError: the device is no CUDA device, or the times contradict the cost model.
        CudaError: the driver fails, or the device has too little memory.
        CudaUnavailable: there is no such device.
    """

def doctor() -> "dict[str, object]":
    """
    What this machine can run, and what is wrong where something is.

    Returns:
        ``version``; ``cpu_threads``; ``kernels``: kernels in the package, or what is wrong with them; ``cuda``: the version of
        CUDA that the driver supports, or why CUDA cannot be used; ``devices``: name, compute capability, SMs and profile of
        each; ``healthy``: whether nothing is broken (a machine without a GPU is a healthy one).
    """

def merge_states(out_a: "torch.Tensor", lse_a: "torch.Tensor", out_b: "torch.Tensor", lse_b: "torch.Tensor", out: "torch.Tensor | None" = None, lse: "torch.Tensor | None" = None, *, stream: "SupportsIndex | None" = None) -> "tuple[torch.Tensor, torch.Tensor]":
    """
    Merges attention over two disjoint sets of tokens into attention over all of them, by the log-sum-exps.

    On CUDA it enqueues one launch on torch's current stream.

    Args:
        out_a, out_b: outputs, ``[rows, heads, head_dim]``, float16 or bfloat16.
        lse_a, lse_b: log-sum-exps, float32 ``[rows, heads]``, natural logarithm; -inf where there are no tokens, whatever the
            output is there.
        out, lse: memory for the result, by default new; may be ``out_a`` and ``lse_a``, or ``out_b`` and ``lse_b``.
        stream: handle of a CUDA stream, instead of torch's current one.

    Returns:
        ``(out, lse)``; 0 and -inf where neither has tokens.

    Raises:
        TypeError: another element type, or no tensor.
        ValueError: a shape, stride, device or address that is not accepted; the message names the argument, and nothing has
            been written.
        CudaError: the driver refuses the launch.
    """

def run(plan: "Plan", q: "torch.Tensor", k_cache: "torch.Tensor", v_cache: "torch.Tensor", out: "torch.Tensor | None" = None, lse: "torch.Tensor | None" = None, *, scale: "float | None" = None, softcap: "float | None" = None, sinks: "torch.Tensor | None" = None, k_scale: "float | torch.Tensor | None" = None, v_scale: "float | torch.Tensor | None" = None, return_lse: "bool" = False, kv_layout: "str" = "NHD", workspace: "Workspace | None" = None, stream: SupportsIndex | None = None) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]":
    """
    Decode attention of one layer: for row b, query head h and KV head g = h / (q_heads / kv_heads),
    ``out[b, h] = sum_t softmax_t(scale * q[b, h] . k[t, g]) v[t, g]`` over the tokens that the plan's block table of b names.

    On CUDA it enqueues on torch's current stream and the host waits for nothing; the first run of a plan uploads it. A run on
    another stream than that one waits, on the device, for what that stream has been given. On the CPU it computes with all
    threads before it returns, and holds the interpreter's lock meanwhile: for tests and tools.

    Args:
        plan: of :meth:`Planner.plan`.
        q: ``[rows, q_heads, head_dim]``, at least the plan's rows; what is behind them is not touched.
        k_cache, v_cache: ``[pages, page_size, kv_heads, head_dim]`` ("NHD") or ``[pages, kv_heads, page_size, head_dim]``
            ("HND"), with any strides in front of a contiguous last dimension; v_cache may lie inside k_cache's rows. 8-bit caches
            may be given as uint8.
        out: memory for the output, as q; by default new.
        lse: memory for the log-sum-exps, float32 ``[rows, q_heads]``, natural logarithm.
        scale: factor on the scores; by default ``head_dim ** -0.5``. Scores beyond float32's range can give NaN.
        softcap: caps the scaled scores: ``softcap * tanh(score / softcap)``; the planner must know that there is a cap.
        sinks: float32 ``[q_heads]``: for each query head one more score, neither scaled nor capped, that adds to the
            denominator and has no value. The log-sum-exps contain it: rows of length 0 get 0 and the sink.
            A sink that is NaN or +inf gives NaN.
        k_scale, v_scale: what the elements of 8-bit caches are multiplied with: a number, or float32 ``[kv_heads]``. Numbers in
            device memory are not looked at; others are finite and above 0.
        return_lse: return ``(out, lse)``; lse is new where it is not given.
        kv_layout: order of the dimensions of the caches.
        workspace: memory for partial results; by default the plan has its own.
        stream: handle of a CUDA stream of the device's primary context, to use instead of torch's current one; it has to live
            until the call returns.

    Tensors are torch's, or any DLPack producer's (numpy, cupy, jax; then ``out`` must be given). Device addresses are
    multiples of 16 bytes, strides multiples of 8 elements (16 of 8-bit caches).

    Returns:
        out, or ``(out, lse)``. Rows of length 0 get 0 and -inf, or their sink.

    Raises:
        TypeError: another element type, or no tensor.
        ValueError: a shape, stride, device, address or value that is not accepted. The message names the argument; nothing
            has been written.
        CudaError: the driver refuses a launch.
    """

def supports(shape: "AttentionShape", page_size: SupportsIndex, *, window: "SupportsIndex | None" = None, softcap: "float | None" = None, sinks: "bool" = False, kv_dtype: "torch.dtype | str | None" = None, query_tokens: SupportsIndex | None = None, alibi: "bool" = False, value_head_dim: "SupportsIndex | None" = None, chunk: "SupportsIndex | None" = None, query_tree: "bool" = False) -> "str | None":
    """
    Whether the kernels compute a model's attention. Asks no device.

    Args:
        shape: heads, head dimension and type.
        page_size: tokens per page.
        window: tokens that a sliding window leaves, if the model has one.
        chunk: tokens of a chunk, if the model has chunked attention (Llama 4) instead.
        softcap: the cap of scores, if the model has one.
        sinks: whether it has attention sinks.
        kv_dtype: the type of the KV cache, where it is not that of Q.
        query_tokens: query tokens of each sequence; by default 1.
        query_tree: whether its query tokens may form a tree.
        alibi: whether it has linear position biases.
        value_head_dim: elements per head of V, where they are not those of K.

    Returns:
        None if it can, else the reason why not.
    """
