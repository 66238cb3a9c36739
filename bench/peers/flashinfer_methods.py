"""FlashInfer's decode kernels of Hopper and Ampere, its persistent kernel and its multi-level cascade.

Its default backend for decode, "auto", takes fa2 on Hopper since 0.7; fa3, which puts one query into a tile of 64 or more rows
and does not pack the query heads of a GQA group, is a method of its own here. trtllm-gen, cute-dsl and the Cake kernels run on
Blackwell alone; cutile and cudnn need compilers or libraries of their own and are not measured.
"""

import importlib

import torch

from cascade_levels import NotExpressible, cascade
from exchange import pages_of
from methods import NotRunnable, Prepared, Unavailable

VERSION = "0.7.2"
"""What this was written for; a post release is the same. The cascade replaces a private attribute, which another version need not
have."""

WORKSPACE_BYTES = 512 << 20
SEMAPHORE_BYTES = 8 << 20
"""What the xqa kernel takes of its workspace, which must be zero at first."""

PERSISTENT_BYTES = 2 << 30
"""Partial outputs of the persistent kernel: 1.2 GiB with 32 KV heads."""

CUDA_CORE_GROUPS = (1, 2, 3, 4, 6, 8, 16)
XQA_PAGE_SIZES = (16, 32, 64, 128)

_workspaces = {}


def create(name, device):
    """One of the methods. Raises Unavailable."""
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"FlashInfer cannot be imported ({error}): pip install -r requirements.txt") from error
    if flashinfer.__version__.split(".post")[0] != VERSION:
        raise Unavailable(f"FlashInfer {flashinfer.__version__} is installed, {VERSION} is what this was written for")
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    kinds = {
        "flashinfer_fa2": lambda *arguments: TensorCoreDecode(*arguments, "fa2"),
        "flashinfer_fa3": lambda *arguments: TensorCoreDecode(*arguments, "fa3"),
        "flashinfer_cudacore": CudaCoreDecode,
        "flashinfer_xqa": Xqa,
        "flashinfer_persistent": Persistent,
        "flashinfer_cascade": CascadeDecode,
    }
    return kinds[name](flashinfer, _workspaces[device])


def _version(flashinfer):
    return f"{flashinfer.__version__} (torch {torch.__version__})"


def _dtype(configuration):
    return {"f16": torch.float16, "bf16": torch.bfloat16}[configuration.dtype]


def _types(configuration):
    """What a module of decode attention is made for: types of Q, K and V, O and indices, both head dims, no position encoding, no
    sliding window, no soft cap."""
    dtype, head_dim = _dtype(configuration), configuration.head_dim
    return dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False


def _host(values):
    return torch.tensor(values, dtype=torch.int32)


def _paged(batch, device):
    """Where an engine has them: page ids on the device, counts on the host."""
    pages = pages_of(batch)
    indptr = torch.zeros(len(pages) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(_host(pages), 0)
    indices = [page for table, count in zip(batch.block_tables, pages) for page in table[:count]]
    last = _host([length - max(count - 1, 0) * batch.page_size for length, count in zip(batch.lengths, pages)])
    return indptr, _host(indices).to(device), last


class _Decode:
    """What `BatchDecodeWithPagedKVCacheWrapper` needs, whichever kernel it runs."""

    def __init__(self, flashinfer, wrapper):
        self.version = _version(flashinfer)
        self._flashinfer = flashinfer
        self._wrapper = wrapper

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        indptr, indices, last = _paged(batch, case.q.device)

        def plan():
            self._wrapper.plan(
                indptr,
                indices,
                last,
                configuration.nheads_q,
                configuration.nheads_kv,
                configuration.head_dim,
                batch.page_size,
                q_data_type=case.q.dtype,
                kv_data_type=case.q.dtype,
                sm_scale=configuration.softmax_scale,
            )

        return Prepared(call=lambda: self._wrapper.run(case.q, (case.k, case.v)), plan=plan)


class TensorCoreDecode(_Decode):
    """Decode by one of FlashInfer's prefill kernels: fa2 packs the heads of a GQA group into one tile."""

    def __init__(self, flashinfer, workspace, backend):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend=backend
        )
        super().__init__(flashinfer, wrapper)
        self._backend = backend
        self.note = f"BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=True, backend {backend}"

    def compile(self, configuration):
        prefill_module(self._flashinfer, self._backend, configuration).build_and_load()


class CudaCoreDecode(_Decode):
    """Decode without tensor cores: good where a KV head has one query head."""

    note = "BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=False"

    def __init__(self, flashinfer, workspace):
        super().__init__(flashinfer, flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD"))

    def compile(self, configuration):
        self._flashinfer.decode.gen_batch_decode_module(*_types(configuration)).build_and_load()

    def prepare(self, case):
        group = case.configuration.nheads_q // case.configuration.nheads_kv
        if group not in CUDA_CORE_GROUPS:
            raise NotRunnable(f"{group} query heads per KV head, the kernels have {CUDA_CORE_GROUPS}")
        return super().prepare(case)


class Xqa:
    """TensorRT-LLM's decode kernel of Hopper, as FlashInfer carries it: what its trtllm_batch_decode_with_kv_cache runs there."""

    note = "xqa_batch_decode_with_kv_cache; it plans nothing"

    def __init__(self, flashinfer, workspace):
        self.version = _version(flashinfer)
        self._flashinfer = flashinfer
        # `flashinfer.xqa` is the function of that name, not the module.
        self._generate = importlib.import_module("flashinfer.jit.xqa").gen_xqa_module
        self._workspace = torch.zeros_like(workspace)

    def compile(self, configuration):
        dtype, group = _dtype(configuration), configuration.nheads_q // configuration.nheads_kv
        if configuration.batch.page_size in XQA_PAGE_SIZES:
            module = self._generate(
                dtype, dtype, configuration.batch.page_size, configuration.head_dim, group, False, dtype, 1
            )
            module.build_and_load()

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        if batch.page_size not in XQA_PAGE_SIZES:
            raise NotRunnable(f"pages of {batch.page_size} tokens, the kernels have {XQA_PAGE_SIZES}")
        if min(batch.lengths, default=0) == 0:
            raise NotRunnable("a sequence is empty")
        # What an earlier configuration has left there, were it cut off in the middle, is not this one's.
        self._workspace[:SEMAPHORE_BYTES].zero_()
        tables = case.tables
        lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=case.q.device)
        out = torch.full_like(case.q, float("nan"))

        def call():
            return self._flashinfer.decode.xqa_batch_decode_with_kv_cache(
                case.q,
                (case.k, case.v),
                self._workspace,
                tables,
                lengths,
                max(batch.lengths),
                bmm1_scale=configuration.softmax_scale,
                bmm2_scale=1.0,
                out=out,
                kv_layout="NHD",
            )

        return Prepared(call=call)


class Persistent:
    """One persistent kernel whose work is balanced by its plan."""

    note = "BatchAttention"

    def __init__(self, flashinfer, workspace):
        self.version = _version(flashinfer)
        self._flashinfer = flashinfer
        self._wrapper = flashinfer.BatchAttention("NHD", workspace.device)
        # Its own 384 MiB do not hold the partials of 32 KV heads.
        self._wrapper.float_workspace_buffer = torch.empty(PERSISTENT_BYTES, dtype=torch.uint8, device=workspace.device)

    def compile(self, configuration):
        # Its module knows no window; the last arguments: no soft cap, not profiled.
        module = self._flashinfer.attention._core._gen_batch_attention_primary_module(*_types(configuration)[:-2], False, False)
        module.build_and_load()

    def prepare(self, case):
        configuration, batch, device = case.configuration, case.configuration.batch, case.q.device
        if min(batch.lengths, default=0) == 0:
            raise NotRunnable("a sequence is empty")
        indptr, indices, _ = _paged(batch, device)
        rows = torch.arange(len(batch.lengths) + 1, dtype=torch.int32)
        lengths, head_dim = _host(batch.lengths), configuration.head_dim

        def plan():
            self._wrapper.plan(
                rows,
                indptr,
                indices,
                lengths,
                configuration.nheads_q,
                configuration.nheads_kv,
                head_dim,
                head_dim,
                batch.page_size,
                sm_scale=configuration.softmax_scale,
                q_data_type=case.q.dtype,
                kv_data_type=case.q.dtype,
            )

        return Prepared(
            call=lambda: self._wrapper.run(case.q, (case.k, case.v)), plan=plan, answer=lambda out_and_lse: out_and_lse[0]
        )


class CascadeDecode:
    """Multi-level cascade attention; its levels come from the block tables."""

    note = (
        "MultiLevelCascadeAttentionWrapper, backend fa2 on every level; finding the levels and ordering the queries by "
        "group are not in its times"
    )

    def __init__(self, flashinfer, workspace):
        self.version = _version(flashinfer)
        self._flashinfer = flashinfer
        self._workspace = workspace
        self._wrappers = {}

    def compile(self, configuration):
        prefill_module(self._flashinfer, "fa2", configuration).build_and_load()
        self._flashinfer.cascade.gen_cascade_module().build_and_load()

    def _wrapper(self, levels):
        if levels not in self._wrappers:
            wrapper = self._flashinfer.MultiLevelCascadeAttentionWrapper(levels, self._workspace, "NHD")
            # It has no argument for the backend of its levels.
            wrapper._batch_prefill_wrappers = [
                self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
                for _ in range(levels)
            ]
            self._wrappers[levels] = wrapper
        return self._wrappers[levels]

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        try:
            found = cascade(batch.page_size, batch.lengths, batch.block_tables)
        except NotExpressible as error:
            raise NotRunnable(str(error)) from error
        device = case.q.device
        wrapper = self._wrapper(len(found.levels))
        arrays = (
            [_host(level.qo_indptr) for level in found.levels],
            [_host(level.kv_indptr) for level in found.levels],
            [_host(level.kv_indices).to(device) for level in found.levels],
            [_host(level.last_page_len) for level in found.levels],
        )
        order = torch.tensor(found.order, dtype=torch.int64, device=device)
        q = case.q[order]

        def plan():
            wrapper.plan(
                *arrays,
                configuration.nheads_q,
                configuration.nheads_kv,
                configuration.head_dim,
                batch.page_size,
                sm_scale=configuration.softmax_scale,
                q_data_type=case.q.dtype,
                kv_data_type=case.q.dtype,
            )

        return Prepared(
            call=lambda: wrapper.run(q, (case.k, case.v)),
            plan=plan,
            answer=lambda out: torch.empty_like(out).index_copy_(0, order, out),
        )


def prefill_module(flashinfer, backend, configuration):
    """The module that tensor-core decode and the cascade share, as the wrappers make it; the last argument: no f16 accumulation
    of scores."""
    prefill = flashinfer.prefill
    generate = prefill._gen_batch_prefill_primary_module if backend == "fa2" else prefill.gen_batch_prefill_module
    return generate(backend, *_types(configuration), False)
