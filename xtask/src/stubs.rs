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
    let text = with_unhashable_classes(&text);
    let text = format!("# Made by `cargo xtask stubs` from the compiled extension.\n\n{text}");
    stubs.put("python/prefix_attn/_native.pyi", &text, "stubs")
}

/// Python takes the hash of a class that compares by `__eq__` and has none of its own; pyo3 does not write that down, so that type
/// checkers would take it for `object`'s.
fn with_unhashable_classes(text: &str) -> String {
    const UNHASHABLE: &str = "    __hash__: ClassVar[None]  # type: ignore[assignment]\n";
    let mut classes = text.split("\n@final\n");
    let mut changed = classes.next().unwrap_or_default().replacen("import Any, ", "import Any, ClassVar, ", 1);
    for class in classes {
        changed.push_str("\n@final\n");
        match class.find("    def __eq__(") {
            Some(place) if !class.contains("    def __hash__(") => {
                changed.extend([&class[..place], UNHASHABLE, &class[place..]]);
            }
            _ => changed.push_str(class),
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_that_compares_and_has_no_hash_says_so() {
        let text = "from typing import Any, final\n\n@final\nclass A:\n    def __eq__(self, value): ...\n    def __hash__(self): ...\n\
                    \n@final\nclass B:\n    \"\"\"B.\"\"\"\n    def __eq__(self, value): ...\n\n@final\nclass C:\n    def c(self): ...\n";
        let expected = text
            .replace("import Any, ", "import Any, ClassVar, ")
            .replace("B.\"\"\"\n", "B.\"\"\"\n    __hash__: ClassVar[None]  # type: ignore[assignment]\n");
        assert_eq!(with_unhashable_classes(text), expected);
    }
}
