#!/usr/bin/env bash
# vllm-tests.sh [VENV]: tests/with_vllm in an environment with vLLM 0.33, made where it is missing (about 3 GB from PyPI).
# Needs Rust and Python 3.11 or later; no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-../target/ci-vllm}
pins=ci/requirements-vllm.txt
if ! cmp -s "$pins" "$venv/pins.txt"; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --no-deps -r "$pins"
    cp "$pins" "$venv/pins.txt"
fi
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$venv/bin/maturin" build --quiet --locked --profile dev --out "$wheels"
"$venv/bin/pip" install --quiet --no-deps --force-reinstall "$wheels"/prefix_attn-*.whl
# By name: what was not collected has not passed.
"$venv/bin/pytest" -p no:cacheprovider tests/with_vllm
