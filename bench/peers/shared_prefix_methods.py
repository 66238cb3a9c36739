"""Libraries that find shared prefixes themselves: CoDec's and PAT's packages, where the user has installed them by their own
instructions, and ours by its Python package."""

import importlib.metadata

import torch

from methods import NotRunnable, Prepared, Unavailable


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


class PrefixAttn:
    """This library by its Python package: the automatic plan, log-sum-exps written as well."""

    note = "this library by its Python package: the automatic plan, log-sum-exps written too; its plan time is without the upload"

    def __init__(self):
        try:
            import prefix_attn
        except ImportError as error:
            raise Unavailable(f"the package prefix_attn cannot be imported ({error})") from error
        if not hasattr(prefix_attn, "PlanBuffers"):
            raise Unavailable("the package prefix_attn that is found is PAT's: --pat names its folder instead")
        self._package = prefix_attn
        self.version = f"{_version('prefix-attn')} (torch {torch.__version__})"

    def compile(self, configuration):
        """The driver compiles the PTX when its kernels run first, for the check of the answer."""

    def prepare(self, case):
        configuration, batch = case.configuration, case.configuration.batch
        shape = self._package.AttentionShape(
            configuration.nheads_q, configuration.nheads_kv, configuration.head_dim, case.q.dtype
        )
        planner = self._package.Planner(shape, case.q.device)
        of_batch = case.host_tables, torch.tensor(batch.lengths, dtype=torch.int32), batch.page_size, batch.num_pages
        plan, out = planner.plan(*of_batch), torch.full_like(case.q, float("nan"))
        lse = torch.empty(case.q.shape[:2], dtype=torch.float32, device=case.q.device)
        scale = configuration.softmax_scale
        return Prepared(
            call=lambda: self._package.run(plan, case.q, case.k, case.v, out, lse, scale=scale),
            plan=lambda: planner.plan(*of_batch),
        )


class CoDec:
    """CoDec's tree attention. Its tree is built on the host from tables on the device, its kernels accumulate in f16."""

    HEADS = ((32, 32), (32, 8))
    HEAD_DIMS = (64, 128)
    SEQUENCES_PER_NODE = 16
    note = "tree_attn of the package codec_gpu; build_prefix_tree is its plan time"

    def __init__(self):
        try:
            import codec_gpu
        except ImportError as error:
            raise Unavailable(f"the package codec_gpu cannot be imported ({error})") from error
        self._package = codec_gpu
        self.version = f"{_version('codec-gpu')} (torch {torch.__version__})"

    def compile(self, configuration):
        """Its installation has built it."""

    def prepare(self, case):
        configuration, batch, device = case.configuration, case.configuration.batch, case.q.device
        heads = configuration.nheads_q, configuration.nheads_kv
        if configuration.dtype != "f16" or heads not in self.HEADS or configuration.head_dim not in self.HEAD_DIMS:
            raise NotRunnable(f"f16 with heads {self.HEADS} and head dims {self.HEAD_DIMS} alone is compiled in")
        if min(batch.lengths, default=0) == 0:
            raise NotRunnable("a sequence is empty")
        # Its tree needs sequences that share pages next to each other.
        order = sorted(range(len(batch.lengths)), key=lambda row: batch.block_tables[row])
        rows = torch.tensor(order, dtype=torch.int64, device=device)
        tables = case.tables[rows].contiguous()
        lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=device)[rows]
        q, tree = case.q[rows], None

        def plan():
            nonlocal tree
            tree = self._package.build_prefix_tree(lengths, tables, batch.page_size, self.SEQUENCES_PER_NODE)

        return Prepared(
            call=lambda: self._package.tree_attn(q, case.k, case.v, *tree),
            plan=plan,
            answer=lambda out: torch.empty_like(case.q).index_copy_(0, rows, out.reshape(case.q.shape)),
        )


class Pat:
    """PAT's package, in a process in which the import name that it shares with ours is its own."""

    GROUPS = (1, 2, 4, 8)
    HEAD_DIMS = (64, 128)
    PAGE_SIZE_MULTIPLE = 32
    """One of its tiles needs pages of 32 tokens; the others 16."""
    note = "prefix_attn_with_kvcache of PAT's package; building, packing and copying the schedule is its plan time"

    def __init__(self):
        try:
            import prefix_attn
        except ImportError as error:
            raise Unavailable(f"PAT's package cannot be imported ({error})") from error
        if hasattr(prefix_attn, "PlanBuffers"):
            raise Unavailable("the package prefix_attn that is found is ours: --pat names the folder that holds PAT's")
        self._package = prefix_attn
        self.version = f"{_version('prefix-attn')} (torch {torch.__version__})"

    def compile(self, configuration):
        """Its installation has built it."""

    def prepare(self, case):
        configuration, batch, device = case.configuration, case.configuration.batch, case.q.device
        group = configuration.nheads_q // configuration.nheads_kv
        if group not in self.GROUPS or configuration.head_dim not in self.HEAD_DIMS:
            has = f"it has {self.GROUPS} of {self.HEAD_DIMS}"
            raise NotRunnable(f"{group} query heads per KV head of {configuration.head_dim}, {has}")
        if batch.page_size % self.PAGE_SIZE_MULTIPLE:
            raise NotRunnable(f"pages of {batch.page_size} tokens, a multiple of {self.PAGE_SIZE_MULTIPLE} is needed")
        if min(batch.lengths, default=0) == 0:
            raise NotRunnable("a sequence is empty")
        tables = case.host_tables
        lengths = list(batch.lengths)
        q, out, tree = case.q.unsqueeze(1), torch.full_like(case.q, float("nan")).unsqueeze(1), None

        def plan():
            nonlocal tree
            tree = self._package.PrefixTreeCPP(batch.page_size)
            tree.build_radix_tree(lengths, tables)
            tree.pack_schedule(None, group, configuration.nheads_kv)
            tree.kernel_info.to_gpu(device)

        def call():
            self._package.prefix_attn_with_kvcache(q, case.k, case.v, tree, configuration.softmax_scale, out)
            return out

        return Prepared(call=call, plan=plan, answer=lambda out: out.squeeze(1))
