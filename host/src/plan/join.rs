//! One plan of two: of runs of pages and of single pages.

use super::Plan;
use super::buffer::{checked_count, first_item, items_offset, write_headers};
use super::cost::Prediction;
use crate::{DecodeBatch, DeviceProfile, Problem, Result};
use pat_abi::{
    DIRECT_SLOT, ItemQuery, MAX_TILE_VARIANTS, MergeRow, NO_MASKS, PLAN_MAGIC, PageMask, PlanHeader, RUN_PAGES,
    TileVariant, VariantItems, WorkItem,
};
use std::cmp::Reverse;
use std::sync::Arc;

/// Bytes of a plan that are written one section behind the other.
struct Sections<'a> {
    rest: &'a mut [u8],
    offset: usize,
}

impl<'a> Sections<'a> {
    /// `count` records at the next multiple of 16, zeros in front of them; and where they begin.
    fn take<T: bytemuck::Pod>(&mut self, count: usize) -> (&'a mut [T], u32) {
        let padding = self.offset.next_multiple_of(16) - self.offset;
        let bytes = count * size_of::<T>();
        let (before, behind) = std::mem::take(&mut self.rest).split_at_mut(padding);
        before.fill(0);
        let (section, rest) = behind.split_at_mut(bytes);
        self.rest = rest;
        let begin = self.offset + padding;
        self.offset = begin + bytes;
        (bytemuck::cast_slice_mut(section), begin as u32)
    }
}

impl Plan {
    /// Makes this the plan of a batch whose runs and single pages `runs` and `singles` are the plans of. Rows that are in both
    /// are merged. `slots` is memory.
    ///
    /// # Errors
    /// An offset or count does not fit its record; the plan is as before.
    pub(super) fn join(
        &mut self,
        (problem, profile): (Problem, &Arc<DeviceProfile>),
        batch: &DecodeBatch<'_>,
        (runs, singles): (&Plan, &Plan),
        prediction: Prediction,
        slots: &mut Vec<u32>,
    ) -> Result<()> {
        let both = [runs, singles];
        let sum = |of: fn(&PlanHeader) -> u32| both.iter().map(|plan| u64::from(of(plan.header()))).sum::<u64>();
        let item_count = checked_count("items", sum(|header| header.item_count))?;
        checked_count("items times KV heads", u64::from(item_count) * u64::from(problem.shape().kv_heads()))?;
        let query_count = checked_count("queries", sum(|header| header.query_count))?;
        let page_count = checked_count("pages", sum(|header| header.page_count))?;
        let mask_count = checked_count("masks", sum(|header| header.mask_count))?;
        // By row its partials.
        slots.clear();
        slots.resize(batch.sequence_count(), 0);
        for query in both.iter().flat_map(|plan| plan.queries()) {
            slots[query.query_token as usize] += 1;
        }
        let merge_count = slots.iter().filter(|count| **count != 1).count() as u32;
        let slot_count: u64 = slots.iter().filter(|count| **count > 1).map(|count| u64::from(*count)).sum();
        let slot_count = checked_count("slots", slot_count)?;
        let page_size = problem.page_size();
        let align = |bytes: usize| bytes.next_multiple_of(16);
        let total_bytes = items_offset(page_size)
            + align(item_count as usize * size_of::<WorkItem>())
            + align(query_count as usize * size_of::<ItemQuery>())
            + align(page_count as usize * size_of::<u32>())
            + align(merge_count as usize * size_of::<MergeRow>())
            + align(mask_count as usize * size_of::<PageMask>());
        checked_count("bytes", total_bytes as u64)?;

        self.resize(total_bytes);
        let (headers, sections) = self.bytes_mut().split_at_mut(items_offset(page_size));
        let mut sections = Sections { rest: sections, offset: items_offset(page_size) };
        let (items, _) = sections.take::<WorkItem>(item_count as usize);
        let (queries, queries_offset_bytes) = sections.take::<ItemQuery>(query_count as usize);
        let (pages, pages_offset_bytes) = sections.take::<u32>(page_count as usize);
        let (merges, merges_offset_bytes) = sections.take::<MergeRow>(merge_count as usize);
        let (masks, masks_offset_bytes) = sections.take::<PageMask>(mask_count as usize);
        let (_, words_offset_bytes) = sections.take::<u32>(0);
        let mut header = PlanHeader {
            magic: PLAN_MAGIC,
            total_bytes: total_bytes as u32,
            sequence_count: batch.sequence_count() as u32,
            slot_count,
            queries_offset_bytes,
            pages_offset_bytes,
            masks_offset_bytes,
            merges_offset_bytes,
            item_count,
            query_count,
            page_count,
            mask_count,
            merge_count,
            page_size,
            words_offset_bytes,
            word_count: 0,
            variants: [VariantItems::default(); MAX_TILE_VARIANTS],
        };
        let mut in_runs = [VariantItems::default(); MAX_TILE_VARIANTS];
        // Streams, queries and masks of the runs stand in front of the others'.
        let of_runs = runs.header();
        let moved = |item: &WorkItem| WorkItem {
            page_begin: item.page_begin + of_runs.page_count,
            query_begin: item.query_begin + of_runs.query_count,
            mask_begin: if item.mask_begin == NO_MASKS { NO_MASKS } else { item.mask_begin + of_runs.mask_count },
            ..*item
        };
        let in_run = |item: &WorkItem| WorkItem { run_pages: RUN_PAGES as u16, ..*item };
        let mut end = 0;
        for variant in TileVariant::ALL {
            let [run_items, single_items] = both.map(|plan| plan.variant_items(variant));
            for (place, item) in
                items[end..].iter_mut().zip(single_items.iter().map(moved).chain(run_items.iter().map(in_run)))
            {
                *place = item;
            }
            let mut next = |items: &[WorkItem]| {
                let begin = first_item(page_size) + end as u32;
                end += items.len();
                VariantItems { begin, count: items.len() as u32 }
            };
            header.variants[variant.index()] = next(single_items);
            in_runs[variant.index()] = next(run_items);
        }
        write_headers(headers, &header, in_runs);
        copy_both(pages, both.map(Plan::pages));
        copy_both(masks, both.map(Plan::all_masks));
        copy_both(queries, both.map(Plan::queries));

        let mut rows = merges.iter_mut();
        let mut slot_begin = 0;
        for (sequence, slot) in (0u32..).zip(slots.iter_mut()) {
            let slot_count = std::mem::replace(slot, DIRECT_SLOT);
            if slot_count == 1 {
                continue;
            }
            let begin = if slot_count == 0 { 0 } else { slot_begin };
            *slot = begin;
            slot_begin += slot_count;
            if let Some(row) = rows.next() {
                *row = MergeRow { sequence, slot_begin: begin, slot_count, reserved: 0 };
            }
        }
        merges.sort_unstable_by_key(|row| (Reverse(row.slot_count), row.sequence));
        for query in queries {
            let next = &mut slots[query.query_token as usize];
            query.slot = *next;
            if *next != DIRECT_SLOT {
                *next += 1;
            }
        }
        self.take_over((problem, profile), batch.num_pages(), both, prediction);
        Ok(())
    }
}

fn copy_both<T: Copy>(to: &mut [T], [first, second]: [&[T]; 2]) {
    let (front, back) = to.split_at_mut(first.len());
    front.copy_from_slice(first);
    back.copy_from_slice(second);
}
