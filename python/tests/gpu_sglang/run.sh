#!/bin/bash
# run.sh: SGLang 0.5.16 (which asks for torch 2.11) with this package on a GPU machine without a network, eager, radix cache on,
# beside SGLang's Triton backend: tokens, calls of our kernels. One GPU, times nothing, about 140 s. Logs and JSON under $OUT/sglang/.
#
# This folder holds, beside these scripts, the wheels of prefix_attn, loguru and orjson, and sglang.tar.xz: the .py files of the wheel
# of SGLang 0.5.16 with its dist-info and jit_kernel's include/ and csrc/ (4.3 MB). Beside the folder lies vllm026/ (parts of a reduced
# vLLM with setup.py), whose packages SGLang takes as well. sgl_kernel and flashinfer are stubs: norms, activations and rotary
# embeddings run in torch, attention in Triton or here.
set -u
here=$(cd "$(dirname "$0")" && pwd)
parts=${PARTS:-$here/../vllm026}
out=${OUT:-/tmp/out}/sglang
dest=${DEST:-/root/vllm}
mkdir -p "$out"
flock /tmp/vllm-setup.lock python3 "$parts/setup.py" $dest > "$out/setup.log" 2>&1 || { tail -3 "$out/setup.log"; exit 1; }
site=$(mktemp -d)
cp "$here"/pat_*.py "$site"/
printf 'import pat_stubs\n\npat_stubs.install()\n' > "$site/sitecustomize.py"
mkdir -p "$site"/pat_sglang-0.1.dist-info
printf 'Metadata-Version: 2.1\nName: pat-sglang\nVersion: 0.1\n' > "$site"/pat_sglang-0.1.dist-info/METADATA
printf '[sglang.srt.plugins]\npat_sglang = pat_sglang_plugin:register\n' > "$site"/pat_sglang-0.1.dist-info/entry_points.txt
tar xJf "$here/sglang.tar.xz" -C "$site"
for wheel in "$here"/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
# What was carried for vLLM, without vLLM.
packages=$(mktemp -d)
for package in $dest/site/*; do
    case $(basename "$package") in vllm*) ;; *) ln -s "$package" "$packages/" ;; esac
done
export PYTHONPATH=$site:$packages SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1 SGLANG_IS_FLASHINFER_AVAILABLE=false HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo SGLANG_HOST_IP=127.0.0.1 HOST_IP=127.0.0.1
export TOKENIZERS_PARALLELISM=false PAT_MODEL=$site/model
python3 "$here/drive.py" make "$PAT_MODEL" || exit 1
t=64x1000+77:32
drive() { # name, backend, tasks...
    local name=$1 rc
    timeout 230 python3 "$here/drive.py" "$out/$name.json" "${@:2}" > "$out/$name.log" 2>&1
    rc=$?
    echo "== sglang $name: rc $rc; $(grep -E '^(engine up|stats|64x)' "$out/$name.log" | tr '\n' ';' | cut -c1-300)"
    [ $rc = 0 ] || grep -E "Error|error:|assert" "$out/$name.log" | tail -6 | cut -c1-220
}
drive triton triton $t $t:16 &
sleep 2
drive ours prefix_attn $t &
sleep 2
PAT_BROKEN=1 drive broken prefix_attn $t &
wait
failed=0
judge() { # title, arguments...
    echo "== $1"
    shift
    python3 "$here/../gpu_vllm/compare.py" "$@" || { failed=1; echo "  FAILED"; }
}
noise="--noise $out/triton.json tokens:$t:16"
judge "SGLang 0.5.16, eager, radix cache: as its Triton backend?" "$out/triton.json" "$out/ours.json" tokens:$t $noise
judge "SGLang, one token left out of every row: must be found" "$out/triton.json" "$out/broken.json" tokens:$t $noise --expect-different
[ $failed = 0 ] && echo "== sglang: ALL GOOD" || echo "== sglang: SOMETHING FAILED"
exit $failed
