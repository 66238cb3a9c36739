#!/usr/bin/env bash
# float8 0.7.0 (crates.io) beside ml_dtypes 0.6.0 (PyPI).
#
# float8's constants F8E4M3::MAX and F8E5M2::MAX are one step below the largest finite values of the formats (448 and 57344), and
# below what the crate's own conversions return. Code that takes a tensor's scale as amax / MAX scales by 416 instead of 448.
# The libraries also disagree about overflow in e4m3: float8 saturates everything above 448, infinity included; ml_dtypes
# gives NaN from 465 on. A KV cache in FP8 that one of them wrote is not what the other would have written.
#
# Seen on 2026-11-28:
#   float8:    MAX 416 and 49152; 1e4 becomes 448 (e4m3); 465 becomes 448; inf becomes 448 (e4m3) and 57344 (e5m2)
#   ml_dtypes: finfo.max 448 and 57344; 464 becomes 448; 465 and inf become nan (e4m3fn); inf stays inf (e5m2)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/src"
cat >"$folder/Cargo.toml" <<'TOML'
[package]
name = "maxima"
version = "0.0.0"
edition = "2021"

[dependencies]
float8 = "=0.7.0"

[workspace]
TOML
cat >"$folder/src/main.rs" <<'RUST'
use float8::{F8E4M3, F8E5M2};

fn main() {
    let e4m3 = |x: f32| F8E4M3::from_f32(x).to_f32();
    let e5m2 = |x: f32| F8E5M2::from_f32(x).to_f32();
    println!("MAX {} {}", F8E4M3::MAX.to_f32(), F8E5M2::MAX.to_f32());
    println!("e4m3 {} {} {}; e5m2 {}", e4m3(1e4), e4m3(465.0), e4m3(f32::INFINITY), e5m2(f32::INFINITY));
}
RUST
rust=$(cd "$folder" && cargo run --quiet --release)
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ml_dtypes==0.6.0
python=$("$folder/venv/bin/python" -W ignore - <<'PY'
import ml_dtypes
import numpy

def through(dtype, x):
    return float(numpy.float32(x).astype(dtype))

e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
print("max", float(ml_dtypes.finfo(e4m3).max), float(ml_dtypes.finfo(e5m2).max))
print("e4m3", *(through(e4m3, x) for x in (464, 465, "inf")), "e5m2", through(e5m2, "inf"))
PY
)
printf 'float8:\n%s\nml_dtypes:\n%s\n' "$rust" "$python"
[ "$rust" = $'MAX 416 49152\ne4m3 448 448 448; e5m2 57344' ] &&
    [ "$python" = $'max 448.0 57344.0\ne4m3 448.0 nan nan e5m2 inf' ] || {
    echo "CHANGED: see the head of this script for what was seen"
    exit 1
}
