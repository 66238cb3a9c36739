//! Reading one kernel of a PTX text.

use crate::decode::decode;
use crate::error::{Error, Result};
use crate::instruction::{Guard, Instruction, Op, Slot};
use crate::text::{Kind, newlines, statements};
use std::collections::HashMap;

/// Where the shared memory of a CTA begins. Not at 0, so that an offset that was taken for an address shows; aligned as the
/// widest swizzle wants it.
pub(crate) const SHARED_BEGIN: u64 = 1024;
/// Where the parameters of a launch begin. No buffer of global memory is there.
pub(crate) const PARAMS_BEGIN: u64 = 1 << 20;

/// A special register that a thread reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread,
    Threads,
    Cta,
    Ctas,
    Lane,
    Warp,
    /// Coordinates in the dimensions that launches do not have.
    Zero,
    /// Sizes there.
    One,
}

impl Special {
    fn find(name: &str) -> Option<Self> {
        Some(match name {
            "%tid.x" => Self::Thread,
            "%ntid.x" => Self::Threads,
            "%ctaid.x" => Self::Cta,
            "%nctaid.x" => Self::Ctas,
            "%laneid" => Self::Lane,
            "%warpid" => Self::Warp,
            "%tid.y" | "%tid.z" | "%ctaid.y" | "%ctaid.z" => Self::Zero,
            "%ntid.y" | "%ntid.z" | "%nctaid.y" | "%nctaid.z" => Self::One,
            _ => return None,
        })
    }
}

/// A parameter of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Param {
    /// From the start of the parameters.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A kernel that can be launched.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(crate) name: String,
    pub(crate) instructions: Vec<Instruction>,
    pub(crate) params: Vec<Param>,
    /// Registers, constants and special registers.
    pub(crate) slots: usize,
    pub(crate) constants: Vec<(Slot, u64)>,
    pub(crate) specials: Vec<(Slot, Special)>,
    /// `.maxntid`
    pub(crate) max_threads: Option<u32>,
}

impl Kernel {
    /// Reads entry `name` of a PTX text.
    ///
    /// # Errors
    /// There is no such entry, or an instruction of it is not one that the interpreter knows: the error names it.
    pub fn parse(text: &str, name: &str) -> Result<Self> {
        let begins = |rest: &str| rest.trim_start().starts_with(['(', '{']);
        let head = format!(".entry {name}");
        let at = text
            .match_indices(&head)
            .find(|(at, _)| begins(&text[at + head.len()..]))
            .map(|(at, _)| at)
            .ok_or_else(|| Error::NoEntry(name.into()))?;
        let line = 1 + newlines(&text[..at]);
        let refuse = |what: &str| Error::Parse { line, text: head.clone(), what: what.into() };
        let body = at + text[at..].find('{').ok_or_else(|| refuse("the entry has no body"))?;
        let (declaration, first_line) = (&text[at + head.len()..body], 1 + newlines(&text[..body]));

        let mut reader = Reader::new(&text[..at], declaration).map_err(|what| refuse(&what))?;
        let mut instructions: Vec<Instruction> = Vec::new();
        let mut labels: HashMap<&str, usize> = HashMap::new();
        let mut branches: Vec<(usize, &str)> = Vec::new();
        for statement in statements(&text[body + 1..], first_line)? {
            let line = statement.line;
            match statement.kind {
                Kind::Open => reader.scopes.push(HashMap::new()),
                Kind::Close => drop(reader.scopes.pop()),
                Kind::Label(name) => drop(labels.insert(name, instructions.len())),
                Kind::Text(text) => {
                    let one_line = text.split_whitespace().collect::<Vec<_>>().join(" ");
                    let refuse = |what: String| Error::Parse { line, text: one_line.clone(), what };
                    if let Some(declared) = text.strip_prefix(".reg") {
                        reader.declare_registers(declared).map_err(refuse)?;
                    } else if !text.starts_with(".pragma") && !text.starts_with(".loc") {
                        let (guard, bare) = reader.guard(text).map_err(refuse)?;
                        let op = match branch_target(bare) {
                            Some(label) => {
                                branches.push((instructions.len(), label));
                                Op::Branch { target: usize::MAX }
                            }
                            None => decode(bare, &mut reader).map_err(refuse)?,
                        };
                        instructions.push(Instruction { guard, op, line, text: one_line });
                    }
                }
            }
        }
        for (at, label) in branches {
            let Instruction { line, ref text, .. } = instructions[at];
            let unknown = || Error::Parse { line, text: text.clone(), what: format!("there is no label {label}") };
            instructions[at].op = Op::Branch { target: *labels.get(label).ok_or_else(unknown)? };
        }
        Ok(Self {
            name: name.into(),
            instructions,
            params: reader.params.iter().map(|(_, param)| *param).collect(),
            slots: reader.slots as usize,
            constants: reader.constants.iter().map(|(&value, &slot)| (slot, value)).collect(),
            specials: reader.specials.iter().map(|(&special, &slot)| (slot, special)).collect(),
            max_threads: reader.max_threads,
        })
    }
}

fn branch_target(text: &str) -> Option<&str> {
    let (opcode, label) = text.split_once(char::is_whitespace)?;
    matches!(opcode, "bra" | "bra.uni").then(|| label.trim())
}

/// What names mean, while a kernel is read.
pub(crate) struct Reader {
    /// Registers declared one by one, by the braces they are in.
    scopes: Vec<HashMap<String, Slot>>,
    /// Registers declared as `%r<7>`: the prefix and the number.
    ranges: Vec<(String, u32)>,
    slots: Slot,
    constants: HashMap<u64, Slot>,
    specials: HashMap<Special, Slot>,
    /// The symbol of the CTA's dynamic shared memory.
    shared: Option<String>,
    params: Vec<(String, Param)>,
    max_threads: Option<u32>,
}

impl Reader {
    /// `prelude` is what stands before the entry, `declaration` what stands between its name and its body.
    fn new(prelude: &str, declaration: &str) -> std::result::Result<Self, String> {
        let shared = prelude.lines().find(|line| line.contains(".extern .shared")).and_then(|line| {
            let name = line.split_whitespace().last()?;
            Some(name.trim_end_matches([';', '[', ']']).to_string())
        });
        let mut params = Vec::new();
        let mut end = 0usize;
        let list = declaration.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map_or("", |(list, _)| list);
        for text in list.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            let (name, param) = parse_param(text, end).ok_or_else(|| format!("a parameter {text:?}"))?;
            end = param.offset + param.bytes;
            params.push((name, param));
        }
        let max_threads = declaration
            .split_once(".maxntid")
            .and_then(|(_, rest)| rest.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
        Ok(Self {
            scopes: vec![HashMap::new()],
            ranges: Vec::new(),
            slots: 0,
            constants: HashMap::new(),
            specials: HashMap::new(),
            shared,
            params,
            max_threads,
        })
    }

    fn new_slot(&mut self) -> Slot {
        self.slots += 1;
        self.slots - 1
    }

    /// `.b32 %r<7>` or `.b32 tmp, other`, behind `.reg`.
    fn declare_registers(&mut self, text: &str) -> std::result::Result<(), String> {
        let (_, names) = text.trim_start().split_once(char::is_whitespace).ok_or("registers without a name")?;
        for name in names.split(',').map(str::trim) {
            if let Some((prefix, rest)) = name.split_once('<') {
                let count = rest.trim_end_matches('>').parse().map_err(|_| format!("a register range {name:?}"))?;
                self.ranges.push((prefix.into(), count));
            } else {
                let slot = self.new_slot();
                self.scopes.last_mut().ok_or("registers behind the kernel")?.insert(name.into(), slot);
            }
        }
        Ok(())
    }

    /// Splits `@%p1 ...` and `@!%p1 ...`.
    fn guard<'a>(&mut self, text: &'a str) -> std::result::Result<(Option<Guard>, &'a str), String> {
        let Some(rest) = text.strip_prefix('@') else { return Ok((None, text)) };
        let (name, bare) = rest.split_once(char::is_whitespace).ok_or("a guard without an instruction")?;
        let (name, expected) = name.strip_prefix('!').map_or((name, true), |name| (name, false));
        let slot = self.register(name)?;
        Ok((Some((slot, expected)), bare.trim_start()))
    }

    fn declared(&self, name: &str) -> Option<Slot> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name).copied())
    }

    /// The register of that name.
    pub(crate) fn register(&mut self, name: &str) -> std::result::Result<Slot, String> {
        if let Some(slot) = self.declared(name) {
            return Ok(slot);
        }
        let digits = name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (prefix, number) = name.split_at(digits);
        let is_declared = number
            .parse::<u32>()
            .is_ok_and(|number| self.ranges.iter().any(|(range, count)| range == prefix && number < *count));
        if !is_declared {
            return Err(format!("there is no register {name}"));
        }
        let slot = self.new_slot();
        self.scopes[0].insert(name.into(), slot);
        Ok(slot)
    }

    /// The slot of a constant.
    pub(crate) fn constant(&mut self, value: u64) -> Slot {
        match self.constants.get(&value) {
            Some(&slot) => slot,
            None => {
                let slot = self.new_slot();
                self.constants.insert(value, slot);
                slot
            }
        }
    }

    /// A source operand: a register, a special one, a number, or the address of a symbol.
    pub(crate) fn source(&mut self, text: &str) -> std::result::Result<Slot, String> {
        if let Some(value) = number(text) {
            return Ok(self.constant(value));
        }
        if let Some(special) = Special::find(text) {
            if let Some(&slot) = self.specials.get(&special) {
                return Ok(slot);
            }
            let slot = self.new_slot();
            self.specials.insert(special, slot);
            return Ok(slot);
        }
        if self.shared.as_deref() == Some(text) {
            return Ok(self.constant(SHARED_BEGIN));
        }
        if let Some(param) = self.param(text) {
            return Ok(self.constant(PARAMS_BEGIN + param.offset as u64));
        }
        self.register(text)
    }

    /// The parameter of that name.
    pub(crate) fn param(&self, name: &str) -> Option<Param> {
        self.params.iter().find(|(known, _)| known == name).map(|(_, param)| *param)
    }
}

/// `.param .align 8 .b8 name[232]` or `.param .u64 name`; the one before it ends at `end`.
fn parse_param(text: &str, end: usize) -> Option<(String, Param)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let of_type = words.iter().rev().nth(1)?;
    let element_bytes = of_type.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>().ok()? / 8;
    let align = words.iter().position(|&word| word == ".align").and_then(|at| words.get(at + 1)?.parse().ok());
    let (name, elements) = match words.last()?.split_once('[') {
        Some((name, count)) => (name, count.trim_end_matches(']').parse().ok()?),
        None => (*words.last()?, 1),
    };
    let offset = end.next_multiple_of(align.unwrap_or(element_bytes).max(1));
    Some((name.into(), Param { offset, bytes: element_bytes * elements }))
}

/// A number as PTX writes it: decimal or hexadecimal, or `0f` and the bits of an f32.
pub(crate) fn number(text: &str) -> Option<u64> {
    if let Some(bits) = text.strip_prefix("0f").or_else(|| text.strip_prefix("0F")) {
        return (bits.len() == 8).then(|| u64::from_str_radix(bits, 16).ok())?;
    }
    let (is_negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    Some(if is_negative { value.wrapping_neg() } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number("0f3F800000"), Some(0x3f80_0000));
        assert_eq!(number("-1"), Some(u64::MAX));
        assert_eq!(number("0x10"), Some(16));
        assert_eq!(number("%r1"), None);
        assert_eq!(number("0f12"), None);
    }

    #[test]
    fn parameters_are_laid_out_by_their_alignment() {
        let text = ".entry k(
            .param .align 8 .b8 k_param_0[12],
            .param .align 64 .b8 k_param_1[128],
            .param .u32 k_param_2
            ) .maxntid 96, 1, 1 { ret; }";
        let kernel = Kernel::parse(text, "k").unwrap();
        let offsets: Vec<(usize, usize)> = kernel.params.iter().map(|param| (param.offset, param.bytes)).collect();
        assert_eq!(offsets, [(0, 12), (64, 128), (192, 4)]);
        assert_eq!(kernel.max_threads, Some(96));
    }

    #[test]
    fn an_entry_is_found_by_its_whole_name() {
        let text = ".entry kernel_more() { ret; }\n.entry kernel() { add.s32 %r1, %r1, 1; }";
        assert_eq!(Kernel::parse(text, "kernel_more").unwrap().instructions.len(), 1);
        assert_eq!(Kernel::parse(text, "kern").unwrap_err(), Error::NoEntry("kern".into()));
        let error = Kernel::parse(text, "kernel").unwrap_err().to_string();
        assert!(error.starts_with("line 2: there is no register %r1"), "{error}");
    }

    #[test]
    fn what_is_unknown_is_named() {
        let parse = |body: &str| Kernel::parse(&format!(".entry k()\n{{\n.reg .b32 %r<3>;\n{body}\n}}"), "k");
        let error = parse("brx.idx %r1, %r2;").unwrap_err().to_string();
        assert!(error.starts_with("line 4: the instruction brx.idx is not known"), "{error}");
        let error = parse("bra $L_9;").unwrap_err().to_string();
        assert!(error.contains("there is no label $L_9"), "{error}");
        let error = parse("add.s32 %r1, %r3, 1;").unwrap_err().to_string();
        assert!(error.contains("there is no register %r3"), "{error}");
        let error = parse("add.s32 %r1, %r2;").unwrap_err().to_string();
        assert!(error.contains("add.s32 takes 3 operands"), "{error}");
    }
}
