//! `cargo xtask gpu-bundle`: one folder, and its archive, that tests and measures on a GPU machine without cargo.

use crate::workspace;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Of the archive: what a machine without a network can be expected to be sent.
const MAX_BYTES: u64 = 40 << 20;
/// The PTX is in each executable: a dictionary that spans several of them stores it once (5 MiB, not 60).
const COMPRESSOR: &str = "xz --threads=1 --lzma2=preset=3,dict=192MiB";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to put the folder; its archive lies beside it, with `.tar.xz` behind the name.
    #[arg(long, default_value = "dist/gpu-bundle")]
    output: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = workspace::root().join(&args.output);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(folder.join("tests"))?;
    let commit = commit();
    let build = ["build", "--release", "--package", "pat-cli", "--bin", "pat"];
    for (name, file) in executables(&build, &commit)? {
        install(&file, &folder.join(name))?;
    }
    let of_device =
        ["--release", "--package", "pat-tests", "--package", "pat-rs", "--features", "pat-tests/fault-injection"];
    // The others need no GPU, or measure what the tool measures.
    let tests = ["test", "--no-run", "--lib", "--test", "gpu_*"];
    // `cargo test --example` builds a harness without tests, which passes.
    let examples = ["build", "--example", "soak", "--example", "first_use"];
    for what in [tests.as_slice(), examples.as_slice()] {
        // The support of the tests has tests of its own.
        let of_what = executables(&[what, &of_device].concat(), &commit)?;
        for (name, file) in of_what.into_iter().filter(|(name, _)| name != "pat_tests") {
            install(&file, &folder.join("tests").join(name))?;
        }
    }
    let ptx = folder.join("ptx");
    fs::create_dir_all(&ptx)?;
    for arch in pat_abi::Arch::ALL {
        fs::copy(workspace::ptx_file(arch), ptx.join(format!("{}.ptx", arch.name())))?;
    }
    fs::write(folder.join("run.sh"), include_str!("gpu_bundle_run.sh"))?;
    workspace::run(Command::new("chmod").arg("+x").arg(folder.join("run.sh")))?;
    let archive = archive(&folder)?;
    let bytes = fs::metadata(&archive)?.len();
    println!("{}\n{}: {:.1} MiB", folder.display(), archive.display(), bytes as f64 / f64::from(1 << 20));
    if bytes > MAX_BYTES {
        bail!("the archive is larger than {} MiB", MAX_BYTES >> 20);
    }
    Ok(())
}

/// Packs the folder; the archive gets its name when it is whole.
fn archive(folder: &Path) -> Result<PathBuf> {
    let name = folder.file_name().context("--output ends in no folder's name")?;
    let parent = folder.parent().context("--output has no parent folder")?;
    let [partial, archive] = [".tar.xz.partial", ".tar.xz"].map(|suffix| {
        let mut file = name.to_owned();
        file.push(suffix);
        parent.join(file)
    });
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--file").arg(&partial).args(["--use-compress-program", COMPRESSOR, "--directory"]);
    workspace::run(tar.arg(parent).arg(name))?;
    fs::rename(&partial, &archive)?;
    Ok(archive)
}

/// What is bundled: result files name it, on a machine where git cannot be asked. Empty where git does not say.
fn commit() -> String {
    let arguments = ["describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"];
    let output = Command::new("git").args(arguments).current_dir(workspace::root()).output();
    output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs cargo and returns the executables it made, by target name.
fn executables(arguments: &[&str], commit: &str) -> Result<Vec<(String, PathBuf)>> {
    let output = Command::new("cargo")
        .args(arguments)
        .args(["--message-format=json-render-diagnostics"])
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("PAT_COMMIT", commit)
        .current_dir(workspace::root())
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed", arguments.join(" "));
    }
    let messages = String::from_utf8(output.stdout)?;
    let parsed = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(parsed
        .filter_map(|message| {
            let file = message.get("executable")?.as_str()?.into();
            Some((message.pointer("/target/name")?.as_str()?.to_owned(), file))
        })
        .collect())
}

fn install(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}
