"""The mirror of the block tables equals the device's, whatever the scheduler does."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import simulated

from prefix_attn.vllm import hooks
from prefix_attn.vllm.builder import local_lengths
from prefix_attn.vllm.tables import StepTables, TableMirror


class Probe:
    """A builder that keeps what it is told."""

    def __init__(self):
        self.step_tables = None


@pytest.mark.parametrize("seed", range(40))
def test_rows_equal_the_device_tables(monkeypatch, seed):
    tables = simulated.make_tables(monkeypatch, requests=24, width=64)
    engine = simulated.Engine(tables, seed, blocks=400, longest=900)
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
        rows = probe.step_tables.mirror.ids[probe.step_tables.rows(len(lengths))]
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


def test_padded_rows():
    mirror = TableMirror(4, 6, 16)
    mirror.write(2, 0, [9, 8, 7])
    mirror.write(0, 0, [5])
    mirror.write(0, 1, [])
    mirror.write(0, 1, [6])
    step = StepTables(mirror, np.array([2, 0, 3]), is_dummy=False)
    rows = step.rows(2)
    assert rows.dtype == np.int32 and mirror.ids[rows].tolist() == [[9, 8, 7, 0, 0, 0], [5, 6, 0, 0, 0, 0]]
    padded = step.rows(5)
    assert padded.dtype == np.int32 and padded[:3].tolist() == [2, 0, 3] and len(padded) == 5 and padded.max() < 4
    dummy = StepTables(mirror, np.array([7, 7]), is_dummy=True)
    assert dummy.rows(2).tolist() == [0, 0]


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
