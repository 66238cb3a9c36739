//! How evenly the work of a plan lies on the device, by dealing its items out as they are launched.

use super::deal::Deal;
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
    /// Deals CTAs, given as runs of equal ones (main-loop steps of each, count), out over `places` in this order: as [`Deal`] does
    /// where the kernel is persistent, else each to the place that is free first.
    pub(super) fn of(ctas: impl Iterator<Item = (u64, u64)> + Clone, places: u32, is_persistent: bool) -> Self {
        let places = places.max(1);
        let all_steps: u64 = ctas.clone().map(|(steps, count)| steps * count).sum();
        let longest_steps = if is_persistent {
            Deal::default().loads(ctas, places).last().map_or(0, |most| most.load)
        } else {
            let mut by_load: BinaryHeap<Reverse<u64>> = vec![Reverse(0); places as usize].into();
            let mut longest = 0;
            for steps in ctas.flat_map(|(steps, count)| std::iter::repeat_n(steps, count as usize)) {
                let mut least = by_load.peek_mut().expect("there is a place");
                least.0 += steps;
                longest = longest.max(least.0);
            }
            longest
        };
        Self { longest_steps, mean_steps: all_steps as f64 / f64::from(places) }
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

    fn imbalance(steps: &[u64], places: u32, is_persistent: bool) -> f64 {
        Balance::of(steps.iter().map(|&steps| (steps, 1)), places, is_persistent).imbalance()
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
        let of = |ctas: (u64, u64)| Balance::of(std::iter::once(ctas), 2, false);
        let (long, short) = (of((6, 1)), of((1, 2)));
        assert_eq!(long.then(short), Balance { longest_steps: 7, mean_steps: 4.0 });
    }
}
