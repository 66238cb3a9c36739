//! `cargo xtask lint-kernels`: rustfmt and clippy for the device crate, which the workspace's own runs do not reach.

use crate::build_ptx::rustflags;
use crate::sysroot::{self, CoreSource};
use crate::toolchain::Toolchain;
use crate::workspace;
use anyhow::Result;
use pat_abi::Arch;

pub(crate) fn run() -> Result<()> {
    let toolchain = Toolchain::find()?;
    let manifest = workspace::root().join("kernels-gpu/Cargo.toml");
    workspace::run(toolchain.command("cargo").args(["fmt", "--check", "--manifest-path"]).arg(&manifest))?;
    let sysroot = sysroot::prepare(&toolchain, &CoreSource::find(&toolchain, true)?)?;
    for arch in Arch::ALL {
        workspace::run(
            toolchain
                .command("cargo")
                .args([
                    "clippy",
                    "--quiet",
                    "--release",
                    "--locked",
                    "--target",
                    "nvptx64-nvidia-cuda",
                    "--manifest-path",
                ])
                .arg(&manifest)
                .arg("--target-dir")
                .arg(workspace::target_dir().join("nvptx-lint").join(arch.name()))
                .args(["--", "-D", "warnings"])
                .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&sysroot, arch, false)),
        )?;
    }
    Ok(())
}
