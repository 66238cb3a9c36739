//! `cargo xtask doctor`: what works on this machine; each failing line says what repairs it.

use crate::sysroot::CoreSource;
use crate::toolchain::{COMMIT_HASH, Toolchain};
use crate::{ptxas, workspace};
use anyhow::{Result, bail};
use pat_abi::Arch;
use std::process::Command;
use std::time::SystemTime;

pub(crate) fn run() -> Result<()> {
    let mut failures = 0;
    let mut line = |name: &str, state: std::result::Result<String, String>, needed: bool| {
        let (mark, text) = match state {
            Ok(text) => ("ok  ", text),
            Err(text) if needed => {
                failures += 1;
                ("FAIL", text)
            }
            Err(text) => ("none", text),
        };
        println!("{mark}  {name:<16} {text}");
    };
    match Toolchain::find() {
        Ok(toolchain) => {
            line(
                "device compiler",
                Ok(format!("rustc 1.95.0 ({COMMIT_HASH}) in {}", toolchain.sysroot.display())),
                true,
            );
            let source = CoreSource::find(&toolchain, true);
            line("core source", source.map(|s| s.to_string()).map_err(|e| e.to_string()), true);
        }
        Err(error) => line("device compiler", Err(error.to_string()), true),
    }
    line(
        "ptxas",
        ptxas::installed().map(|file| file.display().to_string()).ok_or_else(|| {
            "not found; `cargo xtask check-ptx` fetches it from PyPI, or put one on the PATH or set CUDA_HOME"
                .to_owned()
        }),
        false,
    );
    for arch in Arch::ALL {
        line(&format!("PTX {}", arch.name()), freshness(arch), true);
    }
    let driver = Command::new("nvidia-smi")
        .args(["--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"])
        .output();
    line(
        "GPU",
        match driver {
            Ok(output) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).trim().replace('\n', "; "))
            }
            Ok(output) => Err(format!("nvidia-smi: {}", String::from_utf8_lossy(&output.stdout).trim())),
            Err(_) => Err(
                "no NVIDIA driver (nvidia-smi not found): install one to run on a GPU; the CPU executor works without"
                    .into(),
            ),
        },
        false,
    );
    if failures > 0 {
        bail!("{failures} checks failed");
    }
    Ok(())
}

/// Whether the committed PTX is at least as new as the device sources. `build-ptx --check` tells for certain.
fn freshness(arch: Arch) -> std::result::Result<String, String> {
    let file = workspace::ptx_file(arch);
    let modified = |path: &std::path::Path| path.metadata().and_then(|m| m.modified()).ok();
    let Some(built) = modified(&file) else {
        return Err(format!("{} is missing: run `cargo xtask build-ptx`", file.display()));
    };
    let mut newest = SystemTime::UNIX_EPOCH;
    let mut folders = vec![workspace::root().join("kernels-gpu/src"), workspace::root().join("kernels-gpu/abi/src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            } else if let Some(time) = modified(&entry.path()) {
                newest = newest.max(time);
            }
        }
    }
    let slack = std::time::Duration::from_secs(60);
    if newest > built + slack {
        return Err("older than the device sources: run `cargo xtask build-ptx`".into());
    }
    Ok(format!("{} ({} KiB)", file.display(), file.metadata().map_or(0, |m| m.len() / 1024)))
}
