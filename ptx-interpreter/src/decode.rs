//! From the text of an instruction to what is executed. An instruction or a form of it that is not here is an error.

use crate::instruction::{Address, MatrixType, Op, Shuffle, Slot, Space, Vote, WgmmaA};
use crate::kernel::{Reader, number};
use crate::lanewise;
use crate::order::Fence;
use crate::text::operands;

type Result<T> = std::result::Result<T, String>;

/// Decodes an instruction without guard.
pub(crate) fn decode(text: &str, reader: &mut Reader) -> Result<Op> {
    let (opcode, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let mut operands = Operands { opcode, texts: operands(rest), reader };
    if let Some(op) = operands.packed()? {
        return Ok(op);
    }
    if let Some((sources, function)) = lanewise::find(opcode) {
        operands.expect(1 + sources)?;
        let to = operands.register(0)?;
        let mut from = [0; 3];
        for (index, slot) in from.iter_mut().enumerate() {
            // Behind the last one stands any.
            *slot = operands.source(1 + index.min(sources - 1))?;
        }
        return Ok(Op::Lanewise { function, to, from });
    }
    match operands.memory()? {
        Some(op) => Ok(op),
        None => match operands.warp()? {
            Some(op) => Ok(op),
            None => operands.hopper()?.ok_or_else(|| format!("the instruction {opcode} is not known")),
        },
    }
}

struct Operands<'a, 'r> {
    opcode: &'a str,
    texts: Vec<&'a str>,
    reader: &'r mut Reader,
}

impl Operands<'_, '_> {
    fn expect(&self, count: usize) -> Result<()> {
        if self.texts.len() == count {
            return Ok(());
        }
        Err(format!("{} takes {count} operands, not {}", self.opcode, self.texts.len()))
    }

    fn text(&self, index: usize) -> Result<&str> {
        self.texts.get(index).copied().ok_or_else(|| format!("{} lacks operand {index}", self.opcode))
    }

    fn register(&mut self, index: usize) -> Result<Slot> {
        let text = self.text(index)?.to_string();
        self.reader.register(&text)
    }

    fn source(&mut self, index: usize) -> Result<Slot> {
        let text = self.text(index)?.to_string();
        self.reader.source(&text)
    }

    fn immediate(&self, index: usize) -> Result<u64> {
        let text = self.text(index)?;
        number(text).ok_or_else(|| format!("operand {text} is no number"))
    }

    /// `{a, b}` or, of one, `a`; `None` for an element that is `_`.
    fn elements(&mut self, index: usize) -> Result<Vec<Option<Slot>>> {
        let text = self.text(index)?.to_string();
        let list = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(&text);
        list.split(',')
            .map(str::trim)
            .map(|name| if name == "_" { Ok(None) } else { self.reader.source(name).map(Some) })
            .collect()
    }

    fn vector(&mut self, index: usize) -> Result<Vec<Slot>> {
        let elements = self.elements(index)?;
        elements.into_iter().map(|slot| slot.ok_or_else(|| "an element without a register".to_string())).collect()
    }

    fn array<const N: usize>(&mut self, index: usize) -> Result<[Slot; N]> {
        let slots = self.vector(index)?;
        let count = slots.len();
        slots.try_into().map_err(|_| format!("operand {index} has {count} registers, not {N}"))
    }

    /// `[register]` or `[register+4]`.
    fn address(&mut self, index: usize) -> Result<Address> {
        let text = self.text(index)?.to_string();
        let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let inner = inner.ok_or_else(|| format!("operand {text} is no address"))?;
        self.address_of(inner)
    }

    fn address_of(&mut self, text: &str) -> Result<Address> {
        let (base, offset) = text.split_once('+').unwrap_or((text, "0"));
        let offset = number(offset.trim()).ok_or_else(|| format!("offset {offset} is no number"))?;
        Ok(Address { base: self.reader.source(base.trim())?, offset: offset as i64 })
    }

    /// Moves of a register from or to its halves. PTX ISA, "mov": packing and unpacking of vectors.
    fn packed(&mut self) -> Result<Option<Op>> {
        let bits = match self.opcode {
            "mov.b32" => 16,
            "mov.b64" => 32,
            _ => return Ok(None),
        };
        self.expect(2)?;
        if self.text(0)?.starts_with('{') {
            let elements = self.elements(0)?;
            let halves = elements.try_into().map_err(|_| "a register has two halves")?;
            return Ok(Some(Op::Unpack { halves, from: self.source(1)?, bits }));
        }
        if self.text(1)?.starts_with('{') {
            return Ok(Some(Op::Pack { to: self.register(0)?, halves: self.array(1)?, bits }));
        }
        Ok(None)
    }

    /// Loads, stores and copies.
    fn memory(&mut self) -> Result<Option<Op>> {
        let parts: Vec<&str> = self.opcode.split('.').collect();
        Ok(Some(match parts[..] {
            ["ld", "param", of_type] => {
                self.expect(2)?;
                let text = self.text(1)?.trim_start_matches('[').trim_end_matches(']').to_string();
                let (name, offset) = text.split_once('+').unwrap_or((&text, "0"));
                let param = self.reader.param(name).ok_or_else(|| format!("there is no parameter {name}"))?;
                let offset = number(offset).ok_or_else(|| format!("offset {offset} is no number"))? as usize;
                let bytes = type_bytes(of_type)?;
                if offset + bytes > param.bytes {
                    return Err(format!("{name} has {} bytes", param.bytes));
                }
                Op::LoadParam { to: self.register(0)?, offset: param.offset + offset, bytes }
            }
            ["ld", ref kind @ .., of_type] => {
                self.expect(2)?;
                let (space, count) = access(kind)?;
                let to = self.vector(0)?;
                check_count(&to, count)?;
                Op::Load { space, to, from: self.address(1)?, bytes: type_bytes(of_type)? }
            }
            ["st", ref kind @ .., of_type] => {
                self.expect(2)?;
                let (space, count) = access(kind)?;
                let from = self.vector(1)?;
                check_count(&from, count)?;
                Op::Store { space, to: self.address(0)?, from, bytes: type_bytes(of_type)? }
            }
            ["cp", "async", "cg" | "ca", "shared", "global"] => {
                let source_bytes =
                    if self.texts.len() == 4 { Some(self.source(3)?) } else { self.expect(3).map(|()| None)? };
                let bytes = self.immediate(2)? as usize;
                Op::CopyAsync { to: self.address(0)?, from: self.address(1)?, bytes, source_bytes }
            }
            ["cp", "async", "commit_group"] => Op::CommitCopies,
            ["cp", "async", "wait_group"] => Op::WaitCopies { open_groups: self.immediate(0)? as usize },
            ["cp", "async", "wait_all"] => Op::WaitCopies { open_groups: 0 },
            ["prefetch", ..] | ["createpolicy", ..] => Op::Nothing,
            _ => return Ok(None),
        }))
    }

    /// What the lanes of a warp or the warps of a CTA do together, on every architecture.
    fn warp(&mut self) -> Result<Option<Op>> {
        Ok(Some(match self.opcode {
            "ret" | "exit" => Op::Exit,
            "trap" => Op::Trap,
            "shfl.sync.idx.b32" | "shfl.sync.bfly.b32" => {
                self.expect(5)?;
                let kind = if self.opcode.contains("idx") { Shuffle::Index } else { Shuffle::Butterfly };
                let [to, from] = [self.register(0)?, self.source(1)?];
                Op::Shuffle { kind, to, from, lane: self.source(2)?, clamp: self.source(3)?, members: self.source(4)? }
            }
            "vote.sync.any.pred" | "vote.sync.all.pred" | "vote.sync.ballot.b32" => {
                self.expect(3)?;
                let kind = match self.opcode.split('.').nth(2) {
                    Some("any") => Vote::Any,
                    Some("all") => Vote::All,
                    _ => Vote::Ballot,
                };
                Op::Vote { kind, to: self.register(0)?, from: self.source(1)?, members: self.source(2)? }
            }
            "redux.sync.or.b32" => {
                self.expect(3)?;
                Op::Reduce { to: self.register(0)?, from: self.source(1)?, members: self.source(2)? }
            }
            "bar.warp.sync" => Op::WarpBarrier { members: self.source(0)? },
            "bar.sync" | "barrier.sync.aligned" | "barrier.cta.sync.aligned" | "barrier.sync" | "barrier.cta.sync" => {
                let threads =
                    if self.texts.len() == 2 { Some(self.source(1)?) } else { self.expect(1).map(|()| None)? };
                let aligned = self.opcode == "bar.sync" || self.opcode.ends_with(".aligned");
                Op::CtaBarrier { id: self.source(0)?, threads, aligned }
            }
            "bar.arrive"
            | "barrier.arrive.aligned"
            | "barrier.cta.arrive.aligned"
            | "barrier.arrive"
            | "barrier.cta.arrive" => {
                self.expect(2)?;
                Op::ArriveAtCtaBarrier { id: self.source(0)?, threads: self.source(1)? }
            }
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16" | "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16" => {
                self.expect(2)?;
                let transposed = self.opcode.contains(".trans.");
                Op::LoadMatrices { to: self.array(0)?, from: self.address(1)?, transposed }
            }
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
            | "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" => {
                self.expect(4)?;
                let [d, a] = [self.array(0)?, self.array(1)?];
                Op::Mma { of: self.matrix_type()?, d, a, b: self.array(2)?, c: self.array(3)? }
            }
            _ => return Ok(None),
        }))
    }

    /// What compute capability 9.0 has beyond.
    fn hopper(&mut self) -> Result<Option<Op>> {
        Ok(Some(match self.opcode {
            "fence.proxy.async.shared::cta" => Op::Fence { of: Fence::Proxy },
            "fence.mbarrier_init.release.cluster" => Op::Fence { of: Fence::Barriers },
            "griddepcontrol.wait" | "griddepcontrol.launch_dependents" => Op::Nothing,
            "setmaxnreg.inc.sync.aligned.u32" | "setmaxnreg.dec.sync.aligned.u32" => Op::Nothing,
            "mbarrier.init.shared::cta.b64" => {
                self.expect(2)?;
                Op::InitBarrier { at: self.address(0)?, count: self.source(1)? }
            }
            "mbarrier.arrive.shared::cta.b64" => {
                self.expect_no_state(2)?;
                Op::Arrive { at: self.address(1)? }
            }
            "mbarrier.arrive.expect_tx.shared::cta.b64" => {
                self.expect_no_state(3)?;
                Op::ArriveExpecting { at: self.address(1)?, bytes: self.source(2)? }
            }
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64" => {
                self.expect(1)?;
                Op::ArriveAfterCopies { at: self.address(0)? }
            }
            "mbarrier.try_wait.parity.shared::cta.b64" | "mbarrier.test_wait.parity.shared::cta.b64" => {
                self.expect(3)?;
                Op::TryWait { to: self.register(0)?, at: self.address(1)?, parity: self.source(2)? }
            }
            "wgmma.fence.sync.aligned" => Op::FenceProducts,
            "wgmma.commit_group.sync.aligned" => Op::CommitProducts,
            "wgmma.wait_group.sync.aligned" => Op::WaitProducts { open_groups: self.immediate(0)? as usize },
            _ if self.opcode.starts_with("wgmma.mma_async.sync.aligned.m64n") => self.wgmma()?,
            _ if self.opcode.starts_with(TENSOR_COPY) => self.tensor_copy()?,
            _ => return Ok(None),
        }))
    }

    fn expect_no_state(&self, count: usize) -> Result<()> {
        self.expect(count)?;
        if self.text(0)? == "_" { Ok(()) } else { Err("the state of a barrier is not kept".into()) }
    }

    /// A from registers or from shared memory, B from shared memory, f32 accumulators.
    fn wgmma(&mut self) -> Result<Op> {
        let of_registers = self.text(1)?.starts_with('{');
        self.expect(if of_registers { 7 } else { 8 })?;
        let columns: usize = self
            .opcode
            .split_once("m64n")
            .and_then(|(_, rest)| rest.split_once("k16.f32.")?.0.parse().ok())
            .ok_or_else(|| format!("the instruction {} is not known", self.opcode))?;
        let d = self.vector(0)?;
        check_count(&d, columns / 2)?;
        if self.immediate(4)? != 1 || self.immediate(5)? != 1 {
            return Err("negated operands are not known".into());
        }
        let last = self.texts.len() - 1;
        let transposed = self.immediate(last)? == 1;
        let a = if of_registers {
            WgmmaA::Registers(self.array(1)?)
        } else if self.immediate(6)? == 0 {
            WgmmaA::Shared(self.source(1)?)
        } else {
            return Err("A that is transposed is not known".into());
        };
        let of = self.matrix_type()?;
        Ok(Op::Wgmma { of, d, a, b: self.source(2)?, adds: self.source(3)?, transposed })
    }

    /// `[to], [map, {x, y, z, w}], [barrier]`, with or without a cache policy.
    fn tensor_copy(&mut self) -> Result<Op> {
        match &self.opcode[TENSOR_COPY.len()..] {
            "" => self.expect(3)?,
            ".L2::cache_hint" => self.expect(4)?,
            other => return Err(format!("{other} is not known")),
        }
        let text = self.text(1)?.to_string();
        let parts =
            text.strip_prefix('[').and_then(|text| text.strip_suffix("}]")).and_then(|text| text.split_once('{'));
        let (map, list) = parts.ok_or_else(|| format!("operand {text} is no place in a tensor"))?;
        let map = self.address_of(map.trim().trim_end_matches(','))?;
        let names: Vec<&str> = list.split(',').map(str::trim).collect();
        let [x, y, z, w] = names[..] else { return Err("four coordinates are wanted".into()) };
        let reader = &mut *self.reader;
        let coordinates = [reader.source(x)?, reader.source(y)?, reader.source(z)?, reader.source(w)?];
        Ok(Op::CopyTensor { to: self.address(0)?, map, coordinates, barrier: self.address(2)? })
    }

    fn matrix_type(&self) -> Result<MatrixType> {
        if self.opcode.contains(".f32.f16.f16") {
            Ok(MatrixType::F16)
        } else if self.opcode.contains(".f32.bf16.bf16") {
            Ok(MatrixType::Bf16)
        } else {
            Err(format!("the instruction {} is not known", self.opcode))
        }
    }
}

const TENSOR_COPY: &str = "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes";

fn type_bytes(name: &str) -> Result<usize> {
    match name {
        "b8" | "u8" | "s8" => Ok(1),
        "b16" | "u16" | "s16" => Ok(2),
        "b32" | "u32" | "s32" | "f32" => Ok(4),
        "b64" | "u64" | "s64" | "f64" => Ok(8),
        _ => Err(format!("the type {name} is not known")),
    }
}

/// State space and vector length; how a load is cached does not matter.
fn access(kind: &[&str]) -> Result<(Space, usize)> {
    let (mut space, mut count) = (None, 1);
    for &part in kind {
        match part {
            "global" => space = Some(Space::Global),
            "shared" => space = Some(Space::Shared),
            "v2" => count = 2,
            "v4" => count = 4,
            "nc" | "cg" | "ca" | "cs" => {}
            _ => return Err(format!("accesses with .{part} are not known")),
        }
    }
    space.map(|space| (space, count)).ok_or_else(|| "generic addresses are not known".into())
}

fn check_count(slots: &[Slot], count: usize) -> Result<()> {
    if slots.len() == count { Ok(()) } else { Err(format!("{} registers, not {count}", slots.len())) }
}
