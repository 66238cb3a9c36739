#!/usr/bin/env bash
# torch 2.14.0 and ml_dtypes 0.6.0 (which JAX uses), PyPI.
#
# float8_e8m0fnu, the scale of the MX formats, holds powers of two: no sign, no zero. Two libraries that read each other's arrays
# convert what it cannot hold in opposite ways. torch gives 0.0 the code 0, which is 2^-127, and drops the sign of a negative value:
# -1.0 becomes 1.0. ml_dtypes gives NaN (code 255) for both, and a NaN scale makes its whole block NaN. A block of zeros whose
# largest magnitude is written as its scale is thus harmless from one library and poison from the other. Positive values round
# alike in both, ties included.
#
# Seen on 2026-11-28: torch 0 and 127 (0.0 and -1.0), ml_dtypes 255 and 255; equal codes for seven positive values and NaN.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.0 ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys

import ml_dtypes
import numpy as np
import torch


def codes(values):
    values = np.array(values, np.float32)
    by_torch = torch.from_numpy(values).to(torch.float8_e8m0fnu).view(torch.uint8).tolist()
    return by_torch, values.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8).tolist()


edges, positive = codes([0.0, -1.0]), codes([0.5, 1.0, 1.25, 1.5, 3.0, 6.0, 2.0**-127, np.nan])
print(f"0.0 and -1.0: torch {edges[0]}, ml_dtypes {edges[1]}")
print(f"positive values: torch {positive[0]}, ml_dtypes {positive[1]}")
if edges != ([0, 127], [255, 255]) or positive[0] != positive[1]:
    sys.exit("CHANGED: expected [0, 127] and [255, 255], and equal codes for positive values")
PY
