//! PTX as text: taking a module apart, finishing it, counting in it.

use anyhow::{Context, Result, bail};
use pat_abi::{Arch, KERNELS, KernelSpec};

const ENTRY: &str = ".visible .entry ";

/// A module: what stands before the first kernel, and the kernels.
pub(crate) struct Module {
    pub(crate) prelude: String,
    pub(crate) entries: Vec<Entry>,
}

/// One kernel: its `.entry` line and what follows, up to the next one.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) text: String,
}

impl Module {
    /// Takes compiler output (or a finished file) apart. Comments of the compiler are dropped, and so is its indentation: the
    /// text is part of every program.
    pub(crate) fn parse(text: &str) -> Self {
        let mut prelude = String::new();
        let mut entries: Vec<Entry> = Vec::new();
        for line in text.lines() {
            let line = line.split("//").next().unwrap_or_default().trim_end();
            if line.is_empty() {
                continue;
            }
            if let Some(rest) = line.strip_prefix(ENTRY) {
                let name = rest.split('(').next().unwrap_or_default().trim().to_owned();
                entries.push(Entry { name, text: String::new() });
            }
            let part = entries.last_mut().map_or(&mut prelude, |entry| &mut entry.text);
            let mut gap = "";
            for word in line.split_whitespace() {
                part.extend([gap, word]);
                gap = " ";
            }
            part.push('\n');
        }
        Self { prelude, entries }
    }

    /// Puts the kernels in the manifest's order, with its launch bounds and tensor-map alignments.
    ///
    /// # Errors
    /// A kernel of the manifest is missing, or one is not in the manifest.
    pub(crate) fn finish(mut self, arch: Arch) -> Result<String> {
        let mut text = self.prelude;
        for kernel in KERNELS.iter().filter(|kernel| kernel.is_in(arch)) {
            let Some(position) = self.entries.iter().position(|entry| entry.name == kernel.entry) else {
                bail!("the manifest has {}, the {} build has not", kernel.entry, arch.name());
            };
            text.push('\n');
            text.push_str(&bounded(&self.entries.swap_remove(position).text, kernel)?);
        }
        if let Some(entry) = self.entries.first() {
            bail!("the {} build has {}, the manifest has not", arch.name(), entry.name);
        }
        Ok(text)
    }
}

/// The text of a finished module with the labels that `former` has in those kernels that are the same otherwise. LLVM counts the
/// functions of a module, in the order of their names, and labels begin with that number: without this a new kernel would change
/// the text of kernels that it has nothing to do with.
pub(crate) fn with_labels_of(text: &str, former: &str) -> String {
    let former = Module::parse(former).entries;
    let Module { mut prelude, entries } = Module::parse(text);
    for entry in entries {
        let code = without_label_numbers(&entry.text);
        let same = former.iter().find(|other| other.name == entry.name && without_label_numbers(&other.text) == code);
        prelude.push('\n');
        prelude.push_str(same.map_or(&entry.text, |other| &other.text));
    }
    prelude
}

fn without_label_numbers(text: &str) -> String {
    const LABEL: &str = "$L__BB";
    let mut parts = text.split(LABEL);
    let mut code = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        code.extend([LABEL, part.trim_start_matches(|c: char| c.is_ascii_digit())]);
    }
    code
}

impl Entry {
    /// Barrier instructions of the CTA or of some of its warps (not `bar.warp.sync`, not `mbarrier`).
    pub(crate) fn barriers(&self) -> u32 {
        let names = ["bar.sync", "bar.arrive", "bar.red", "barrier."];
        let is_barrier = |line: &&str| names.iter().any(|name| line.starts_with(name));
        self.text.lines().filter(is_barrier).count() as u32
    }

    /// What a kernel must not contain, as far as the text shows it.
    pub(crate) fn violations(&self) -> Vec<String> {
        let forbidden = [
            ("__local_depot", "an array in local memory (index register arrays by constants only)"),
            ("call", "a call (everything must be inlined; panics become calls)"),
            ("ld.b", "a generic load (use the ld.global and ld.shared wrappers)"),
            ("st.b", "a generic store (use the st.global and st.shared wrappers)"),
        ];
        let mut found = Vec::new();
        for (token, meaning) in forbidden {
            let starts = |line: &str| line.starts_with(token);
            if self.text.lines().any(|line| if token == "__local_depot" { line.contains(token) } else { starts(line) })
            {
                found.push(meaning.to_owned());
            }
        }
        found
    }
}

/// Inserts the launch bounds between an entry's parameter list and its body, and raises the alignment of tensor maps to
/// the 64 bytes they need (rustc cannot pass a type of that alignment by value).
fn bounded(text: &str, kernel: &KernelSpec) -> Result<String> {
    let (parameters, body) = text.split_once("\n{\n").with_context(|| format!("{}: no body", kernel.entry))?;
    let mut parameters = parameters.to_owned();
    for index in 1..=kernel.tensor_maps {
        let (low, high) = (16, 64);
        let declaration = |align: u32| format!(".param .align {align} .b8 {}_param_{index}[128]", kernel.entry);
        if !parameters.contains(&declaration(low)) {
            bail!("{}: parameter {index} is not a tensor map ({})", kernel.entry, declaration(low));
        }
        parameters = parameters.replace(&declaration(low), &declaration(high));
    }
    let KernelSpec { threads, min_ctas_per_sm, .. } = kernel;
    Ok(format!("{parameters}\n.maxntid {threads}, 1, 1\n.minnctapersm {min_ctas_per_sm}\n{{\n{body}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
//
// Generated by LLVM
//
.version 8.0
.target sm_90a

\t// .globl k
.visible .entry k(
\t.param .align 8 .b8 k_param_0[224],
\t.param .align 16 .b8 k_param_1[128]
)
{
\t.reg .b32 %r<2>;
\t// begin inline asm
\tbar.sync \t0;
\tbar.warp.sync \t-1;
\tmbarrier.arrive.shared::cta.b64 _, [%r1];
\tbarrier.cta.sync.aligned 1, 128;
\tret; // %r1
}
\t// -- End function
";

    #[test]
    fn modules_come_apart_and_comments_go() {
        let module = Module::parse(TEXT);
        assert_eq!(module.prelude, ".version 8.0\n.target sm_90a\n");
        assert_eq!(module.entries.len(), 1);
        assert_eq!(module.entries[0].name, "k");
        assert_eq!(module.entries[0].barriers(), 2);
        assert!(module.entries[0].violations().is_empty());
        assert!(!module.entries[0].text.contains("//"));
        assert!(module.entries[0].text.contains("\nbar.sync 0;\n"));
    }

    #[test]
    fn bounds_stand_behind_the_parameters() {
        let kernel = KernelSpec { entry: "k", threads: 256, min_ctas_per_sm: 2, tensor_maps: 1, ..KERNELS[0] };
        let text = bounded(&Module::parse(TEXT).entries[0].text, &kernel).unwrap();
        assert!(text.contains(")\n.maxntid 256, 1, 1\n.minnctapersm 2\n{\n"), "{text}");
        assert!(text.contains(".param .align 64 .b8 k_param_1[128]"), "{text}");
        let wrong = KernelSpec { tensor_maps: 2, ..kernel };
        assert!(bounded(&Module::parse(TEXT).entries[0].text, &wrong).is_err());
    }

    #[test]
    fn a_kernel_outside_the_manifest_is_an_error() {
        let unknown = format!("{ENTRY}stranger(\n)\n{{\n}}\n");
        assert!(Module::parse(&unknown).finish(Arch::Sm80).is_err());
    }

    #[test]
    fn a_kernel_that_is_the_same_keeps_its_labels() {
        let kernel = |name: &str, number: u32, code: &str| {
            format!("\n{ENTRY}{name}(\n)\n{{\nbra $L__BB{number}_2;\n{code};\n$L__BB{number}_2:\nret;\n}}\n")
        };
        let module = |kernels: &[String]| format!(".version 8.0\n{}", kernels.concat());
        let former = module(&[kernel("a", 0, "exit"), kernel("c", 1, "exit")]);
        let built = module(&[kernel("a", 0, "trap"), kernel("b", 1, "exit"), kernel("c", 2, "exit")]);
        let expected = module(&[kernel("a", 0, "trap"), kernel("b", 1, "exit"), kernel("c", 1, "exit")]);
        assert_eq!(with_labels_of(&built, &former), expected);
        assert_eq!(with_labels_of(&built, ""), built);
    }

    #[test]
    fn calls_depots_and_generic_accesses_are_found() {
        for line in
            [".local .align 8 .b8 __local_depot0[24];", "\tcall.uni f;", "\tld.b32 %r1, [%rd1];", "\tst.b8 [%rd1], 1;"]
        {
            let module = Module::parse(&format!("{ENTRY}k(\n)\n{{\n{line}\n}}\n"));
            assert_eq!(module.entries[0].violations().len(), 1, "{line}");
        }
    }
}
