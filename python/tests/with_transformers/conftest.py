"""What continuous batching does on GPUs alone, on the CPU."""

import functools

import pytest
from transformers.generation.continuous_batching import initialization, model_runner

import prefix_attn
import prefix_attn.hf
from prefix_attn.hf import steps


@pytest.fixture
def cpu_fast_path(monkeypatch):
    """transformers takes its decode fast path on GPUs only: for this attention, on the CPU too."""
    original = initialization.ensure_decode_fast_path_is_available

    def ensure(config, *args, **kwargs):
        if config._attn_implementation != prefix_attn.hf.attention_name():
            original(config, *args, **kwargs)

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", ensure)


@pytest.fixture
def padded_batches(monkeypatch):
    """Batches padded to powers of two, as for CUDA graphs."""
    original = model_runner.ModelRunner.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(model_runner.ModelRunner, "__init__", init)


@pytest.fixture
def shared_plans(monkeypatch):
    """Plans that read shared pages once, also where it does not pay: batches here are small."""
    planner = functools.partial(prefix_attn.Planner, mode="packed")
    monkeypatch.setattr(prefix_attn, "Planner", planner)


@pytest.fixture
def graph_batches(monkeypatch, padded_batches):
    """Batches as a CUDA graph reads them: fixed buffers, layers bound once; launched by Python all the same."""
    original = steps.DecodeSteps.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.uses_graphs = True

    monkeypatch.setattr(steps.DecodeSteps, "__init__", init)
