//! `cargo xtask check-cuda-linking`: the build does not depend on the CUDA toolkit that a machine happens to have, and a tree
//! that also holds candle can be built.
//!
//! cudarc's build script decides both: with the wrong features it runs `nvcc --version`, refuses versions it does not know,
//! and gives other bindings for each that it knows; and it refuses a tree that asks for two kinds of loading.

use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An old toolkit, two in the middle, the one that candle's check below builds with, and one that cudarc does not know.
const TOOLKITS: [&str; 5] = ["11.8", "12.4", "12.9", "13.0", "13.5"];
/// The toolkit that the tree with candle's features is built with.
const CANDLE_TOOLKIT: &str = "13.0";
/// The candle that is resolved beside pat-rs.
const CANDLE: &str = r#"candle-core = { version = "=0.11.1", features = ["cuda"] }"#;
/// What candle-core 0.11.1 asks of cudarc, less `f16` and `f8`: they concern no linking, and need more crates.
const CANDLE_CUDARC: &str = r#"cudarc = { version = "0.19.10", default-features = false, features = [
    "std", "cublas", "cublaslt", "curand", "driver", "nvrtc", "cuda-version-from-build-system", "dynamic-linking"
] }"#;

pub(crate) fn run() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    no_toolkit_changes_the_build(scratch.path())?;
    a_tree_with_candle_resolves(scratch.path())?;
    the_candle_crate_is_checked(scratch.path())?;
    a_tree_that_links_cuda_builds(scratch.path())
}

/// Checks pat-rs with each toolkit on the PATH: none is run, and the build script of cudarc says the same each time.
fn no_toolkit_changes_the_build(scratch: &Path) -> Result<()> {
    let target = workspace::target_dir().join("cuda-linking");
    let mut said: Option<String> = None;
    for version in TOOLKITS {
        let toolkit = FakeToolkit::new(&scratch.join(version), version)?;
        let mut check = toolkit.cargo();
        check.args(["check", "--quiet", "--locked", "--package", "pat-rs", "--target-dir"]).arg(&target);
        workspace::run(check.current_dir(workspace::root()))?;
        ensure!(!toolkit.was_run(), "the build ran nvcc {version}");
        let output = build_script_output(&target)?;
        match &said {
            None => said = Some(output),
            Some(before) => ensure!(*before == output, "nvcc {version} changes the build:\n{before}\n---\n{output}"),
        }
        println!("nvcc {version} on the PATH: pat-rs builds, and looks at none of it");
    }
    Ok(())
}

/// Resolves pat-rs with `yield-cuda-linking` beside candle: features of cudarc that exclude each other do not meet.
fn a_tree_with_candle_resolves(scratch: &Path) -> Result<()> {
    let tree = write_tree(&scratch.join("with-candle"), CANDLE)?;
    let metadata = workspace::output(
        Command::new("cargo")
            .args(["metadata", "--format-version", "1", "--filter-platform", "x86_64-unknown-linux-gnu"])
            .current_dir(&tree),
    )?;
    let metadata: Value = serde_json::from_slice(&metadata.stdout)?;
    let nodes = metadata["resolve"]["nodes"].as_array().context("cargo metadata has no resolve.nodes")?;
    let of_cudarc: Vec<&Value> =
        nodes.iter().filter(|node| node["id"].as_str().is_some_and(|id| id.contains("#cudarc@"))).collect();
    let [node] = of_cudarc[..] else { bail!("{} versions of cudarc beside candle, expected one", of_cudarc.len()) };
    let features: Vec<&str> = node["features"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    ensure!(features.contains(&"dynamic-linking"), "candle no longer links CUDA: {features:?}");
    let clash = features.iter().find(|feature| **feature == "dynamic-loading" || feature.starts_with("cuda-1"));
    ensure!(clash.is_none(), "pat-rs turns {clash:?} on beside candle: {features:?}");
    println!("beside candle: cudarc is resolved with {}", features.join(", "));
    Ok(())
}

/// Checks pat-candle with its feature `cuda`, tests included. Nothing is linked, and nvcc has made files without anything in them.
fn the_candle_crate_is_checked(scratch: &Path) -> Result<()> {
    let toolkit = FakeToolkit::new(&scratch.join("for-pat-candle"), CANDLE_TOOLKIT)?;
    let mut check = toolkit.cargo();
    check.args(["check", "--quiet", "--locked", "--all-targets", "--no-default-features", "--features", "cuda"]);
    check
        .args(["--manifest-path", "candle/Cargo.toml", "--target-dir"])
        .arg(workspace::target_dir().join("candle-cuda"));
    // Otherwise candle's build asks nvidia-smi.
    workspace::run(check.env("CUDA_COMPUTE_CAP", "90").env("RUSTFLAGS", "-D warnings").current_dir(workspace::root()))?;
    ensure!(toolkit.was_run(), "candle's build no longer runs nvcc: can its tests be linked without CUDA?");
    println!("pat-candle with the feature cuda, CUDA {CANDLE_TOOLKIT}: its code and its tests are right");
    Ok(())
}

/// Checks pat-rs with `yield-cuda-linking` in a tree whose cudarc has candle's features. Nothing is linked, so that no CUDA
/// library is needed; candle itself would need nvcc for its kernels.
fn a_tree_that_links_cuda_builds(scratch: &Path) -> Result<()> {
    let tree = write_tree(&scratch.join("with-linking"), CANDLE_CUDARC)?;
    let toolkit = FakeToolkit::new(&scratch.join("for-candle"), CANDLE_TOOLKIT)?;
    let target = workspace::target_dir().join("cuda-linking-yield");
    workspace::run(toolkit.cargo().args(["check", "--quiet", "--target-dir"]).arg(&target).current_dir(&tree))?;
    ensure!(toolkit.was_run(), "cudarc no longer asks nvcc, as candle makes it: is the feature still needed?");
    println!("beside a cudarc that links CUDA {CANDLE_TOOLKIT}: pat-rs builds");
    Ok(())
}

/// A crate that depends on pat-rs with `yield-cuda-linking` and on `other`, with this workspace's versions.
fn write_tree(folder: &Path, other: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder.join("src"))?;
    let host = workspace::root().join("host");
    let manifest = format!(
        "[package]\nname = \"tree\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n[dependencies]\n{other}\n\
         pat-rs = {{ path = {host:?}, default-features = false, features = [\"yield-cuda-linking\"] }}\n"
    );
    fs::write(folder.join("Cargo.toml"), manifest)?;
    fs::write(folder.join("src/lib.rs"), "pub use pat_rs::cuda::CudaEngine;\n")?;
    fs::copy(workspace::root().join("Cargo.lock"), folder.join("Cargo.lock"))?;
    Ok(folder.to_owned())
}

/// What cudarc's build script printed last in a target directory.
fn build_script_output(target: &Path) -> Result<String> {
    let mut outputs = Vec::new();
    for entry in fs::read_dir(target.join("debug/build"))? {
        let path = entry?.path();
        let of_cudarc = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cudarc-"));
        if of_cudarc && path.join("output").is_file() {
            outputs.push((fs::metadata(path.join("output"))?.modified()?, path.join("output")));
        }
    }
    let (_, latest) = outputs.into_iter().max().context("cudarc's build script has not run")?;
    Ok(fs::read_to_string(latest)?)
}

/// A folder with an `nvcc` that says its version, notes that it was asked, and makes empty files of what it is to compile.
struct FakeToolkit {
    folder: PathBuf,
}

impl FakeToolkit {
    fn new(folder: &Path, version: &str) -> Result<Self> {
        fs::create_dir_all(folder.join("bin"))?;
        let nvcc = folder.join("bin/nvcc");
        let asked = folder.join("asked");
        let asked = asked.display().to_string();
        fs::write(&nvcc, include_str!("fake_nvcc.sh").replace("ASKED", &asked).replace("VERSION", version))?;
        fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Cargo, with this toolkit first on the PATH and as CUDA_HOME: the latter makes cargo run build scripts again.
    fn cargo(&self) -> Command {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = [self.folder.join("bin")].into_iter().chain(std::env::split_paths(&path));
        let mut command = Command::new("cargo");
        command.env("PATH", std::env::join_paths(folders).expect("folders of a PATH, and one without a colon"));
        command.env("CUDA_HOME", &self.folder);
        command
    }

    fn was_run(&self) -> bool {
        self.folder.join("asked").exists()
    }
}
