//! Compiles C programs with the system's compilers and links them with the library.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn crate_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A form of the library, `libpat_capi.so` or `.a`: cargo has put it beside the test.
fn library(file: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test knows where it is");
    let library = test.with_file_name(file);
    assert!(library.exists(), "no {}", library.display());
    library
}

/// Compiles `source` without a warning, links it with a form of the library, and runs it.
pub(crate) fn compile_and_run(compiler: &str, standard: &str, source: &str, library_file: &str) -> Output {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join("program");
    let mut compile = Command::new(compiler);
    compile
        .args([standard, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-I"])
        .arg(crate_folder().join("include"))
        .arg(crate_folder().join(source))
        .arg(library(library_file))
        // What `rustc --print native-static-libs` names on Linux.
        .args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl", "-o"])
        .arg(&program);
    let compiled = compile.output().unwrap_or_else(|error| panic!("{compile:?}: {error}"));
    assert!(compiled.status.success(), "{compile:?}: {}", text(&compiled));
    Command::new(&program).output().unwrap_or_else(|error| panic!("{source}: {error}"))
}

/// All that a program has printed.
pub(crate) fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}
