//! Which place of the device serves which CTAs of a launch, and how much each place thus has to do.

/// Deals CTAs out as a persistent kernel takes its work (`work_index` in the wgmma kernels): round by round, first place to
/// last and back. Keeps its memory between calls.
#[derive(Clone, Debug, Default)]
pub(super) struct Deal {
    /// By place, and one more: what its load is above that of the place before it.
    rises: Vec<u64>,
    loads: Vec<EqualLoads>,
}

/// Places with the same load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EqualLoads {
    /// In the unit of the CTAs' loads.
    pub(super) load: u64,
    /// How many such places there are.
    pub(super) places: u32,
}

impl Deal {
    /// Makes room for that many places.
    pub(super) fn reserve(&mut self, places: u32) {
        let places = places as usize;
        self.rises.clear();
        self.rises.reserve(places + 1);
        self.loads.clear();
        self.loads.reserve(places);
    }

    /// The loads of all `places` (one at least) when `ctas`, runs of equal ones as (load of each, count), are dealt
    /// out in this order; smallest first. Takes a few steps per run and per place, however many CTAs there are.
    /// (Loads beyond 2^64 wrap.)
    pub(super) fn loads(&mut self, ctas: impl Iterator<Item = (u64, u64)>, places: u32) -> &[EqualLoads] {
        self.reserve(places);
        let count = u64::from(places);
        self.rises.resize(places as usize + 1, 0);
        let (mut index, mut everywhere) = (0u64, 0u64);
        for (load, mut left) in ctas {
            while left > 0 {
                let (round, first) = (index / count, index % count);
                if first == 0 && left >= count {
                    let rounds = left / count;
                    everywhere = everywhere.wrapping_add(rounds.wrapping_mul(load));
                    index += rounds * count;
                    left -= rounds * count;
                    continue;
                }
                let taken = left.min(count - first);
                let begin = if round.is_multiple_of(2) { first } else { count - first - taken };
                for (place, rise) in [(begin, load), (begin + taken, load.wrapping_neg())] {
                    let of_place = &mut self.rises[place as usize];
                    *of_place = of_place.wrapping_add(rise);
                }
                index += taken;
                left -= taken;
            }
        }
        let mut load = everywhere;
        for rise in &self.rises[..places as usize] {
            load = load.wrapping_add(*rise);
            match self.loads.last_mut() {
                Some(equal) if equal.load == load => equal.places += 1,
                _ => self.loads.push(EqualLoads { load, places: 1 }),
            }
        }
        self.loads.sort_unstable();
        &self.loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One CTA after the other, as the kernel takes them.
    fn one_by_one(ctas: &[(u64, u64)], places: u32) -> Vec<u64> {
        let places = places as usize;
        let mut loads = vec![0; places];
        let each = ctas.iter().flat_map(|&(load, count)| std::iter::repeat_n(load, count as usize));
        for (index, load) in each.enumerate() {
            let (round, place) = (index / places, index % places);
            loads[if round % 2 == 0 { place } else { places - 1 - place }] += load;
        }
        loads.sort_unstable();
        loads
    }

    #[test]
    fn the_second_round_goes_back() {
        let mut deal = Deal::default();
        let loads = deal.loads([(9, 1), (2, 2), (1, 1)].into_iter(), 2);
        assert_eq!(loads, [EqualLoads { load: 4, places: 1 }, EqualLoads { load: 10, places: 1 }]);
        assert_eq!(deal.loads(std::iter::empty(), 3), [EqualLoads { load: 0, places: 3 }]);
    }

    proptest! {
        #[test]
        fn runs_are_dealt_out_as_their_ctas_are(
            ctas in prop::collection::vec((0u64..1000, 0u64..60), 0..12),
            places in 1u32..20,
        ) {
            let mut deal = Deal::default();
            let loads = deal.loads(ctas.iter().copied(), places);
            let by_place: Vec<_> =
                loads.iter().flat_map(|equal| std::iter::repeat_n(equal.load, equal.places as usize)).collect();
            prop_assert_eq!(by_place, one_by_one(&ctas, places));
        }
    }
}
