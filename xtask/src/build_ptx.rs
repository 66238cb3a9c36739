//! `cargo xtask build-ptx`: the device crate to PTX, one rustc run per architecture.

use crate::ptx::{self, Module};
use crate::sysroot::{self, CoreSource};
use crate::toolchain::Toolchain;
use crate::workspace;
use anyhow::{Context, Result, bail};
use pat_abi::Arch;
use std::fs;
use std::path::Path;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Compare a fresh build with the committed PTX instead of writing it.
    #[arg(long)]
    pub(crate) check: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let toolchain = Toolchain::find()?;
    let source = CoreSource::find(&toolchain, args.check)?;
    eprintln!("core for the device: {source}");
    let sysroot = sysroot::prepare(&toolchain, &source)?;
    let mut stale = Vec::new();
    for arch in Arch::ALL {
        let file = workspace::ptx_file(arch);
        let committed = fs::read_to_string(&file).unwrap_or_default();
        let text = ptx::with_labels_of(&compile(&toolchain, &sysroot, arch, false)?, &committed);
        if !args.check {
            fs::write(&file, &text).with_context(|| format!("writing {}", file.display()))?;
            println!("wrote {} ({} KiB)", file.display(), text.len() / 1024);
        } else if committed == text {
            println!("{} is what the sources give", file.display());
        } else {
            stale.push(file.display().to_string());
        }
    }
    if !stale.is_empty() {
        bail!("not what the sources give: {}\nRun `cargo xtask build-ptx` and commit the result", stale.join(", "));
    }
    Ok(())
}

/// Flags every device build is made with (docs/ptx-target.md says why), one per element.
/// `plain` leaves the switches out.
pub(crate) fn rustflags(sysroot: &Path, arch: Arch, plain: bool) -> String {
    let mut flags = vec![
        "--sysroot".to_owned(),
        sysroot.display().to_string(),
        format!("-Ctarget-cpu={}", arch.name()),
        "-Clinker=true".to_owned(),
        "-Cllvm-args=-unroll-threshold=100000".to_owned(),
        "-Zmir-enable-passes=-JumpThreading".to_owned(),
        format!("--remap-path-prefix={}=/pat-rs", workspace::root().display()),
        "--check-cfg=cfg(pat_sm90a, pat_plain)".to_owned(),
    ];
    if arch == Arch::Sm90a {
        flags.push("--cfg=pat_sm90a".to_owned());
    }
    if plain {
        flags.push("--cfg=pat_plain".to_owned());
    }
    flags.join("\x1f")
}

/// The finished PTX of one architecture; with `plain`, as if there were no switches.
pub(crate) fn compile(toolchain: &Toolchain, sysroot: &Path, arch: Arch, plain: bool) -> Result<String> {
    let target_dir = workspace::target_dir().join(if plain { "nvptx-plain" } else { "nvptx" }).join(arch.name());
    workspace::run(
        toolchain
            .command("cargo")
            .args(["rustc", "--quiet", "--release", "--locked", "--target", "nvptx64-nvidia-cuda"])
            .arg("--manifest-path")
            .arg(workspace::root().join("kernels-gpu/Cargo.toml"))
            .arg("--target-dir")
            .arg(&target_dir)
            .args(["--", "--emit=asm"])
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags(sysroot, arch, plain)),
    )?;
    let file = target_dir.join("nvptx64-nvidia-cuda/release/deps/pat_kernels.s");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    Module::parse(&text).finish(arch)
}
