//! Finding ptxas and reading what it reports.

use crate::workspace;
use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The wheel on PyPI that carries ptxas. It is downloaded, never kept in the repository (NVIDIA's licence).
const WHEEL: &str = "nvidia-cuda-nvcc==13.5.37";
const PTXAS_IN_WHEEL: &str = "nvidia/cu13/bin/ptxas";

/// What ptxas says of one kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Resources {
    pub(crate) registers: u32,
    pub(crate) stack_bytes: u32,
    pub(crate) spill_store_bytes: u32,
    pub(crate) spill_load_bytes: u32,
}

/// ptxas on this machine, without downloading: on the PATH, under `CUDA_HOME`, or unpacked earlier.
pub(crate) fn installed() -> Option<PathBuf> {
    let on_path = std::env::var_os("PATH")
        .into_iter()
        .flat_map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .map(|folder| folder.join("ptxas"));
    let in_toolkit = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/ptxas"));
    on_path.chain(in_toolkit).chain([unpacked()]).find(|file| file.is_file())
}

fn unpacked() -> PathBuf {
    workspace::target_dir().join("ptxas").join(PTXAS_IN_WHEEL)
}

/// [`installed`], else from the wheel.
pub(crate) fn find() -> Result<PathBuf> {
    if let Some(file) = installed() {
        return Ok(file);
    }
    let folder = workspace::target_dir().join("ptxas");
    std::fs::create_dir_all(&folder)?;
    eprintln!("no ptxas on the PATH or under CUDA_HOME: taking it from {WHEEL}");
    let fetch = || -> Result<()> {
        workspace::output(
            Command::new("python3")
                .args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", WHEEL, "--target"])
                .arg(&folder),
        )?;
        Ok(())
    };
    fetch().with_context(|| {
        format!(
            "ptxas is missing. Put one on the PATH, set CUDA_HOME, or with network: python3 -m pip install --no-deps \
             {WHEEL} --target {}",
            folder.display()
        )
    })?;
    let file = unpacked();
    if !file.is_file() {
        bail!("{WHEEL} holds no {PTXAS_IN_WHEEL}");
    }
    Ok(file)
}

/// What ptxas makes of a module.
pub(crate) struct Assembled {
    /// By kernel.
    pub(crate) resources: BTreeMap<String, Resources>,
    /// Machine code by kernel.
    pub(crate) code: BTreeMap<String, Vec<u8>>,
    pub(crate) warnings: Vec<String>,
}

/// Assembles PTX.
pub(crate) fn assemble(ptxas: &Path, ptx: &str, arch: &str) -> Result<Assembled> {
    let (source, cubin) = (tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?);
    std::fs::write(source.path(), ptx)?;
    let output = workspace::output(
        Command::new(ptxas).arg("-v").arg(format!("-arch={arch}")).arg(source.path()).arg("-o").arg(cubin.path()),
    )?;
    let (resources, warnings) = parse(&String::from_utf8_lossy(&output.stderr));
    let cubin = std::fs::read(cubin.path())?;
    let mut code = BTreeMap::new();
    for section in object::File::parse(&*cubin)?.sections() {
        if let Some(kernel) = section.name()?.strip_prefix(".text.") {
            code.insert(kernel.to_owned(), section.data()?.to_vec());
        }
    }
    Ok(Assembled { resources, code, warnings })
}

fn parse(report: &str) -> (BTreeMap<String, Resources>, Vec<String>) {
    let mut kernels: BTreeMap<String, Resources> = BTreeMap::new();
    let mut warnings = Vec::new();
    let mut current = String::new();
    let number_before = |line: &str, unit: &str| -> Option<u32> {
        line.split_once(unit)?.0.split_whitespace().next_back()?.parse().ok()
    };
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            current = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.insert(current.clone(), Resources::default());
        } else if line.contains("warning") || line.contains("Potential Performance Loss") {
            warnings.push(line.trim().to_owned());
        } else if let Some(kernel) = kernels.get_mut(&current) {
            if let Some(stack) = number_before(line, " bytes stack frame") {
                kernel.stack_bytes = stack;
                kernel.spill_store_bytes = number_before(line, " bytes spill stores").unwrap_or(0);
                kernel.spill_load_bytes = number_before(line, " bytes spill loads").unwrap_or(0);
            }
            if let Some(registers) = number_before(line, " registers") {
                kernel.registers = registers;
            }
        }
    }
    (kernels, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let report = "\
ptxas info    : Compiling entry function 'k' for 'sm_80'
ptxas info    : Function properties for k
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
";
        let (kernels, warnings) = parse(report);
        let expected = Resources { registers: 168, stack_bytes: 8, spill_store_bytes: 12, spill_load_bytes: 16 };
        assert_eq!(kernels["k"], expected);
        assert_eq!(warnings.len(), 1);
    }
}
