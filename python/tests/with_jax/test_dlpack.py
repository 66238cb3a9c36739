"""jax's arrays as inputs: a producer of DLPack that is no torch. Run by `cargo xtask test-torch`."""

import jax
import numpy
import pytest
import torch
from support import caches, queries, random_forest

import prefix_attn as pa


def arrays(*tensors):
    # Copies in jax's own memory, which is aligned.
    return [jax.numpy.array(tensor.numpy()) for tensor in tensors]


def case(seed):
    planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), "cpu")
    batch = random_forest(seed)
    k, v = caches(batch)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    return plan, queries(len(batch.lengths)), k, v


def test_jax_arrays_are_read_in_place():
    for seed in range(5):
        plan, q, k, v = case(seed)
        expected, expected_lse = pa.run(plan, q, k, v, return_lse=True)
        out, lse = numpy.empty(q.shape, numpy.float16), numpy.empty(q.shape[:2], numpy.float32)
        assert pa.run(plan, *arrays(q, k, v), out, lse) is out
        assert torch.equal(torch.from_numpy(out), expected) and torch.equal(torch.from_numpy(lse), expected_lse)


def test_memory_for_the_output_has_to_be_given():
    plan, q, k, v = case(7)
    with pytest.raises(ValueError, match="^out: got None"):
        pa.run(plan, *arrays(q, k, v))


def test_block_tables_and_lengths_of_jax():
    batch = random_forest(3)
    planner = pa.Planner(pa.AttentionShape(8, 2, 64, torch.float16), "cpu")
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    padded, lengths = (jax.numpy.array(numpy.asarray(form, dtype=numpy.int32)) for form in (batch.padded, batch.lengths))
    assert planner.plan(padded, lengths, 16, batch.num_pages).summary() == plan.summary()
