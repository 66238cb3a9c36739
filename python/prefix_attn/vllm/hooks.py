"""Where the block tables are taken from vLLM: three methods of its model runner are wrapped, once per process.

- ``BlockTables.__init__``: each group's device table gets a :class:`~prefix_attn.vllm.tables.TableMirror`; the table's
  ``stage_write``, through which every edit goes, also writes the mirror.
- ``BlockTables.gather_block_tables`` and ``get_dummy_block_tables``: whether the coming step has requests.
- ``DefaultModelState.prepare_attn``, which calls the metadata builders: it alone knows which request each row is.

Other model states that override ``prepare_attn`` without calling it announce nothing; their steps take the stock path.
"""

import functools
import weakref

from prefix_attn.vllm.tables import StepTables, TableMirror

#: The ``BlockTables`` of this process.
_owners: "weakref.WeakSet" = weakref.WeakSet()


def install() -> str | None:
    """Wrap the methods, once.

    Returns:
        ``None``, or why this vLLM cannot be wrapped.
    """
    try:
        from vllm.v1.worker.gpu.block_table import BlockTables
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        originals = [
            (BlockTables, "__init__", _mirroring),
            (BlockTables, "gather_block_tables", _of_requests),
            (BlockTables, "get_dummy_block_tables", _of_none),
            (DefaultModelState, "prepare_attn", _announcing),
        ]
        methods = [getattr(owner, name) for owner, name, _ in originals]
    except (ImportError, AttributeError) as error:
        return f"its block tables are not where they were: {error}"
    for (owner, name, wrap), method in zip(originals, methods):
        if not hasattr(method, "prefix_attn"):
            wrapped = wrap(method)
            wrapped.prefix_attn = True
            setattr(owner, name, wrapped)
    return None


def _mirroring(original):
    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        # 0.26 has tables of kernel blocks, 0.33 of the KV cache manager's blocks alone.
        block_sizes = getattr(self, "kernel_block_sizes", self.block_sizes)
        mirrors = []
        for table, block_size in zip(self.block_tables, block_sizes):
            mirrors.append(mirror := TableMirror(*table.gpu.shape, block_size))
            table.stage_write = _writing_both(table.stage_write, mirror)
        self.prefix_attn_mirrors = mirrors
        self.prefix_attn_is_dummy = True
        _owners.add(self)

    return init


def _writing_both(stage_write, mirror: TableMirror):
    @functools.wraps(stage_write)
    def both(index, start, x):
        stage_write(index, start, x)
        mirror.write(index, start, x)

    return both


def _of_requests(original):
    @functools.wraps(original)
    def gather_block_tables(self, *args, **kwargs):
        self.prefix_attn_is_dummy = False
        return original(self, *args, **kwargs)

    return gather_block_tables


def _of_none(original):
    @functools.wraps(original)
    def get_dummy_block_tables(self, *args, **kwargs):
        self.prefix_attn_is_dummy = True
        return original(self, *args, **kwargs)

    return get_dummy_block_tables


def _announcing(original):
    @functools.wraps(original)
    def prepare_attn(self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs):
        told = _tell_builders(input_batch, block_tables, attn_groups)
        try:
            return original(
                self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *args, **kwargs
            )
        finally:
            for builder in told:
                builder.step_tables = None

    return prepare_attn


def _tell_builders(input_batch, block_tables, attn_groups) -> list:
    """Give each of our builders the tables of its group."""
    owner = next((tables for tables in _owners if _gave(tables, block_tables)), None)
    if owner is None:
        return []
    told = []
    requests, is_dummy = input_batch.idx_mapping_np, owner.prefix_attn_is_dummy
    for mirror, groups in zip(owner.prefix_attn_mirrors, attn_groups):
        tables = StepTables(mirror, requests, is_dummy)
        for group in groups:
            for builder in group.metadata_builders:
                if hasattr(builder, "step_tables"):
                    builder.step_tables = tables
                    told.append(builder)
    return told


def _gave(owner, block_tables) -> bool:
    """Whether the step's device tables are views of this owner's."""
    return len(owner.input_block_tables) == len(block_tables) > 0 and all(
        given.data_ptr() == own.data_ptr() for given, own in zip(block_tables, owner.input_block_tables)
    )
