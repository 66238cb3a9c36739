#!/usr/bin/env bash
# jax 0.10.2, torch 2.14.0 and numpy 2.4.6, PyPI.
#
# jax's arrays never change: programs, and jax itself, count on it. DLPack has a read-only flag since its version 1.0, which the
# consumer asks for (`max_version=(1, 0)`). jax's `__dlpack__` takes that argument and hands out the old struct all the same, which
# has no flags. What such a struct means is up to the consumer: numpy makes an array that cannot be written, torch a tensor that
# can. So an operation of torch in place changes a jax array, every other name of it, and the results of the operations that read
# it from then on, while a function that jax.jit compiled before goes on with the value that the array had.
#
# Seen on 2026-11-28: as asserted below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy
import torch

zeros = jnp.zeros(3)
capsule = zeros.__dlpack__(max_version=(1, 0))
add_zeros = jax.jit(lambda x: x + zeros)
before = add_zeros(jnp.ones(3)).tolist()
writable = numpy.from_dlpack(zeros).flags.writeable
torch.from_dlpack(zeros).fill_(5)
seen = {
    "the capsule that jax gives": repr(capsule).split('"')[1],
    "numpy may write": writable,
    "jnp.zeros(3) after torch wrote to it": zeros.tolist(),
    "1 + it": (1 + zeros).tolist(),
    "1 + it, compiled before": [before, add_zeros(jnp.ones(3)).tolist()],
}
for what, value in seen.items():
    print(f"{what}: {value}")
if list(seen.values()) != ["dltensor", False, [5.0] * 3, [6.0] * 3, [[1.0] * 3, [1.0] * 3]]:
    sys.exit("CHANGED: expected dltensor, False, fives, sixes, and ones twice")
PY
