//! Barriers: those of warps by number (`bar.sync`, `barrier.sync`), and those in shared memory that count arrivals and bytes
//! (`mbarrier`).

use crate::error::Fault;
use crate::order::Clock;
use std::collections::BTreeMap;

/// `bar.sync` of one number, while warps wait at it.
#[derive(Clone, Debug)]
struct Gathering {
    /// Threads that it waits for.
    threads: u32,
    /// The instruction at which warps wait, once one does; `None` in it where it is not an aligned one.
    place: Option<Option<usize>>,
    /// Who waits.
    warps: Vec<usize>,
    /// What those know that have arrived and gone on.
    passed: Vec<Clock>,
}

/// A warp that comes to a numbered barrier.
#[derive(Clone, Debug)]
pub(crate) enum Comer {
    /// It waits there.
    Waits(usize),
    /// It goes on; what it knows.
    Passes(Clock),
}

/// Who was at a numbered barrier when the last one came: the warps that waited, and what the others knew.
pub(crate) type Gathered = (Vec<usize>, Vec<Clock>);

/// The numbered barriers of a CTA.
#[derive(Clone, Debug, Default)]
pub(crate) struct NumberedBarriers {
    gathering: BTreeMap<u64, Gathering>,
}

/// Barriers that the hardware has per CTA.
const NUMBERS: u64 = 16;

impl NumberedBarriers {
    /// A warp arrives, `place` being the instruction where that is an aligned one. Who was there, if it is the last one.
    pub(crate) fn arrive(
        &mut self,
        id: u64,
        threads: u32,
        place: Option<usize>,
        comer: Comer,
    ) -> Result<Option<Gathered>, Fault> {
        let refuse = |what: String| Err(Fault::Barrier { id, what });
        if id >= NUMBERS {
            return refuse(format!("a CTA has barriers 0 to {}", NUMBERS - 1));
        }
        if threads == 0 || !threads.is_multiple_of(32) {
            return refuse(format!("{threads} threads are not whole warps"));
        }
        let empty = Gathering { threads, place: None, warps: Vec::new(), passed: Vec::new() };
        let gathering = self.gathering.entry(id).or_insert(empty);
        if gathering.threads != threads {
            return refuse(format!("waits for {threads} threads here, for {} elsewhere", gathering.threads));
        }
        match comer {
            Comer::Waits(_) if *gathering.place.get_or_insert(place) != place => {
                return refuse("an aligned instruction, and other warps come to another one".into());
            }
            Comer::Waits(warp) => gathering.warps.push(warp),
            Comer::Passes(clock) => gathering.passed.push(clock),
        }
        if ((gathering.warps.len() + gathering.passed.len()) as u32) * 32 < threads {
            return Ok(None);
        }
        Ok(self.gathering.remove(&id).map(|gathering| (gathering.warps, gathering.passed)))
    }
}

/// PTX ISA, "mbarrier": a phase is complete when all arrivals have come and as many bytes as were expected.
#[derive(Clone, Debug)]
pub(crate) struct CountingBarrier {
    count: u32,
    pending: u32,
    /// Bytes expected less bytes that came.
    bytes: i64,
    phase: u64,
    /// What those know that arrived.
    clock: Clock,
}

/// The largest count of arrivals.
const MAX_COUNT: u32 = (1 << 20) - 1;

/// The barriers of a CTA that lie in shared memory, by their addresses.
#[derive(Clone, Debug, Default)]
pub(crate) struct CountingBarriers {
    barriers: BTreeMap<u64, CountingBarrier>,
}

impl CountingBarriers {
    pub(crate) fn init(&mut self, address: u64, count: u32, clock: Clock) -> Result<(), Fault> {
        if count == 0 || count > MAX_COUNT {
            return Err(Fault::Barrier { id: address, what: format!("a count of {count}, not 1 to {MAX_COUNT}") });
        }
        self.barriers.insert(address, CountingBarrier { count, pending: count, bytes: 0, phase: 0, clock });
        Ok(())
    }

    fn find(&mut self, address: u64) -> Result<&mut CountingBarrier, Fault> {
        let none = || Fault::Barrier { id: address, what: "is not initialised".into() };
        self.barriers.get_mut(&address).ok_or_else(none)
    }

    /// An arrival that first expects `bytes` more. Whether the phase is complete.
    pub(crate) fn arrive(&mut self, address: u64, bytes: u32, clock: &Clock) -> Result<bool, Fault> {
        let barrier = self.find(address)?;
        if barrier.pending == 0 {
            let what = format!("more than {} arrivals in phase {}", barrier.count, barrier.phase);
            return Err(Fault::Barrier { id: address, what });
        }
        barrier.clock.join(clock);
        barrier.bytes += i64::from(bytes);
        barrier.pending -= 1;
        Ok(barrier.turn())
    }

    /// Bytes have come. Whether the phase is complete.
    pub(crate) fn receive(&mut self, address: u64, bytes: usize, clock: &Clock) -> Result<bool, Fault> {
        let barrier = self.find(address)?;
        barrier.clock.join(clock);
        barrier.bytes -= bytes as i64;
        Ok(barrier.turn())
    }

    /// What those know that arrived, if the phase of that parity is complete: the barrier is in the phase after it.
    pub(crate) fn passed(&mut self, address: u64, parity: u64) -> Result<Option<&Clock>, Fault> {
        let barrier = self.find(address)?;
        Ok((barrier.phase & 1 != parity & 1).then_some(&barrier.clock))
    }

    /// In words, for who waits in vain.
    pub(crate) fn describe(&self, address: u64) -> String {
        match self.barriers.get(&address) {
            Some(CountingBarrier { count, pending, bytes, phase, .. }) => {
                format!(
                    "barrier {address:#x} in phase {phase}: {pending} of {count} arrivals and {bytes} bytes are missing"
                )
            }
            None => format!("barrier {address:#x}, which is not initialised"),
        }
    }
}

impl CountingBarrier {
    fn turn(&mut self) -> bool {
        let is_complete = self.pending == 0 && self.bytes == 0;
        if is_complete {
            self.pending = self.count;
            self.phase += 1;
        }
        is_complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_barriers_let_go_when_all_are_there() {
        let mut barriers = NumberedBarriers::default();
        let mut arrive = |id, threads, place, comer| barriers.arrive(id, threads, place, comer);
        assert_eq!(arrive(1, 64, None, Comer::Waits(3)), Ok(None));
        assert!(arrive(1, 96, None, Comer::Waits(4)).unwrap_err().to_string().contains("for 64 elsewhere"));
        assert_eq!(arrive(0, 64, None, Comer::Waits(3)), Ok(None));
        assert_eq!(arrive(1, 64, None, Comer::Waits(5)), Ok(Some((vec![3, 5], Vec::new()))));
        assert_eq!(arrive(1, 32, None, Comer::Waits(5)), Ok(Some((vec![5], Vec::new()))));
        assert_eq!(arrive(2, 64, Some(70), Comer::Waits(0)), Ok(None));
        assert!(arrive(2, 64, Some(80), Comer::Waits(1)).unwrap_err().to_string().contains("come to another one"));
        assert!(arrive(2, 64, None, Comer::Waits(1)).is_err());
        assert_eq!(arrive(2, 64, Some(70), Comer::Waits(1)), Ok(Some((vec![0, 1], Vec::new()))));
        assert!(arrive(16, 32, None, Comer::Waits(5)).is_err() && arrive(2, 40, None, Comer::Waits(5)).is_err());
        // Who does not wait is not let go.
        let clock = Clock::new(2);
        assert_eq!(arrive(3, 64, None, Comer::Passes(clock.clone())), Ok(None));
        assert_eq!(arrive(3, 64, None, Comer::Waits(7)), Ok(Some((vec![7], vec![clock]))));
    }

    #[test]
    fn a_phase_waits_for_arrivals_and_bytes() {
        let clock = Clock::new(2);
        let mut barriers = CountingBarriers::default();
        barriers.init(0x400, 2, clock.clone()).unwrap();
        assert!(!barriers.arrive(0x400, 64, &clock).unwrap());
        // Phase 0 is under way; the one before it counts as passed.
        assert!(barriers.passed(0x400, 0).unwrap().is_none() && barriers.passed(0x400, 1).unwrap().is_some());
        assert!(!barriers.arrive(0x400, 0, &clock).unwrap());
        assert!(barriers.describe(0x400).contains("0 of 2 arrivals and 64 bytes are missing"));
        assert!(barriers.arrive(0x400, 0, &clock).unwrap_err().to_string().contains("more than 2 arrivals"));
        assert!(!barriers.receive(0x400, 48, &clock).unwrap() && barriers.receive(0x400, 16, &clock).unwrap());
        assert!(barriers.passed(0x400, 0).unwrap().is_some() && barriers.passed(0x400, 1).unwrap().is_none());
        assert!(barriers.arrive(0x408, 0, &clock).unwrap_err().to_string().contains("not initialised"));
        assert!(barriers.init(0x408, 0, clock).is_err());
    }
}
