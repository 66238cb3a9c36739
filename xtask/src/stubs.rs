//! `cargo xtask stubs`: the type stubs of the Python extension, from what pyo3 has written into the compiled library.

use crate::workspace::{self, Generated};
use anyhow::{Context, Result, bail};
use pyo3_introspection::{introspect_cdylib, module_stub_files};
use std::process::Command;

pub(crate) fn run(stubs: &Generated) -> Result<()> {
    workspace::run(
        Command::new("cargo").args(["build", "--quiet", "--package", "pat-python"]).current_dir(workspace::root()),
    )?;
    let library = workspace::target_dir().join("debug/lib_native.so");
    let module = introspect_cdylib(&library, "_native").with_context(|| library.display().to_string())?;
    let files: Vec<_> = module_stub_files(&module).into_iter().collect();
    let [(_, text)] = &files[..] else { bail!("{} stub files of one module", files.len()) };
    if text.contains("Incomplete") {
        bail!("something in the module has no type: {text}");
    }
    // The annotations that name torch's types are strings, for which pyo3 writes no import.
    let text = text.replacen("\nfrom ", "\nimport torch\nfrom ", 1);
    let text = format!("# Made by `cargo xtask stubs` from the compiled extension.\n\n{text}");
    stubs.put("python/prefix_attn/_native.pyi", &text, "stubs")
}
