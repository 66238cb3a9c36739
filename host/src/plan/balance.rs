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
    /// Deals CTAs of `steps` main-loop steps each, in launch order, out over `places`: in turn where the kernel is persistent
    /// (its CTAs step through the work at a fixed stride), else each to the place that is free first.
    pub(super) fn of(steps: impl Iterator<Item = u32>, places: u32, is_persistent: bool) -> Self {
        let places = places.max(1) as usize;
        let mut in_turn = vec![0u64; places];
        let mut by_load: BinaryHeap<Reverse<u64>> = vec![Reverse(0); places].into();
        let (mut longest_steps, mut all_steps) = (0, 0u64);
        for (index, steps) in steps.enumerate() {
            let steps = u64::from(steps);
            let load = if is_persistent {
                in_turn[index % places] += steps;
                in_turn[index % places]
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
    fn only_a_persistent_kernel_deals_in_turn() {
        // Longest first: 4 3 3 2 in turn gives 7 and 5; to whoever is free first, 4 + 2 and 3 + 3.
        assert_eq!(imbalance(&[4, 3, 3, 2], 2, true), 7.0 / 6.0);
        assert_eq!(imbalance(&[4, 3, 3, 2], 2, false), 1.0);
    }

    #[test]
    fn launches_follow_each_other() {
        let (long, short) = (Balance::of([6].into_iter(), 2, false), Balance::of([1, 1].into_iter(), 2, false));
        assert_eq!(long.then(short), Balance { longest_steps: 7, mean_steps: 4.0 });
    }
}
