//! A sysroot for nvptx64 that holds `core`, compiled once per compiler and cached under the target directory.

use crate::toolchain::{COMMIT_HASH, Toolchain};
use crate::{core_source, workspace};
use anyhow::{Context, Result, bail};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Where the device's `core` comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CoreSource {
    /// The toolchain has a compiled one.
    DeviceStd(PathBuf),
    /// The rust-src component.
    RustSrc(PathBuf),
    /// The source pages of the rust-docs component.
    RustDocs(PathBuf),
}

impl CoreSource {
    /// The first that is there. A build that will be compared never takes the compiled one: its flags are not ours.
    pub(crate) fn find(toolchain: &Toolchain, comparable: bool) -> Result<Self> {
        let device_std = if comparable { None } else { toolchain.device_std() };
        let source = device_std
            .map(Self::DeviceStd)
            .or_else(|| toolchain.rust_src().map(Self::RustSrc))
            .or_else(|| toolchain.core_pages().map(Self::RustDocs));
        match source {
            Some(source) => Ok(source),
            None => bail!(
                "no source of `core` for the device: add one with `rustup component add rust-src` (or rust-docs) \
                 to the toolchain at {}",
                toolchain.sysroot.display()
            ),
        }
    }
}

impl fmt::Display for CoreSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeviceStd(path) => write!(f, "the toolchain's own nvptx64 standard library ({})", path.display()),
            Self::RustSrc(path) => write!(f, "the rust-src component ({})", path.display()),
            Self::RustDocs(path) => write!(f, "the source pages of the rust-docs component ({})", path.display()),
        }
    }
}

/// The sysroot to build the device crate against; compiled if it is not cached (about 12 s).
pub(crate) fn prepare(toolchain: &Toolchain, source: &CoreSource) -> Result<PathBuf> {
    if let CoreSource::DeviceStd(_) = source {
        return Ok(toolchain.sysroot.clone());
    }
    let cached = workspace::target_dir().join("nvptx-sysroot").join(COMMIT_HASH);
    if cached.is_dir() {
        return Ok(cached);
    }
    let parent = cached.parent().context("the sysroot has a parent folder")?;
    fs::create_dir_all(parent)?;
    // Built aside and renamed: an interrupted build leaves nothing that looks complete.
    let work = tempfile::tempdir_in(parent)?;
    let library = match source {
        CoreSource::RustSrc(library) => library.clone(),
        CoreSource::RustDocs(pages) => {
            let library = work.path().join("library");
            let count = core_source::extract(pages, &library)?;
            eprintln!("extracted {count} source files of core from rust-docs");
            library
        }
        CoreSource::DeviceStd(_) => unreachable!("returned above"),
    };
    eprintln!("compiling core for nvptx64-nvidia-cuda");
    let sysroot = work.path().join("sysroot");
    let lib = sysroot.join("lib/rustlib/nvptx64-nvidia-cuda/lib");
    fs::create_dir_all(&lib)?;
    compile(toolchain, &sysroot, "core", &library.join("core/src/lib.rs"), &library)?;
    // Nothing of it is used, but every crate that uses `core` looks for it.
    let builtins = work.path().join("compiler_builtins.rs");
    fs::write(&builtins, "#![feature(no_core, compiler_builtins)]\n#![no_core]\n#![compiler_builtins]\n")?;
    compile(toolchain, &sysroot, "compiler_builtins", &builtins, work.path())?;
    match fs::rename(&sysroot, &cached) {
        Ok(()) => Ok(cached),
        // Another build was faster.
        Err(_) if cached.is_dir() => Ok(cached),
        Err(error) => Err(error).context("moving the sysroot into place"),
    }
}

fn compile(toolchain: &Toolchain, sysroot: &Path, name: &str, source: &Path, folder: &Path) -> Result<()> {
    let output_file = sysroot.join(format!("lib/rustlib/nvptx64-nvidia-cuda/lib/lib{name}.rlib"));
    workspace::output(
        toolchain
            .command("rustc")
            .args(["--crate-name", name, "--edition", "2024", "--crate-type", "rlib"])
            .args(["--target", "nvptx64-nvidia-cuda", "-C", "opt-level=3", "-C", "panic=abort"])
            .args(["-Zforce-unstable-if-unmarked", "--cap-lints", "allow"])
            // Panic locations would otherwise carry this machine's paths into the PTX.
            .arg(format!("--remap-path-prefix={}=/library", folder.display()))
            .arg("--sysroot")
            .arg(sysroot)
            .arg(source)
            .arg("-o")
            .arg(output_file),
    )
    .with_context(|| format!("compiling {name} for the device"))?;
    Ok(())
}
