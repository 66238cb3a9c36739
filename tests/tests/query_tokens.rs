//! Several query tokens per sequence: rows, sharing and results against a batch that names every row by hand, on random forests.

use half::{bf16, f16};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Element, PlanOptions, Planner, QueryTokens};
use pat_tests::invariants::{check, modes, random_forest};
use pat_tests::query_rows::written_out;
use pat_tests::{Case, Output, judge, random_case, softmax_scale};
use pat_workloads::{OwnedBatch, Tensors};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Counts from 0 to 16 that the sequences have tokens for.
fn draw_counts(rng: &mut impl Rng, batch: &OwnedBatch) -> Vec<u32> {
    let most = |length: u32| if length == 0 { 16 } else { length.min(16) };
    batch.lengths.iter().map(|&length| rng.random_range(0..=most(length))).collect()
}

fn verify<T: Element>(rng: &mut impl Rng, index: u64) {
    let case = random_case(rng, T::DTYPE);
    verify_case::<T>(rng, case, index);
}

fn verify_case<T: Element>(rng: &mut impl Rng, case: Case, index: u64) {
    let counts = draw_counts(rng, &case.batch);
    let rows = Case { batch: written_out(&case.batch, &counts), ..case.clone() };
    let slices = case.batch.rows();
    let sequences = case.batch.view(&slices).unwrap();
    let queries = QueryTokens::ragged(&sequences, &counts).unwrap();
    let tensors = Tensors::<T>::draw(&rows.batch, case.shape, case.layout, index as u32).unwrap();
    for mode in modes(case.batch.page_size) {
        let problem = case.batch.problem(case.shape).with_query_tokens(16);
        let mut planner = Planner::new(problem, DeviceProfile::h200(), PlanOptions::from(mode)).unwrap();
        let plan = planner.plan(&queries.batch()).unwrap();
        let mut output = Output {
            out: vec![T::from_f32(f32::NAN); tensors.q.len()],
            lse: vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize],
        };
        let host = tensors.host(softmax_scale(case.shape));
        pat_rs::cpu::run(&plan, &host, &mut output.out, Some(&mut output.lse)).unwrap();
        let report = judge(&rows, &output, index as u32).unwrap();
        assert!(report.passed, "forest {index}, {mode:?}, {counts:?}: {report:?}\n{case:?}");
    }
}

#[test]
fn query_tokens_agree_with_the_oracle() {
    for index in 0..60 {
        let mut rng = ChaCha8Rng::seed_from_u64(index);
        if index % 2 == 0 { verify::<f16>(&mut rng, index) } else { verify::<bf16>(&mut rng, index) }
    }
}

/// More rows per sequence and KV head than any tile has: 16 heads times up to 16 tokens, and groups that fill tiles by
/// themselves.
#[test]
fn query_tokens_of_large_groups_agree_with_the_oracle() {
    for (index, (group, head_dim)) in (0..).zip([(16, 128), (16, 256), (71, 64), (130, 64), (200, 128), (96, 256)]) {
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + index);
        let mut case = random_case(&mut rng, Dtype::F16);
        case.shape = AttentionShape::new(group, 1, head_dim, Dtype::F16).unwrap();
        verify_case::<f16>(&mut rng, case, index);
    }
}

#[test]
fn the_query_tokens_of_a_sequence_share_all_full_pages_that_they_see() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
    let mut shared = 0;
    for _ in 0..300 {
        let batch = random_forest(&mut rng);
        let counts = draw_counts(&mut rng, &batch);
        let rows = written_out(&batch, &counts);
        let slices = batch.rows();
        let sequences = batch.view(&slices).unwrap();
        let queries = QueryTokens::ragged(&sequences, &counts).unwrap();
        for mode in modes(batch.page_size) {
            let options = PlanOptions::from(mode);
            let mut planner = Planner::new(batch.problem(shape), DeviceProfile::h200(), options).unwrap();
            check(&planner.plan(&queries.batch()).unwrap(), &rows, shape);
            for sequence in 0..counts.len() {
                let tokens = queries.rows(sequence);
                for (row, next) in tokens.clone().zip(tokens.skip(1)) {
                    let full_pages = rows.lengths[row].min(rows.lengths[next]) / batch.page_size;
                    assert!(planner.forest().shared_pages(row as u32) >= full_pages);
                    shared += u64::from(full_pages);
                }
            }
        }
    }
    assert!(shared > 10_000, "{shared}");
}

/// What verifying drafts costs beside a step with one token: only the partial last pages are read once per query token.
#[test]
fn four_query_tokens_are_predicted_to_cost_little_more_than_one() {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
    for (sequences, tokens) in [(8u32, 1024u32), (64, 1024), (64, 4096), (256, 4096)] {
        let pages = (tokens + 8).div_ceil(16);
        let batch = OwnedBatch {
            page_size: 16,
            num_pages: sequences * pages,
            lengths: vec![tokens + 8; sequences as usize],
            block_tables: (0..sequences).map(|sequence| (sequence * pages..(sequence + 1) * pages).collect()).collect(),
        };
        let slices = batch.rows();
        let view = batch.view(&slices).unwrap();
        let mut planner =
            Planner::new(batch.problem(shape), DeviceProfile::h100_sxm(), PlanOptions::default()).unwrap();
        let mut time = |query_tokens| {
            let queries = QueryTokens::uniform(&view, query_tokens).unwrap();
            planner.plan(&queries.batch()).unwrap().summary().predicted_us
        };
        let [one, two, four, eight] = [1, 2, 4, 8].map(&mut time);
        println!(
            "{sequences} sequences of {tokens} tokens: {one:.1} us, with 2, 4, 8 query tokens {two:.1}, {four:.1}, {eight:.1}"
        );
        assert!(four < 1.5 * one, "{four} {one}");
    }
}
