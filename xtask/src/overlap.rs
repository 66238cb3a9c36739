//! What a kernel must keep to that is launched over the end of the one before (programmatic stream serialisation).
//!
//! Until it waits (`griddepcontrol.wait`), a thread computes in registers, uses shared memory, and reads the plan, which is copied
//! and so complete before the kernel before begins; it does nothing else, and does not end: the launch behind waits for this grid
//! alone, and would begin while the one before it still runs. `ld.global.nc` reads the plan alone, behind the wait, too: its cache
//! may hold what memory was before.

use crate::ptx::Entry;
use pat_abi::params::Denominators;
use pat_abi::{Family, ForwardParams, KernelSpec, MergeParams, ScaledForwardParams};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;

/// What a thread may do ahead of its wait beside reading the plan, by how operations begin: nothing that another grid sees.
const OF_ITS_OWN: [&str; 33] = [
    "add.",
    "and.",
    "bar.sync",
    "bar.warp.sync",
    "barrier.sync",
    "bfe.",
    "cvt.",
    "cvta.param.",
    "fence.mbarrier_init.",
    "ld.param.",
    "ld.shared.",
    "mad.",
    "max.",
    "mbarrier.init.shared::cta.",
    "min.",
    "mov.",
    "mul.",
    "neg.",
    "not.",
    "or.",
    "prefetch.tensormap",
    "prmt.",
    "selp.",
    "set.",
    "setp.",
    "shfl.sync.",
    "shl.",
    "shr.",
    "st.shared.",
    "sub.",
    "vote.sync.",
    "xor.",
    "bra",
];

/// Violations in the text of a kernel that [`KernelSpec::waits`].
pub(crate) fn violations(kernel: &KernelSpec, entry: &Entry) -> Vec<String> {
    let statements = statements(&entry.text);
    let parameter = format!("{}_param_0", kernel.entry);
    let origins = Origins::of(&statements, predicates(&entry.text), &parameter, addresses(kernel.family));
    let mut found: Vec<String> = statements
        .iter()
        .filter(|statement| statement.operation.starts_with("ld.global.nc") && !origins.is_plan(statement))
        .map(|statement| format!("`{}` of memory that is not the plan's alone", statement.text()))
        .collect();
    found.extend(unwaited(&statements, &origins));
    found
}

/// Where fields are that hold addresses. A field that is named nowhere here does not compile: what nobody has looked at could make
/// another address of the plan's.
macro_rules! address_offsets {
    ($params:ident { plan: $($plan:ident)?, addresses: $($address:ident)*, others: $($other:ident)* }) => {{
        let _all_fields = |$params { $($plan: _,)? $($address: _,)* $($other: _),* }: $params| ();
        const OFFSETS: &[usize] = &[$(offset_of!($params, $address)),*];
        OFFSETS
    }};
}

/// Where the first parameter holds addresses beside that of the plan, which comes first.
fn addresses(family: Family) -> Vec<usize> {
    const _: () = assert!(offset_of!(ForwardParams, plan) == 0 && offset_of!(MergeParams, plan) == 0);
    const _: () = assert!(offset_of!(ScaledForwardParams, forward) == 0);
    let of_denominators = |begin: usize| Denominators::ADDRESSES.map(|offset| begin + offset);
    if !matches!(family, Family::Forward(_)) {
        let own = address_offsets!(MergeParams {
            plan: plan,
            addresses: out lse partial_out partial_lse,
            others: denominators out_sequence_stride out_head_stride lse_sequence_stride lse_head_stride q_heads
        });
        return [own, &of_denominators(offset_of!(MergeParams, denominators))].concat();
    }
    let of_any = address_offsets!(ForwardParams {
        plan: plan,
        addresses: q k v out lse partial_out partial_lse,
        others: denominators q_sequence_stride q_head_stride k_page_stride k_token_stride k_head_stride v_page_stride
            v_token_stride v_head_stride out_sequence_stride out_head_stride lse_sequence_stride lse_head_stride scale_log2
            kv_heads group page_size kv_heads_divisor num_pages map_scale page_keys
    });
    let of_eight_bits = address_offsets!(ScaledForwardParams {
        plan: ,
        addresses: k_scales v_scales,
        others: forward k_scale v_scale
    });
    [of_any, &of_denominators(offset_of!(ForwardParams, denominators)), of_eight_bits].concat()
}

/// One instruction, or a label (`operation` ends with a colon).
struct Statement<'a> {
    /// The predicate it depends on, and the value with which it is executed.
    guard: Option<(&'a str, bool)>,
    operation: &'a str,
    operands: &'a str,
}

impl<'a> Statement<'a> {
    fn text(&self) -> String {
        format!("{} {}", self.operation, self.operands)
    }

    fn is_branch(&self) -> bool {
        self.operation == "bra" || self.operation.starts_with("bra.")
    }

    /// The operands that it writes, and those that it reads.
    fn written_and_read(&self) -> (&'a str, &'a str) {
        let mut depth = 0;
        let end = self.operands.find(|c| {
            depth += i32::from(matches!(c, '{' | '[')) - i32::from(matches!(c, '}' | ']'));
            c == ',' && depth == 0
        });
        self.operands.split_at(end.unwrap_or(self.operands.len()))
    }
}

/// Names of registers and of others in operands, not numbers.
fn names(operands: &str) -> impl Iterator<Item = &str> {
    operands
        .split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '%' | '_' | '.')))
        .filter(|name| name.len() > 1 || name.starts_with(|c: char| c.is_ascii_alphabetic()))
        .filter(|name| !name.starts_with(|c: char| c.is_ascii_digit()))
}

/// Names of predicates that a kernel declares; those of a range (`%p<9>`) begin with `%p`.
fn predicates(text: &str) -> BTreeSet<&str> {
    text.split(".pred ").skip(1).filter_map(|rest| rest.split([';', '<']).next()).collect()
}

fn statements(text: &str) -> Vec<Statement<'_>> {
    let body = text.split_once("\n{\n").map_or("", |(_, body)| body);
    let mut found = Vec::new();
    for line in body.lines() {
        for part in line.split(';') {
            // Braces of a scope, not of a vector.
            let part = part.trim().trim_start_matches("{ ").trim_matches(['{', '}']).trim();
            let (guard, part) = match part.strip_prefix('@').map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) {
                Some((name, rest)) => (Some((name.trim_start_matches('!'), !name.starts_with('!'))), rest),
                None => (None, part),
            };
            if !part.is_empty() && !part.starts_with('.') {
                let (operation, operands) = part.split_once(' ').unwrap_or((part, ""));
                found.push(Statement { guard, operation, operands });
            }
        }
    }
    found
}

/// Which addresses of the parameters each register is made of. A register is what any of its statements makes it.
struct Origins<'a> {
    of: BTreeMap<&'a str, BTreeSet<usize>>,
    predicates: BTreeSet<&'a str>,
}

impl<'a> Origins<'a> {
    const PLAN: usize = 0;
    /// Of something that this does not follow.
    const UNKNOWN: usize = usize::MAX;

    fn of(statements: &[Statement<'a>], predicates: BTreeSet<&'a str>, parameter: &str, others: Vec<usize>) -> Self {
        let mut origins = Self { of: BTreeMap::new(), predicates };
        let mut has_grown = true;
        while has_grown {
            has_grown = false;
            for statement in statements {
                let (written, read) = statement.written_and_read();
                let made_of = if statement.operation.starts_with("ld.param") {
                    Self::of_parameter(statement, parameter, &others)
                } else if read.contains("_param_") || statement.operation.starts_with("ld.shared") {
                    BTreeSet::from([Self::UNKNOWN])
                } else if statement.operation.starts_with("ld.") {
                    // What the plan says is a number.
                    let mut of_address = origins.of_names(read);
                    of_address.remove(&Self::PLAN);
                    of_address
                } else {
                    origins.of_names(read)
                };
                for name in names(written) {
                    let of_register = origins.of.entry(name).or_default();
                    let before = of_register.len();
                    of_register.extend(&made_of);
                    has_grown |= of_register.len() > before;
                }
            }
        }
        origins
    }

    /// Of what a load of a parameter gives: of numbers nothing.
    fn of_parameter(load: &Statement<'_>, parameter: &str, others: &[usize]) -> BTreeSet<usize> {
        let inner = load.operands.split_once('[').and_then(|(_, rest)| rest.strip_suffix(']'));
        let (name, offset) = inner.map_or(("", "0"), |text| text.split_once('+').unwrap_or((text, "0")));
        let bytes = match load.operation {
            "ld.param.b64" => 8,
            "ld.param.b32" => 4,
            // Of vectors each register is something else.
            _ => return BTreeSet::from([Self::UNKNOWN]),
        };
        let Ok(offset) = offset.parse::<usize>() else { return BTreeSet::from([Self::UNKNOWN]) };
        if name != parameter {
            return BTreeSet::from([Self::UNKNOWN]);
        }
        let is_in = |address: &usize| offset < address + 8 && *address < offset + bytes;
        let in_it: Vec<usize> = [Self::PLAN].iter().chain(others).filter(|address| is_in(address)).copied().collect();
        match in_it[..] {
            [] => BTreeSet::new(),
            [address] if address == offset && bytes == 8 => BTreeSet::from([address]),
            // A part of an address.
            _ => BTreeSet::from([Self::UNKNOWN]),
        }
    }

    fn of_names(&self, operands: &str) -> BTreeSet<usize> {
        // Of predicates no address is made.
        let names = names(operands).filter(|name| !name.starts_with("%p") && !self.predicates.contains(name));
        names.filter_map(|name| self.of.get(name)).flatten().copied().collect()
    }

    /// Whether a load or a prefetch is of the plan: its address is made of the plan's, and of no other.
    fn is_plan(&self, access: &Statement<'_>) -> bool {
        let address = access.operands.split_once('[').map_or("", |(_, address)| address);
        self.of_names(address).iter().eq([&Self::PLAN])
    }
}

/// Predicates that are constants wherever they are written: by such a flag a merge knows whether it has waited.
fn flags<'a>(statements: &[Statement<'a>]) -> BTreeSet<&'a str> {
    let (mut constant, mut others) = (BTreeSet::new(), BTreeSet::new());
    for statement in statements {
        let (written, read) = statement.written_and_read();
        let is_constant = statement.guard.is_none()
            && statement.operation == "mov.pred"
            && read.trim_start_matches(',').trim().parse::<i32>().is_ok();
        let of = if is_constant { &mut constant } else { &mut others };
        of.extend(names(written));
    }
    constant.difference(&others).copied().collect()
}

/// What a thread does ahead of its wait that it must not, on any way from the beginning.
fn unwaited(statements: &[Statement<'_>], origins: &Origins<'_>) -> Vec<String> {
    let label = |name: &str| statements.iter().position(|other| other.operation.strip_suffix(':') == Some(name));
    let flags = flags(statements);
    let (mut found, mut seen) = (BTreeSet::new(), BTreeSet::new());
    // A place, and the flags that are known there.
    let mut ahead = vec![(0, BTreeMap::new())];
    while let Some((at, mut known)) = ahead.pop() {
        if !seen.insert((at, known.clone())) {
            continue;
        }
        let Some(statement) = statements.get(at) else {
            found.insert("the end of the kernel ahead of griddepcontrol.wait".to_owned());
            continue;
        };
        let Statement { guard, operation, operands } = *statement;
        // Where the guard is a flag, one of both is known not to happen.
        let is_executed = guard.map_or(Some(true), |(name, value)| known.get(name).map(|flag| *flag == value));
        let (written, read) = statement.written_and_read();
        if operation == "mov.pred" && flags.contains(written) {
            known.insert(written, read.trim_start_matches(',').trim() != "0");
        }
        if is_executed == Some(false) {
            ahead.push((at + 1, known));
            continue;
        }
        if operation == "griddepcontrol.wait" {
            if is_executed.is_none() {
                ahead.push((at + 1, known));
            }
            continue;
        }
        let reads_plan = (operation.starts_with("ld.global.") || operation.starts_with("prefetch.global."))
            && origins.is_plan(statement);
        let is_allowed = operation.ends_with(':') || OF_ITS_OWN.iter().any(|name| operation.starts_with(name));
        if !reads_plan && !is_allowed {
            found.insert(format!("`{}` ahead of griddepcontrol.wait", statement.text().trim_end()));
        }
        if statement.is_branch() {
            match label(operands) {
                Some(place) => ahead.push((place, known.clone())),
                None => drop(found.insert(format!("`{}`: to nowhere in the kernel", statement.text()))),
            }
        }
        let leaves = statement.is_branch() || matches!(operation, "ret" | "exit");
        if !leaves || is_executed.is_none() {
            ahead.push((at + 1, known));
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::Module;
    use pat_abi::{Arch, KERNELS};

    /// `%rd1` is the plan's address, `%rd2` that of the queries or of the output, `%rd3` a stride.
    fn violations_of_a(kernel: &KernelSpec, code: &str) -> Vec<String> {
        let text = format!(
            ".visible .entry {name}(\n)\n{{\n.reg .pred %p<9>;\n.reg .b64 %rd<9>;\nld.param.b64 %rd1, [{name}_param_0];\n\
             ld.param.b64 %rd2, [{name}_param_0+8];\nld.param.b64 %rd3, [{name}_param_0+72];\n{code}\nret;\n}}\n",
            name = kernel.entry
        )
        .replace("PARAM", kernel.entry);
        violations(kernel, &Module::parse(&text).entries[0])
    }

    fn kernel(family: fn(Family) -> bool) -> &'static KernelSpec {
        KERNELS.iter().find(|kernel| kernel.waits() && family(kernel.family)).unwrap()
    }

    fn violations_of(code: &str) -> Vec<String> {
        violations_of_a(kernel(|family| family != Family::Merge), code)
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
        assert_eq!(violations_of(&around("griddepcontrol.wait;")), ["`ret` ahead of griddepcontrol.wait"]);
        for access in [
            "st.global.b32 [%rd1], %r1;",
            "cp.async.bulk.tensor.4d [%r1], [%rd1];",
            "@%p2 red.global.add.u32 [%rd1], 1;",
            "ld.global.b32 %r1, [%rd2];",
            // Of the plan, but not by a load that says where it reads.
            "ld.b32 %r1, [%rd1];",
            "prefetch.global.L2 [%rd2];",
            "cp.async.bulk.prefetch.L2.global [%rd1], 64;",
            "st.async.shared::cluster.b32 [%r1], %r2;",
            "mbarrier.arrive.shared::cluster.b64 _, [%r1];",
            "griddepcontrol.launch_dependents;",
            "something.that.nobody.knows %r1;",
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
    fn what_is_not_followed_makes_no_address_of_the_plan() {
        let before = |code: &str| violations_of(&format!("{code}\ngriddepcontrol.wait;"));
        for code in [
            "ld.param.b32 %r1, [PARAM_param_0+168];\ncvt.u64.u32 %rd4, %r1;\nadd.s64 %rd4, %rd1, %rd4;",
            "ld.global.u32 %r1, [%rd1];\nmul.wide.u32 %rd5, %r1, 16;\nadd.s64 %rd4, %rd1, %rd5;",
            "setp.ne.b64 %p1, %rd2, 0;\nselp.b64 %rd4, %rd1, 0, %p1;",
        ] {
            assert_eq!(before(&format!("{code}\nld.global.nc.u32 %r2, [%rd4];")), [""; 0], "{code}");
        }
        for code in [
            // The upper half of an address, all of one in two registers, and another parameter's.
            "ld.param.b32 %r1, [PARAM_param_0+12];\ncvt.u64.u32 %rd5, %r1;\nadd.s64 %rd4, %rd1, %rd5;",
            "ld.param.v2.b32 {%r1, %r3}, [PARAM_param_0+8];\ncvt.u64.u32 %rd5, %r1;\nadd.s64 %rd4, %rd1, %rd5;",
            "{ .reg .b64 t; mov.b64 t, PARAM_param_1; cvta.param.u64 %rd5, t; }\nadd.s64 %rd4, %rd1, %rd5;",
            // What shared memory or other memory says.
            "ld.shared.b64 %rd5, [%r1];\nadd.s64 %rd4, %rd1, %rd5;",
            "sub.s64 %rd5, %rd2, %rd1;\nadd.s64 %rd4, %rd1, %rd5;",
        ] {
            let load = "ld.global.nc.u32 %r2, [%rd4];";
            assert!(!before(&format!("{code}\n{load}")).is_empty(), "{code}");
            assert_eq!(violations_of(&format!("griddepcontrol.wait;\n{code}\n{load}")).len(), 1, "{code}");
        }
    }

    #[test]
    fn a_merge_knows_by_a_flag_whether_it_has_waited() {
        let merge = |code: &str| violations_of_a(kernel(|family| family == Family::Merge), code);
        let code = "mov.pred %p1, 0;\nsetp.ne.u32 %p2, %r1, 0;\n@%p2 bra $LOOP;\ngriddepcontrol.wait;\nbra.uni $END;\n\
                    $LOOP:\nld.global.nc.u32 %r2, [%rd1];\n@%p1 bra $BEHIND;\ngriddepcontrol.wait;\n$BEHIND:\n\
                    ld.global.u32 %r3, [%rd2];\nst.global.u32 [%rd2], %r3;\nmov.pred %p1, -1;\n@%p3 bra $LOOP;\n$END:";
        assert_eq!(merge(code), [""; 0]);
        for (what, instead) in [
            ("mov.pred %p1, 0;\n", "mov.pred %p1, -1;\n"),
            ("mov.pred %p1, 0;\n", ""),
            ("mov.pred %p1, 0;\n", "setp.eq.u32 %p1, %r1, 3;\n"),
            ("@%p1 bra $BEHIND", "@!%p1 bra $BEHIND"),
            ("@%p1 bra $BEHIND;\ngriddepcontrol.wait", "@%p1 bra $BEHIND;\n@%p2 griddepcontrol.wait"),
            ("ld.global.nc.u32 %r2, [%rd1]", "ld.global.u32 %r2, [%rd2]"),
            ("ld.global.u32 %r3, [%rd2]", "ld.global.nc.u32 %r3, [%rd2]"),
            ("@%p2 bra $LOOP;\ngriddepcontrol.wait;\n", "@%p2 bra $LOOP;\n"),
        ] {
            assert!(code.contains(what));
            assert!(!merge(&code.replacen(what, instead, 1)).is_empty(), "{instead} for {what}");
        }
    }

    #[test]
    fn the_kernels_of_hopper_keep_to_it_and_no_longer_when_changed() {
        let text = std::fs::read_to_string(crate::workspace::ptx_file(Arch::Sm90a)).unwrap();
        let entries = Module::parse(&text).entries;
        let mut count = 0;
        for kernel in KERNELS.iter().filter(|kernel| kernel.waits()) {
            let entry = entries.iter().find(|entry| entry.name == kernel.entry).unwrap();
            assert_eq!(violations(kernel, entry), [""; 0], "{}", kernel.entry);
            // Others differ from these by types and sizes.
            let changed = if entry.name.contains("_d128_f16") { changed(&entry.text) } else { Vec::new() };
            for (what, changed) in changed {
                let entry = Entry { name: entry.name.clone(), text: changed };
                assert!(!violations(kernel, &entry).is_empty(), "{}: {what}", kernel.entry);
            }
            count += 1;
        }
        // Kernels of mma.sync in that file are launched in stream order.
        let others = KERNELS.iter().filter(|kernel| kernel.is_in(Arch::Sm90a) && !kernel.waits()).count();
        assert_eq!(count + others, entries.len());
    }

    /// A kernel without one of its waits, with a wait that not every thread executes, and with a load of each kind that has come
    /// ahead of the first one.
    fn changed(text: &str) -> Vec<(String, String)> {
        const WAIT: &str = "\ngriddepcontrol.wait;\n";
        let mut changed = Vec::new();
        for (place, _) in text.match_indices(WAIT) {
            let (before, behind) = (&text[..place], &text[place + WAIT.len()..]);
            changed.push((format!("no wait at {place}"), format!("{before}\n{behind}")));
            changed
                .push((format!("a wait of some at {place}"), format!("{before}\n@%p1 griddepcontrol.wait;\n{behind}")));
        }
        let wait = text.find(WAIT).unwrap();
        let is_plan = |line: &str| line.starts_with("ld.global.nc");
        let mut kinds = BTreeSet::new();
        for line in text[wait..].lines() {
            let operation = line.split(' ').next().unwrap_or_default();
            let touches = ["ld.global", "st.global", "cp.async"].iter().any(|name| operation.starts_with(name));
            if touches && !is_plan(line) && kinds.insert(operation) {
                changed.push((format!("{line} ahead"), format!("{}\n{line}{}", &text[..wait], &text[wait..])));
            }
        }
        // And what may only be read past the cache, read through it.
        kinds.clear();
        for line in text[wait..].lines().filter(|line| line.starts_with("ld.global.") && !is_plan(line)) {
            if kinds.insert(line.split(' ').next().unwrap_or_default()) {
                let through = line.replacen("ld.global.", "ld.global.nc.", 1).replacen(".nc.cg", ".nc", 1);
                changed.push((through.clone(), text.replacen(line, &through, 1)));
            }
        }
        assert!(changed.len() > 4, "{} changes", changed.len());
        changed
    }
}
