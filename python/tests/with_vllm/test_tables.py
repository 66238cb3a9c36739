"""The mirror of the block tables equals the device's, whatever the scheduler does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import simulated

from prefix_attn.vllm import hooks
from prefix_attn.vllm.builder import local_lengths
from prefix_attn.vllm.tables import RowTables, StepTables, TableMirror


class Probe:
    """A builder that keeps what it is told."""

    def __init__(self):
        self.step_tables = None


@pytest.mark.parametrize("seed", range(40))
def test_rows_equal_the_device_tables(monkeypatch, seed):
    tables = simulated.make_tables(monkeypatch, requests=24, width=64)
    engine = simulated.Engine(tables, seed, blocks=400, longest=900)
    out = RowTables(24, 64)
    seen = 0
    for _ in range(60):
        scheduled = engine.step()
        if not scheduled:
            continue
        slots = np.array([request.slot for request, _ in scheduled], dtype=np.int32)
        device = tables.gather_block_tables(torch.from_numpy(slots), len(slots))
        probe = Probe()
        groups = [[SimpleNamespace(metadata_builders=[probe])]]
        told = hooks._tell_builders(SimpleNamespace(idx_mapping_np=slots), device, groups)
        assert told == [probe] and not probe.step_tables.is_dummy
        lengths = np.array([request.computed + chunk for request, chunk in scheduled], dtype=np.int32)
        rows = probe.step_tables.rows(lengths, out)
        for row, (request, chunk) in enumerate(scheduled):
            used = -(-int(lengths[row]) // simulated.BLOCK)
            assert rows[row, :used].tolist() == device[0][row, :used].tolist() == request.blocks[:used]
            seen += used
            request.computed += chunk
    assert seen > 5000


def test_dummy_tables_are_announced_as_such(monkeypatch):
    tables = simulated.make_tables(monkeypatch, requests=4, width=8)
    device = tables.get_dummy_block_tables(3)
    probe = Probe()
    batch = SimpleNamespace(idx_mapping_np=np.arange(3))
    hooks._tell_builders(batch, device, [[SimpleNamespace(metadata_builders=[probe])]])
    assert probe.step_tables.is_dummy


def test_tables_of_another_owner_are_not_taken(monkeypatch):
    simulated.make_tables(monkeypatch, requests=4, width=8)
    probe = Probe()
    groups = [[SimpleNamespace(metadata_builders=[probe])]]
    assert hooks._tell_builders(SimpleNamespace(idx_mapping_np=np.arange(3)), (torch.zeros(3, 8),), groups) == []
    assert probe.step_tables is None


def test_padded_rows_and_partial_pages():
    mirror = TableMirror(4, 6, 16)
    mirror.write(2, 0, [9, 8, 7])
    mirror.write(0, 0, [5])
    step = StepTables(mirror, np.array([2, 0]), is_dummy=False)
    tables = RowTables(8, 6)
    rows = step.rows(np.array([33, 1, 0, 0], dtype=np.int32), tables)
    assert rows.shape == (4, 3)
    assert rows[0].tolist() == [9, 8, 7] and rows[1, 0] == 5


def test_rows_that_stay_are_not_copied():
    mirror = TableMirror(4, 6, 16)
    mirror.write(2, 0, [9, 8, 7])
    mirror.write(0, 0, [5])
    lengths, tables = np.array([48, 16], dtype=np.int32), RowTables(2, 6)
    StepTables(mirror, np.array([2, 0]), is_dummy=False).rows(lengths, tables)
    # What nobody wrote is not looked at.
    mirror.ids[2, 0] = mirror.ids[0, 0] = 1
    mirror.write(0, 1, [6])
    rows = StepTables(mirror, np.array([2, 0]), is_dummy=False).rows(lengths, tables)
    assert rows.tolist() == [[9, 8, 7], [1, 6, 0]]
    rows = StepTables(mirror, np.array([0, 2]), is_dummy=False).rows(lengths, tables)
    assert rows.tolist() == [[1, 6, 0], [1, 8, 7]]
    dummy = StepTables(mirror, np.array([3, 3]), is_dummy=True)
    assert dummy.rows(np.zeros(2, dtype=np.int32), tables).shape == (2, 0)
    rows = StepTables(mirror, np.array([0, 2]), is_dummy=False).rows(lengths, tables)
    assert rows.tolist() == [[1, 6, 0], [1, 8, 7]]


def test_hooks_are_installed_once():
    before = simulated.BlockTables.gather_block_tables
    assert hooks.install() is None
    assert simulated.BlockTables.gather_block_tables is before


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("interleave", [1, 4, 16])
def test_local_lengths_are_vllms(ranks, interleave):
    from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

    lengths = np.arange(300, dtype=np.int32)
    total = 0
    for rank in range(ranks):
        ours = local_lengths(lengths, ranks, rank, interleave)
        assert ours.tolist() == get_dcp_local_seq_lens(torch.from_numpy(lengths), ranks, rank, interleave).tolist()
        total = total + ours
    assert np.array_equal(total, lengths)


def test_rows_are_copied_anew_from_another_mirror():
    """Requests and counts of writes are equal there, the ids are not."""
    out, lengths, requests = RowTables(2, 8), np.array([32, 32], dtype=np.int32), np.arange(2)
    for ids in ([3, 4], [5, 6], [3, 4]):
        mirror = TableMirror(2, 8, 16)
        for request in requests:
            mirror.write(request, 0, ids)
        assert StepTables(mirror, requests, False).rows(lengths, out).tolist() == [ids] * 2
