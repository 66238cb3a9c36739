//! The planner's invariants over random ragged forests (2,000; 20,000 with `PAT_LONG` set), and the named cases that
//! PAT's planner gets wrong.

use pat_abi::{DIRECT_SLOT, PageMask, TileVariant};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, PlanOptions, Planner};
use pat_workloads::OwnedBatch;
use rand::Rng;
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;

/// Up to 64 sequences of up to 64 pages: continuations, copies and cuts of earlier ones, of uneven depth; lengths around
/// page borders, and 0.
fn random_batch(rng: &mut impl Rng) -> OwnedBatch {
    let page_size = *[1u32, 16, 32, 64].choose(rng).unwrap();
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
        let missing = *[0, 1, page_size - 1, page_size / 2].choose(rng).unwrap();
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

fn plan(batch: &OwnedBatch, shape: AttentionShape, options: &PlanOptions) -> Plan {
    let rows = batch.rows();
    let view = batch.view(&rows).unwrap();
    Planner::new(shape, DeviceProfile::h200(), options.clone()).unwrap().plan(&view).unwrap()
}

/// A partial of one row: its slot, its pages, its tokens.
type Piece = (u32, Vec<u32>, u32);

/// Invariants 1 to 3: every (sequence, token, head of the group) is covered once; every slot is written once; items fit
/// their tile, their run and the pool.
fn check(plan: &Plan, batch: &OwnedBatch, shape: AttentionShape) {
    let group = shape.group();
    let page_size = batch.page_size;
    // By (sequence, head in group); together the pieces of a row hold the pages of its block table.
    let mut pieces: HashMap<(u32, u32), Vec<Piece>> = HashMap::new();
    for variant in TileVariant::ALL {
        for item in plan.variant_items(variant) {
            assert!(item.token_count >= 1);
            assert!((1..=variant.rows()).contains(&item.row_count));
            let pages = item.page_begin as usize..(item.page_begin + item.token_count.div_ceil(page_size)) as usize;
            let pages = plan.pages()[pages].to_vec();
            assert!(pages.iter().all(|&page| page < batch.num_pages));
            let masks = plan.masks(item);
            if !masks.is_empty() {
                assert!(item.token_count.is_multiple_of(page_size));
                assert!(masks.iter().all(|m| m.row_end() <= item.row_count && m.tokens() <= page_size));
            }
            for row in 0..item.row_count {
                let query = plan.queries()[(item.query_begin + row / group) as usize];
                let (mut own, mut tokens) = (pages.clone(), item.token_count);
                if !masks.is_empty() {
                    let reads = |m: &PageMask| (m.row_begin()..m.row_end()).contains(&row);
                    own = pages.iter().zip(masks).filter(|(_, m)| reads(m)).map(|(&page, _)| page).collect();
                    tokens = masks.iter().filter(|m| reads(m)).map(|m| m.tokens()).sum();
                    // Only the last page may be partial.
                    assert_eq!(own.len() as u32, tokens.div_ceil(page_size));
                }
                assert!(tokens > 0, "a row without a token");
                pieces.entry((query.sequence, row % group)).or_default().push((query.slot, own, tokens));
            }
        }
    }
    let merges: HashMap<u32, _> = plan.merges().iter().map(|merge| (merge.sequence, *merge)).collect();
    assert_eq!(merges.len(), plan.merges().len());
    let mut slots_seen = vec![false; plan.header().slot_count as usize];
    for (sequence, &length) in batch.lengths.iter().enumerate() {
        let merge = merges.get(&(sequence as u32));
        if length == 0 {
            assert_eq!(merge.unwrap().slot_count, 0);
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
            let tokens: u32 = of_row.iter().map(|piece| piece.2).sum();
            assert_eq!(tokens, length, "sequence {sequence}");
            // An item may hold its runs in any order.
            let mut pages: Vec<u32> = of_row.iter().flat_map(|piece| piece.1.clone()).collect();
            let mut expected = batch.block_tables[sequence][..length.div_ceil(page_size) as usize].to_vec();
            pages.sort_unstable();
            expected.sort_unstable();
            assert_eq!(pages, expected);
            // Only the last piece may end inside a page.
            for piece in &of_row[..of_row.len() - 1] {
                assert_eq!(piece.2 % page_size, 0);
            }
        }
    }
    assert!(pieces.is_empty());
    assert!(slots_seen.iter().all(|&seen| seen));
}

fn modes(page_size: u32) -> [PlanMode; 5] {
    [
        PlanMode::Auto,
        PlanMode::Flat,
        PlanMode::PerNode,
        PlanMode::Packed,
        PlanMode::FixedChunk { tokens: 4 * page_size },
    ]
}

#[test]
fn invariants_hold_on_random_forests() {
    let cases = if std::env::var_os("PAT_LONG").is_some() { 20_000 } else { 2_000 };
    let mut rng = ChaCha8Rng::seed_from_u64(20_261_123);
    for case in 0..cases {
        let batch = random_batch(&mut rng);
        let group = *[1u32, 2, 3, 4, 5, 7, 8, 16].choose(&mut rng).unwrap();
        let kv_heads = *[1u32, 2, 8].choose(&mut rng).unwrap();
        let shape = AttentionShape::new(group * kv_heads, kv_heads, 128, Dtype::F16).unwrap();
        let variants = match case % 3 {
            0 => None,
            1 => Some(vec![TileVariant::Mma16, TileVariant::Mma64]),
            _ => Some(vec![*[TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma128].choose(&mut rng).unwrap()]),
        };
        let mut predicted = Vec::new();
        for mode in modes(batch.page_size) {
            let options = PlanOptions { mode, variants: variants.clone() };
            let plan = plan(&batch, shape, &options);
            check(&plan, &batch, shape);
            predicted.push(plan.prediction().total_us());
            assert_eq!(plan, self::plan(&batch, shape, &options), "planning is deterministic");
        }
        // Invariant 6.
        assert!(predicted[0] <= predicted[1], "auto {} us, flat {} us", predicted[0], predicted[1]);
    }
}

/// Invariant 5: the order of the sequences does not matter, up to their permutation.
#[test]
fn a_permuted_batch_gives_the_same_work() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    for _ in 0..200 {
        let batch = random_batch(&mut rng);
        let mut permutation: Vec<usize> = (0..batch.lengths.len()).collect();
        permutation.shuffle(&mut rng);
        let permuted = OwnedBatch {
            lengths: permutation.iter().map(|&i| batch.lengths[i]).collect(),
            block_tables: permutation.iter().map(|&i| batch.block_tables[i].clone()).collect(),
            ..batch.clone()
        };
        let (a, b) = (plan(&batch, shape, &PlanOptions::default()), plan(&permuted, shape, &PlanOptions::default()));
        let work = |plan: &Plan| {
            let mut items: Vec<_> =
                plan.items().iter().map(|i| (i.token_count, i.row_count, plan.stream_tokens(i))).collect();
            items.sort_unstable();
            items
        };
        assert_eq!(work(&a), work(&b));
        assert_eq!(a.summary(), b.summary());
    }
}

fn batch(page_size: u32, tables: &[&[u32]], lengths: &[u32]) -> OwnedBatch {
    let block_tables = tables.iter().map(|t| t.to_vec()).collect();
    OwnedBatch { page_size, num_pages: 10_000, lengths: lengths.to_vec(), block_tables }
}

fn check_all_modes(batch: &OwnedBatch, q_heads: u32, kv_heads: u32) {
    let shape = AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).unwrap();
    for mode in modes(batch.page_size) {
        check(&plan(batch, shape, &PlanOptions { mode, variants: None }), batch, shape);
    }
}

/// PAT's worked examples E1 to E4: forests whose packs are known.
#[test]
fn worked_examples() {
    let e1: [&[u32]; 6] = [
        &[0, 1, 2, 3, 4, 5, 13, 14, 15],
        &[0, 1, 2, 3, 4, 5, 16],
        &[0, 1, 2, 7, 8, 9, 17, 18, 19],
        &[0, 1, 2, 7, 8, 9, 20],
        &[0, 1, 2, 7, 8, 9, 21, 22, 23, 24],
        &[0, 1, 2, 10, 11, 12, 25],
    ];
    let lengths: Vec<u32> = e1.iter().map(|t| t.len() as u32 * 32 - 5).collect();
    let e1 = batch(32, &e1, &lengths);
    check_all_modes(&e1, 32, 8);
    // Per node: the root, its two shared children, and a private run each: {0..5} {0,1} {2,3,4} {5} and five leaves.
    let shape = AttentionShape::new(256, 64, 128, Dtype::F16).unwrap();
    let per_node = PlanOptions { mode: PlanMode::PerNode, variants: None };
    let packs = plan(&e1, shape, &per_node).queries().len();
    assert_eq!(packs, 6 + 2 + 3 + 6);

    check_all_modes(&batch(32, &[&[0, 1], &[0], &[0, 1, 2]], &[64, 32, 96]), 32, 8);
    check_all_modes(&batch(16, &[&[0, 1, 5], &[0, 2, 6], &[3, 4, 7]], &[33, 33, 33]), 32, 8);
}

/// B1: a pack whose queries have different numbers of partials; B2: two tile groups without any split; B3: more than 32
/// splits; B4: a partial last page named by two sequences.
#[test]
fn cases_that_pat_gets_wrong() {
    let mut next = 32;
    let tails = [2000u32, 100, 300, 700].map(|tail| {
        let table: Vec<u32> = (0..32).chain(next..next + tail.div_ceil(32)).collect();
        next += tail.div_ceil(32);
        (table, 1024 + tail)
    });
    let tables: Vec<&[u32]> = tails.iter().map(|(table, _)| table.as_slice()).collect();
    check_all_modes(&batch(32, &tables, &tails.clone().map(|(_, length)| length)), 32, 8);

    check_all_modes(&batch(32, &[&[0, 1, 2, 3], &[4, 5, 6, 7, 8, 9, 10, 11, 12, 13]], &[100, 300]), 32, 8);

    let long: Vec<u32> = (100..100 + 4096).collect();
    let mut tables: Vec<&[u32]> = vec![&long];
    let short: Vec<Vec<u32>> = (0..63).map(|i| vec![5000 + 4 * i, 5001 + 4 * i, 5002 + 4 * i, 5003 + 4 * i]).collect();
    tables.extend(short.iter().map(Vec::as_slice));
    let lengths: Vec<u32> = std::iter::once(131_072).chain([128; 63]).collect();
    check_all_modes(&batch(32, &tables, &lengths), 32, 8);

    check_all_modes(&batch(32, &[&[0, 1], &[0, 1], &[0, 1, 2]], &[40, 50, 70]), 32, 8);
    // The same page twice in a row, identical sequences, only empty ones.
    check_all_modes(&batch(16, &[&[3, 3, 3], &[3, 3, 3], &[3]], &[48, 48, 16]), 8, 8);
    check_all_modes(&batch(16, &[&[], &[]], &[0, 0]), 8, 8);
}

#[test]
fn options_that_cannot_be_are_refused() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    let new = |mode, variants| Planner::new(shape, DeviceProfile::h200(), PlanOptions { mode, variants });
    assert!(new(PlanMode::Auto, Some(vec![])).is_err());
    assert!(new(PlanMode::FixedChunk { tokens: 0 }, None).is_err());
    let a100 = DeviceProfile { compute_capability: 80, ..DeviceProfile::h200() };
    let wgmma = PlanOptions { mode: PlanMode::Auto, variants: Some(vec![TileVariant::Wgmma64]) };
    let error = Planner::new(shape, a100, wgmma.clone()).unwrap_err().to_string();
    assert!(error.contains("wgmma64") && error.contains("mma16"), "{error}");
    let odd = batch(1, &[&[0, 1]], &[2]);
    let rows = odd.rows();
    let mut planner = Planner::new(shape, DeviceProfile::h200(), wgmma).unwrap();
    assert!(planner.plan(&odd.view(&rows).unwrap()).is_err());
    let mut planner = new(PlanMode::FixedChunk { tokens: 24 }, None).unwrap();
    let paged = batch(16, &[&[0, 1]], &[20]);
    let rows = paged.rows();
    let error = planner.plan(&paged.view(&rows).unwrap()).unwrap_err().to_string();
    assert!(error.contains("multiple of page_size"), "{error}");
}
