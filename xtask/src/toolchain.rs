//! The device compiler: one rustc, pinned by commit hash, so that the same sources give the same PTX everywhere.

use crate::workspace;
use anyhow::{Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// rustc 1.95.0 (2026-04-14).
pub(crate) const COMMIT_HASH: &str = "59807616e";

/// An installed toolchain that holds the pinned compiler.
#[derive(Clone, Debug)]
pub(crate) struct Toolchain {
    /// What `rustup run` calls it; `None` where `rustc` on the PATH is the one.
    name: Option<String>,
    /// Its sysroot.
    pub(crate) sysroot: PathBuf,
}

impl Toolchain {
    /// The first installed toolchain with the pinned compiler: the active one, `stable`, `1.95.0`. Nothing is downloaded.
    pub(crate) fn find() -> Result<Self> {
        let mut seen = Vec::new();
        for name in [None, Some("stable"), Some("1.95.0")] {
            let candidate = Self { name: name.map(Into::into), sysroot: PathBuf::new() };
            let Ok(output) = workspace::output(candidate.command("rustc").arg("-vV")) else { continue };
            let version = String::from_utf8_lossy(&output.stdout).into_owned();
            let field = |key: &str| version.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").trim();
            if field("commit-hash:").starts_with(COMMIT_HASH) {
                let output = workspace::output(candidate.command("rustc").args(["--print", "sysroot"]))?;
                let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim());
                return Ok(Self { sysroot, ..candidate });
            }
            seen.push(format!("{}: {}", name.unwrap_or("active"), field("release:")));
        }
        bail!(
            "the device code is pinned to rustc 1.95.0 ({COMMIT_HASH}), found {}.\nInstall it: rustup toolchain install \
             1.95.0 --component rust-docs,rustfmt,clippy (the committed PTX keeps working without)",
            seen.join(", ")
        );
    }

    /// A command of this toolchain (`rustc`, `cargo`), with the unstable features the device build needs.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = match &self.name {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("rustup");
                command.args(["run", name, program]);
                command
            }
        };
        // Cargo tells its children which rustc runs it: the device build must not inherit that.
        for variable in ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"] {
            command.env_remove(variable);
        }
        command.env("RUSTC_BOOTSTRAP", "1").env("RUSTUP_AUTO_INSTALL", "0").current_dir(workspace::root());
        command
    }

    /// The standard library of the device target, where the toolchain has it.
    pub(crate) fn device_std(&self) -> Option<PathBuf> {
        Some(self.sysroot.join("lib/rustlib/nvptx64-nvidia-cuda/lib")).filter(|dir| dir.is_dir())
    }

    /// The `library` folder of the rust-src component.
    pub(crate) fn rust_src(&self) -> Option<PathBuf> {
        Some(self.sysroot.join("lib/rustlib/src/rust/library")).filter(|dir| dir.join("core/src/lib.rs").is_file())
    }

    /// The source pages of `core` in the rust-docs component.
    pub(crate) fn core_pages(&self) -> Option<PathBuf> {
        Some(self.sysroot.join("share/doc/rust/html/src/core")).filter(|dir: &PathBuf| has_pages(dir))
    }
}

fn has_pages(dir: &Path) -> bool {
    dir.join("lib.rs.html").is_file()
}
