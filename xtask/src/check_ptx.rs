//! `cargo xtask check-ptx`: what can be said of the kernels without a GPU.

use crate::ptx::Module;
use crate::{ptxas, workspace};
use anyhow::{Context, Result, bail};
use pat_abi::{Arch, KERNELS, KernelSpec};
use std::fs;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the table as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct Row {
    entry: &'static str,
    assembled_for: &'static str,
    #[serde(flatten)]
    resources: ptxas::Resources,
    max_registers: u32,
    smem_bytes: u32,
    barriers: u32,
    violations: Vec<String>,
}

/// Real architectures that the driver may assemble a PTX file for.
fn targets(arch: Arch) -> &'static [&'static str] {
    match arch {
        Arch::Sm80 => &["sm_80", "sm_90"],
        Arch::Sm90a => &["sm_90a"],
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let ptxas = ptxas::find()?;
    let mut rows = Vec::new();
    let mut warnings = Vec::new();
    for arch in Arch::ALL {
        let file = workspace::ptx_file(arch);
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let module = Module::parse(&text);
        for target in targets(arch) {
            let (resources, target_warnings) = ptxas::assemble(&ptxas, &file, target)?;
            warnings.extend(target_warnings);
            for kernel in KERNELS.iter().filter(|kernel| kernel.arch == arch) {
                let Some(entry) = module.entries.iter().find(|entry| entry.name == kernel.entry) else {
                    bail!("{} has no {}: run `cargo xtask build-ptx`", file.display(), kernel.entry);
                };
                let resources = resources.get(kernel.entry).copied().unwrap_or_default();
                let mut violations = entry.violations();
                violations.extend(limits(kernel, resources, entry.barriers()));
                rows.push(Row {
                    entry: kernel.entry,
                    assembled_for: target,
                    resources,
                    max_registers: kernel.max_registers,
                    smem_bytes: kernel.smem_bytes,
                    barriers: entry.barriers(),
                    violations,
                });
            }
        }
        if module.prelude.contains(".extern .func") {
            bail!("{} calls functions that are not in it", file.display());
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&rows);
    }
    for warning in &warnings {
        eprintln!("{warning}");
    }
    let bad = rows.iter().filter(|row| !row.violations.is_empty()).count();
    if bad > 0 || !warnings.is_empty() {
        bail!("{bad} kernels break a rule, ptxas gave {} warnings", warnings.len());
    }
    Ok(())
}

fn limits(kernel: &KernelSpec, resources: ptxas::Resources, barriers: u32) -> Vec<String> {
    let mut violations = Vec::new();
    let mut check = |ok: bool, text: String| {
        if !ok {
            violations.push(text);
        }
    };
    let ptxas::Resources { registers, stack_bytes, spill_store_bytes, spill_load_bytes } = resources;
    check(registers > 0, "ptxas did not report it".into());
    check(registers <= kernel.max_registers, format!("{registers} registers, manifest {}", kernel.max_registers));
    check(stack_bytes == 0, format!("{stack_bytes} bytes of stack"));
    check(spill_store_bytes + spill_load_bytes == 0, format!("spills ({spill_store_bytes}+{spill_load_bytes} bytes)"));
    check(kernel.smem_bytes <= kernel.arch.max_smem_bytes(), format!("{} bytes of shared memory", kernel.smem_bytes));
    check(barriers == kernel.barriers, format!("{barriers} barriers, manifest {}", kernel.barriers));
    violations
}

fn print_table(rows: &[Row]) {
    println!(
        "{:36} {:7} {:>9} {:>5} {:>6} {:>8} {:>8}  verdict",
        "kernel", "target", "registers", "stack", "spills", "smem", "barriers"
    );
    for row in rows {
        let spills = row.resources.spill_store_bytes + row.resources.spill_load_bytes;
        let verdict = if row.violations.is_empty() { "ok".to_owned() } else { row.violations.join("; ") };
        println!(
            "{:36} {:7} {:>9} {:>5} {:>6} {:>8} {:>8}  {verdict}",
            row.entry,
            row.assembled_for,
            row.resources.registers,
            row.resources.stack_bytes,
            spills,
            row.smem_bytes,
            row.barriers
        );
    }
}
