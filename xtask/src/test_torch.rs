//! `cargo xtask test-torch`: the Python package's tests without a GPU, with one torch after another. Not a step of CI: a torch from
//! PyPI comes with some gigabytes of CUDA.

use crate::{wheel, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest version that the package says it takes, and the last release of each one after it.
const VERSIONS: &[&str] = &["2.9.0", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"];
/// What the tests need beside torch.
const TOOLS: &[&str] = &["numpy", "pytest"];
/// A producer of DLPack that is no torch.
const JAX: &str = "jax[cpu]";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The wheel to test; by default the one that `cargo xtask wheel` has written.
    #[arg(long, value_name = "FILE")]
    wheel: Option<PathBuf>,
    /// Versions of torch, separated by commas.
    #[arg(long, value_delimiter = ',', default_values_t = VERSIONS.iter().map(|&version| version.to_owned()))]
    versions: Vec<String>,
    /// Keep each version's environment (target/test-torch/VERSION, up to 8 GB) for the next call.
    #[arg(long)]
    keep: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let wheel = match &args.wheel {
        Some(wheel) => wheel.canonicalize().with_context(|| wheel.display().to_string())?,
        None => wheel::built()?,
    };
    let mut failed = Vec::new();
    for version in &args.versions {
        let environment = workspace::target_dir().join("test-torch").join(version);
        let tested = test(&environment, version, &wheel);
        if !args.keep && environment.exists() {
            fs::remove_dir_all(&environment)?;
        }
        match tested {
            Ok(()) => println!("torch {version}: passed"),
            Err(error) => {
                println!("torch {version}: {error:#}");
                failed.push(version.as_str());
            }
        }
    }
    if !failed.is_empty() {
        bail!("failed with torch {}", failed.join(", "));
    }
    Ok(())
}

fn test(environment: &Path, version: &str, wheel: &Path) -> Result<()> {
    let program = |name: &str| environment.join("bin").join(name);
    let pip = || {
        let mut pip = Command::new(program("python"));
        pip.args(["-m", "pip", "install", "--quiet"]);
        pip
    };
    if !program("pytest").exists() {
        workspace::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(environment))?;
        workspace::run(pip().arg(format!("torch=={version}")).args(TOOLS).arg(JAX))?;
    }
    workspace::run(pip().args(["--no-deps", "--force-reinstall"]).arg(wheel))?;
    // By name: what was not collected has not passed.
    for tests in ["tests", "tests/with_jax"] {
        workspace::run(
            Command::new(program("pytest"))
                .args(["-p", "no:cacheprovider", tests])
                .current_dir(workspace::root().join("python"))
                .env("OMP_NUM_THREADS", "1"),
        )?;
    }
    Ok(())
}
