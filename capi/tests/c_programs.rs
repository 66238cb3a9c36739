//! Compiles the C programs with the system's compilers, links them with the library, and runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo has put this test, and `libpat_capi.so` and `.a` beside it.
fn library_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the test knows where it is");
    let folder = test.parent().expect("an executable lies in a folder").to_path_buf();
    assert!(folder.join("libpat_capi.so").exists(), "no libpat_capi.so in {}", folder.display());
    folder
}

enum Linking {
    Shared,
    Static,
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// Compiles `source` without a warning and runs it to success; what it printed.
fn run_program(compiler: &str, standard: &str, source: &str, linking: &Linking) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("program");
    let libraries = library_folder();
    let mut compile = Command::new(compiler);
    compile
        .args([standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"])
        .arg("-I")
        .arg(crate_folder().join("include"))
        .arg(crate_folder().join(source))
        .arg("-o")
        .arg(&program);
    match linking {
        Linking::Shared => {
            compile.arg("-L").arg(&libraries).args(["-lpat_capi", "-lm", "-lpthread"]);
        }
        // The libraries that `rustc --print native-static-libs` names on Linux.
        Linking::Static => {
            compile.arg(libraries.join("libpat_capi.a")).args([
                "-lgcc_s",
                "-lutil",
                "-lrt",
                "-lpthread",
                "-lm",
                "-ldl",
            ]);
        }
    }
    run(&mut compile);
    let output = run(Command::new(&program).env("LD_LIBRARY_PATH", &libraries));
    String::from_utf8(output.stdout).expect("the programs print ASCII")
}

#[test]
fn the_example_gives_the_right_numbers() {
    let printed = run_program("cc", "-std=c11", "examples/shared_prefix.c", &Linking::Shared);
    for line in
        ["2 sequences, sharing factor 1.60", "sequence 0, 40 tokens: out 0.80", "sequence 1, 46 tokens: out 1.2"]
    {
        assert!(printed.contains(line), "{line:?} is not in\n{printed}");
    }
}

#[test]
fn the_static_library_is_complete() {
    run_program("cc", "-std=c11", "examples/shared_prefix.c", &Linking::Static);
}

#[test]
fn the_header_is_one_for_cpp_too() {
    run_program("c++", "-std=c++17", "tests/header.cpp", &Linking::Static);
}

#[test]
fn bad_input_is_refused() {
    run_program("cc", "-std=c11", "tests/bad_input.c", &Linking::Shared);
}

#[test]
fn threads_may_share_objects() {
    run_program("cc", "-std=c11", "tests/threads.c", &Linking::Shared);
}
