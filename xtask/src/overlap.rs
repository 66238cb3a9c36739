//! What a kernel must keep to that is launched over the end of the one before (programmatic stream serialisation).
//!
//! A thread waits (`griddepcontrol.wait`) before it reads what kernels write, and before it writes, copies or ends: the launch
//! behind waits for this grid alone, and would begin while the one before it still runs. Ahead of the wait it may read the plan,
//! which is copied and so complete before the kernel before begins. `ld.global.nc` may read the plan alone, behind the wait, too:
//! its cache may hold what memory was before.

use crate::ptx::Entry;
use pat_abi::params::Denominators;
use pat_abi::{Family, ForwardParams, KernelSpec, MergeParams, ScaledForwardParams};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

/// Violations in the text of a kernel that [`KernelSpec::waits`].
pub(crate) fn violations(kernel: &KernelSpec, entry: &Entry) -> Vec<String> {
    let statements = statements(&entry.text);
    let origins = Origins::of(&statements, &format!("{}_param_0", kernel.entry), &addresses(kernel.family));
    let mut found: Vec<String> = statements
        .iter()
        .filter(|statement| statement.operation.starts_with("ld.global.nc") && !origins.is_plan(statement))
        .map(|statement| format!("`{}` of memory that is not the plan's alone", statement.text()))
        .collect();
    if matches!(kernel.family, Family::Forward(_)) {
        found.extend(unwaited(&statements, &origins));
    } else if !entry.text.contains("griddepcontrol.wait;") {
        // Merges wait when a warp first has a row: by a flag, which no reading of the text follows.
        found.push("no griddepcontrol.wait".into());
    }
    found
}

/// Where the first parameter holds addresses beside that of the plan, which comes first.
fn addresses(family: Family) -> Vec<usize> {
    const _: () = assert!(offset_of!(ForwardParams, plan) == 0 && offset_of!(MergeParams, plan) == 0);
    const FORWARD: &[usize] = &[
        offset_of!(ForwardParams, q),
        offset_of!(ForwardParams, k),
        offset_of!(ForwardParams, v),
        offset_of!(ForwardParams, out),
        offset_of!(ForwardParams, lse),
        offset_of!(ForwardParams, partial_out),
        offset_of!(ForwardParams, partial_lse),
        offset_of!(ScaledForwardParams, k_scales),
        offset_of!(ScaledForwardParams, v_scales),
    ];
    const MERGE: &[usize] = &[
        offset_of!(MergeParams, out),
        offset_of!(MergeParams, lse),
        offset_of!(MergeParams, partial_out),
        offset_of!(MergeParams, partial_lse),
    ];
    let (own, denominators) = match family {
        Family::Forward(_) => (FORWARD, offset_of!(ForwardParams, denominators)),
        _ => (MERGE, offset_of!(MergeParams, denominators)),
    };
    own.iter().copied().chain(Denominators::ADDRESSES.map(|at| denominators + at)).collect()
}

/// One instruction, or a label (`operation` ends with a colon).
struct Statement<'a> {
    is_predicated: bool,
    operation: &'a str,
    operands: &'a str,
}

impl<'a> Statement<'a> {
    fn text(&self) -> String {
        format!("{} {}", self.operation, self.operands)
    }

    /// Registers that it writes, and those that it reads. Of predicates no address is made.
    fn registers(&self) -> (Vec<&'a str>, Vec<&'a str>) {
        let mut depth = 0;
        let end = self.operands.find(|c| {
            depth += i32::from(matches!(c, '{' | '[')) - i32::from(matches!(c, '}' | ']'));
            c == ',' && depth == 0
        });
        let (first, rest) = self.operands.split_at(end.unwrap_or(self.operands.len()));
        let names = |text: &'a str| {
            text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '%' | '_' | '.')))
                .filter(|name| name.starts_with("%r"))
                .collect::<Vec<_>>()
        };
        (names(first), names(rest))
    }
}

fn statements(text: &str) -> Vec<Statement<'_>> {
    let body = text.split_once("\n{\n").map_or("", |(_, body)| body);
    let mut found = Vec::new();
    for line in body.lines() {
        for part in line.split(';') {
            // Braces of a scope, not of a vector.
            let part = part.trim().trim_start_matches("{ ").trim_matches(['{', '}']).trim();
            let (is_predicated, part) = match part.strip_prefix('@') {
                Some(rest) => (true, rest.split_once(' ').map_or("", |(_, rest)| rest)),
                None => (false, part),
            };
            if !part.is_empty() && !part.starts_with('.') {
                let (operation, operands) = part.split_once(' ').unwrap_or((part, ""));
                found.push(Statement { is_predicated, operation, operands });
            }
        }
    }
    found
}

/// Which addresses of the parameters each register is made of. A register is what any of its statements makes it.
struct Origins<'a>(BTreeMap<&'a str, BTreeSet<usize>>);

impl<'a> Origins<'a> {
    fn of(statements: &[Statement<'a>], parameter: &str, others: &[usize]) -> Self {
        let mut origins = BTreeMap::<&str, BTreeSet<usize>>::new();
        let mut has_grown = true;
        while has_grown {
            has_grown = false;
            for statement in statements {
                let (written, read) = statement.registers();
                let mut made_of = BTreeSet::new();
                if statement.operation.starts_with("ld.param") {
                    let inner = statement.operands.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']'));
                    let (name, offset) = inner.map_or(("", "0"), |text| text.split_once('+').unwrap_or((text, "0")));
                    let offset: usize = offset.parse().unwrap_or(usize::MAX);
                    let is_address = offset == 0 || others.contains(&offset);
                    if name == parameter && statement.operation == "ld.param.b64" && is_address {
                        made_of.insert(offset);
                    } else if name == parameter && statement.operation.contains(".v") {
                        // A vector may hold addresses that this does not tell apart.
                        made_of.insert(usize::MAX);
                    }
                } else if !statement.operation.starts_with("ld.") {
                    made_of.extend(read.iter().filter_map(|name| origins.get(name)).flatten());
                }
                for name in written {
                    let of_register = origins.entry(name).or_default();
                    let before = of_register.len();
                    of_register.extend(&made_of);
                    has_grown |= of_register.len() > before;
                }
            }
        }
        Self(origins)
    }

    /// Whether a load reads the plan: its address is made of the plan's, and of no other.
    fn is_plan(&self, load: &Statement<'_>) -> bool {
        let (_, read) = load.registers();
        let origins: BTreeSet<usize> = read.iter().filter_map(|name| self.0.get(name)).flatten().copied().collect();
        origins.iter().eq([&0])
    }
}

/// What a thread does ahead of its wait that it must not, on any way from the beginning.
fn unwaited(statements: &[Statement<'_>], origins: &Origins<'_>) -> Vec<String> {
    let label = |name: &str| statements.iter().position(|other| other.operation.strip_suffix(':') == Some(name));
    let (mut found, mut seen, mut ahead) = (Vec::new(), vec![false; statements.len()], vec![0]);
    while let Some(at) = ahead.pop() {
        if at >= statements.len() || std::mem::replace(&mut seen[at], true) {
            continue;
        }
        let statement = &statements[at];
        let operation = statement.operation;
        if operation == "griddepcontrol.wait" && !statement.is_predicated {
            continue;
        }
        let is_end = matches!(operation, "ret" | "exit");
        let acts = ["st.global", "red.", "atom.", "cp.async", "cp.reduce"];
        let reads = operation.starts_with("ld.global") && !origins.is_plan(statement);
        if is_end || reads || acts.iter().any(|name| operation.starts_with(name)) {
            found.push(format!("`{}` ahead of griddepcontrol.wait", statement.text()));
        }
        let is_branch = operation == "bra" || operation.starts_with("bra.");
        if is_branch {
            match label(statement.operands) {
                Some(place) => ahead.push(place),
                None => found.push(format!("`{}`: to nowhere in the kernel", statement.text())),
            }
        }
        if statement.is_predicated || !(is_end || is_branch) {
            ahead.push(at + 1);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::Module;
    use pat_abi::{Arch, KERNELS};

    fn violations_of(code: &str) -> Vec<String> {
        let kernel = KERNELS.iter().find(|kernel| kernel.waits() && kernel.family != Family::Merge).unwrap();
        let text = format!(
            ".visible .entry {name}(\n)\n{{\n.reg .b64 %rd<9>;\nld.param.b64 %rd1, [{name}_param_0];\n\
             ld.param.b64 %rd2, [{name}_param_0+8];\nld.param.b64 %rd3, [{name}_param_0+72];\n{code}\nret;\n}}\n",
            name = kernel.entry
        );
        violations(kernel, &Module::parse(&text).entries[0])
    }

    #[test]
    fn a_thread_that_has_not_waited_neither_writes_nor_ends() {
        let around = |inner: &str| format!("@%p1 bra $L__BB0_2;\n{inner}\n$L__BB0_2:");
        for code in [
            "ld.global.nc.b32 %r1, [%rd1];\ngriddepcontrol.wait;\nst.global.b32 [%rd2], %r1;",
            "@%p1 bra $L__BB0_1;\ngriddepcontrol.wait;\nret;\n$L__BB0_1:\ngriddepcontrol.wait;",
        ] {
            assert_eq!(violations_of(code), [""; 0], "{code}");
        }
        for code in ["", "@%p1 griddepcontrol.wait;", "bra.uni $L__BB0_7;\ngriddepcontrol.wait;"] {
            assert_eq!(violations_of(code).len(), 1, "{code}");
        }
        assert_eq!(violations_of(&around("griddepcontrol.wait;")), ["`ret ` ahead of griddepcontrol.wait"]);
        for access in [
            "st.global.b32 [%rd1], %r1;",
            "cp.async.bulk.tensor.4d [%r1], [%rd1];",
            "@%p2 red.global.add.u32 [%rd1], 1;",
            "ld.global.b32 %r1, [%rd2];",
        ] {
            let code = format!("{access}\ngriddepcontrol.wait;");
            assert_eq!(violations_of(&code).len(), 1, "{access}");
            assert_eq!(
                violations_of(&format!("{}\ngriddepcontrol.wait;", around(access))).len(),
                1,
                "{access} in a branch"
            );
        }
    }

    #[test]
    fn what_kernels_write_is_not_read_through_the_cache_that_no_write_invalidates() {
        let behind = |code: &str| violations_of(&format!("griddepcontrol.wait;\n{code}"));
        for code in [
            "add.s64 %rd4, %rd1, 16;\nld.global.nc.v2.u32 {%r1, %r2}, [%rd4];\nmul.wide.u32 %rd5, %r1, 4;\n\
             add.s64 %rd6, %rd1, %rd5;\nld.global.nc.u32 %r3, [%rd6];",
            "mad.lo.s64 %rd4, %rd3, 2, %rd1;\n@%p1 ld.global.nc.u32 %r1, [%rd4];",
            "ld.global.u32 %r1, [%rd2];",
        ] {
            assert_eq!(behind(code), [""; 0], "{code}");
        }
        for code in [
            "ld.global.nc.u32 %r1, [%rd2];",
            "add.s64 %rd4, %rd2, 16;\nld.global.nc.u32 %r1, [%rd4+8];",
            "{ .reg .pred p; setp.ne.u32 p, %r1, 0; @p ld.global.nc.u32 %r1, [%rd2]; }",
            "selp.b64 %rd4, %rd1, %rd2, %p1;\nld.global.nc.u32 %r1, [%rd4];",
            "mov.b64 {%r4, %r5}, %rd2;\nmov.b64 %rd4, {%r4, %r5};\nld.global.nc.u32 %r1, [%rd4];",
            "ld.global.u64 %rd4, [%rd2];\nld.global.nc.u32 %r1, [%rd4];",
        ] {
            assert_eq!(behind(code).len(), 1, "{code}");
        }
    }

    #[test]
    fn the_kernels_of_hopper_keep_to_it() {
        let text = std::fs::read_to_string(crate::workspace::ptx_file(Arch::Sm90a)).unwrap();
        let entries = Module::parse(&text).entries;
        let mut count = 0;
        for kernel in KERNELS.iter().filter(|kernel| kernel.waits()) {
            let entry = entries.iter().find(|entry| entry.name == kernel.entry).unwrap();
            assert_eq!(violations(kernel, entry), [""; 0], "{}", kernel.entry);
            count += 1;
        }
        assert_eq!(count, entries.len());
    }
}
