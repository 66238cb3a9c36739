#!/usr/bin/env bash
# llvmlite 0.50.0 (PyPI): LLVM 22.1.0, targets nvptx64 and the host; numpy 2.4.6.
#
# `frem` of LLVM's IR is C's fmod: the exact remainder, of the sign of the first operand and smaller than the second. On the host
# it is. LLVM's backend for NVIDIA GPUs makes it x - trunc(x / y) * y, with a quotient that is rounded before it is cut: where x
# is just below a multiple of y the remainder of two positive numbers is negative, and where the quotient is large it exceeds y.
# All that compiles by way of LLVM has it, `%` of floats in Rust's nvptx64 target for one; nothing says so when it compiles.
#
# Seen on 2026-11-28: 1e10 % 3 is 256; 954.23816 % 0.0016723388 is -0.0000386, not 0.0016338; of 100,000 pairs of up to 1,000 and
# of 0.001 to 0.1 134 have the wrong sign.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llvmlite==0.50.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import ctypes
import re
import sys
from fractions import Fraction

import llvmlite.binding as llvm
import numpy as np

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
IR = "define float @remainder(float %x, float %y) { %r = frem float %x, %y ret float %r }"

gpu = llvm.Target.from_triple("nvptx64-nvidia-cuda").create_target_machine(cpu="sm_90", opt=2)
ptx = gpu.emit_assembly(llvm.parse_assembly(f'target triple = "nvptx64-nvidia-cuda"\n{IR}'))
instructions = re.findall(r"(?:div|cvt|neg|fma|testp|selp|call)[.\w]*", ptx)
print("LLVM", ".".join(map(str, llvm.llvm_version_info)), "on nvptx64:", " ".join(instructions))

host = llvm.Target.from_default_triple().create_target_machine(jit=True)
module = llvm.parse_assembly(IR)
module.triple = llvm.get_process_triple()
engine = llvm.create_mcjit_compiler(module, host)
engine.finalize_object()
on_host = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float, ctypes.c_float)(engine.get_function_address("remainder"))


def on_gpu(x, y):
    """The instructions above, each rounded as PTX says."""
    quotient = np.trunc(np.float32(x) / np.float32(y))
    return float(np.float32(float(Fraction(float(x)) - Fraction(float(quotient)) * Fraction(float(y)))))


rng = np.random.default_rng(1)
xs = rng.uniform(0, 1000, 100_000).astype(np.float32)
ys = rng.uniform(0.001, 0.1, 100_000).astype(np.float32)
wrong = [(x, y) for x, y in zip(xs, ys) if on_gpu(x, y) < 0]
for x, y in [(1e10, 3.0), *wrong[:3]]:
    print(f"{float(x)!r} % {float(y)!r}: {on_host(x, y)!r} on the host, {on_gpu(x, y)!r} on the GPU")
print(f"{len(wrong)} of {len(xs)} remainders of positive numbers are negative on the GPU")
expected = ["div.rn.f32", "cvt.rzi.f32.f32", "neg.f32", "fma.rn.f32", "testp.infinite.f32", "selp.f32"]
right = all(0 <= on_host(x, y) < y for x, y in wrong)
if instructions != expected or on_host(1e10, 3.0) != 1.0 or on_gpu(1e10, 3.0) != 256.0 or not wrong or not right:
    sys.exit("CHANGED: expected a rounded quotient on the GPU, and the exact remainder on the host")
PY
