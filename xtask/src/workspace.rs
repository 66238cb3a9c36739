//! Where things are, and running commands.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The repository root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the xtask crate lies in the repository")
}

/// Cargo's target directory: where cached and downloaded things go.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// The committed PTX file of an architecture.
pub(crate) fn ptx_file(arch: pat_abi::Arch) -> PathBuf {
    root().join("host/src/cuda/ptx").join(format!("{}.ptx", arch.name()))
}

/// How a task treats the committed file that it makes.
#[derive(clap::Args)]
pub(crate) struct Generated {
    /// Write nothing; fail if the committed file differs.
    #[arg(long)]
    pub(crate) check: bool,
}

impl Generated {
    /// Writes `text` to `file` of the repository, or compares the two. `task` makes the file.
    pub(crate) fn put(&self, file: &str, text: &str, task: &str) -> Result<()> {
        let path = root().join(file);
        if !self.check {
            return fs::write(&path, text).with_context(|| path.display().to_string());
        }
        if fs::read_to_string(&path).with_context(|| path.display().to_string())? != text {
            bail!("{file} is not what its sources give: run `cargo xtask {task}`");
        }
        Ok(())
    }
}

/// Runs a command to its end; an error carries what it printed.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} ended with {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// Runs a command with its output on the terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
