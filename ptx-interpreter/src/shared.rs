//! Shared memory of a CTA. It knows of each byte whether there is something to be read.

use crate::error::Fault;
use crate::global::check_alignment;
use crate::kernel::SHARED_BEGIN;
use crate::launch::Unset;
use crate::order::{Accessor, GRANULE, Order};
use std::ops::Range;

/// What a byte holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unset,
    /// An asynchronous copy will write it.
    Pending,
    Set,
    /// Part of a barrier.
    Barrier,
}

impl State {
    fn describe(self) -> &'static str {
        match self {
            Self::Unset => "which nothing has been written to",
            Self::Pending => "which an asynchronous copy is still writing",
            Self::Set => "which has been written",
            Self::Barrier => "where a barrier lies",
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    states: Vec<State>,
    pub(crate) order: Order,
}

impl Shared {
    pub(crate) fn new(bytes: usize, unset: Unset, warps: usize) -> Self {
        let (value, state) = match unset {
            Unset::Fault => (0, State::Unset),
            Unset::Reads(value) => (value, State::Set),
        };
        Self {
            bytes: vec![value; bytes],
            states: vec![state; bytes],
            order: Order::new(bytes.div_ceil(GRANULE), warps),
        }
    }

    /// Reads `N` bytes, aligned to `N`.
    pub(crate) fn read<const N: usize>(&mut self, by: Accessor, address: u64) -> Result<[u8; N], Fault> {
        let mut value = [0; N];
        self.read_into(by, address, &mut value)?;
        Ok(value)
    }

    /// Reads bytes, aligned to their number.
    pub(crate) fn read_into(&mut self, by: Accessor, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        let bytes = into.len();
        let at = self.locate(by.lane, address, bytes)?;
        if let Some(offset) = self.states[at..at + bytes].iter().position(|&state| state != State::Set) {
            let state = self.states[at + offset].describe();
            return Err(Fault::NotReadable { lane: by.lane, address: address + offset as u64, state });
        }
        self.order.read(by, granules(at, bytes))?;
        into.copy_from_slice(&self.bytes[at..at + bytes]);
        Ok(())
    }

    /// Writes bytes, aligned to their number.
    pub(crate) fn write(&mut self, by: Accessor, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, bytes.len())?;
        self.check_no_copy(by.lane, address, at, bytes.len())?;
        self.order.write(by, granules(at, bytes.len()), "a write")?;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.states[at..at + bytes.len()].fill(State::Set);
        Ok(())
    }

    /// An asynchronous copy will write `bytes` bytes, a multiple of `alignment` from the start: until then they hold nothing.
    pub(crate) fn reserve(&mut self, by: Accessor, address: u64, bytes: usize, alignment: usize) -> Result<(), Fault> {
        check_alignment(by.lane, address, alignment)?;
        let at = self.find(by.lane, address, bytes)?;
        self.check_no_copy(by.lane, address, at, bytes)?;
        self.order.write(by, granules(at, bytes), "an asynchronous copy's write")?;
        self.states[at..at + bytes].fill(State::Pending);
        Ok(())
    }

    /// The copy is there, as written by its warp `when`: others read it behind a barrier that knows of this time.
    pub(crate) fn fill(&mut self, by: Accessor, when: u32, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let at = self.find(by.lane, address, bytes.len())?;
        self.order.fill(by, when, granules(at, bytes.len()));
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.states[at..at + bytes.len()].fill(State::Set);
        Ok(())
    }

    /// Eight bytes become a barrier.
    pub(crate) fn place_barrier(&mut self, by: Accessor, address: u64) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, 8)?;
        self.order.write(by, granules(at, 8), "the start of a barrier")?;
        self.states[at..at + 8].fill(State::Barrier);
        Ok(())
    }

    /// A barrier is used: behind its start.
    pub(crate) fn use_barrier(&self, by: Accessor, address: u64) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, 8)?;
        self.order.check_use(by, at / GRANULE)
    }

    fn locate(&self, lane: usize, address: u64, bytes: usize) -> Result<usize, Fault> {
        check_alignment(lane, address, bytes)?;
        self.find(lane, address, bytes)
    }

    fn find(&self, lane: usize, address: u64, bytes: usize) -> Result<usize, Fault> {
        let end = SHARED_BEGIN + self.bytes.len() as u64;
        let is_inside = address >= SHARED_BEGIN && address.checked_add(bytes as u64).is_some_and(|last| last <= end);
        if is_inside {
            return Ok((address - SHARED_BEGIN) as usize);
        }
        Err(Fault::OutsideShared { lane, address, bytes, begin: SHARED_BEGIN, end })
    }

    fn check_no_copy(&self, lane: usize, address: u64, at: usize, bytes: usize) -> Result<(), Fault> {
        match self.states[at..at + bytes].iter().position(|&state| state == State::Pending) {
            Some(offset) => {
                let state = State::Pending.describe();
                Err(Fault::NotReadable { lane, address: address + offset as u64, state })
            }
            None => Ok(()),
        }
    }
}

fn granules(at: usize, bytes: usize) -> Range<usize> {
    at / GRANULE..(at + bytes).div_ceil(GRANULE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Accessor = Accessor::new(0, 1);

    #[test]
    fn only_what_was_written_can_be_read() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        let error = shared.read::<4>(FIRST, SHARED_BEGIN).unwrap_err().to_string();
        assert!(error.contains("nothing has been written"), "{error}");
        shared.write(FIRST, SHARED_BEGIN, &[5; 4]).unwrap();
        assert_eq!(shared.read::<4>(FIRST, SHARED_BEGIN).unwrap(), [5; 4]);
        assert!(
            shared
                .read::<8>(FIRST, SHARED_BEGIN)
                .unwrap_err()
                .to_string()
                .contains(&format!("{:#x}", SHARED_BEGIN + 4))
        );
        assert!(shared.read::<4>(FIRST, SHARED_BEGIN + 64).unwrap_err().to_string().contains("0x400 to 0x440"));
        assert!(shared.read::<4>(FIRST, 0).is_err());
        assert!(shared.read::<4>(FIRST, SHARED_BEGIN + 2).unwrap_err().to_string().contains("no multiple"));
    }

    #[test]
    fn memory_may_begin_with_garbage() {
        let mut shared = Shared::new(64, Unset::Reads(0xff), 2);
        assert_eq!(shared.read::<2>(FIRST, SHARED_BEGIN + 8).unwrap(), [0xff; 2]);
    }

    #[test]
    fn copies_under_way_are_neither_read_nor_written() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        shared.write(FIRST, SHARED_BEGIN, &[5; 8]).unwrap();
        shared.reserve(FIRST, SHARED_BEGIN, 16, 16).unwrap();
        assert!(shared.read::<4>(FIRST, SHARED_BEGIN).unwrap_err().to_string().contains("still writing"));
        assert!(shared.write(FIRST, SHARED_BEGIN, &[5; 4]).unwrap_err().to_string().contains("still writing"));
        assert!(shared.reserve(FIRST, SHARED_BEGIN, 16, 16).is_err());
        shared.fill(FIRST, shared.order.now(0), SHARED_BEGIN, &[7; 16]).unwrap();
        assert_eq!(shared.read::<4>(FIRST, SHARED_BEGIN).unwrap(), [7; 4]);
    }

    #[test]
    fn a_barrier_is_no_memory() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        shared.place_barrier(FIRST, SHARED_BEGIN + 8).unwrap();
        assert!(shared.read::<4>(FIRST, SHARED_BEGIN + 8).unwrap_err().to_string().contains("a barrier lies"));
    }
}
