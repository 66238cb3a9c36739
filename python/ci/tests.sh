#!/usr/bin/env bash
# tests.sh WHEEL [FOLDER]: the tests of the Python package and of its adapters with the engines, without a GPU, in the two
# environments that environments.sh makes in FOLDER where they are missing. Needs Python 3.11 or later.
set -euo pipefail
wheel=$(realpath "$1")
folder=$(realpath -m "${2:-target/ci-python}")
cd "$(dirname "$0")/.."
ci/environments.sh "$folder"

for name in engines transformers; do
    "$folder/$name/bin/python" -m pip install --quiet --no-deps --force-reinstall "$wheel"
done

# Small matrices: threads cost more than they bring.
export OMP_NUM_THREADS=1
"$folder/engines/bin/pytest" -p no:cacheprovider
# By name and in a process each: what was not collected has not passed, and engines patch what they share.
for engine in vllm sglang transformers; do
    "$folder/engines/bin/pytest" -p no:cacheprovider tests/with_$engine
done
"$folder/transformers/bin/python" -P -m pytest -p no:cacheprovider tests/with_transformers
