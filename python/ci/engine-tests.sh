#!/usr/bin/env bash
# engine-tests.sh [FOLDER]: the adapters' tests with the engines, without a GPU, in two environments that are made in FOLDER
# where they are missing (about 3 GB from PyPI): "engines" has torch 2.14, vLLM 0.33, SGLang 0.5.23 and transformers 5.19,
# "transformers" has transformers 5.24 on the same torch. Needs Rust and Python 3.11 or later.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-../target/ci-engines}")
mkdir -p "$folder"

packages_of() { # name
    "$folder/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

environment() { # name, packages of another environment or nothing, requirement files...
    local name=$1 venv=$folder/$1 base=$2
    shift 2
    if ! cat "$@" | cmp -s - "$venv/pins.txt"; then
        python3 -m venv --clear "$venv"
        # Before what the other environment has comes what this one installs.
        [ -z "$base" ] || echo "$base" > "$(packages_of "$name")/base.pth"
        # Without the engines' own pins: they ask for GPU packages that no test needs, and for each other's versions.
        "$venv/bin/python" -m pip install --quiet --no-deps --no-compile "${@/#/-r}"
        cat "$@" > "$venv/pins.txt"
    fi
}

environment engines "" ci/requirements-vllm.txt ci/requirements-sglang.txt
environment transformers "$(packages_of engines)" ci/requirements-transformers.txt

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$folder/engines/bin/maturin" build --quiet --locked --profile dev --out "$wheels"
for name in engines transformers; do
    "$folder/$name/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheels"/prefix_attn-*.whl
done

# Small matrices: threads cost more than they bring.
export OMP_NUM_THREADS=1
# By folder and in a process each: what was not collected has not passed, and engines patch what they share.
for tests in with_vllm with_sglang with_transformers; do
    "$folder/engines/bin/pytest" -p no:cacheprovider tests/$tests
done
"$folder/transformers/bin/python" -P -m pytest -p no:cacheprovider tests/with_transformers
