//! What each instruction does.

use crate::barrier::{Comer, Gathered};
use crate::cta::{Common, MAX_INSTRUCTIONS, TensorCopy};
use crate::error::Fault;
use crate::instruction::{Address, Instruction, MatrixType, Op, Shuffle, Slot, Space, Vote, WgmmaA};
use crate::lanes::{Lanes, WARP, lanes_of};
use crate::matrix::{DEPTH, ROWS, a_matrix, b_matrix, distribute, multiply_add};
use crate::order::{Accessor, Clock, Proxy};
use crate::tensor::MatrixDescriptor;
use crate::warp::{Copy, Group, Product, Wait, Warp};

type Result<T> = std::result::Result<T, Fault>;

/// Most bytes of a vector that a lane loads or stores.
const VECTOR_BYTES: usize = 16;

/// Warps of a warpgroup.
const WARPS_OF_GROUP: usize = 4;

/// What becomes of the lanes that executed an instruction.
enum Flow {
    Next,
    Jump(usize),
    Exit,
    Wait(Wait),
    /// The instruction is done; what comes next waits.
    NextThenWait(Wait),
}

impl Common<'_> {
    /// Those that waited at a numbered barrier go on, and know what was done before it.
    fn let_go(&mut self, gathered: Option<Gathered>) {
        let Some((warps, passed)) = gathered else { return };
        let order = &mut self.shared.order;
        let clocks: Vec<Clock> = warps.iter().map(|&warp| order.release(warp)).chain(passed).collect();
        for &warp in &warps {
            clocks.iter().for_each(|clock| order.acquire(warp, clock));
        }
        self.released.extend(warps);
    }
}

impl Warp {
    /// Runs a group until it waits, ends, splits, or another one is to be looked at.
    pub(crate) fn run_group(
        &mut self,
        index: usize,
        common: &mut Common<'_>,
    ) -> std::result::Result<(), (usize, Fault)> {
        let kernel = common.kernel;
        self.groups[index].wait = Wait::None;
        loop {
            let group = self.groups[index];
            let Some(instruction) = kernel.instructions.get(group.pc) else {
                self.leave(index, group.lanes);
                return Ok(());
            };
            common.executed += 1;
            if common.executed > MAX_INSTRUCTIONS {
                return Err((group.pc, Fault::Endless(MAX_INSTRUCTIONS)));
            }
            let lanes = group.lanes & self.guarded(instruction);
            let flow = if lanes == 0 {
                Flow::Next
            } else {
                let flow = self.execute(lanes, group.pc, &instruction.op, common);
                flow.and_then(|flow| self.products.check().map(|()| flow)).map_err(|fault| (group.pc, fault))?
            };
            match flow {
                Flow::Next => self.groups[index].pc += 1,
                Flow::Jump(target) if lanes == group.lanes => self.groups[index].pc = target,
                Flow::Jump(target) => {
                    let own = &mut self.groups[index];
                    own.lanes &= !lanes;
                    own.pc += 1;
                    self.groups.push(Group { pc: target, lanes, wait: Wait::None });
                    return Ok(());
                }
                Flow::Exit => {
                    self.groups[index].pc += 1;
                    self.leave(index, lanes);
                    return Ok(());
                }
                Flow::Wait(wait) => {
                    self.groups[index].wait = wait;
                    return Ok(());
                }
                Flow::NextThenWait(wait) => {
                    self.groups[index].pc += 1;
                    self.groups[index].wait = wait;
                    return Ok(());
                }
            }
            if self.groups.len() > 1 {
                let pc = self.groups[index].pc;
                let is_behind = self.groups.iter().enumerate().all(|(other, group)| other == index || group.pc > pc);
                if !is_behind {
                    return Ok(());
                }
            }
        }
    }

    fn leave(&mut self, index: usize, lanes: u32) {
        self.exited |= lanes;
        self.groups[index].lanes &= !lanes;
        if self.groups[index].lanes == 0 {
            self.groups.swap_remove(index);
        }
    }

    fn guarded(&self, instruction: &Instruction) -> u32 {
        let Some((slot, expected)) = instruction.guard else { return u32::MAX };
        let mask = mask_of(self.get(slot));
        if expected { mask } else { !mask }
    }

    fn by(&self, lane: usize) -> Accessor {
        Accessor::new(self.index, lane)
    }

    fn address(&self, at: Address, lane: usize) -> u64 {
        self.get(at.base)[lane].wrapping_add_signed(at.offset)
    }

    /// An address in shared memory, where registers have 32 bits.
    fn shared_address(&self, at: Address, lane: usize) -> u64 {
        self.address(at, lane) & u64::from(u32::MAX)
    }

    /// A value that is the same in all of these lanes.
    fn uniform(&self, slot: Slot, lanes: u32, what: &'static str) -> Result<u64> {
        let register = self.get(slot);
        let mut values = lanes_of(lanes).map(|lane| register[lane]);
        let first = values.next().unwrap_or_default();
        if values.all(|value| value == first) { Ok(first) } else { Err(Fault::NotUniform(what)) }
    }

    /// Whether all lanes of `needed` are here; a fault where one has exited.
    fn gathered(&self, needed: u32, lanes: u32) -> Result<bool> {
        match needed & self.exited {
            0 => Ok(needed & !lanes == 0),
            missing => Err(Fault::Exited { missing }),
        }
    }

    /// The members of a `.sync` instruction, once they are here.
    fn members(&self, slot: Slot, lanes: u32) -> Result<Option<u32>> {
        let members = self.uniform(slot, lanes, "the mask of members")? as u32;
        if lanes & !members != 0 {
            return Err(Fault::NotUniform("who is a member"));
        }
        Ok(self.gathered(members, lanes)?.then_some(members))
    }

    fn execute(&mut self, lanes: u32, pc: usize, op: &Op, common: &mut Common<'_>) -> Result<Flow> {
        if op.wants_all_lanes() && !self.gathered(u32::MAX, lanes)? {
            return Ok(Flow::Wait(Wait::Lanes));
        }
        match op {
            &Op::Lanewise { function, to, from: [a, b, c] } => {
                let values = function([self.get(a), self.get(b), self.get(c)]);
                self.set(to, lanes, &values);
            }
            &Op::Pack { to, halves: [low, high], bits } => {
                let (low, high) = (self.get(low), self.get(high));
                let mask = (1u64 << bits) - 1;
                let values: Lanes = std::array::from_fn(|lane| low[lane] & mask | (high[lane] & mask) << bits);
                self.set(to, lanes, &values);
            }
            &Op::Unpack { halves, from, bits } => {
                let values = *self.get(from);
                for (half, slot) in halves.into_iter().enumerate() {
                    if let Some(slot) = slot {
                        let values = values.map(|value| value >> (bits * half as u32) & ((1 << bits) - 1));
                        self.set(slot, lanes, &values);
                    }
                }
            }
            &Op::LoadParam { to, offset, bytes } => {
                let value = little_endian(&common.params[offset..offset + bytes]);
                self.set(to, lanes, &[value; WARP]);
            }
            Op::Load { space, to, from, bytes } => self.load(lanes, *space, to, *from, *bytes, common)?,
            Op::Store { space, to, from, bytes } => self.store(lanes, *space, *to, from, *bytes, common)?,
            &Op::Branch { target } => return Ok(Flow::Jump(target)),
            Op::Exit => return Ok(Flow::Exit),
            Op::Trap => return Err(Fault::Trap),
            Op::Nothing => {}
            &Op::Fence { of } => common.shared.order.fence(self.index, of),
            &Op::Shuffle { kind, to, from, lane, clamp, members } => {
                if self.members(members, lanes)?.is_none() {
                    return Ok(Flow::Wait(Wait::Lanes));
                }
                let values = self.shuffle(lanes, kind, from, lane, clamp)?;
                self.set(to, lanes, &values);
            }
            &Op::Vote { kind, to, from, members } => {
                if self.members(members, lanes)?.is_none() {
                    return Ok(Flow::Wait(Wait::Lanes));
                }
                let votes = mask_of(self.get(from)) & lanes;
                let value = match kind {
                    Vote::Any => u64::from(votes != 0),
                    Vote::All => u64::from(votes == lanes),
                    Vote::Ballot => u64::from(votes),
                };
                self.set(to, lanes, &[value; WARP]);
            }
            &Op::Reduce { to, from, members } => {
                if self.members(members, lanes)?.is_none() {
                    return Ok(Flow::Wait(Wait::Lanes));
                }
                let value = lanes_of(lanes).fold(0, |bits, lane| bits | self.get(from)[lane]);
                self.set(to, lanes, &[value; WARP]);
            }
            &Op::WarpBarrier { members } => {
                if self.members(members, lanes)?.is_none() {
                    return Ok(Flow::Wait(Wait::Lanes));
                }
                // Unlike the other `.sync` instructions it orders memory accesses.
                common.shared.order.release(self.index);
            }
            &Op::CtaBarrier { id, threads, aligned } => {
                return self.cta_barrier(lanes, id, threads, aligned.then_some(pc), common);
            }
            &Op::ArriveAtCtaBarrier { id, threads } => {
                return self.arrive_at_cta_barrier(lanes, id, threads, common);
            }
            &Op::CopyAsync { to, from, bytes, source_bytes } => {
                self.copy_async(lanes, to, from, bytes, source_bytes, common)?;
            }
            Op::CommitCopies => {
                for lane in lanes_of(lanes) {
                    let copies = &mut self.copies[lane];
                    copies.groups.push_back(std::mem::take(&mut copies.open));
                }
            }
            &Op::WaitCopies { open_groups } => self.wait_copies(lanes, open_groups, common)?,
            &Op::LoadMatrices { to, from, transposed } => {
                let mut rows = [[0; 16]; WARP];
                for (lane, row) in rows.iter_mut().enumerate() {
                    *row = common.shared.read(self.by(lane), self.shared_address(from, lane))?;
                }
                let values = distribute(&rows, transposed);
                to.into_iter().zip(&values).for_each(|(slot, values)| self.set(slot, lanes, values));
            }
            &Op::Mma { of, d, a, b, c } => {
                let a = a_matrix(of, a.map(|slot| self.get(slot)));
                let b = b_matrix(of, b.map(|slot| self.get(slot)));
                let sums = multiply_add(&a, &b, c.map(|slot| self.get(slot)));
                d.into_iter().zip(&sums).for_each(|(slot, values)| self.set(slot, lanes, values));
            }
            Op::FenceProducts => self.products.fence(),
            Op::Wgmma { d, a, b, adds, .. } => {
                let descriptor = |slot| MatrixDescriptor::decode(self.uniform(slot, lanes, "a matrix descriptor")?);
                let b = descriptor(*b)?;
                let of_shared = match *a {
                    WgmmaA::Shared(slot) => Some(descriptor(slot)?),
                    WgmmaA::Registers(_) => None,
                };
                let adds = self.uniform(*adds, lanes, "whether a product is added")? != 0;
                let registers = d.iter().chain(a.registers()).copied();
                self.products.start(Product { pc, a: of_shared, b, adds }, registers)?;
            }
            Op::CommitProducts => {
                let group = std::mem::take(&mut self.products.open);
                self.products.groups.push_back(group);
            }
            &Op::WaitProducts { open_groups } => {
                while self.products.groups.len() > open_groups {
                    for product in self.products.groups.pop_front().unwrap_or_default() {
                        self.multiply(product, common)?;
                    }
                }
            }
            &Op::InitBarrier { at, count } => {
                for lane in lanes_of(lanes) {
                    let (address, count) = (self.shared_address(at, lane), self.get(count)[lane] as u32);
                    common.shared.place_barrier(self.by(lane), address)?;
                    let clock = common.shared.order.release(self.index);
                    common.counting.init(address, count, clock)?;
                }
            }
            &Op::Arrive { at } => self.arrive(lanes, at, None, common)?,
            &Op::ArriveExpecting { at, bytes } => self.arrive(lanes, at, Some(bytes), common)?,
            &Op::ArriveAfterCopies { at } => {
                for lane in lanes_of(lanes) {
                    let copies = std::mem::take(&mut self.copies[lane]);
                    let all = copies.groups.into_iter().flatten().chain(copies.open);
                    all.into_iter().try_for_each(|copy| self.finish_copy(lane, copy, common))?;
                }
                self.arrive(lanes, at, None, common)?;
            }
            &Op::TryWait { to, at, parity } => return self.try_wait(lanes, to, at, parity, common),
            &Op::CopyTensor { to, map, coordinates, barrier } => {
                for lane in lanes_of(lanes) {
                    self.copy_tensor(lane, to, map, coordinates, barrier, common)?;
                }
            }
        }
        Ok(Flow::Next)
    }

    fn load(
        &mut self,
        lanes: u32,
        space: Space,
        to: &[Slot],
        from: Address,
        bytes: usize,
        common: &mut Common<'_>,
    ) -> Result<()> {
        let total = bytes * to.len();
        for lane in lanes_of(lanes) {
            let mut vector = [0; VECTOR_BYTES];
            match space {
                Space::Global => {
                    common.global.read_into(lane, self.address(from, lane), total, &mut vector[..total])?;
                }
                Space::Shared => {
                    let address = self.shared_address(from, lane);
                    common.shared.read_into(self.by(lane), address, &mut vector[..total])?;
                }
            }
            for (&slot, value) in to.iter().zip(vector.chunks_exact(bytes)) {
                self.get_mut(slot)[lane] = little_endian(value);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        lanes: u32,
        space: Space,
        to: Address,
        from: &[Slot],
        bytes: usize,
        common: &mut Common<'_>,
    ) -> Result<()> {
        for lane in lanes_of(lanes) {
            let mut vector = [0; VECTOR_BYTES];
            for (&slot, into) in from.iter().zip(vector.chunks_exact_mut(bytes)) {
                into.copy_from_slice(&self.get(slot)[lane].to_le_bytes()[..bytes]);
            }
            let vector = &vector[..bytes * from.len()];
            match space {
                Space::Global => common.global.write(lane, self.address(to, lane), vector)?,
                Space::Shared => common.shared.write(self.by(lane), self.shared_address(to, lane), vector)?,
            }
        }
        Ok(())
    }

    /// PTX ISA, "shfl.sync": the clamp operand holds the end of the segment in bits 0 to 4, its mask in bits 8 to 12.
    fn shuffle(&self, lanes: u32, kind: Shuffle, from: Slot, lane: Slot, clamp: Slot) -> Result<Lanes> {
        let (values, places, clamps) = (self.get(from), self.get(lane), self.get(clamp));
        let mut result = *values;
        for own in lanes_of(lanes) {
            let (place, segment) = (places[own] as usize & 31, clamps[own] as usize >> 8 & 31);
            let last = own & segment | clamps[own] as usize & 31 & !segment;
            let other = match kind {
                Shuffle::Index => own & segment | place & !segment,
                Shuffle::Butterfly => own ^ place,
            };
            let other = if other <= last { other } else { own };
            if lanes >> other & 1 == 0 {
                return Err(Fault::NotUniform("who takes part: a lane that does not is read"));
            }
            result[own] = values[other];
        }
        Ok(result)
    }

    /// `place`: of the instruction, where all warps have to come to it.
    fn cta_barrier(
        &mut self,
        lanes: u32,
        id: Slot,
        threads: Option<Slot>,
        place: Option<usize>,
        common: &mut Common<'_>,
    ) -> Result<Flow> {
        // Either form waits for all threads of the warp.
        if !self.gathered(!self.exited, lanes)? {
            return Ok(Flow::Wait(Wait::Lanes));
        }
        let id = self.uniform(id, lanes, "the barrier's number")?;
        let threads = match threads {
            Some(slot) => self.uniform(slot, lanes, "the barrier's threads")? as u32,
            None => common.launch.threads,
        };
        let gathered = common.numbered.arrive(id, threads, place, Comer::Waits(self.index))?;
        common.let_go(gathered);
        Ok(Flow::Wait(Wait::Barrier(id)))
    }

    fn arrive_at_cta_barrier(&self, lanes: u32, id: Slot, threads: Slot, common: &mut Common<'_>) -> Result<Flow> {
        if !self.gathered(!self.exited, lanes)? {
            return Ok(Flow::Wait(Wait::Lanes));
        }
        let id = self.uniform(id, lanes, "the barrier's number")?;
        let threads = self.uniform(threads, lanes, "the barrier's threads")? as u32;
        let clock = common.shared.order.release(self.index);
        let gathered = common.numbered.arrive(id, threads, None, Comer::Passes(clock))?;
        common.let_go(gathered);
        Ok(Flow::Next)
    }

    fn copy_async(
        &mut self,
        lanes: u32,
        to: Address,
        from: Address,
        bytes: usize,
        source_bytes: Option<Slot>,
        common: &mut Common<'_>,
    ) -> Result<()> {
        for lane in lanes_of(lanes) {
            let source_bytes = source_bytes.map_or(bytes, |slot| (self.get(slot)[lane] as u32 as usize).min(bytes));
            let mut copied = vec![0; bytes];
            if source_bytes > 0 {
                common.global.read_into(lane, self.address(from, lane), bytes, &mut copied[..source_bytes])?;
            }
            let to = self.shared_address(to, lane);
            common.shared.reserve(self.by(lane), to, bytes, bytes)?;
            self.copies[lane].open.push(Copy { to, bytes: copied });
        }
        Ok(())
    }

    fn wait_copies(&mut self, lanes: u32, open_groups: usize, common: &mut Common<'_>) -> Result<()> {
        for lane in lanes_of(lanes) {
            while self.copies[lane].groups.len() > open_groups {
                let group = self.copies[lane].groups.pop_front().unwrap_or_default();
                group.into_iter().try_for_each(|copy| self.finish_copy(lane, copy, common))?;
            }
        }
        Ok(())
    }

    fn finish_copy(&self, lane: usize, copy: Copy, common: &mut Common<'_>) -> Result<()> {
        let now = common.shared.order.now(self.index);
        common.shared.fill(self.by(lane), now, copy.to, &copy.bytes)
    }

    fn arrive(&self, lanes: u32, at: Address, bytes: Option<Slot>, common: &mut Common<'_>) -> Result<()> {
        let clock = common.shared.order.release(self.index);
        for lane in lanes_of(lanes) {
            let bytes = bytes.map_or(0, |slot| self.get(slot)[lane] as u32);
            common.shared.use_barrier(self.by(lane), self.shared_address(at, lane))?;
            let is_complete = common.counting.arrive(self.shared_address(at, lane), bytes, &clock)?;
            common.changes += u64::from(is_complete);
        }
        Ok(())
    }

    /// The instruction may take its time: lanes that wait in vain are not asked again before a barrier has turned.
    fn try_wait(&mut self, lanes: u32, to: Slot, at: Address, parity: Slot, common: &mut Common<'_>) -> Result<Flow> {
        let mut passed = [0; WARP];
        let mut vain = None;
        for lane in lanes_of(lanes) {
            let address = self.shared_address(at, lane);
            common.shared.use_barrier(self.by(lane), address)?;
            match common.counting.passed(address, self.get(parity)[lane])? {
                Some(clock) => {
                    common.shared.order.acquire(self.index, clock);
                    passed[lane] = 1;
                }
                None => vain = Some(address),
            }
        }
        self.set(to, lanes, &passed);
        Ok(match vain {
            Some(barrier) => Flow::NextThenWait(Wait::Change { barrier, since: common.changes }),
            None => Flow::Next,
        })
    }

    fn copy_tensor(
        &self,
        lane: usize,
        to: Address,
        map: Address,
        coordinates: [Slot; 4],
        barrier: Address,
        common: &mut Common<'_>,
    ) -> Result<()> {
        let map_address = self.address(map, lane);
        let unknown = || Fault::Descriptor(format!("lane {lane}: there is no tensor map at {map_address:#x}"));
        let map = common.kernel.tensor_map(common.launch, map_address).ok_or_else(unknown)?;
        let (to, barrier) = (self.shared_address(to, lane), self.shared_address(barrier, lane));
        let by = Accessor { proxy: Proxy::Async, ..self.by(lane) };
        common.shared.use_barrier(by, barrier)?;
        common.shared.reserve(by, to, map.box_bytes(), 128)?;
        let bytes =
            map.read_box(lane, common.global, coordinates.map(|slot| self.get(slot)[lane] as u32 as i32), to)?;
        let when = common.shared.order.now(self.index);
        let clock = common.shared.order.release(self.index);
        common.tensor_copies.push_back(TensorCopy { by, when, clock, to, bytes, barrier });
        Ok(())
    }

    /// A warp's 16 rows of a product of its warpgroup.
    fn multiply(&mut self, product: Product, common: &mut Common<'_>) -> Result<()> {
        let Product { pc, a: of_shared, b: descriptor, adds } = product;
        let Op::Wgmma { of, d, a, transposed, .. } = &common.kernel.instructions[pc].op else { return Ok(()) };
        let registers = || d.iter().chain(a.registers()).copied();
        let a = match (*a, of_shared) {
            (WgmmaA::Shared(_), Some(descriptor)) => self.read_a(*of, descriptor, common)?,
            (WgmmaA::Registers(a), _) => a_matrix(*of, a.map(|slot| self.get_of_product(slot))),
            (WgmmaA::Shared(_), None) => return Ok(()),
        };
        for (block, d) in d.chunks_exact(4).enumerate() {
            let b = self.read_b(*of, descriptor, 8 * block, *transposed, common)?;
            let zeros = [0; WARP];
            let sums: [&Lanes; 4] =
                std::array::from_fn(|index| if adds { self.get_of_product(d[index]) } else { &zeros });
            let sums = multiply_add(&a, &b, sums);
            d.iter().zip(sums).for_each(|(&slot, values)| self.set_of_product(slot, values));
        }
        self.products.finish(registers());
        Ok(())
    }

    /// This warp's 16 rows of A.
    fn read_a(
        &self,
        of: MatrixType,
        descriptor: MatrixDescriptor,
        common: &mut Common<'_>,
    ) -> Result<[[f32; DEPTH]; ROWS]> {
        let by = Accessor { proxy: Proxy::Async, ..self.by(0) };
        let first_row = self.index % WARPS_OF_GROUP * ROWS;
        let mut a = [[0; DEPTH]; ROWS];
        for (row, a) in a.iter_mut().enumerate() {
            for (half, a) in a.chunks_exact_mut(8).enumerate() {
                let address = descriptor.chunk(first_row + row, 8 * half, false);
                let bytes: [u8; 16] = common.shared.read(by, address)?;
                for (a, bits) in a.iter_mut().zip(bytes.chunks_exact(2)) {
                    *a = u16::from_le_bytes([bits[0], bits[1]]);
                }
            }
        }
        Ok(of.to_f32(&a))
    }

    /// Eight columns of B.
    fn read_b(
        &self,
        of: MatrixType,
        descriptor: MatrixDescriptor,
        first_column: usize,
        transposed: bool,
        common: &mut Common<'_>,
    ) -> Result<[[f32; 8]; DEPTH]> {
        let by = Accessor { proxy: Proxy::Async, ..self.by(0) };
        let mut b = [[0; 8]; DEPTH];
        let chunks = if transposed { DEPTH } else { 2 * 8 };
        for chunk in 0..chunks {
            let (n, k) = if transposed { (first_column, chunk) } else { (first_column + chunk % 8, 8 * (chunk / 8)) };
            let bytes: [u8; 16] = common.shared.read(by, descriptor.chunk(n, k, transposed))?;
            for (index, bits) in bytes.chunks_exact(2).enumerate() {
                let value = u16::from_le_bytes([bits[0], bits[1]]);
                if transposed {
                    b[k][index] = value;
                } else {
                    b[k + index][n - first_column] = value;
                }
            }
        }
        Ok(of.to_f32(&b))
    }
}

/// The lanes whose predicate is true.
fn mask_of(predicate: &Lanes) -> u32 {
    predicate.iter().enumerate().fold(0, |mask, (lane, &value)| mask | u32::from(value != 0) << lane)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
