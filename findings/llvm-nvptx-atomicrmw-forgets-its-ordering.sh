#!/usr/bin/env bash
# llvmlite 0.50.0 (PyPI): LLVM 22.1.0, target nvptx64, sm_90 with PTX 8.0.
#
# LLVM's backend for NVIDIA GPUs gives atomic loads, stores and cmpxchg the memory ordering and scope that the IR asks for, and
# atomicrmw none: `atomicrmw add` with acquire, release, acq_rel or seq_cst becomes the same instruction as with monotonic,
# `atom.add.u32`, without a fence. In PTX that is relaxed, and of GPU scope, where the IR's default is the whole system. "Write the
# partial result, add 1 to the counter with acq_rel, the last one reads all of them" then reads results that are not there yet.
# What compiles by way of LLVM has it, as `fetch_add(1, AcqRel)` of rustc's nvptx64 target does. Explicit fences stay.
#
# Seen on 2026-11-28: as asserted below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llvmlite==0.50.0
"$folder/venv/bin/python" - <<'PY'
import re
import sys

import llvmlite.binding as llvm

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
machine = llvm.Target.from_triple("nvptx64-nvidia-cuda").create_target_machine(cpu="sm_90", features="+ptx80", opt=2)


def ptx(operation):
    """What one operation between a plain store and a plain load becomes: the atomic instructions and fences."""
    module = llvm.parse_assembly(f"""
        target triple = "nvptx64-nvidia-cuda"
        define i32 @f(ptr %counter, ptr %data) {{
            store i32 7, ptr %data
            {operation}
            %seen = load i32, ptr %data
            ret i32 %seen
        }}""")
    module.verify()
    return re.findall(r"(?:atom|fence|membar|(?:ld|st)\.(?:relaxed|acquire|release))[.\w]*", machine.emit_assembly(module))


orderings = ["monotonic", "acquire", "release", "acq_rel", "seq_cst"]
add = {ordering: ptx(f"%old = atomicrmw add ptr %counter, i32 1 {ordering}") for ordering in orderings}
others = {
    operation: ptx(operation)
    for operation in [
        "%old = cmpxchg ptr %counter, i32 0, i32 1 monotonic monotonic",
        "%old = cmpxchg ptr %counter, i32 0, i32 1 acq_rel acquire",
        "%old = load atomic i32, ptr %counter acquire, align 4",
        "store atomic i32 1, ptr %counter release, align 4",
        "fence acq_rel",
    ]
}
print("LLVM", ".".join(map(str, llvm.llvm_version_info)))
for operation, instructions in [*((f"atomicrmw add {ordering}", add[ordering]) for ordering in orderings), *others.items()]:
    print(f"{operation}: {' '.join(instructions)}")
expected = [["atom.relaxed.sys.cas.b32"], ["atom.acq_rel.sys.cas.b32"], ["ld.acquire.sys.b32"], ["st.release.sys.b32"], ["fence.acq_rel.sys"]]
if any(instructions != ["atom.add.u32"] for instructions in add.values()) or list(others.values()) != expected:
    sys.exit("CHANGED: expected atom.add.u32 alone for every ordering, and the ordering and scope in all others")
PY
