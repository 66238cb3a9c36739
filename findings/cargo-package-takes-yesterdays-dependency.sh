#!/usr/bin/env bash
# cargo 1.95.0.
#
# `cargo package` of two crates of a workspace, of which one depends on the other, builds the second from its package against the
# first's package of the same run: that is what the run is for. When the first changes and its version does not (as between two
# releases, in CI), the second is built against the first's package of the earlier run: the unpacked source in
# $CARGO_HOME/registry/src and what was built of it in the target folder stay what they were, as for a registry, where a version
# never changes. A correct change fails with "cannot find function". Without both folders the same command works.
#
# Seen on 2026-11-28 with cargo 1.95.0 (f2d3ce0bd 2026-03-21): the second run fails, the third passes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CARGO_HOME=$folder/home CARGO_TARGET_DIR=$folder/target
cd "$folder"
mkdir -p work/yesterday-a/src work/yesterday-b/src "$CARGO_HOME"
cat >work/Cargo.toml <<'TOML'
[workspace]
resolver = "3"
members = ["yesterday-a", "yesterday-b"]
TOML
for crate in a b; do
    cat >work/yesterday-$crate/Cargo.toml <<TOML
[package]
name = "yesterday-$crate"
version = "0.1.0"
edition = "2024"
description = "x"
license = "MIT"
TOML
done
printf '[dependencies]\nyesterday-a = { path = "../yesterday-a", version = "0.1.0" }\n' >>work/yesterday-b/Cargo.toml
package() {
    (cd work && cargo package --quiet --allow-dirty -p yesterday-a -p yesterday-b) >"$1.log" 2>&1 && echo passes || echo fails
}
echo 'pub fn old() {}' >work/yesterday-a/src/lib.rs
echo 'pub fn call() { yesterday_a::old() }' >work/yesterday-b/src/lib.rs
first=$(package first)
echo 'pub fn new() {}' >work/yesterday-a/src/lib.rs
echo 'pub fn call() { yesterday_a::new() }' >work/yesterday-b/src/lib.rs
second=$(package second)
grep -m1 'cannot find function' second.log || true
rm -rf "$CARGO_HOME"/registry/src/-* "$CARGO_TARGET_DIR"
third=$(package third)
echo "$(cargo --version): first run $first; changed, $second; without what was unpacked and built, $third"
[ "$first, $second, $third" = "passes, fails, passes" ]
