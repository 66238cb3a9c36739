"""Tests against vLLM 0.33 without a GPU: its own builders, block tables, metadata and attention layer, on CPU tensors.

What needs a GPU in vLLM is stood in for: the three FlashAttention kernels by torch, the device tables by CPU tensors. The CI job
that has vLLM runs this folder by name, so that it cannot be skipped unseen.
"""

import json
import logging

import pytest
import stock
import torch
from vllm.config import VllmConfig


@pytest.fixture(autouse=True)
def stock_kernels(monkeypatch):
    """FlashAttention's kernels in torch; gives the calls of the attention kernel, as (rows, longest query)."""
    # Its default on CUDA; without Triton it cannot be asked for.
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    return stock.install(monkeypatch)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Qwen3-shaped config.json."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def seeded():
    """Reproducible torch."""
    torch.manual_seed(0)


@pytest.fixture
def caplog_vllm(monkeypatch):
    """Lines that the plug-in logs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.prefix_attn")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
