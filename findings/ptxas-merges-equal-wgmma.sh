#!/usr/bin/env bash
# ptxas 13.1.115 and 13.2.51 (PyPI: nvidia-cuda-nvcc), target sm_90a.
#
# Two wgmma instructions of one group multiply the same matrices into two sets of accumulators, both 0 before; then both sets are
# stored. ptxas keeps one of the products, as it may: they are equal. But until 13.1 the stores of the second set take register R1,
# the stack pointer, all of them: the kernel writes garbage, with exit status 0 and without a word. 13.2 stores the one product
# twice.
#
# Seen on 2026-11-28: of 16 accumulators 13.1.115 stores R1 for 8, with 1 HGMMA; 13.2.51 for none, with 1 HGMMA. Likewise 13.0.88
# and 13.1.80; 13.5.37 as 13.2.51.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet nvidia-cuda-nvdisasm==13.5.37
nvdisasm=$(find "$folder/venv" -name nvdisasm -type f)

list() { # prefix: eight registers
    printf "%%$1%d, " 0 1 2 3 4 5 6
    printf "%%$1%d" 7
}

kernel() {
    cat <<PTX
.version 8.0
.target sm_90a
.address_size 64
.visible .entry twins(.param .u64 out, .param .u64 a_descriptor, .param .u64 b_descriptor) .maxntid 128 .minnctapersm 1
{
  .reg .f32 %x<8>;
  .reg .f32 %y<8>;
  .reg .u64 %out, %a, %b, %offset;
  .reg .u32 %thread;
  .reg .pred %adds;
  ld.param.u64 %out, [out];
  ld.param.u64 %a, [a_descriptor];
  ld.param.u64 %b, [b_descriptor];
  mov.u32 %thread, %tid.x;
  mul.wide.u32 %offset, %thread, 64;
  add.u64 %out, %out, %offset;
  setp.ne.u32 %adds, 1, 0;
PTX
    for set in x y; do
        for i in 0 1 2 3 4 5 6 7; do echo "  mov.f32 %$set$i, 0f00000000;"; done
    done
    echo "  wgmma.fence.sync.aligned;"
    for set in x y; do
        echo "  wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {$(list $set)}, %a, %b, %adds, 1, 1, 0, 0;"
    done
    echo "  wgmma.commit_group.sync.aligned;"
    echo "  wgmma.wait_group.sync.aligned 0;"
    for i in 0 1 2 3 4 5 6 7; do
        echo "  st.global.f32 [%out+$((4 * i))], %x$i;"
        echo "  st.global.f32 [%out+$((32 + 4 * i))], %y$i;"
    done
    echo "  ret;"
    echo "}"
}
kernel >"$folder/twins.ptx"

stack_pointers() { # version: how many of the 16 stores take R1
    "$folder/venv/bin/pip" install --quiet --target "$folder/$1" --no-deps "nvidia-cuda-nvcc==$1"
    local ptxas
    ptxas=$(find "$folder/$1" -name ptxas -type f)
    chmod +x "$ptxas"
    "$ptxas" -arch=sm_90a "$folder/twins.ptx" -o "$folder/$1.cubin" 2>"$folder/$1.log"
    "$nvdisasm" "$folder/$1.cubin" >"$folder/$1.sass"
    echo "ptxas $1: $(grep -c HGMMA "$folder/$1.sass") HGMMA, $(grep -c 'STG.E' "$folder/$1.sass") stores," \
        "$(grep 'STG.E' "$folder/$1.sass" | grep -c ', R1 ;') of them of R1; it said: $(cat "$folder/$1.log")" >&2
    grep 'STG.E' "$folder/$1.sass" | grep -c ', R1 ;' || true
}

before=$(stack_pointers 13.1.115)
after=$(stack_pointers 13.2.51)
[ "$before" -eq 8 ] && [ "$after" -eq 0 ] && [ ! -s "$folder/13.1.115.log" ] || {
    echo "CHANGED: expected 8 and 0, and not a word of the first"
    exit 1
}
