"""Arrays of cupy and jax through DLPack, on a device. Without these libraries there are no such tests, instead of some that are
skipped."""

import importlib.util
import os

import pytest
import torch

from support import caches, queries, random_forest, reference, tolerance

import prefix_attn as pa

DEVICE = "cuda:0"


def case(seed):
    batch = random_forest(seed)
    k, v = caches(batch, torch.float16, "NHD", seed, 2, 64, DEVICE)
    planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), DEVICE)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    return batch, plan, queries(len(batch.lengths), torch.float16, seed + 1, 8, 64, DEVICE), k, v


def check(case, out, lse):
    batch, _, *inputs = case
    expected, expected_lse = reference(batch, *inputs)
    torch.testing.assert_close(out.double(), expected, atol=tolerance(torch.float16), rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=1e-5)


if importlib.util.find_spec("cupy"):
    import cupy

    def test_arrays_of_cupy_are_read_and_written_in_place():
        for seed in range(10):
            given = case(seed)
            _, plan, *inputs = given
            q, k, v = (cupy.asarray(tensor.cpu().numpy()) for tensor in inputs)
            out, lse = cupy.full(q.shape, 7, cupy.float16), cupy.full(q.shape[:2], 7, cupy.float32)
            assert pa.run(plan, q, k, v, out, lse) is out
            check(given, torch.from_dlpack(out), torch.from_dlpack(lse))

    def test_a_stream_of_cupy():
        given = case(3)
        _, plan, *inputs = given
        stream = cupy.cuda.Stream(non_blocking=True)
        torch.cuda.synchronize()
        with stream:
            q, k, v = (cupy.asarray(tensor.cpu().numpy()) for tensor in inputs)
            out, lse = cupy.empty(q.shape, cupy.float16), cupy.empty(q.shape[:2], cupy.float32)
            pa.run(plan, q, k, v, out, lse, stream=stream.ptr)
        stream.synchronize()
        check(given, torch.from_dlpack(out), torch.from_dlpack(lse))

    def test_cupy_is_refused_by_name():
        _, plan, q, k, v = case(4)
        given = [cupy.asarray(tensor.cpu().numpy()) for tensor in (q, k, v)]
        with pytest.raises(ValueError, match="^out: got None"):
            pa.run(plan, *given)
        with pytest.raises(TypeError, match="^q: got .*float32"):
            pa.run(plan, given[0].astype(cupy.float32), *given[1:], cupy.empty_like(given[0]))
        planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), DEVICE)
        with pytest.raises(ValueError, match="^block_tables: got a tensor on cuda:0, expected host memory"):
            planner.plan(cupy.zeros((1, 1), cupy.int32), [1], 16, 1)


def jax_with_a_device():
    """jax where it sees a GPU. It would take most of the device's memory at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if importlib.util.find_spec("jax") is None:
        return None
    import jax

    return jax if jax.default_backend() == "gpu" else None


if jax := jax_with_a_device():

    def test_arrays_of_jax_are_read_in_place():
        for seed in range(10):
            given = case(seed)
            _, plan, *inputs = given
            q, k, v = (jax.numpy.array(tensor.cpu().numpy()) for tensor in inputs)
            out, lse = torch.full_like(inputs[0], 7.0), torch.full(q.shape[:2], 7.0, device=DEVICE)
            assert pa.run(plan, q, k, v, out, lse) is out
            check(given, out, lse)
