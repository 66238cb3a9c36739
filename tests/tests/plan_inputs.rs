//! What a batch may look like: three forms of the same tables, the legal oddities that engines produce, and the inputs that
//! are refused before anything is planned.

use half::f16;
use pat_rs::plan::{PlanCapacity, PlanMode};
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Dtype, Plan, PlanOptions, Planner, Problem};
use pat_tests::{Case, judge, random_case, run_cpu};
use pat_workloads::{OwnedBatch, PoolLayout};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn shape() -> AttentionShape {
    AttentionShape::new(8, 2, 64, Dtype::F16).expect("a valid shape")
}

fn problem(batch: &DecodeBatch<'_>) -> Problem {
    Problem::new(shape(), batch.page_size())
}

fn plan(batch: &DecodeBatch<'_>) -> Plan {
    let mut planner = Planner::new(problem(batch), DeviceProfile::h200(), PlanOptions::default()).expect("a planner");
    planner.plan(batch).expect("a plan")
}

/// Plans and executes a batch in every mode, and compares with the f64 oracle.
fn verify(page_size: u32, block_tables: Vec<Vec<u32>>, lengths: Vec<u32>) {
    let batch = OwnedBatch { page_size, num_pages: 64, lengths, block_tables };
    let case = Case { batch, shape: shape(), layout: PoolLayout::Nhd };
    let fixed = PlanMode::FixedChunk { tokens: 2 * page_size };
    for mode in [PlanMode::Auto, PlanMode::Flat, PlanMode::PerNode, fixed] {
        let output = run_cpu::<f16>(&case, PlanOptions::from(mode), 9).expect("a legal batch");
        let report = judge(&case, &output, 9).expect("a legal batch");
        assert!(report.passed, "{mode:?}: {report:?}\n{:?}", case.batch);
    }
}

#[test]
fn slices_a_padded_matrix_and_csr_give_the_same_plan() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..200 {
        let OwnedBatch { page_size, num_pages, lengths, block_tables } = random_case(&mut rng, Dtype::F16).batch;
        let slices: Vec<&[u32]> = block_tables.iter().map(Vec::as_slice).collect();
        let from_slices = DecodeBatch::from_block_tables(&slices, &lengths, page_size, num_pages).expect("valid");
        let expected = plan(&from_slices);

        let needed = |sequence: usize| lengths[sequence].div_ceil(page_size) as usize;
        let row_stride = (0..lengths.len()).map(needed).max().expect("a sequence") + rng.random_range(0..3);
        // Behind the last needed entry stands anything, a valid page id included.
        let mut padded: Vec<i32> =
            (0..lengths.len() * row_stride).map(|_| rng.random_range(-2..num_pages as i32 + 2)).collect();
        let (mut indptr, mut indices, mut last_page_len) = (vec![0], Vec::new(), Vec::new());
        for (sequence, table) in block_tables.iter().enumerate() {
            let pages = &table[..needed(sequence)];
            for (entry, &page) in padded[sequence * row_stride..].iter_mut().zip(pages) {
                *entry = page as i32;
            }
            indices.extend_from_slice(pages);
            indptr.push(indices.len() as u32);
            let full = (pages.len() as u32).saturating_sub(1) * page_size;
            // Ignored where there is no page.
            last_page_len.push(if pages.is_empty() { 999 } else { lengths[sequence] - full });
        }
        let padded = DecodeBatch::from_padded(&padded, row_stride, &lengths, page_size, num_pages).expect("valid");
        assert_eq!(plan(&padded), expected);
        let csr = DecodeBatch::from_csr(&indptr, &indices, &last_page_len, page_size, num_pages).expect("valid");
        assert_eq!(plan(&csr), expected);
    }
}

#[test]
fn the_first_rows_of_a_padded_matrix_are_a_batch() {
    // Mixed batches put their decode rows first: only those are planned.
    let matrix = [0, 1, -1, 0, 2, 3, 7, 7, 7];
    let decode = DecodeBatch::from_padded(&matrix, 3, &[20, 40], 16, 4).expect("valid");
    assert_eq!((decode.page_size(), decode.num_pages()), (16, 4));
    let plan = plan(&decode);
    assert_eq!((plan.sequence_count(), plan.page_size(), plan.num_pages()), (2, 16, 4));
}

#[test]
fn empty_rows() {
    verify(16, vec![vec![], vec![3, 4], vec![]], vec![0, 17, 0]);
    verify(16, vec![vec![], vec![]], vec![0, 0]);
    // A padded row of a captured graph may still name pages.
    verify(16, vec![vec![1, 2], vec![1, 2, 3]], vec![0, 40]);
    verify(16, vec![], vec![]);
}

#[test]
fn identical_rows() {
    verify(16, vec![vec![1, 2, 3]; 5], vec![48; 5]);
    verify(16, vec![vec![1, 2, 3]; 5], vec![41; 5]);
}

#[test]
fn a_page_twice_in_one_row() {
    verify(16, vec![vec![5, 5, 5], vec![5, 5], vec![6, 5, 6]], vec![48, 32, 35]);
    // The same page shared by two rows at different positions is no common prefix.
    verify(16, vec![vec![5, 6, 7], vec![6, 7, 5]], vec![48, 48]);
}

#[test]
fn one_partial_page_with_several_lengths() {
    verify(16, vec![vec![1, 2], vec![1, 2], vec![1, 2], vec![1, 2, 3]], vec![20, 20, 27, 33]);
    verify(1, vec![vec![1], vec![1], vec![1, 2]], vec![1, 1, 2]);
}

#[test]
fn prefixes_of_each_other_around_page_borders() {
    let row: Vec<u32> = (0..5).collect();
    let lengths = vec![1, 15, 16, 17, 31, 32, 33, 79, 80];
    verify(16, vec![row; lengths.len()], lengths);
}

#[test]
fn garbage_behind_the_last_needed_entry_changes_nothing() {
    let with = |garbage: u32| {
        let tables = [vec![1, 2, garbage], vec![1, 3, garbage, garbage], vec![garbage]];
        let rows: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        plan(&DecodeBatch::from_block_tables(&rows, &[32, 20, 0], 16, 64).expect("valid"))
    };
    assert_eq!(with(u32::MAX), with(3));
    assert_eq!(with(u32::MAX), with(64));
}

fn refusal<V>(result: pat_rs::Result<V>, parts: &[&str]) {
    let message = result.err().expect("refused").to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn tables_that_are_too_short_or_name_no_page() {
    let rows: &[&[u32]] = &[&[0, 1], &[2]];
    refusal(
        DecodeBatch::from_block_tables(rows, &[32, 17], 16, 4),
        &["block_tables[1]", "1 pages of 16 tokens", "at least 2", "lengths[1] = 17"],
    );
    refusal(DecodeBatch::from_block_tables(rows, &[32], 16, 4), &["block_tables", "2 tables", "one per length (1)"]);
    refusal(DecodeBatch::from_block_tables(rows, &[32, 16], 16, 2), &["block_tables[1][0]", "got 2", "num_pages = 2"]);
    refusal(DecodeBatch::from_block_tables(rows, &[32, 16], 0, 4), &["page_size", "got 0"]);
    refusal(DecodeBatch::from_block_tables(rows, &[32, 16], 1 << 21, 4), &["page_size", "got 2097152", "65536"]);
    refusal(DecodeBatch::from_block_tables(rows, &[32, 16], 16, 1 << 31), &["num_pages", "got 2147483648"]);
    refusal(DecodeBatch::from_block_tables(rows, &[u32::MAX, 1], 16, 4), &["lengths[0]", "got 4294967295"]);
    refusal(DecodeBatch::from_padded(&[0, 1, 2], 2, &[32, 16], 16, 4), &["block_table", "3 entries", "= 4"]);
    refusal(DecodeBatch::from_padded(&[0, 1], 1, &[32, 16], 16, 4), &["block_tables[0]", "at least 2"]);
    refusal(DecodeBatch::from_padded(&[0, -1], 2, &[32], 16, 4), &["block_tables[0][1]", "got -1", "num_pages = 4"]);
    // What transformers' stock path gives its kernel for a padded row.
    refusal(DecodeBatch::from_padded(&[-1], 1, &[-1], 16, 4), &["lengths[0]", "got -1"]);
    refusal(DecodeBatch::from_padded(&[0], usize::MAX, &[1, 1], 16, 4), &["block_table", "1 entries"]);
}

#[test]
fn csr_that_contradicts_itself() {
    let csr = |indptr: &[u32], last_page_len: &[u32]| {
        DecodeBatch::from_csr(indptr, &[0, 1, 2], last_page_len, 16, 4).map(|_| ())
    };
    refusal(csr(&[], &[]), &["indptr", "0 entries", "one more than last_page_len (0)"]);
    refusal(csr(&[0, 1], &[1, 1]), &["indptr", "2 entries", "last_page_len (2)"]);
    refusal(csr(&[1, 2], &[1]), &["indptr[0]", "got 1"]);
    refusal(csr(&[0, 2, 1], &[1, 1]), &["indptr[2]", "got 1", "between 2 and"]);
    refusal(csr(&[0, 2, 4], &[1, 1]), &["indptr[2]", "got 4", "indices.len() = 3"]);
    refusal(csr(&[0, 2, 3], &[1, 0]), &["last_page_len[1]", "got 0", "page_size = 16"]);
    refusal(csr(&[0, 2, 3], &[17, 1]), &["last_page_len[0]", "got 17"]);
    // The tokens of a sequence are counted in 64 bits: no overflow makes a long one short.
    let long = DecodeBatch::from_csr(&[0, 4097], &[0; 4097], &[1], 1 << 20, 4);
    refusal(long, &["indptr[1]", "got 4296015872 tokens", "2147483647"]);
    // A sequence's own pages count, not where they stand: 20,000 of 65,536 tokens are below 2^31.
    let indptr = [0u32, 20_000, 40_000];
    DecodeBatch::from_csr(&indptr, &vec![0; 40_000], &[1, 1], 1 << 16, 1).expect("valid");
}

#[test]
fn the_largest_batches_that_are_accepted() {
    let most = DecodeBatch::MAX_TOKENS;
    let row = vec![most - 1; 1 << 15];
    DecodeBatch::from_block_tables(&[&row], &[most], 1 << 16, most).expect("the longest sequence, the largest pool");
    refusal(DecodeBatch::from_block_tables(&[&row], &[most + 1], 1 << 16, most), &["lengths[0]", "got 2147483648"]);
    DecodeBatch::from_block_tables(&[&[]], &[0u32], 16, 0).expect("no pages, and no sequence that wants one");
}

#[test]
fn offsets_that_do_not_fit_the_plan() {
    // All rows are one slice, so that the batch is large but its tables are not: 2^27 work items of 32 bytes.
    let ids = vec![0; 1 << 13];
    let rows: Vec<&[u32]> = vec![&ids; 1 << 14];
    let lengths = vec![1 << 13; 1 << 14];
    let batch = DecodeBatch::from_block_tables(&rows, &lengths, 1, 1).expect("valid");
    let fixed = PlanOptions::from(PlanMode::FixedChunk { tokens: 1 });
    let mut planner = Planner::new(problem(&batch), DeviceProfile::h200(), fixed).expect("a planner");
    refusal(planner.plan(&batch), &["plan bytes", "fewer than 2^31"]);
    // The planner is as good as new.
    let small: &[&[u32]] = &[&[0]];
    planner.plan(&DecodeBatch::from_block_tables(small, &[1], 1, 1).expect("valid")).expect("a plan");
}

#[test]
fn more_tokens_than_an_item_counts() {
    // Four sequences of 2^30 tokens in one tile, which nothing may be cut of, are 2^32.
    let page_size = 1 << 16;
    let pages = (1 << 30) / page_size;
    let tables: Vec<Vec<u32>> = (0..4).map(|row| (row * pages..(row + 1) * pages).collect()).collect();
    let rows: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
    let batch = DecodeBatch::from_block_tables(&rows, &[1 << 30; 4], page_size, 4 * pages).expect("valid");
    let capacity = PlanCapacity { max_sequences: 4, max_pages: 4 * pages, max_items: 4, max_slots: 0 };
    let plan = |mode| {
        let options = PlanOptions::from(mode);
        let planner = Planner::new(problem(&batch), DeviceProfile::h200(), options).expect("a planner");
        planner.with_capacity(capacity).expect("a valid capacity").plan(&batch)
    };
    refusal(plan(PlanMode::Packed), &["plan tokens of an item: got 4294967296", "fewer than 2^31"]);
    assert_eq!(plan(PlanMode::Auto).expect("one sequence per item").items().len(), 4);
}

#[test]
fn more_work_than_is_counted() {
    // One item of a sequence for each of the most heads that there may be.
    let shape = AttentionShape::new(65_535, 65_535, 128, Dtype::F16).expect("a valid shape");
    let tables: Vec<[u32; 1]> = (0..32_769).map(|page| [page]).collect();
    let plan = |rows: &[[u32; 1]]| {
        let rows: Vec<&[u32]> = rows.iter().map(|row| &row[..]).collect();
        let lengths = vec![1; rows.len()];
        let batch = DecodeBatch::from_block_tables(&rows, &lengths, 16, 32_769).expect("valid");
        let options = PlanOptions::from(PlanMode::Flat);
        Planner::new(Problem::new(shape, 16), DeviceProfile::h200(), options).expect("a planner").plan(&batch)
    };
    assert_eq!(plan(&tables[..32_768]).expect("2^31 - 2^15").items().len(), 32_768);
    refusal(plan(&tables), &["plan items times KV heads: got 2147516415", "fewer than 2^31"]);

    // A step to as many is refused likewise, and its plan is the one before.
    let rows: Vec<&[u32]> = tables.iter().map(|row| &row[..]).collect();
    let lengths = vec![1; rows.len()];
    let view =
        |count: usize| DecodeBatch::from_block_tables(&rows[..count], &lengths[..count], 16, 32_769).expect("valid");
    let options = PlanOptions::from(PlanMode::Flat);
    let mut planner = Planner::new(Problem::new(shape, 16), DeviceProfile::h200(), options).expect("a planner");
    let mut plan = planner.plan(&view(32_768)).expect("2^31 - 2^15");
    let before = plan.clone();
    refusal(planner.advance(&view(32_769), None, &mut plan), &["plan items times KV heads: got 2147516415"]);
    assert_eq!((&plan, plan.generation()), (&before, before.generation()));
}
