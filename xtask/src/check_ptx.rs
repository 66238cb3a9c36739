//! `cargo xtask check-ptx`: what can be said of the kernels without a GPU.

use crate::ptx::Module;
use crate::sysroot::{self, CoreSource};
use crate::toolchain::Toolchain;
use crate::{build_ptx, overlap, ptxas, workspace};
use anyhow::{Context, Result, bail};
use flate2::Compression;
use flate2::write::GzEncoder;
use pat_abi::{Arch, Family, KERNELS, KernelSpec, Switches};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Write;

/// Of both files of PTX together, compressed: what they add to a package or a wheel.
const MAX_COMPRESSED_BYTES: usize = 6_000_000;

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
    /// Features that are compiled in.
    switches: String,
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
    let toolchain = Toolchain::find()?;
    let sysroot = sysroot::prepare(&toolchain, &CoreSource::find(&toolchain, true)?)?;
    let mut rows = Vec::new();
    let mut warnings = Vec::new();
    for arch in Arch::ALL {
        let file = workspace::ptx_file(arch);
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let module = Module::parse(&text);
        if module.prelude.contains(".extern .func") {
            bail!("{} calls functions that are not in it", file.display());
        }
        let plain = build_ptx::compile(&toolchain, &sysroot, arch, true)?;
        for target in targets(arch) {
            let plain = ptxas::assemble(&ptxas, &plain, target)?;
            let of_arch = || KERNELS.iter().filter(|kernel| kernel.is_in(arch));
            for switches in
                Switches::ALL.into_iter().filter(|switches| of_arch().any(|kernel| kernel.serves(*switches)))
            {
                let assembled = ptxas::assemble(&ptxas, &switches.specialise(&text), target)?;
                warnings.extend(assembled.warnings.iter().cloned());
                for kernel in of_arch().filter(|kernel| kernel.serves(switches)) {
                    let Some(entry) = module.entries.iter().find(|entry| entry.name == kernel.entry) else {
                        bail!("{} has no {}: run `cargo xtask build-ptx`", file.display(), kernel.entry);
                    };
                    let resources = assembled.resources.get(kernel.entry).copied().unwrap_or_default();
                    let mut violations = entry.violations();
                    violations.extend(limits(kernel, resources, entry.barriers()));
                    if kernel.waits() {
                        violations.extend(overlap::violations(kernel, entry));
                    }
                    let code = |module: &ptxas::Assembled| module.code.get(kernel.entry).cloned().unwrap_or_default();
                    if switches == Switches::OFF && !costs_no_more(&code(&assembled), &code(&plain), slack(kernel)) {
                        violations.push("with all switches off not the instructions of a build without them".into());
                    }
                    rows.push(Row {
                        entry: kernel.entry,
                        assembled_for: target,
                        switches: describe(switches),
                        resources,
                        max_registers: kernel.max_registers,
                        smem_bytes: kernel.smem_bytes,
                        barriers: entry.barriers(),
                        violations,
                    });
                }
            }
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
    let size = Size::of_committed()?;
    if !args.json {
        println!("{size}");
    }
    if size.compressed_bytes > MAX_COMPRESSED_BYTES {
        bail!("{size}: expected at most {MAX_COMPRESSED_BYTES} bytes compressed");
    }
    let bad = rows.iter().filter(|row| !row.violations.is_empty()).count();
    if bad > 0 || !warnings.is_empty() {
        bail!("{bad} kernels break a rule, ptxas gave {} warnings", warnings.len());
    }
    Ok(())
}

/// What the embedded PTX adds to a program and to what it is sent as.
#[derive(Clone, Copy, Debug)]
struct Size {
    entries: usize,
    text_bytes: usize,
    /// By gzip.
    compressed_bytes: usize,
}

impl Size {
    /// Of both files.
    fn of_committed() -> Result<Self> {
        let mut size = Self { entries: 0, text_bytes: 0, compressed_bytes: 0 };
        for arch in Arch::ALL {
            let file = workspace::ptx_file(arch);
            let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
            compressed.write_all(text.as_bytes())?;
            size.entries += Module::parse(&text).entries.len();
            size.text_bytes += text.len();
            size.compressed_bytes += compressed.finish()?.len();
        }
        Ok(size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { entries, text_bytes, compressed_bytes } = self;
        write!(f, "{entries} entries, {text_bytes} bytes of PTX, {compressed_bytes} by gzip")
    }
}

/// Instructions in a thousand by which a kernel with all switches off may be longer than a build without them, where ptxas shares
/// and repeats more or less by what is left out elsewhere: around what widens 8-bit K and V, and in lone tiles, behind whose masks
/// it takes uniform registers or not.
fn slack(kernel: &KernelSpec) -> Option<usize> {
    let Family::Forward(variant) = kernel.family else { return None };
    if kernel.kv_dtype != kernel.dtype {
        Some(1)
    } else if variant.has_lone_tiles(kernel.kv_dtype, kernel.head_dim) {
        Some(10)
    } else {
        None
    }
}

/// Whether a kernel costs no more than a build without the switches, which are off: it has the same instructions. Where it has
/// `slack`, it may be shorter, or longer by so many instructions in a thousand, without those that fill it up.
fn costs_no_more(specialised: &[u8], plain: &[u8], slack: Option<usize>) -> bool {
    const NOP: u16 = 0x918;
    let length = |code: &[u8]| operations(code).filter(|operation| *operation != NOP).count();
    are_alike(specialised, plain)
        || slack.is_some_and(|slack| {
            !specialised.is_empty() && length(specialised) * 1000 <= length(plain) * (1000 + slack)
        })
}

/// The operations of a kernel: an instruction has 16 bytes and begins with the 12 bits of its operation.
fn operations(code: &[u8]) -> impl Iterator<Item = u16> {
    code.chunks_exact(16).map(|word| u16::from_le_bytes([word[0], word[1]]) & 0xfff)
}

/// Whether two kernels have as many instructions, and as many of each operation but for one in a thousand: ptxas chooses
/// registers, the order of neighbours that do not depend on each other, and how to copy a register by the names in the PTX, too.
fn are_alike(a: &[u8], b: &[u8]) -> bool {
    let mut counts = BTreeMap::<u16, i64>::new();
    for (code, sign) in [(a, 1), (b, -1)] {
        for operation in operations(code) {
            *counts.entry(operation).or_default() += sign;
        }
    }
    let others = counts.values().map(|count| count.unsigned_abs()).sum::<u64>() / 2;
    !a.is_empty() && a.len() == b.len() && others * 1000 <= (a.len() / 16) as u64
}

fn describe(switches: Switches) -> String {
    let on = switches.values().into_iter().filter(|(_, value)| *value != "0");
    let names: Vec<String> = on.map(|(symbol, _)| symbol.trim_start_matches(Switches::PREFIX).to_lowercase()).collect();
    names.join(",")
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
        "{:36} {:7} {:21} {:>9} {:>5} {:>6} {:>8} {:>8}  verdict",
        "kernel", "target", "switches", "registers", "stack", "spills", "smem", "barriers"
    );
    for row in rows {
        let spills = row.resources.spill_store_bytes + row.resources.spill_load_bytes;
        let verdict = if row.violations.is_empty() { "ok".to_owned() } else { row.violations.join("; ") };
        println!(
            "{:36} {:7} {:21} {:>9} {:>5} {:>6} {:>8} {:>8}  {verdict}",
            row.entry,
            row.assembled_for,
            row.switches,
            row.resources.registers,
            row.resources.stack_bytes,
            spills,
            row.smem_bytes,
            row.barriers
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_ptx_is_small() {
        let size = Size::of_committed().unwrap();
        println!("{size}");
        let texts = Arch::ALL.into_iter().flat_map(|arch| KERNELS.iter().filter(move |kernel| kernel.is_in(arch)));
        assert_eq!(size.entries, texts.count(), "{size}");
        assert!(size.compressed_bytes < MAX_COMPRESSED_BYTES, "{size}");
    }

    #[test]
    fn kernels_are_alike_up_to_registers_order_and_a_few_operations() {
        let instruction = |&operation: &u8| {
            let mut word = [0; 16];
            word[0] = operation;
            word
        };
        let code = |operations: &[u8]| operations.iter().flat_map(instruction).collect::<Vec<u8>>();
        let mut other: Vec<u8> = (0..1000).map(|i| (i % 7) as u8).collect();
        let original = code(&other);
        other.reverse();
        assert!(are_alike(&original, &code(&other)));
        other[0] = 9;
        assert!(are_alike(&original, &code(&other)));
        other[1] = 9;
        assert!(!are_alike(&original, &code(&other)));
        assert!(!are_alike(&original, &original[16..]) && !are_alike(&[], &[]));
        for (shorter, longer) in [(&original[16..], &original[..]), (&[], &original)] {
            assert!(!costs_no_more(shorter, longer, None) && !costs_no_more(longer, shorter, Some(1)));
            assert_eq!(costs_no_more(shorter, longer, Some(1)), !shorter.is_empty());
        }
        let nop: Vec<u8> = [0x18, 9].into_iter().chain([0; 14]).collect();
        let filled_up = [&original[..], &nop.repeat(8)].concat();
        assert!(costs_no_more(&filled_up, &original, Some(1)) && !costs_no_more(&filled_up, &original, None));
        let one_more = [&filled_up[..], &code(&[1])].concat();
        assert!(costs_no_more(&one_more, &original, Some(1)));
        assert!(!costs_no_more(&[&one_more[..], &code(&[1])].concat(), &original, Some(1)));
    }
}
