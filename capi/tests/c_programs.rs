//! C and C++ programs over the interface, without a GPU.

mod programs;

use programs::{compile_and_run, text};

const SHARED: &str = "libpat_capi.so";
const STATIC: &str = "libpat_capi.a";

/// What a program printed that ended well.
fn succeeds(compiler: &str, standard: &str, source: &str, library: &str) -> String {
    let output = compile_and_run(compiler, standard, source, library);
    assert!(output.status.success(), "{source}: {}\n{}", output.status, text(&output));
    text(&output)
}

#[test]
fn the_example_gives_the_right_numbers() {
    let printed = succeeds("cc", "-std=c11", "examples/shared_prefix.c", SHARED);
    for line in
        ["2 sequences, sharing factor 1.60", "sequence 0, 40 tokens: out 0.80", "sequence 1, 46 tokens: out 1.2"]
    {
        assert!(printed.contains(line), "{line:?} is not in\n{printed}");
    }
}

#[test]
fn the_static_library_is_complete() {
    succeeds("cc", "-std=c11", "examples/shared_prefix.c", STATIC);
}

#[test]
fn the_header_is_one_for_cpp_too() {
    succeeds("c++", "-std=c++17", "tests/header.cpp", STATIC);
}

#[test]
fn bad_input_is_refused() {
    succeeds("cc", "-std=c11", "tests/bad_input.c", SHARED);
}

#[test]
fn caches_of_8_bits_have_factors() {
    succeeds("cc", "-std=c11", "tests/eight_bit.c", SHARED);
}

#[test]
fn threads_may_share_objects() {
    succeeds("cc", "-std=c11", "tests/threads.c", SHARED);
}
