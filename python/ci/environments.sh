#!/usr/bin/env bash
# environments.sh [FOLDER]: makes the two environments of tests.sh in FOLDER where they are missing (about 3 GB from PyPI):
# "engines" with torch 2.14, vLLM 0.33, SGLang 0.5.23 and transformers 5.19, "transformers" with 5.24 of it on the same torch.
set -euo pipefail
folder=$(realpath -m "${1:-target/ci-python}")
cd "$(dirname "$0")"
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

environment engines "" requirements-vllm.txt requirements-sglang.txt
# In a statement of its own, so that its failure ends this.
base=$(packages_of engines)
environment transformers "$base" requirements-transformers.txt
