//! A warp: 32 lanes that may go different ways. Lanes at the same instruction form a group; of the groups that can go on, the
//! one that is furthest behind does, so that they meet again where their ways do.

use crate::error::Fault;
use crate::instruction::Slot;
use crate::kernel::{Kernel, Special};
use crate::lanes::{Lanes, WARP};
use crate::tensor::MatrixDescriptor;
use std::cell::Cell;
use std::collections::VecDeque;

/// Lanes that are at the same instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) pc: usize,
    pub(crate) lanes: u32,
    pub(crate) wait: Wait,
}

/// What a group waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    None,
    /// Other lanes of the warp at the same instruction.
    Lanes,
    /// A numbered barrier.
    Barrier(u64),
    /// A barrier in shared memory, which has not changed since the CTA's count of changes was this.
    Change {
        barrier: u64,
        since: u64,
    },
}

/// An asynchronous copy that a lane has asked for.
#[derive(Clone, Debug)]
pub(crate) struct Copy {
    pub(crate) to: u64,
    pub(crate) bytes: Vec<u8>,
}

/// The asynchronous copies of a lane, oldest first. They arrive when the lane waits for them, and no earlier.
#[derive(Clone, Debug, Default)]
pub(crate) struct LaneCopies {
    pub(crate) open: Vec<Copy>,
    pub(crate) groups: VecDeque<Vec<Copy>>,
}

/// A matrix product of the warpgroup that a warp has asked for. The registers are read and written when it is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    /// Index of the instruction.
    pub(crate) pc: usize,
    /// Where A is, if that is in shared memory.
    pub(crate) a: Option<MatrixDescriptor>,
    pub(crate) b: MatrixDescriptor,
    /// Whether it is added to what the accumulators hold.
    pub(crate) adds: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Warp {
    pub(crate) index: usize,
    registers: Vec<Lanes>,
    pub(crate) groups: Vec<Group>,
    pub(crate) exited: u32,
    pub(crate) copies: [LaneCopies; WARP],
    pub(crate) products: Products,
}

/// Matrix products of the warpgroup, computed when they are waited for, and no earlier.
#[derive(Clone, Debug, Default)]
pub(crate) struct Products {
    pub(crate) open: Vec<Product>,
    pub(crate) groups: VecDeque<Vec<Product>>,
    /// Of each register: how many products under way read or write it.
    in_flight: Vec<u32>,
    /// Whether another instruction has accessed one of these.
    is_accessed: Cell<bool>,
    /// Registers that were written since the last fence.
    unfenced: Vec<bool>,
}

impl Products {
    /// A product with these registers is under way.
    ///
    /// # Errors
    /// One of them was written since the last fence.
    pub(crate) fn start(&mut self, product: Product, registers: impl Iterator<Item = Slot>) -> Result<(), Fault> {
        for slot in registers {
            if self.unfenced[slot as usize] {
                return Err(Fault::Product("a register was written since the last wgmma.fence"));
            }
            self.in_flight[slot as usize] += 1;
        }
        self.open.push(product);
        Ok(())
    }

    /// It has been computed.
    pub(crate) fn finish(&mut self, registers: impl Iterator<Item = Slot>) {
        registers.for_each(|slot| self.in_flight[slot as usize] -= 1);
    }

    pub(crate) fn fence(&mut self) {
        self.unfenced.fill(false);
    }

    fn access(&self, slot: Slot) {
        if self.in_flight[slot as usize] > 0 {
            self.is_accessed.set(true);
        }
    }

    /// # Errors
    /// An instruction has accessed a register of a product under way.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        if self.is_accessed.get() {
            return Err(Fault::Product("a register is accessed that a product under way reads or writes"));
        }
        Ok(())
    }
}

impl Warp {
    /// Warp `index` of a CTA of `threads` threads, `(cta, ctas)` its number and their count.
    pub(crate) fn new(kernel: &Kernel, index: usize, threads: u32, (cta, ctas): (u32, u32)) -> Self {
        let mut registers = vec![[0; WARP]; kernel.slots];
        for &(slot, value) in &kernel.constants {
            registers[slot as usize] = [value; WARP];
        }
        for &(slot, special) in &kernel.specials {
            registers[slot as usize] = std::array::from_fn(|lane| match special {
                Special::Thread => (WARP * index + lane) as u64,
                Special::Threads => u64::from(threads),
                Special::Cta => u64::from(cta),
                Special::Ctas => u64::from(ctas),
                Special::Lane => lane as u64,
                Special::Warp => index as u64,
                Special::Zero => 0,
                Special::One => 1,
            });
        }
        Self {
            index,
            registers,
            groups: vec![Group { pc: 0, lanes: u32::MAX, wait: Wait::None }],
            exited: 0,
            copies: std::array::from_fn(|_| LaneCopies::default()),
            products: Products {
                in_flight: vec![0; kernel.slots],
                unfenced: vec![false; kernel.slots],
                ..Products::default()
            },
        }
    }

    pub(crate) fn get(&self, slot: Slot) -> &Lanes {
        self.products.access(slot);
        &self.registers[slot as usize]
    }

    /// A register that is written.
    pub(crate) fn get_mut(&mut self, slot: Slot) -> &mut Lanes {
        self.products.access(slot);
        self.products.unfenced[slot as usize] = true;
        &mut self.registers[slot as usize]
    }

    /// Sets a register in some lanes.
    pub(crate) fn set(&mut self, slot: Slot, lanes: u32, values: &Lanes) {
        let register = self.get_mut(slot);
        if lanes == u32::MAX {
            *register = *values;
        } else {
            for (lane, (register, value)) in register.iter_mut().zip(values).enumerate() {
                if lanes >> lane & 1 == 1 {
                    *register = *value;
                }
            }
        }
    }

    /// A register of a product under way, for that product.
    pub(crate) fn get_of_product(&self, slot: Slot) -> &Lanes {
        &self.registers[slot as usize]
    }

    /// Sets an accumulator of a product under way.
    pub(crate) fn set_of_product(&mut self, slot: Slot, values: Lanes) {
        self.registers[slot as usize] = values;
    }

    /// Groups at the same instruction become one, which may then go on; and the group to run next, if one can.
    pub(crate) fn next_group(&mut self, changes: u64) -> Option<usize> {
        if self.groups.len() > 1 {
            self.groups.sort_by_key(|group| group.pc);
            self.groups.dedup_by(|later, earlier| {
                // Those that have come to a barrier wait there; the others may meet.
                let meet = |group: &Group| matches!(group.wait, Wait::None | Wait::Lanes);
                let is_met = later.pc == earlier.pc && meet(later) && meet(earlier);
                if is_met {
                    earlier.lanes |= later.lanes;
                    earlier.wait = Wait::None;
                }
                is_met
            });
        }
        self.groups.iter().position(|group| match group.wait {
            Wait::None => true,
            Wait::Lanes | Wait::Barrier(_) => false,
            Wait::Change { since, .. } => changes > since,
        })
    }

    pub(crate) fn has_exited(&self) -> bool {
        self.groups.is_empty()
    }
}
