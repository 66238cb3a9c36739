//! How evenly the work of a plan lies on the device, by dealing its items out as they are launched.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Loads of the places for CTAs under one launch, in main-loop steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Balance {
    /// Of the place with most.
    pub(super) longest_steps: u64,
    /// Over all places, those without work included.
    pub(super) mean_steps: f64,
}

impl Balance {
    /// Deals CTAs of `steps` main-loop steps each, in launch order, out over `places`: round by round where the kernel is
    /// persistent, first place to last and back, else each to the place that is free first.
    pub(super) fn of(steps: impl Iterator<Item = u32>, places: u32, is_persistent: bool) -> Self {
        let places = places.max(1) as usize;
        let mut by_place = vec![0u64; places];
        let mut by_load: BinaryHeap<Reverse<u64>> = vec![Reverse(0); places].into();
        let (mut longest_steps, mut all_steps) = (0, 0u64);
        for (index, steps) in steps.enumerate() {
            let steps = u64::from(steps);
            let load = if is_persistent {
                let (round, place) = (index / places, index % places);
                let load = &mut by_place[if round % 2 == 0 { place } else { places - 1 - place }];
                *load += steps;
                *load
            } else {
                let mut least = by_load.peek_mut().expect("there is a place");
                least.0 += steps;
                least.0
            };
            longest_steps = longest_steps.max(load);
            all_steps += steps;
        }
        Self { longest_steps, mean_steps: all_steps as f64 / places as f64 }
    }

    /// One launch behind the other.
    pub(super) fn then(self, next: Self) -> Self {
        Self { longest_steps: self.longest_steps + next.longest_steps, mean_steps: self.mean_steps + next.mean_steps }
    }

    /// The longest load over the mean one: 1 where the work is even, and where there is none.
    pub(super) fn imbalance(self) -> f64 {
        if self.longest_steps == 0 { 1.0 } else { self.longest_steps as f64 / self.mean_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imbalance(steps: &[u32], places: u32, is_persistent: bool) -> f64 {
        Balance::of(steps.iter().copied(), places, is_persistent).imbalance()
    }

    #[test]
    fn even_work_is_balanced_and_idle_places_count() {
        for is_persistent in [false, true] {
            assert_eq!(imbalance(&[], 4, is_persistent), 1.0);
            assert_eq!(imbalance(&[5; 8], 4, is_persistent), 1.0);
            assert_eq!(imbalance(&[5], 4, is_persistent), 4.0);
            // The second wave has one item for four places: 10 steps where 25 / 4 would be even.
            assert_eq!(imbalance(&[5; 5], 4, is_persistent), 1.6);
        }
    }

    #[test]
    fn a_persistent_kernel_is_dealt_to_to_and_fro() {
        // In turn, these would be 7 and 5.
        assert_eq!(imbalance(&[4, 3, 3, 2], 2, true), 1.0);
        // 9 + 1 and 2 + 2; to whoever is free first, 9 and 2 + 2 + 1.
        assert_eq!(imbalance(&[9, 2, 2, 1], 2, true), 10.0 / 7.0);
        assert_eq!(imbalance(&[9, 2, 2, 1], 2, false), 9.0 / 7.0);
    }

    #[test]
    fn launches_follow_each_other() {
        let (long, short) = (Balance::of([6].into_iter(), 2, false), Balance::of([1, 1].into_iter(), 2, false));
        assert_eq!(long.then(short), Balance { longest_steps: 7, mean_steps: 4.0 });
    }
}
