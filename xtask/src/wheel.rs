//! `cargo xtask wheel`: the Python package as a manylinux wheel.

use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Builds wheels; a tool of the build, so the version is pinned.
const MATURIN: &str = "maturin==1.16.0";

const FOLDER: &str = "dist/wheels";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to put it.
    #[arg(long, default_value = FOLDER, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Cargo profile: `dev` is faster to build where one of the tests is all the wheel is for.
    #[arg(long, default_value = "release")]
    pub(crate) profile: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let out = workspace::root().join(&args.out);
    let maturin = maturin()?;
    // A wheel of an earlier version would be taken for this one's.
    for wheel in wheels(&out)? {
        fs::remove_file(wheel)?;
    }
    let manifest = workspace::root().join("python/Cargo.toml");
    workspace::run(
        Command::new(maturin)
            .args(["build", "--locked", "--profile", &args.profile, "--compatibility", "pypi", "--manifest-path"])
            .arg(manifest)
            .arg("--out")
            .arg(&out),
    )?;
    let [wheel] = &wheels(&out)?[..] else { bail!("{}: not exactly one wheel", out.display()) };
    println!("{} ({:.1} MiB):", wheel.display(), wheel.metadata()?.len() as f64 / f64::from(1 << 20));
    workspace::run(Command::new("python3").args(["-m", "zipfile", "--list"]).arg(wheel))
}

/// The wheel that was built last, where it is put by default.
pub(crate) fn built() -> Result<PathBuf> {
    let folder = workspace::root().join(FOLDER);
    wheels(&folder)?.pop().with_context(|| format!("{}: no wheel, run `cargo xtask wheel`", folder.display()))
}

/// maturin in a virtual environment below the target folder; installed at the first use.
fn maturin() -> Result<PathBuf> {
    let environment = workspace::target_dir().join("maturin");
    let maturin = environment.join("bin/maturin");
    if !maturin.exists() {
        workspace::run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
        let pip = environment.join("bin/pip");
        workspace::run(Command::new(pip).args(["install", "--quiet", MATURIN])).context("maturin")?;
    }
    Ok(maturin)
}

fn wheels(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let name = |file: &Path| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(files
        .into_iter()
        .filter(|file| name(file).starts_with("prefix_attn-") && name(file).ends_with(".whl"))
        .collect())
}
