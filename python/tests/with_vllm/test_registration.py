"""How vLLM finds the backend, and what is said at the start and in between: versions, steps, graphs."""

import importlib.metadata
import importlib.util
import logging
import sys

import pytest
import simulated
from vllm.config import CUDAGraphMode
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from world import World

import prefix_attn as pa
import prefix_attn.vllm
from prefix_attn.vllm import backend, decoder, hooks, metrics, versions
from prefix_attn.vllm.builder import Builder


def test_vllm_finds_the_backend_by_its_entry_point(monkeypatch):
    [entry] = importlib.metadata.entry_points(group="vllm.general_plugins", name="prefix_attn")
    assert entry.load() is prefix_attn.vllm.register
    monkeypatch.setenv("VLLM_PLUGINS", "prefix_attn")
    monkeypatch.setattr("vllm.plugins.plugins_loaded", False)
    load_general_plugins()
    chosen = AttentionBackendEnum.CUSTOM.get_class()
    assert chosen is backend.Backend and chosen.get_builder_cls() is Builder and chosen.get_name() == "CUSTOM"


@pytest.mark.parametrize(
    "version, is_tested",
    [("0.26.0", True), ("0.33.0", True), ("0.33.1rc2+cu130", True)]
    + [(version, False) for version in ("0.25.9", "0.34.0", "1.0.0", "none", "dev")],
)
def test_an_untested_version_is_one_line_at_the_start(monkeypatch, caplog_vllm, version, is_tested):
    monkeypatch.setattr(versions, "installed", lambda: version)
    again = importlib.util.spec_from_file_location("backend_again", backend.__file__)
    again.loader.exec_module(importlib.util.module_from_spec(again))
    assert len(caplog_vllm) == (0 if is_tested else 1)
    for line in caplog_vllm:
        assert f"vLLM {version}" in line and f"prefix_attn {versions.own()}" in line and "0.26 to 0.33" in line


def test_a_vllm_that_cannot_be_registered_with_is_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        prefix_attn.vllm.register()
    [record] = [record for record in caplog.records if record.name == "vllm.prefix_attn"]
    assert versions.installed() in record.getMessage() and versions.own() in record.getMessage()


def test_a_vllm_without_the_hooks_stays_stock(monkeypatch):
    with monkeypatch.context() as context:
        context.delattr(simulated.BlockTables, "get_dummy_block_tables")
        assert "get_dummy_block_tables" in hooks.install()
    assert hooks.install() is None


def test_a_line_says_how_many_steps_went_which_way(monkeypatch, model_folder, stock_kernels, seeded, caplog_vllm):
    monkeypatch.setattr(metrics, "LOG_EVERY", 10)
    # So few rows would not be packed on a CPU.
    monkeypatch.setattr(
        decoder,
        "planner",
        lambda group, rows: pa.Planner(group.shape, group.device, mode="packed", capacity=decoder.limits(group, rows)),
    )
    world = World(monkeypatch, model_folder)
    running = world.joined(*[400] * 16)
    world.step([(running[0], 400)])
    world.step([(request, request.prompt - request.computed) for request in running[1:]])
    for _ in range(17):
        world.step([(request, 1) for request in running])
    last = world.joined(30)[-1]
    world.step([(request, 1) for request in running[:16]] + [(last, last.prompt - last.computed)])
    counted = world.builder.metrics
    assert (counted.decode_steps, counted.mixed_steps, counted.stock_steps) == (17, 1, 2)
    first, second = (line for line in caplog_vllm if " steps: " in line)
    assert "10 steps: 8 on plans, 0 with their decode rows on plans, 2 on FlashAttention" in first
    assert "20 steps: 17 on plans, 1 with their decode rows on plans, 2 on FlashAttention" in second
    saved = float(second.split("plans read ")[1].split("%")[0])
    assert abs(saved - 100 * (1 - counted.planned_kv_bytes / counted.flat_kv_bytes)) < 0.1 and 50 < saved < 94
    assert metrics.totals().decode_steps >= 17


def test_groups_whose_tables_nobody_announces_are_stock_before_graphs_are_captured(
    monkeypatch, model_folder, stock_kernels, seeded, caplog_vllm
):
    world = World(monkeypatch, model_folder)
    monkeypatch.setattr(hooks, "_tell_builders", lambda *_: [])
    nobody = [(simulated.Request(0, 1, [1], 0), 1)] * 4
    metadata, _, _ = simulated.prepare(
        world.tables, nobody, world.groups, mode=CUDAGraphMode.FULL, is_dummy=True, for_capture=True
    )
    assert all(getattr(of_layer, "prefix_attn", None) is None for of_layer in metadata.values())
    assert "which request a row is" in world.builder._stock_reason
    assert len([line for line in caplog_vllm if "which request a row is" in line]) == 1
