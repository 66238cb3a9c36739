#!/usr/bin/env bash
# ptxas 13.5.37 (PyPI: nvidia-cuda-nvcc), target sm_90a.
#
# A kernel that divides its register file with `setmaxnreg` must give ptxas a way to know the register count at entry.
# `.maxntid` alone is not enough: ptxas then drops every `setmaxnreg`, prints one informational line (C7508) and exits with 0.
# The driver's own compiler prints nothing. With `.minnctapersm 1` beside it, both instructions are in the machine code, and the
# kernel starts with the full budget. A warp-specialised kernel that lost them still computes the right numbers, only slower.
#
# Seen on 2026-11-28: without .minnctapersm 0 USETMAXREG instructions, with it 2; exit status 0 both times.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvcc==13.5.37 nvidia-cuda-nvdisasm==13.5.37
ptxas=$(find "$folder/venv" -name ptxas -type f)
nvdisasm=$(find "$folder/venv" -name nvdisasm -type f)

kernel() { # performance directives
    cat <<PTX
.version 8.0
.target sm_90a
.address_size 64
.visible .entry specialised(.param .u64 out) $1
{
  .reg .u64 %address;
  .reg .u32 %thread;
  .reg .pred %is_producer;
  ld.param.u64 %address, [out];
  mov.u32 %thread, %tid.x;
  setp.lt.u32 %is_producer, %thread, 128;
  @%is_producer bra PRODUCER;
  setmaxnreg.inc.sync.aligned.u32 152;
  bra.uni DONE;
PRODUCER:
  setmaxnreg.dec.sync.aligned.u32 56;
DONE:
  st.global.u32 [%address], %thread;
  ret;
}
PTX
}

count() { # name, performance directives: assembles, prints how many of the instructions are in the machine code
    kernel "$2" >"$folder/$1.ptx"
    "$ptxas" -arch=sm_90a "$folder/$1.ptx" -o "$folder/$1.cubin" 2>"$folder/$1.log"
    "$nvdisasm" "$folder/$1.cubin" | grep -c USETMAXREG || true
}

alone=$(count alone '.maxntid 256')
beside=$(count beside '.maxntid 256 .minnctapersm 1')
echo "with .maxntid alone: $alone USETMAXREG; with .minnctapersm 1 beside it: $beside"
sed 's/^/ptxas said: /' "$folder/alone.log"
[ "$alone" -eq 0 ] && [ "$beside" -eq 2 ] && grep -q "'setmaxnreg' ignored" "$folder/alone.log" || {
    echo "CHANGED: expected 0 and 2, and the line that says it was ignored"
    exit 1
}
