//! Bounds of the plans that one set of buffers, and one captured graph, serves.

use super::buffer::Records;
use crate::{AttentionShape, DecodeBatch, DeviceProfile, Error, Result};
use pat_abi::{ItemQuery, MergeRow, PageMask, PlanHeader, WorkItem};

/// What the plans of a planner may need at most, so that device memory and launches can be sized once
/// ([`crate::Planner::with_capacity`], [`crate::cuda::PlanBuffers::for_capacity`]). Batches may have fewer rows, or empty
/// ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanCapacity {
    /// Rows of a batch.
    pub max_sequences: u32,
    /// Pages of all rows together, shared ones counted for each.
    pub max_pages: u32,
    /// Work items; at least `max_sequences`.
    pub max_items: u32,
    /// Partial slots; with 0 no stream is cut.
    pub max_slots: u32,
}

impl PlanCapacity {
    /// For batches of up to `max_sequences` rows with `max_pages` pages in all: as many items as it takes to keep every CTA slot
    /// of the device busy for several waves, and as many slots for small batches. Large ones fill the device uncut: they have a
    /// slot for what a sequence shares, one for its own tokens, and some for long sequences. Slots are memory
    /// ([`Self::partial_bytes`]).
    pub fn for_batches(max_sequences: u32, max_pages: u32, profile: &DeviceProfile) -> Self {
        let busy = profile.sm_count.saturating_mul(16);
        let max_items = max_sequences.saturating_add(busy);
        let shared_and_own = max_sequences.saturating_mul(2).saturating_add(profile.sm_count.saturating_mul(2));
        Self { max_sequences, max_pages, max_items, max_slots: shared_and_own.max(busy) }
    }

    /// Bytes of the largest plan.
    pub fn plan_bytes(&self) -> usize {
        // A page has an id, a mask and a first token. A row is a query of one item that is not cut, and of as many others as it
        // has slots.
        let queries = self.max_sequences as usize + self.max_slots as usize;
        let padding = 5 * 16;
        // Pages of one token have two headers.
        2 * size_of::<PlanHeader>()
            + self.max_items as usize * size_of::<WorkItem>()
            + queries * size_of::<ItemQuery>()
            + self.max_pages as usize * (2 * size_of::<u32>() + size_of::<PageMask>())
            + self.max_sequences as usize * size_of::<MergeRow>()
            + padding
    }

    /// Bytes of partial outputs and log-sum-exps of the largest plan.
    pub fn partial_bytes(&self, shape: AttentionShape) -> u64 {
        u64::from(self.max_slots) * shape.partial_bytes()
    }

    pub(super) fn validated(self) -> Result<Self> {
        if self.max_items < self.max_sequences {
            let expected = format!("at least max_sequences = {}", self.max_sequences);
            return Err(Error::invalid("capacity.max_items", self.max_items, expected));
        }
        Ok(self)
    }

    /// Refuses a batch that is too large.
    pub(super) fn check_batch(&self, batch: &DecodeBatch<'_>) -> Result<()> {
        let sequences = batch.sequence_count();
        let pages: u64 =
            (0..sequences).map(|sequence| u64::from(batch.length(sequence).div_ceil(batch.page_size()))).sum();
        let limits = [
            ("rows", sequences as u64, "max_sequences", self.max_sequences),
            ("pages", pages, "max_pages", self.max_pages),
        ];
        match limits.into_iter().find(|(_, count, _, limit)| *count > u64::from(*limit)) {
            None => Ok(()),
            Some((of, count, field, limit)) => {
                let expected = format!("at most capacity.{field} = {limit}");
                Err(Error::invalid("lengths", format!("those of {count} {of}"), expected))
            }
        }
    }

    /// Refuses a plan that is too large: one of a mode that leaves no choice.
    pub(super) fn check_records(&self, records: &Records) -> Result<()> {
        let counts = [
            ("max_items", records.items.len() as u64, self.max_items),
            ("max_slots", u64::from(records.slot_count), self.max_slots),
        ];
        match counts.into_iter().find(|(_, count, limit)| *count > u64::from(*limit)) {
            None => Ok(()),
            Some((field, count, limit)) => {
                let expected = format!("at least {count} for this batch, whose mode leaves no choice");
                Err(Error::invalid(format!("capacity.{field}"), limit, expected))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn the_largest_plan_is_counted_record_by_record() {
        let capacity = PlanCapacity { max_sequences: 3, max_pages: 1000, max_items: 50, max_slots: 700 };
        // Headers, items, queries, pages (id, mask, first token), merge rows; five sections that end at multiples of 16.
        assert_eq!(capacity.plan_bytes(), 2 * 192 + 50 * 32 + (3 + 700) * 8 + 1000 * 12 + 3 * 16 + 5 * 16);
        let shape = AttentionShape::new(8, 2, 64, Dtype::F16).unwrap();
        assert_eq!(capacity.partial_bytes(shape), 700 * 8 * (64 + 1) * 4);
    }
}
