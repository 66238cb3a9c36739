//! The embedded PTX, and cutting one kernel out of it.
//!
//! The driver compiles a whole module when it loads it. Loading a module of one kernel makes a program pay only for the
//! tile variants its plans name.

use crate::{Error, Result};
use pat_abi::{Arch, KERNELS, KernelSpec, Switches};

/// How a kernel begins, at the start of a line. There is nothing but kernels behind the first: `cargo xtask check-ptx`
/// refuses functions, and module-scope declarations come first.
const ENTRY: &str = ".visible .entry ";

/// The committed PTX of an architecture.
pub(super) fn text(arch: Arch) -> &'static str {
    match arch {
        Arch::Sm80 => include_str!("ptx/sm_80.ptx"),
        Arch::Sm90a => include_str!("ptx/sm_90a.ptx"),
    }
}

/// A module of one kernel: everything before the first kernel (directives and module-scope declarations), then
/// kernel `entry`, with the features that `switches` says.
///
/// # Errors
/// The text has no kernel of that name.
pub(super) fn cut(module: &str, entry: &str, switches: Switches) -> Result<String> {
    let mut lines = module.split_inclusive('\n').peekable();
    let mut prelude = String::new();
    while let Some(line) = lines.next_if(|line| !line.starts_with(ENTRY)) {
        prelude.push_str(line);
    }
    let mut body = String::new();
    let mut wanted = false;
    for line in lines {
        if let Some(rest) = line.strip_prefix(ENTRY) {
            wanted = rest.split(['(', '\r', '\n']).next() == Some(entry);
        }
        if wanted {
            body.push_str(line);
        }
    }
    if body.is_empty() {
        return Err(Error::Cuda {
            call: format!("looking up kernel {entry}"),
            reason: "the embedded PTX does not contain it: run `cargo xtask build-ptx`".into(),
        });
    }
    Ok(switches.specialise(&(prelude + &body)))
}

/// Whether the embedded PTX is the manifest's: every kernel is there, for its architecture and with its launch bounds.
/// Asks no device. Returns the number of kernels.
///
/// # Errors
/// The first kernel that is missing or has other launch bounds, as after a change of the manifest without a new build of
/// the PTX.
pub fn check_embedded_ptx() -> Result<usize> {
    let files = |kernel: &'static KernelSpec| Arch::ALL.into_iter().filter(|arch| kernel.is_in(*arch));
    for (kernel, arch) in KERNELS.iter().flat_map(|kernel| files(kernel).map(move |arch| (kernel, arch))) {
        let module = cut(text(arch), kernel.entry, Switches::OFF)?;
        let target = format!(".target {}", arch.name());
        let bounds = format!(".maxntid {}, 1, 1\n.minnctapersm {}\n", kernel.threads, kernel.min_ctas_per_sm);
        let refuse = |what: String| Error::Cuda {
            call: format!("checking kernel {}", kernel.entry),
            reason: format!("the embedded PTX {what}: run `cargo xtask build-ptx`"),
        };
        if let Some(missing) = [target, bounds].into_iter().find(|expected| !module.contains(expected)) {
            return Err(refuse(format!("lacks {missing:?}")));
        }
        if module.contains(Switches::PREFIX) {
            return Err(refuse("has a switch that the host does not know".into()));
        }
    }
    Ok(KERNELS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = "\
.version 8.0
.target sm_80
.extern .shared .align 128 .b8 smem[];
	// .globl	first
.visible .entry first(.param .u64 p) { ret; }
	// .globl	first_and_more
.visible .entry first_and_more() { ret; }
";

    #[test]
    fn cut_keeps_the_prelude_and_one_entry() {
        let first = cut(MODULE, "first", Switches::OFF).unwrap();
        assert!(first.starts_with(".version 8.0\n.target sm_80\n.extern .shared"));
        assert!(first.contains(".entry first("));
        assert!(!first.contains(".entry first_and_more"));
        assert!(cut(MODULE, "first_and_more", Switches::OFF).unwrap().ends_with(".entry first_and_more() { ret; }\n"));
    }

    #[test]
    fn every_kernel_of_the_manifest_can_be_cut_out_of_the_embedded_ptx() {
        for kernel in pat_abi::KERNELS {
            let module = cut(text(kernel.arch), kernel.entry, Switches::OFF).unwrap();
            assert_eq!(module.matches(ENTRY).count(), 1, "{}", kernel.entry);
            assert!(module.contains(&format!(".target {}", kernel.arch.name())), "{}", kernel.entry);
        }
    }

    #[test]
    fn the_embedded_ptx_is_the_manifests() {
        assert_eq!(check_embedded_ptx().unwrap(), pat_abi::KERNELS.len());
    }

    #[test]
    fn switches_are_numbers_where_a_kernel_is_cut_out() {
        let module = MODULE.replace(
            "ret; }\n\t// .globl\tfirst_and",
            "mov.u32 %r1, PAT_SPEC_SOFT_CAP; mov.u32 %r2, PAT_SPEC_WINDOW; ret; }\n\t// .globl\tfirst_and",
        );
        let soft_cap = Switches { soft_cap: true, ..Switches::OFF };
        let window = Switches { window: true, ..Switches::OFF };
        for (switches, expected) in [
            (Switches::OFF, "mov.u32 %r1, 0; mov.u32 %r2, 0;"),
            (soft_cap, "mov.u32 %r1, 1; mov.u32 %r2, 0;"),
            (window, "mov.u32 %r1, 0; mov.u32 %r2, 1;"),
        ] {
            assert!(cut(&module, "first", switches).unwrap().contains(expected));
        }
        // A kernel has those that it serves and no others.
        for kernel in pat_abi::KERNELS {
            let cut = |switches| cut(text(kernel.arch), kernel.entry, switches).unwrap();
            for switches in [soft_cap, window] {
                let is_there = cut(Switches::OFF) != cut(switches);
                assert_eq!(is_there, kernel.serves(switches), "{} {switches:?}", kernel.entry);
            }
        }
    }

    #[test]
    fn a_missing_entry_is_an_error_that_names_it() {
        let error = cut(MODULE, "second", Switches::OFF).unwrap_err().to_string();
        assert!(error.contains("second") && error.contains("build-ptx"), "{error}");
    }
}
