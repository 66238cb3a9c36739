//! Forests whose packs are known (E1 to E4 of PAT's specification), and the batches that PAT's planner gets wrong (B1 to
//! B5).

use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, Planner};
use pat_tests::invariants::{check, modes};
use pat_workloads::OwnedBatch;

fn batch(page_size: u32, tables: &[&[u32]], lengths: &[u32]) -> OwnedBatch {
    let block_tables = tables.iter().map(|t| t.to_vec()).collect();
    OwnedBatch { page_size, num_pages: 10_000, lengths: lengths.to_vec(), block_tables }
}

fn shape(q_heads: u32, kv_heads: u32) -> AttentionShape {
    AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).expect("a valid shape")
}

fn plan(batch: &OwnedBatch, shape: AttentionShape, mode: PlanMode) -> Plan {
    let rows = batch.rows();
    let mut planner = Planner::new(batch.problem(shape), DeviceProfile::h200(), mode.into()).expect("a planner");
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

/// Plans the batch in every mode for several group sizes and holds the plans to the invariants.
fn check_all(batch: &OwnedBatch) {
    for (q_heads, kv_heads) in [(8, 8), (64, 64), (16, 8), (32, 8), (8, 2), (64, 8), (16, 1)] {
        for mode in modes(batch.page_size) {
            check(&plan(batch, shape(q_heads, kv_heads), mode), batch, shape(q_heads, kv_heads));
        }
    }
}

/// The items of a plan without masks as (sequences, KV tokens, first page), sorted.
fn packs(plan: &Plan, group: u32) -> Vec<(Vec<u32>, u32, u32)> {
    let mut packs: Vec<_> = plan
        .items()
        .iter()
        .map(|item| {
            assert!(plan.masks(item).is_empty());
            let queries = &plan.queries()[item.query_begin as usize..][..(item.row_count / group) as usize];
            let mut sequences: Vec<u32> = queries.iter().map(|query| query.query_token).collect();
            sequences.sort_unstable();
            (sequences, item.token_count, plan.pages()[item.page_begin as usize])
        })
        .collect();
    packs.sort_unstable();
    packs
}

/// Partials of each sequence.
fn partials(plan: &Plan) -> Vec<u32> {
    let mut partials = vec![1; plan.sequence_count() as usize];
    plan.merges().iter().for_each(|merge| partials[merge.sequence as usize] = merge.slot_count);
    partials
}

#[test]
fn e1_two_levels_of_sharing() {
    let tables: [&[u32]; 6] = [
        &[0, 1, 2, 3, 4, 5, 13, 14, 15],
        &[0, 1, 2, 3, 4, 5, 16],
        &[0, 1, 2, 7, 8, 9, 17, 18, 19],
        &[0, 1, 2, 7, 8, 9, 20],
        &[0, 1, 2, 7, 8, 9, 21, 22, 23, 24],
        &[0, 1, 2, 10, 11, 12, 25],
    ];
    let lengths: Vec<u32> = tables.iter().map(|table| table.len() as u32 * 32 - 5).collect();
    let e1 = batch(32, &tables, &lengths);
    check_all(&e1);
    for heads in [4, 8] {
        let per_node = plan(&e1, shape(64 * heads, 64), PlanMode::PerNode);
        let expected = [
            (vec![0], 91, 13),
            (vec![0, 1], 96, 3),
            (vec![0, 1, 2, 3, 4, 5], 96, 0),
            (vec![1], 27, 16),
            (vec![2], 91, 17),
            (vec![2, 3, 4], 96, 7),
            (vec![3], 27, 20),
            (vec![4], 123, 21),
            (vec![5], 123, 10),
        ];
        assert_eq!(packs(&per_node, heads), expected);
        assert_eq!(partials(&per_node), [3, 3, 3, 3, 3, 2]);
    }
}

#[test]
fn e2_a_short_root_over_two_groups() {
    // One page shared by all, eight by each half, and a private page of 7 tokens.
    let tables: Vec<Vec<u32>> = (0..32)
        .map(|sequence| {
            let group = 1 + sequence / 16 * 8;
            std::iter::once(0).chain(group..group + 8).chain([100 + sequence]).collect()
        })
        .collect();
    let rows: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
    let e2 = batch(32, &rows, &[9 * 32 + 7; 32]);
    check_all(&e2);
    for heads in [1, 2, 4] {
        // PAT reads the root once per group rather than write another partial for 32 sequences. So do row tiles, which
        // need no partial at all.
        let shape = shape(64 * heads, 64);
        let packed = plan(&e2, shape, PlanMode::Packed).summary();
        assert!(packed.planned_kv_bytes / shape.kv_bytes_per_token() <= 2 * 288 + 32 * 7, "{packed:?}");
        assert_eq!(plan(&e2, shape, PlanMode::Auto).summary().partial_bytes, 0);
    }
}

#[test]
fn e3_sequences_that_end_at_inner_nodes() {
    let e3 = batch(32, &[&[0, 1], &[0], &[0, 1, 2]], &[64, 32, 96]);
    check_all(&e3);
    let per_node = plan(&e3, shape(32, 8), PlanMode::PerNode);
    assert_eq!(packs(&per_node, 4), [(vec![0, 1, 2], 32, 0), (vec![0, 2], 32, 1), (vec![2], 32, 2)]);
    assert_eq!(partials(&per_node), [2, 1, 3]);
}

#[test]
fn e4_a_pair_and_a_single() {
    let e4 = batch(16, &[&[0, 1, 5], &[0, 2, 6], &[3, 4, 7]], &[33, 33, 33]);
    check_all(&e4);
    let per_node = plan(&e4, shape(32, 8), PlanMode::PerNode);
    let expected = [(vec![0], 17, 1), (vec![0, 1], 16, 0), (vec![1], 17, 2), (vec![2], 33, 3)];
    assert_eq!(packs(&per_node, 4), expected);
    assert_eq!(partials(&per_node), [2, 2, 1]);
}

/// PAT takes a piece's slot from its first query, for all of them.
#[test]
fn b1_queries_of_one_pack_have_different_numbers_of_partials() {
    let mut next = 32;
    let (tables, lengths): (Vec<Vec<u32>>, Vec<u32>) = [2000u32, 100, 300, 700]
        .map(|tail| {
            let pages = tail.div_ceil(32);
            next += pages;
            ((0..32).chain(next - pages..next).collect(), 1024 + tail)
        })
        .into_iter()
        .unzip();
    let rows: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
    let b1 = batch(32, &rows, &lengths);
    check_all(&b1);
    let partials = partials(&plan(&b1, shape(32, 8), PlanMode::PerNode));
    assert!(partials.iter().any(|&count| count != partials[0]), "{partials:?}");
}

/// PAT launches the first tile group only where no sequence is split.
#[test]
fn b2_two_lengths_without_a_split() {
    check_all(&batch(32, &[&[0, 1, 2, 3], &[4, 5, 6, 7, 8, 9, 10, 11, 12, 13]], &[100, 300]));
}

/// PAT throws above 32 partials.
#[test]
fn b3_one_long_sequence_among_short_ones() {
    let long: Vec<u32> = (100..100 + 4096).collect();
    let short: Vec<Vec<u32>> = (0..63).map(|i| (5000 + 4 * i..5004 + 4 * i).collect()).collect();
    let rows: Vec<&[u32]> = std::iter::once(&long).chain(&short).map(Vec::as_slice).collect();
    let lengths: Vec<u32> = std::iter::once(131_072).chain([128; 63]).collect();
    let b3 = batch(32, &rows, &lengths);
    check_all(&b3);
    let shape = shape(8, 1);
    let auto = plan(&b3, shape, PlanMode::Auto);
    assert!(partials(&auto)[0] > 32, "one KV head leaves no other way to fill the device: {:?}", partials(&auto));
    check(&auto, &b3, shape);
}

/// PAT takes the first inserter's length for all.
#[test]
fn b4_a_partial_last_page_named_by_several_rows() {
    check_all(&batch(32, &[&[0, 1], &[0, 1], &[0, 1, 2]], &[40, 50, 70]));
    check_all(&batch(32, &[&[0], &[0], &[0]], &[1, 31, 32]));
}

/// PAT's Python scheduler drops sequences that end at an inner node.
#[test]
fn b5_sequences_that_are_prefixes_of_others() {
    let row: Vec<u32> = (0..12).collect();
    let lengths: Vec<u32> = (1..=12).map(|pages| pages * 32).chain([12 * 32, 33, 5 * 32]).collect();
    let rows = vec![row.as_slice(); lengths.len()];
    check_all(&batch(32, &rows, &lengths));
}

#[test]
fn repeated_pages_equal_rows_and_nothing_at_all() {
    check_all(&batch(16, &[&[3, 3, 3], &[3, 3, 3], &[3]], &[48, 48, 16]));
    check_all(&batch(16, &[&[], &[]], &[0, 0]));
    check_all(&batch(16, &[], &[]));
}
