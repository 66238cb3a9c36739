"""What tests get as arguments."""

import pytest
import torch
from support import SHAPE

import prefix_attn as pa


@pytest.fixture
def planner():
    return pa.Planner(pa.AttentionShape(**SHAPE, dtype=torch.float16), device="cpu")
