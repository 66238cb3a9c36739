//! What every plan must be, and random forests to hold plans to it.

use pat_abi::{DIRECT_SLOT, NONE, PageMask, TileVariant};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, Plan, Reach};
use pat_workloads::OwnedBatch;
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use std::collections::HashMap;

/// Up to 64 sequences of up to 64 pages: continuations, copies and cuts of earlier ones, of uneven depth; lengths around
/// page borders, and 0.
///
/// # Panics
/// Never.
pub fn random_forest(rng: &mut impl Rng) -> OwnedBatch {
    let page_size = *[1u32, 16, 32, 64].choose(rng).expect("not empty");
    let mut next_page = 0;
    let mut tables: Vec<Vec<u32>> = Vec::new();
    let mut lengths = Vec::new();
    for _ in 0..rng.random_range(1..=64) {
        let parent = tables.choose(rng).cloned().unwrap_or_default();
        let mut table = if rng.random_bool(0.8) { parent } else { Vec::new() };
        table.truncate(rng.random_range(0..=table.len()));
        let own = if rng.random_bool(0.2) { 0 } else { rng.random_range(0..=64 - table.len()) };
        table.extend((0..own as u32).map(|i| next_page + i));
        next_page += own as u32;
        let full = table.len() as u32 * page_size;
        let missing = *[0, 1, page_size - 1, page_size / 2].choose(rng).expect("not empty");
        lengths.push(if missing < page_size { full.saturating_sub(missing) } else { full });
        tables.push(table);
    }
    let mut ids: Vec<u32> = (0..next_page + 2).collect();
    ids.shuffle(rng);
    for table in &mut tables {
        table.iter_mut().for_each(|page| *page = ids[*page as usize]);
        table.push(u32::MAX);
    }
    OwnedBatch { page_size, num_pages: next_page + 2, lengths, block_tables: tables }
}

/// A partial of one row: its slot, its pages, its tokens, and those at the front of its pages that the row does not see.
type Piece = (u32, Vec<u32>, u32, u32);

/// Invariants 1 to 3: every (sequence, token, head of the group) is covered once, as far as it is within the plan's reach; every slot is
/// written once; items fit their tile, their run and the pool.
///
/// # Panics
/// One does not hold.
pub fn check(plan: &Plan, batch: &OwnedBatch, shape: AttentionShape) {
    let group = shape.group();
    let page_size = batch.page_size;
    // By (sequence, head in group); together the pieces of a row hold the pages of its block table.
    let mut pieces: HashMap<(u32, u32), Vec<Piece>> = HashMap::new();
    for variant in TileVariant::ALL {
        for item in plan.variant_items(variant) {
            assert!(item.token_count >= 1);
            assert_eq!(item.kv_limit_begin, NONE);
            assert!((1..=variant.rows()).contains(&item.row_count));
            let pages = item.page_begin as usize..(item.page_begin + item.token_count.div_ceil(page_size)) as usize;
            let pages = plan.pages()[pages].to_vec();
            assert!(pages.iter().all(|&page| page < batch.num_pages));
            let masks = plan.masks(item);
            if !masks.is_empty() {
                assert!(item.token_count.is_multiple_of(page_size));
                assert!(masks.iter().all(|m| m.row_end() <= item.row_count || m.row_end() == PageMask::ALL_ROWS));
                assert!(masks.iter().all(|m| m.token_end() <= page_size));
            }
            let first_tokens = plan.first_tokens(item);
            let reach = plan.problem().visibility().reach;
            let divides_pages = match reach {
                Reach::Full => false,
                Reach::Window(_) => true,
                Reach::Chunk(tokens) => !tokens.is_multiple_of(page_size),
            };
            assert_eq!(item.first_token_begin, if divides_pages { item.mask_begin } else { NONE });
            assert!(first_tokens.iter().zip(masks).all(|(&first, mask)| first < mask.token_end()));
            for row in 0..item.row_count {
                let query = plan.queries()[(item.query_begin + row / group) as usize];
                let (mut own, mut tokens, mut hidden) = (pages.clone(), item.token_count, 0);
                if !masks.is_empty() {
                    let reads = |m: &PageMask| m.has_row(row);
                    own = pages.iter().zip(masks).filter(|(_, m)| reads(m)).map(|(&page, _)| page).collect();
                    hidden = first_tokens.iter().zip(masks).filter(|(_, m)| reads(m)).map(|(first, _)| first).sum();
                    tokens = masks.iter().filter(|m| reads(m)).map(|m| m.token_end()).sum::<u32>() - hidden;
                    // Only the last page may be partial, and only of the first may tokens be hidden.
                    assert_eq!(own.len() as u32, (hidden + tokens).div_ceil(page_size));
                }
                assert!(tokens > 0, "a row without a token");
                pieces.entry((query.query_token, row % group)).or_default().push((query.slot, own, tokens, hidden));
            }
        }
    }
    let merges: HashMap<u32, _> = plan.merges().iter().map(|merge| (merge.sequence, *merge)).collect();
    assert_eq!(merges.len(), plan.merges().len());
    assert!(plan.merges().is_sorted_by_key(|merge| (std::cmp::Reverse(merge.slot_count), merge.sequence)));
    let mut slots_seen = vec![false; plan.header().slot_count as usize];
    for (sequence, &length) in batch.lengths.iter().enumerate() {
        let merge = merges.get(&(sequence as u32));
        if length == 0 {
            assert_eq!(merge.expect("a merge row").slot_count, 0);
            assert!(!pieces.contains_key(&(sequence as u32, 0)));
            continue;
        }
        for head in 0..group {
            let mut of_row = pieces.remove(&(sequence as u32, head)).expect("a row nobody computes");
            of_row.sort();
            match merge {
                None => assert_eq!(of_row.iter().map(|p| p.0).collect::<Vec<_>>(), [DIRECT_SLOT]),
                Some(merge) => {
                    let slots: Vec<_> = of_row.iter().map(|p| p.0).collect();
                    let expected: Vec<_> = (merge.slot_begin..merge.slot_begin + merge.slot_count).collect();
                    assert_eq!(slots, expected);
                    assert!(slots.len() >= 2);
                    if head == 0 {
                        for slot in slots {
                            assert!(!std::mem::replace(&mut slots_seen[slot as usize], true), "slot {slot} twice");
                        }
                    }
                }
            }
            let first_token = plan.problem().visibility().reach.first_token(length - 1);
            let tokens: u32 = of_row.iter().map(|piece| piece.2).sum();
            assert_eq!(tokens, length - first_token, "sequence {sequence}");
            let hidden: u32 = of_row.iter().map(|piece| piece.3).sum();
            assert_eq!(hidden, first_token % page_size, "sequence {sequence}");
            // An item may hold its runs in any order.
            let mut pages: Vec<u32> = of_row.iter().flat_map(|piece| piece.1.clone()).collect();
            let in_window = (first_token / page_size) as usize..length.div_ceil(page_size) as usize;
            let mut expected = batch.block_tables[sequence][in_window].to_vec();
            pages.sort_unstable();
            expected.sort_unstable();
            assert_eq!(pages, expected);
            // Only the last piece may end inside a page.
            for piece in &of_row[..of_row.len() - 1] {
                assert_eq!((piece.2 + piece.3) % page_size, 0);
            }
        }
    }
    assert!(pieces.is_empty());
    assert!(slots_seen.iter().all(|&seen| seen));
}

/// Every mode, with a fixed chunk of four pages.
pub fn modes(page_size: u32) -> [PlanMode; 5] {
    [
        PlanMode::Auto,
        PlanMode::Flat,
        PlanMode::PerNode,
        PlanMode::Packed,
        PlanMode::FixedChunk { tokens: 4 * page_size },
    ]
}
