//! Packs and splits to the records of a plan: launch order, slots, page ids.

use super::cost::Split;
use super::forest::Forest;
use super::packs::Pack;
use super::{PlanParts, buffer};
use crate::{AttentionShape, DecodeBatch, Result};
use pat_abi::{DIRECT_SLOT, MergeRow, PackQuery, WorkItem};

/// `counts` is scratch, one entry per batch row.
pub(super) fn emit(
    shape: AttentionShape,
    batch: &DecodeBatch<'_>,
    forest: &Forest,
    packs: &[Pack],
    splits: &[Split],
    counts: &mut [u32],
) -> Result<PlanParts> {
    let sequences = |pack: &Pack| &forest.order()[pack.order_begin as usize..pack.order_end as usize];
    counts.fill(0);
    for (pack, split) in packs.iter().zip(splits) {
        for &sequence in sequences(pack) {
            counts[sequence as usize] += split.chunks;
        }
    }
    let mut parts = PlanParts::default();
    // From here on `counts` holds each sequence's next free slot.
    let mut slots = 0u64;
    for (sequence, count) in counts.iter_mut().enumerate() {
        let partials = std::mem::replace(count, slots as u32);
        if partials == 1 {
            *count = DIRECT_SLOT;
            continue;
        }
        let slot_begin = if partials == 0 { 0 } else { slots as u32 };
        parts.merges.push(MergeRow { sequence: sequence as u32, slot_begin, slot_count: partials, reserved: 0 });
        slots += u64::from(partials);
        buffer::checked_count("slots", slots)?;
    }
    parts.slot_count = slots as u32;

    let group = shape.group();
    for (index, (pack, split)) in packs.iter().zip(splits).enumerate() {
        let query_begin = parts.queries.len() as u32;
        for &sequence in sequences(pack) {
            let next = &mut counts[sequence as usize];
            parts.queries.push(PackQuery { sequence, slot: *next });
            if *next != DIRECT_SLOT {
                *next += split.chunks;
            }
        }
        let page_base = parts.pages.len() as u32;
        let run = pack.page_begin as usize..pack.page_end as usize;
        parts.pages.extend_from_slice(&batch.pages(pack.sequence as usize)[run]);
        let rows = pack.query_count() * group;
        for chunk in 0..split.chunks {
            let first_page = chunk * split.chunk_pages;
            let token_begin = first_page * batch.page_size();
            let token_count = (split.chunk_pages * batch.page_size()).min(pack.token_count - token_begin);
            for row_begin in (0..rows).step_by(split.variant.rows() as usize) {
                parts.items[split.variant.index()].push(WorkItem {
                    page_begin: page_base + first_page,
                    token_count,
                    query_begin,
                    row_begin,
                    row_count: (rows - row_begin).min(split.variant.rows()),
                    slot_offset: chunk,
                    pack: index as u32,
                    reserved: 0,
                });
            }
        }
        buffer::checked_count("queries", parts.queries.len() as u64)?;
        buffer::checked_count("pages", parts.pages.len() as u64)?;
    }
    for items in &mut parts.items {
        // Shared nodes first: they are compute-bound and hide behind the leaves' traffic. Then longest first, so that what
        // is left at the end is short. Row tiles of one chunk stay together: the second reads the first's KV from L2.
        items.sort_by_key(|item| {
            let shared = packs[item.pack as usize].query_count() > 1;
            (!shared, std::cmp::Reverse(item.token_count))
        });
    }
    Ok(parts)
}
