"""Tests that need a CUDA device. Without one they are skipped, with the reason; `run.py` counts that as not passed."""

import sys

import pytest
import torch

import prefix_attn as pa

HERE = __file__.rsplit("/", 1)[0]
# support.py.
sys.path.insert(0, HERE.rsplit("/", 1)[0])


def why_not():
    """The reason why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        pa.DeviceProfile.detect("cuda:0")
    except (pa.CudaUnavailable, pa.CudaError) as error:
        return str(error)
    return None


def pytest_collection_modifyitems(items):
    here = [item for item in items if str(item.path).startswith(HERE)]
    reason = why_not() if here else None
    for item in here if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def first_device_is_current():
    """jax leaves the last device's context current in the thread that imports it, and with it torch's current device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(0)


@pytest.fixture
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
