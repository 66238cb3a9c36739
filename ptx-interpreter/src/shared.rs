//! Shared memory of a CTA. It knows of each byte whether there is something to be read, and of each two bytes which warps accessed
//! them last: an access that nothing orders behind another warp's is a race.
//!
//! What orders warps are barriers. Each warp has a vector clock: its own count of releases, and how much of the others' it has
//! acquired. (Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978; Mattern, "Virtual time and global
//! states of distributed systems", 1988.) Lanes of a warp share its clock: between them, what is at the same time is not ordered.

use crate::error::Fault;
use crate::global::check_alignment;
use crate::kernel::SHARED_BEGIN;
use crate::launch::Unset;

/// An access: which warp, at what time of its, which lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Event {
    time: u32,
    warp: u16,
    /// [`MANY`] where it is several.
    lane: u16,
}

/// Several lanes of a warp.
const MANY: u16 = u16::MAX;

/// Bytes whose accesses are told apart.
const GRANULE: usize = 2;

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

/// How much of each warp's work is done, as one warp or barrier knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Clock(Vec<u32>);

impl Clock {
    pub(crate) fn new(warps: usize) -> Self {
        Self(vec![0; warps])
    }

    pub(crate) fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, &other)| *own = other.max(*own));
    }
}

/// Who accesses shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accessor {
    pub(crate) warp: usize,
    pub(crate) lane: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    states: Vec<State>,
    warps: usize,
    /// What each warp knows.
    clocks: Vec<Clock>,
    /// Of each granule: the last write.
    writes: Vec<Event>,
    /// Of each granule and warp: the last read.
    reads: Vec<Event>,
}

impl Shared {
    pub(crate) fn new(bytes: usize, unset: Unset, warps: usize) -> Self {
        let granules = bytes.div_ceil(GRANULE);
        let clocks = (0..warps).map(|warp| {
            let mut clock = Clock::new(warps);
            // Its own is ahead of what the others know.
            clock.0[warp] = 1;
            clock
        });
        let (value, state) = match unset {
            Unset::Fault => (0, State::Unset),
            Unset::Reads(value) => (value, State::Set),
        };
        Self {
            bytes: vec![value; bytes],
            states: vec![state; bytes],
            warps,
            clocks: clocks.collect(),
            writes: vec![Event::default(); granules],
            reads: vec![Event::default(); granules * warps],
        }
    }

    /// The time of a warp.
    pub(crate) fn now(&self, warp: usize) -> u32 {
        self.clocks[warp].0[warp]
    }

    /// The end of a time of `warp`: what it has done so far is known to who joins the clock returned, and to its own lanes.
    pub(crate) fn release(&mut self, warp: usize) -> Clock {
        let released = self.clocks[warp].clone();
        self.clocks[warp].0[warp] += 1;
        released
    }

    /// What happens in `warp` from now on is behind what `clock` knows.
    pub(crate) fn acquire(&mut self, warp: usize, clock: &Clock) {
        self.clocks[warp].join(clock);
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
        let now = self.now(by.warp);
        for granule in at / GRANULE..(at + bytes).div_ceil(GRANULE) {
            self.check_behind_write(by, granule, "a read")?;
            let last = &mut self.reads[granule * self.warps + by.warp];
            let is_shared = last.time == now && last.lane != by.lane as u16;
            *last = Event { lane: if is_shared { MANY } else { by.lane as u16 }, ..by.at(now) };
        }
        into.copy_from_slice(&self.bytes[at..at + bytes]);
        Ok(())
    }

    /// Writes bytes, aligned to their number.
    pub(crate) fn write(&mut self, by: Accessor, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, bytes.len())?;
        self.check_no_copy(by.lane, address, at, bytes.len())?;
        self.begin_write(by, at, bytes.len(), "a write")?;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.states[at..at + bytes.len()].fill(State::Set);
        Ok(())
    }

    /// An asynchronous copy will write `bytes` bytes, a multiple of `alignment` from the start: until then they hold nothing.
    pub(crate) fn reserve(&mut self, by: Accessor, address: u64, bytes: usize, alignment: usize) -> Result<(), Fault> {
        check_alignment(by.lane, address, alignment)?;
        let at = self.find(by.lane, address, bytes)?;
        self.check_no_copy(by.lane, address, at, bytes)?;
        self.begin_write(by, at, bytes, "an asynchronous copy's write")?;
        self.states[at..at + bytes].fill(State::Pending);
        Ok(())
    }

    /// The copy is there, as written by its warp `when`: others read it behind a barrier that knows of this time.
    pub(crate) fn fill(&mut self, by: Accessor, when: u32, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let at = self.find(by.lane, address, bytes.len())?;
        self.writes[at / GRANULE..(at + bytes.len()).div_ceil(GRANULE)].fill(by.at(when));
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.states[at..at + bytes.len()].fill(State::Set);
        Ok(())
    }

    /// Eight bytes become a barrier.
    pub(crate) fn place_barrier(&mut self, by: Accessor, address: u64) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, 8)?;
        self.begin_write(by, at, 8, "the start of a barrier")?;
        self.states[at..at + 8].fill(State::Barrier);
        Ok(())
    }

    /// A barrier is used: behind its start.
    pub(crate) fn use_barrier(&self, by: Accessor, address: u64) -> Result<(), Fault> {
        let at = self.locate(by.lane, address, 8)?;
        self.check_behind_write(by, at / GRANULE, "the use of a barrier")
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

    fn begin_write(&mut self, by: Accessor, at: usize, bytes: usize, what: &'static str) -> Result<(), Fault> {
        let now = self.now(by.warp);
        for granule in at / GRANULE..(at + bytes).div_ceil(GRANULE) {
            self.check_behind_write(by, granule, what)?;
            let reads = &self.reads[granule * self.warps..][..self.warps];
            if let Some(read) = reads.iter().find(|read| !self.is_behind(by, **read)) {
                return Err(race(by, granule, what, "a read", *read));
            }
            self.writes[granule] = by.at(now);
        }
        Ok(())
    }

    fn check_behind_write(&self, by: Accessor, granule: usize, what: &'static str) -> Result<(), Fault> {
        let write = self.writes[granule];
        if self.is_behind(by, write) { Ok(()) } else { Err(race(by, granule, what, "a write", write)) }
    }

    /// Whether what a lane does now is behind what was done before.
    fn is_behind(&self, by: Accessor, before: Event) -> bool {
        if usize::from(before.warp) == by.warp {
            before.time < self.now(by.warp) || usize::from(before.lane) == by.lane
        } else {
            before.time <= self.clocks[by.warp].0[usize::from(before.warp)]
        }
    }
}

impl Accessor {
    fn at(self, time: u32) -> Event {
        Event { time, warp: self.warp as u16, lane: self.lane as u16 }
    }
}

fn race(by: Accessor, granule: usize, access: &'static str, before: &'static str, event: Event) -> Fault {
    let other = match event.lane {
        MANY => format!("{before} of lanes of warp {}", event.warp),
        lane => format!("{before} of lane {lane} of warp {}", event.warp),
    };
    Fault::Race { lane: by.lane, address: SHARED_BEGIN + (granule * GRANULE) as u64, access, other }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Accessor = Accessor { warp: 0, lane: 1 };
    const SECOND: Accessor = Accessor { warp: 1, lane: 2 };

    fn meet(shared: &mut Shared) {
        let [a, b] = [shared.release(0), shared.release(1)];
        shared.acquire(0, &b);
        shared.acquire(1, &a);
    }

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
        shared.fill(FIRST, shared.now(0), SHARED_BEGIN, &[7; 16]).unwrap();
        assert_eq!(shared.read::<4>(FIRST, SHARED_BEGIN).unwrap(), [7; 4]);
    }

    #[test]
    fn warps_that_no_barrier_orders_race() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        shared.write(FIRST, SHARED_BEGIN, &[5; 4]).unwrap();
        let error = shared.read::<4>(SECOND, SHARED_BEGIN).unwrap_err().to_string();
        assert_eq!(
            error,
            "lane 2: a read of shared memory at 0x400, which nothing orders behind a write of lane 1 of warp 0"
        );
        meet(&mut shared);
        shared.read::<4>(SECOND, SHARED_BEGIN).unwrap();
        let error = shared.write(FIRST, SHARED_BEGIN, &[6; 4]).unwrap_err().to_string();
        assert_eq!(
            error,
            "lane 1: a write of shared memory at 0x400, which nothing orders behind a read of lane 2 of warp 1"
        );
        meet(&mut shared);
        shared.write(FIRST, SHARED_BEGIN, &[6; 4]).unwrap();
        assert!(shared.write(SECOND, SHARED_BEGIN, &[6; 2]).is_err());
        shared.write(SECOND, SHARED_BEGIN + 4, &[6; 2]).unwrap();
        assert!(shared.reserve(FIRST, SHARED_BEGIN, 16, 16).is_err());
    }

    #[test]
    fn lanes_that_no_barrier_orders_race() {
        let mut shared = Shared::new(64, Unset::Fault, 1);
        let neighbour = Accessor { warp: 0, lane: 3 };
        shared.write(FIRST, SHARED_BEGIN, &[5; 4]).unwrap();
        shared.read::<4>(FIRST, SHARED_BEGIN).unwrap();
        let error = shared.read::<4>(neighbour, SHARED_BEGIN).unwrap_err().to_string();
        assert!(error.ends_with("nothing orders behind a write of lane 1 of warp 0"), "{error}");
        shared.release(0);
        shared.read::<4>(neighbour, SHARED_BEGIN).unwrap();
        shared.read::<4>(FIRST, SHARED_BEGIN).unwrap();
        let error = shared.write(neighbour, SHARED_BEGIN, &[6; 4]).unwrap_err().to_string();
        assert!(error.ends_with("nothing orders behind a read of lanes of warp 0"), "{error}");
        shared.release(0);
        shared.write(neighbour, SHARED_BEGIN, &[6; 4]).unwrap();
    }

    #[test]
    fn a_barrier_is_used_behind_its_start() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        shared.place_barrier(FIRST, SHARED_BEGIN).unwrap();
        assert!(shared.use_barrier(SECOND, SHARED_BEGIN).unwrap_err().to_string().contains("the use of a barrier"));
        meet(&mut shared);
        shared.use_barrier(SECOND, SHARED_BEGIN).unwrap();
    }

    #[test]
    fn a_barrier_is_no_memory() {
        let mut shared = Shared::new(64, Unset::Fault, 2);
        shared.place_barrier(FIRST, SHARED_BEGIN + 8).unwrap();
        assert!(shared.read::<4>(FIRST, SHARED_BEGIN + 8).unwrap_err().to_string().contains("a barrier lies"));
    }
}
