//! What orders accesses to shared memory: an access that nothing orders behind another lane's is a race.
//!
//! What orders warps are barriers. Each warp has a vector clock: its own count of releases, and how much of the others' it has
//! acquired. (Lamport, "Time, clocks, and the ordering of events in a distributed system", 1978; Mattern, "Virtual time and
//! global states of distributed systems", 1988.) Lanes of a warp share its clock: between them, what is at the same time is not
//! ordered.
//!
//! TMA and wgmma access memory through the async proxy. What was written through the generic one they see behind a fence only,
//! which the writer executes before the barrier or the reader behind it. PTX ISA, "Async proxy" and "membar / fence".

use crate::error::Fault;
use crate::kernel::SHARED_BEGIN;
use std::ops::Range;

/// Bytes whose accesses are told apart.
pub(crate) const GRANULE: usize = 2;

/// How memory is accessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Proxy {
    #[default]
    Generic,
    Async,
}

/// What a fence makes visible to the async proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fence {
    /// Everything.
    Proxy,
    /// Barriers that were initialised.
    Barriers,
}

/// Who accesses shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accessor {
    pub(crate) warp: usize,
    pub(crate) lane: usize,
    pub(crate) proxy: Proxy,
}

/// An access: which warp, at what time of its, which lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Event {
    /// 0 where there was none.
    time: u32,
    warp: u16,
    /// [`MANY`] where it is several.
    lane: u8,
    proxy: Proxy,
}

/// Several lanes of a warp.
const MANY: u8 = u8::MAX;

impl Accessor {
    pub(crate) const fn new(warp: usize, lane: usize) -> Self {
        Self { warp, lane, proxy: Proxy::Generic }
    }

    fn at(self, time: u32) -> Event {
        Event { time, warp: self.warp as u16, lane: self.lane as u8, proxy: self.proxy }
    }
}

impl Event {
    fn describe(self, what: &str) -> String {
        match self.lane {
            MANY => format!("{what} of lanes of warp {}", self.warp),
            lane => format!("{what} of lane {lane} of warp {}", self.warp),
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

    fn covers(&self, event: Event) -> bool {
        event.time <= self.0[usize::from(event.warp)]
    }
}

/// The fences of a warp: at which of its times, and what it knew at the last one.
#[derive(Clone, Debug)]
struct Fences {
    times: Vec<u32>,
    known: Clock,
}

/// Who accessed what last, and what each warp knows of it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// Of each warp.
    clocks: Vec<Clock>,
    proxy_fences: Vec<Fences>,
    barrier_fences: Vec<Fences>,
    /// Of each granule: the last write.
    writes: Vec<Event>,
    /// Of each granule and warp: the last read.
    reads: Vec<Event>,
}

impl Order {
    pub(crate) fn new(granules: usize, warps: usize) -> Self {
        let clocks = (0..warps).map(|warp| {
            let mut clock = Clock::new(warps);
            // Its own is ahead of what the others know.
            clock.0[warp] = 1;
            clock
        });
        let fences = vec![Fences { times: Vec::new(), known: Clock::new(warps) }; warps];
        Self {
            clocks: clocks.collect(),
            proxy_fences: fences.clone(),
            barrier_fences: fences,
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

    /// The async proxy sees what `warp` knows of.
    pub(crate) fn fence(&mut self, warp: usize, fence: Fence) {
        let fences = match fence {
            Fence::Proxy => &mut self.proxy_fences,
            Fence::Barriers => &mut self.barrier_fences,
        };
        let known = self.clocks[warp].clone();
        fences[warp].times.push(known.0[warp]);
        fences[warp].known = known;
    }

    /// A read of these granules.
    pub(crate) fn read(&mut self, by: Accessor, granules: Range<usize>) -> Result<(), Fault> {
        let event = by.at(self.now(by.warp));
        for granule in granules {
            self.check_behind_write(by, granule, "a read")?;
            let last = &mut self.reads[granule * self.clocks.len() + by.warp];
            let is_shared = last.time == event.time && last.lane != event.lane;
            *last = if is_shared { Event { lane: MANY, ..event } } else { event };
        }
        Ok(())
    }

    /// A write of these granules.
    pub(crate) fn write(&mut self, by: Accessor, granules: Range<usize>, what: &'static str) -> Result<(), Fault> {
        let event = by.at(self.now(by.warp));
        for granule in granules {
            self.check_behind_write(by, granule, what)?;
            let reads = &self.reads[granule * self.clocks.len()..][..self.clocks.len()];
            if let Some(read) = reads.iter().find(|read| !self.is_behind(by, **read)) {
                return Err(race(by, granule, what, read.describe("a read")));
            }
            self.writes[granule] = event;
        }
        Ok(())
    }

    /// The write of a copy, as its warp's at the time `when`.
    pub(crate) fn fill(&mut self, by: Accessor, when: u32, granules: Range<usize>) {
        self.writes[granules].fill(by.at(when));
    }

    /// The use of a barrier that begins at a granule.
    pub(crate) fn check_use(&self, by: Accessor, granule: usize) -> Result<(), Fault> {
        let (start, what) = (self.writes[granule], "the use of a barrier");
        if !self.is_behind(by, start) {
            return Err(race(by, granule, what, start.describe("its start")));
        }
        let is_seen = self.is_fenced(by, start, &self.barrier_fences) || self.is_fenced(by, start, &self.proxy_fences);
        if is_seen { Ok(()) } else { Err(unfenced(by, granule, what, start.describe("its start"))) }
    }

    fn check_behind_write(&self, by: Accessor, granule: usize, what: &'static str) -> Result<(), Fault> {
        let write = self.writes[granule];
        if !self.is_behind(by, write) {
            return Err(race(by, granule, what, write.describe("a write")));
        }
        if !self.is_fenced(by, write, &self.proxy_fences) {
            return Err(unfenced(by, granule, what, write.describe("a write")));
        }
        Ok(())
    }

    /// Whether what a lane does now is behind what was done before.
    fn is_behind(&self, by: Accessor, before: Event) -> bool {
        if usize::from(before.warp) == by.warp {
            before.time < self.now(by.warp) || usize::from(before.lane) == by.lane
        } else {
            self.clocks[by.warp].covers(before)
        }
    }

    /// Whether a write before is visible through the proxy of `by`.
    fn is_fenced(&self, by: Accessor, before: Event, fences: &[Fences]) -> bool {
        if by.proxy == Proxy::Generic || before.proxy == Proxy::Async || before.time == 0 {
            return true;
        }
        let of_writer = &fences[usize::from(before.warp)].times;
        let next = of_writer.partition_point(|&time| time < before.time);
        let is_known = |&time: &u32| self.clocks[by.warp].covers(Event { time, ..before });
        of_writer.get(next).is_some_and(is_known) || fences[by.warp].known.covers(before)
    }
}

fn address(granule: usize) -> u64 {
    SHARED_BEGIN + (granule * GRANULE) as u64
}

fn race(by: Accessor, granule: usize, access: &'static str, other: String) -> Fault {
    Fault::Race { lane: by.lane, address: address(granule), access, other }
}

fn unfenced(by: Accessor, granule: usize, access: &'static str, other: String) -> Fault {
    Fault::Unfenced { lane: by.lane, address: address(granule), access, other }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Accessor = Accessor::new(0, 1);
    const SECOND: Accessor = Accessor::new(1, 2);

    fn meet(order: &mut Order) {
        let [a, b] = [order.release(0), order.release(1)];
        order.acquire(0, &b);
        order.acquire(1, &a);
    }

    #[test]
    fn warps_that_no_barrier_orders_race() {
        let mut order = Order::new(8, 2);
        order.write(FIRST, 0..2, "a write").unwrap();
        let error = order.read(SECOND, 1..3).unwrap_err().to_string();
        assert_eq!(
            error,
            "lane 2: a read of shared memory at 0x402, which nothing orders behind a write of lane 1 of warp 0"
        );
        meet(&mut order);
        order.read(SECOND, 0..2).unwrap();
        let error = order.write(FIRST, 0..2, "a write").unwrap_err().to_string();
        assert_eq!(
            error,
            "lane 1: a write of shared memory at 0x400, which nothing orders behind a read of lane 2 of warp 1"
        );
        meet(&mut order);
        order.write(FIRST, 0..2, "a write").unwrap();
        assert!(order.write(SECOND, 1..2, "a write").is_err());
        order.write(SECOND, 2..3, "a write").unwrap();
        assert!(order.write(FIRST, 0..8, "a copy").is_err());
    }

    #[test]
    fn lanes_that_no_barrier_orders_race() {
        let mut order = Order::new(8, 1);
        let neighbour = Accessor::new(0, 3);
        order.write(FIRST, 0..2, "a write").unwrap();
        order.read(FIRST, 0..2).unwrap();
        let error = order.read(neighbour, 0..2).unwrap_err().to_string();
        assert!(error.ends_with("nothing orders behind a write of lane 1 of warp 0"), "{error}");
        order.release(0);
        order.read(neighbour, 0..2).unwrap();
        order.read(FIRST, 0..2).unwrap();
        let error = order.write(neighbour, 0..2, "a write").unwrap_err().to_string();
        assert!(error.ends_with("nothing orders behind a read of lanes of warp 0"), "{error}");
        order.release(0);
        order.write(neighbour, 0..2, "a write").unwrap();
    }

    #[test]
    fn the_async_proxy_sees_what_was_fenced() {
        let through = |accessor: Accessor| Accessor { proxy: Proxy::Async, ..accessor };
        // By the writer before the barrier, by the reader behind it, or not at all.
        for (fence_before, fence_behind) in [(true, false), (false, true), (false, false)] {
            let mut order = Order::new(8, 2);
            order.write(FIRST, 0..2, "a write").unwrap();
            if fence_before {
                order.fence(0, Fence::Proxy);
            }
            meet(&mut order);
            if fence_behind {
                order.fence(1, Fence::Proxy);
            }
            let read = order.read(through(SECOND), 0..2);
            assert_eq!(read.is_ok(), fence_before || fence_behind, "{read:?}");
            if let Err(error) = read {
                assert!(
                    error.to_string().contains("no proxy fence stands behind a write of lane 1 of warp 0"),
                    "{error}"
                );
            }
            // What the async proxy has written, everybody sees.
            meet(&mut order);
            order.write(through(SECOND), 4..6, "a copy").unwrap();
            meet(&mut order);
            order.read(FIRST, 4..6).unwrap();
            order.read(through(FIRST), 4..6).unwrap();
        }
    }

    #[test]
    fn barriers_have_a_fence_of_their_own() {
        let mut order = Order::new(8, 1);
        let copier = Accessor { proxy: Proxy::Async, ..FIRST };
        order.write(FIRST, 0..4, "a start").unwrap();
        assert!(order.check_use(copier, 0).is_err());
        order.fence(0, Fence::Barriers);
        order.check_use(copier, 0).unwrap();
        assert!(order.read(copier, 0..4).is_err());
    }
}
