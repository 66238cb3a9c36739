"""FlashInfer's decode kernels and its multi-level cascade, all with the backend fa2.

On Hopper, FlashInfer's default backend is a kernel that puts one query into a tile of 64 or more rows and does not pack the
query heads of a GQA group: up to ten times slower on decode. It is not what a careful user runs.
"""

import torch

from cascade_levels import NotExpressible, cascade
from methods import NotRunnable, Prepared, Unavailable

VERSION = "0.6.3"
"""The cascade replaces a private attribute, which another version need not have."""

WORKSPACE_BYTES = 512 << 20

CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)

_workspaces = {}


def create(name, device):
    """One of the three methods. Raises Unavailable."""
    try:
        import flashinfer
    except ImportError as error:
        raise Unavailable(f"FlashInfer cannot be imported ({error}): pip install -r requirements.txt") from error
    if flashinfer.__version__ != VERSION:
        raise Unavailable(f"FlashInfer {flashinfer.__version__} is installed, {VERSION} is what this was written for")
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    kinds = {"flashinfer_fa2": TensorCoreDecode, "flashinfer_cudacore": CudaCoreDecode, "flashinfer_cascade": CascadeDecode}
    return kinds[name](flashinfer, _workspaces[device])


def _host(values):
    return torch.tensor(values, dtype=torch.int32)


class _Decode:
    """What `BatchDecodeWithPagedKVCacheWrapper` needs, whichever kernel it runs."""

    def __init__(self, flashinfer, wrapper):
        self.version = f"{flashinfer.__version__} (torch {torch.__version__})"
        self._jit = flashinfer.jit
        self._wrapper = wrapper

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        pages = [-(-length // batch.page_size) for length in batch.lengths]
        indptr = torch.zeros(len(pages) + 1, dtype=torch.int32)
        indptr[1:] = torch.cumsum(_host(pages), 0)
        indices = [page for table, count in zip(batch.block_tables, pages) for page in table[:count]]
        # Where an engine has them: page ids on the device, counts on the host.
        indices = _host(indices).to(case.q.device)
        last = _host([length - max(count - 1, 0) * batch.page_size for length, count in zip(batch.lengths, pages)])

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
    """Decode by FlashInfer's prefill kernel, which packs the heads of a GQA group into one tile."""

    note = "BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=True, backend fa2"

    def __init__(self, flashinfer, workspace):
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=True, backend="fa2"
        )
        super().__init__(flashinfer, wrapper)

    def compile(self, dtype, head_dim):
        prefill_module(self._jit, dtype, head_dim).build_and_load()


class CudaCoreDecode(_Decode):
    """Decode without tensor cores: good where a KV head has one query head."""

    note = "BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=False"

    def __init__(self, flashinfer, workspace):
        super().__init__(flashinfer, flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD"))

    def compile(self, dtype, head_dim):
        # The last arguments: index type, both head dims, no position encoding, no sliding window, no soft cap.
        module = self._jit.gen_batch_decode_module(
            dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False
        )
        module.build_and_load()

    def prepare(self, case):
        group = case.configuration.nheads_q // case.configuration.nheads_kv
        if group not in CUDA_CORE_GROUPS:
            raise NotRunnable(f"{group} query heads per KV head, the kernels have {CUDA_CORE_GROUPS}")
        return super().prepare(case)


class CascadeDecode:
    """Multi-level cascade attention; its levels come from the block tables."""

    note = (
        "MultiLevelCascadeAttentionWrapper, backend fa2 on every level; finding the levels and ordering the queries by "
        "group are not in its times"
    )

    def __init__(self, flashinfer, workspace):
        self.version = f"{flashinfer.__version__} (torch {torch.__version__})"
        self._flashinfer = flashinfer
        self._workspace = workspace
        self._wrappers = {}

    def compile(self, dtype, head_dim):
        prefill_module(self._flashinfer.jit, dtype, head_dim).build_and_load()
        self._flashinfer.jit.cascade.gen_cascade_module().build_and_load()

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


def prefill_module(jit, dtype, head_dim):
    """The module that tensor-core decode and the cascade share. The last arguments: index type, both head dims, no position
    encoding, no sliding window, no soft cap, f32 accumulation of scores."""
    return jit.gen_batch_prefill_module(
        "fa2", dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False
    )
