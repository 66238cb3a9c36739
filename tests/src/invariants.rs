//! What every plan must be, and random forests to hold plans to it.

use pat_abi::{DIRECT_SLOT, GroupParts, NONE, PageMask, RUN_PAGES, TileVariant};
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

/// A partial of one row: its slot, and the tokens that the row sees in it, as (page, first token, end).
type Piece = (u32, Vec<(u32, u32, u32)>);

/// Invariants 1 to 3: every (sequence, token, head of the group) is covered once, as far as it is within the plan's reach;
/// every slot is written once; items fit their tile, their run and the pool.
///
/// # Panics
/// One does not hold.
pub fn check(plan: &Plan, batch: &OwnedBatch, shape: AttentionShape) {
    let reach = plan.problem().visibility().reach;
    let seen = |&length: &u32| (reach.first_token(length.saturating_sub(1))..length).collect();
    check_pieces(plan, batch, shape, &batch.lengths.iter().map(seen).collect::<Vec<_>>(), true);
}

/// As [`check`], of a plan whose row `b` sees the tokens `visible[b]` of its sequence, in ascending order, and no other.
///
/// # Panics
/// An invariant does not hold.
pub fn check_visible(plan: &Plan, batch: &OwnedBatch, shape: AttentionShape, visible: &[Vec<u32>]) {
    check_pieces(plan, batch, shape, visible, false);
}

/// `in_order` says that only the last partial of a row may end inside a page.
fn check_pieces(plan: &Plan, batch: &OwnedBatch, shape: AttentionShape, visible: &[Vec<u32>], in_order: bool) {
    let group = shape.group();
    let page_size = batch.page_size;
    let visibility = plan.problem().visibility();
    let has_first_tokens = match visibility.reach {
        _ if visibility.is_tree => true,
        Reach::Full => false,
        Reach::Window(_) => true,
        Reach::Chunk(tokens) => !tokens.is_multiple_of(page_size),
    };
    // By (sequence, head in group); together the pieces of a row hold the tokens that it sees.
    let mut pieces: HashMap<(u32, u32), Vec<Piece>> = HashMap::new();
    for variant in TileVariant::ALL {
        for item in plan.variant_items(variant) {
            assert!(item.token_count >= 1);
            assert_eq!(item.kv_limit_begin, NONE);
            assert!((1..=variant.rows()).contains(&item.row_count));
            // Of a page, or of a run of pages of one token.
            let entry_tokens = plan.entry_tokens(item);
            assert!(entry_tokens == page_size || page_size == 1 && entry_tokens == RUN_PAGES);
            let pages = item.page_begin as usize..(item.page_begin + item.token_count.div_ceil(entry_tokens)) as usize;
            let pages = &plan.pages()[pages];
            assert!(pages.iter().all(|&page| page + entry_tokens / page_size <= batch.num_pages));
            let masks = plan.masks(item);
            if !masks.is_empty() {
                assert!(item.token_count.is_multiple_of(entry_tokens));
                assert!(masks.iter().all(|m| m.row_end() <= item.row_count || m.row_end() == PageMask::ALL_ROWS));
                assert!(masks.iter().all(|m| m.token_end() <= entry_tokens));
            }
            let first_tokens = plan.first_tokens(item);
            assert_eq!(item.first_token_begin, if has_first_tokens { item.mask_begin } else { NONE });
            assert!(first_tokens.iter().zip(masks).all(|(&first, mask)| first < mask.token_end()));
            let parts = GroupParts::new(group, variant);
            // What two parts have in common counts for the first.
            let heads = parts.first_heads().scan(0, |end, first_head| {
                let begin = std::mem::replace(end, first_head + parts.rows) - first_head;
                Some((first_head, if parts.count == 1 { 0 } else { begin }))
            });
            assert!(item.row_count.is_multiple_of(parts.rows) && (parts.count == 1 || item.row_count == parts.rows));
            for (row, first_head) in
                heads.flat_map(|(first, begin)| (begin..item.row_count).map(move |row| (row, first)))
            {
                let query = plan.queries()[(item.query_begin + row / group) as usize];
                let of_entry = |(entry, &page): (usize, &u32)| {
                    let first = first_tokens.get(entry).copied().unwrap_or(0);
                    let Some(mask) = masks.get(entry) else {
                        return Some((page, 0, entry_tokens.min(item.token_count - entry as u32 * entry_tokens)));
                    };
                    mask.has_row(row).then_some((page, first, mask.token_end()))
                };
                let seen = pages.iter().enumerate().filter_map(of_entry);
                let seen: Vec<_> = if entry_tokens == page_size {
                    seen.collect()
                } else {
                    seen.flat_map(|(page, first, end)| (first..end).map(move |token| (page + token, 0, 1))).collect()
                };
                assert!(!seen.is_empty(), "a row without a token");
                pieces.entry((query.query_token, first_head + row % group)).or_default().push((query.slot, seen));
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
        let table = &batch.block_tables[sequence];
        let follows = |&a: &u32, &b: &u32| a + 1 == b && b % page_size != 0;
        let runs = visible[sequence].chunk_by(follows).map(|run| {
            let first = run[0] % page_size;
            (table[(run[0] / page_size) as usize], first, first + run.len() as u32)
        });
        let expected = joined(runs.collect());
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
            if in_order {
                for (_, seen) in &of_row[..of_row.len() - 1] {
                    assert!(seen.iter().all(|&(_, _, end)| end == page_size));
                }
            }
            // An item may hold its runs in any order.
            let seen = joined(of_row.into_iter().flat_map(|(_, seen)| seen).collect());
            assert_eq!(seen, expected, "sequence {sequence}");
        }
    }
    assert!(pieces.is_empty());
    assert!(slots_seen.iter().all(|&seen| seen));
}

/// Tokens of pages in the order of the pages, neighbours in one; those of a page that a row names twice stay apart.
fn joined(mut tokens: Vec<(u32, u32, u32)>) -> Vec<(u32, u32, u32)> {
    tokens.sort_unstable();
    tokens.dedup_by(|(page, first, end), (before, _, before_end)| {
        let follows = page == before && *first == *before_end;
        if follows {
            *before_end = *end;
        }
        follows
    });
    tokens
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
