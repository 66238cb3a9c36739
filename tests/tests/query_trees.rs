//! Query trees: plans cover the context, ancestors and self of each row once and read shared drafts once per tile. (Numerics:
//! gpu_trees.)

use half::f16;
use pat_rs::plan::{PlanCapacity, PlanChange};
use pat_rs::{
    AttentionShape, DecodeBatch, DeviceProfile, Dtype, PlanOptions, Planner, Problem, QueryTokens, Reach, VisibleBatch,
    supports,
};
use pat_tests::invariants::{check_visible, modes, random_forest};
use pat_tests::random_case;
use pat_tests::trees::{Parents, draw_reach, draw_trees, slices, written_out};
use pat_workloads::Tensors;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u32 = 29;

fn planner(problem: Problem, options: impl Into<PlanOptions>) -> Planner {
    Planner::new(problem, DeviceProfile::h200(), options.into()).unwrap()
}

#[test]
fn plans_cover_what_rows_of_random_trees_see() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..200 {
        let batch = random_forest(&mut rng);
        let mut shape = random_case(&mut rng, Dtype::F16).shape;
        if rng.random_bool(0.2) {
            // A group of more heads than a tile has rows.
            shape = AttentionShape::new(131, 1, shape.head_dim(), Dtype::F16).unwrap();
        }
        let trees = draw_trees(&mut rng, &batch);
        let problem = batch.problem(shape).with_query_tree(16).with_reach(draw_reach(&mut rng));
        let (rows, visible) = written_out(&batch, &trees, problem.visibility().reach);
        let tables = batch.rows();
        let view = batch.view(&tables).unwrap();
        let queries = QueryTokens::trees(&view, &slices(&trees)).unwrap();
        for mode in modes(batch.page_size) {
            let plan = planner(problem, mode).plan(&queries.batch()).unwrap();
            check_visible(&plan, &rows, shape, &visible);
            assert_eq!(plan.logical_tokens(), visible.iter().map(|row| row.len() as u64).sum::<u64>());
        }
    }
}

/// A chain sees what the causal form sees, and reads no more of it.
#[test]
fn a_chain_is_the_causal_form() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    for _ in 0..60 {
        let case = random_case(&mut rng, Dtype::F16);
        let page_size = case.batch.page_size;
        let counts: Vec<u32> = case.batch.lengths.iter().map(|&length| length.min(rng.random_range(0..=9))).collect();
        let trees: Parents =
            counts.iter().map(|&count| (0..count).map(|token| token.checked_sub(1)).collect()).collect();
        let problem = case.batch.problem(case.shape).with_query_tree(9);
        let (rows, visible) = written_out(&case.batch, &trees, Reach::Full);
        assert!(visible.iter().zip(&rows.lengths).all(|(row, &length)| row.iter().copied().eq(0..length)));
        let tensors = Tensors::<f16>::draw(&rows, case.shape, case.layout, SEED).unwrap();
        let tables = case.batch.rows();
        let view = case.batch.view(&tables).unwrap();
        let [chain, causal] =
            [QueryTokens::trees(&view, &slices(&trees)), QueryTokens::ragged(&view, &counts)].map(|queries| {
                let queries = queries.unwrap();
                let plan = planner(problem, PlanOptions::default()).plan(&queries.batch()).unwrap();
                check_visible(&plan, &rows, case.shape, &visible);
                let host = tensors.host_of(problem, None);
                let mut out = vec![f16::NAN; tensors.q.len()];
                pat_rs::cpu::run(&plan, &host, &mut out, None).unwrap();
                (out, plan.logical_tokens(), plan.unique_kv_bytes())
            });
        for (chain, causal) in chain.0.iter().zip(&causal.0) {
            assert!((chain.to_f32() - causal.to_f32()).abs() < 2e-3, "{chain} {causal} {case:?}");
        }
        assert!(
            chain.1 == causal.1 && chain.2 <= causal.2,
            "{page_size}: {:?} {:?}",
            (chain.1, chain.2),
            (causal.1, causal.2)
        );
    }
}

/// 8 sequences share a context, each with a tree of 16 tokens behind it: what is distinct is read once where tiles have the rows.
#[test]
fn contexts_are_shared_by_the_rows_of_all_trees() {
    let (page_size, context, drafts) = (16u32, 1024 + 5, 16u32);
    let shape = AttentionShape::new(4, 4, 128, Dtype::F16).unwrap();
    let own = (context % page_size + drafts).div_ceil(page_size);
    let shared = context / page_size;
    let tables: Vec<Vec<u32>> =
        (0..8).map(|row| (0..shared).chain(shared + row * own..shared + (row + 1) * own).collect()).collect();
    let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
    let lengths = [context + drafts; 8];
    let view = DecodeBatch::from_block_tables(&tables, &lengths, page_size, shared + 8 * own).unwrap();
    // Two drafts behind each of the first ones.
    let tree: Vec<Option<u32>> = (0..drafts).map(|token| token.checked_sub(1).map(|before| before / 2)).collect();
    let problem = Problem::new(shape, page_size).with_query_tree(drafts);
    let plan =
        planner(problem, PlanOptions::default()).plan(&QueryTokens::tree(&view, &tree).unwrap().batch()).unwrap();
    let distinct = u64::from(shared * page_size) + 8 * u64::from(context % page_size + drafts);
    assert_eq!(plan.unique_kv_bytes(), distinct * shape.kv_bytes_per_token());
    // 128 rows in tiles of 64: the entries of the context once in each; of every draft one.
    let packed = planner(problem, pat_rs::plan::PlanMode::Packed);
    let widest = packed.tile_variants().iter().map(|variant| variant.rows()).max().unwrap();
    let tiles = (8 * drafts).div_ceil(widest);
    let plan = { packed }.plan(&QueryTokens::tree(&view, &tree).unwrap().batch()).unwrap();
    assert_eq!(plan.pages().len() as u32, tiles * shared + 8 * drafts);
}

#[test]
fn steps_are_planned_from_scratch() {
    let tables: [&[u32]; 2] = [&[0, 1, 2, 3], &[0, 1, 4, 5]];
    let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
    let problem = Problem::new(shape, 16).with_query_tree(4);
    let mut stepping = planner(problem, PlanOptions::default());
    let mut plan = None;
    for step in 0..20u32 {
        let lengths = [40 + step, 37 + step];
        let view = DecodeBatch::from_block_tables(&tables, &lengths, 16, 6).unwrap();
        let trees: [&[Option<u32>]; 2] =
            if step % 3 == 0 { [&[None], &[None]] } else { [&[None, Some(0), Some(0)], &[None, None]] };
        let queries =
            if step % 4 == 0 { QueryTokens::ragged(&view, &[2, 1]) } else { QueryTokens::trees(&view, &trees) };
        let queries = queries.unwrap();
        let scratch = planner(problem, PlanOptions::default()).plan(&queries.batch()).unwrap();
        match &mut plan {
            None => plan = Some(stepping.plan(&queries.batch()).unwrap()),
            Some(plan) => assert_eq!(stepping.advance(&queries.batch(), None, plan).unwrap(), PlanChange::Forest),
        }
        assert_eq!(plan.as_ref(), Some(&scratch));
    }
}

#[test]
fn capacities_count_an_entry_for_each_draft() {
    let tables: [&[u32]; 1] = [&[0, 1, 2]];
    let shape = AttentionShape::new(8, 2, 128, Dtype::F16).unwrap();
    let problem = Problem::new(shape, 16).with_query_tree(3);
    let view = DecodeBatch::from_block_tables(&tables, &[36], 16, 3).unwrap();
    let queries = QueryTokens::tree(&view, &[None, Some(0), Some(0)]).unwrap();
    // Rows see 2 full pages and the part of the third up to the root, and two of them a draft.
    let plan = |max_pages| {
        let capacity = PlanCapacity::for_batches(3, max_pages, &DeviceProfile::h200());
        planner(problem, PlanOptions::default()).with_capacity(capacity).unwrap().plan(&queries.batch())
    };
    let fits = plan(11).unwrap();
    assert!(fits.bytes().len() <= PlanCapacity::for_batches(3, 11, &DeviceProfile::h200()).plan_bytes());
    let message = plan(10).unwrap_err().to_string();
    assert_eq!(message, "lengths: got those of 11 pages, expected at most capacity.max_pages = 10");
}

#[test]
fn what_is_no_tree_is_refused() {
    let tables: [&[u32]; 2] = [&[0, 1], &[0]];
    let view = DecodeBatch::from_block_tables(&tables, &[20, 3], 16, 2).unwrap();
    let refusal = |queries: pat_rs::Result<QueryTokens<'_>>| queries.unwrap_err().to_string();
    for (tree, message) in [
        (&[Some(0)][..], "parents[0]: got 0, expected none: no query token stands before it"),
        (&[None, Some(1)], "parents[1]: got 1, expected none, or at most 0: a query token before it"),
        (&[None, Some(2), Some(0)], "parents[1]: got 2, expected none, or at most 0: a query token before it"),
        (
            &[None, Some(0), Some(u32::MAX)],
            "parents[2]: got 4294967295, expected none, or at most 1: a query token before it",
        ),
        (&[None; 4], "parents: got 4 query tokens, expected at most lengths[1] = 3"),
        (&[None; 257], "parents: got 257 query tokens, expected at most 256 in a tree"),
        (&[], "parents: got 0 query tokens, expected at least 1"),
    ] {
        assert_eq!(refusal(QueryTokens::tree(&view, tree)), message);
    }
    let message = refusal(QueryTokens::trees(&view, &[&[None], &[None, None, Some(3)]]));
    assert_eq!(message, "parents[1][2]: got 3, expected none, or at most 1: a query token before it");
    let message = refusal(QueryTokens::trees(&view, &[&[None], &[None; 4]]));
    assert_eq!(message, "parents[1]: got 4 query tokens, expected at most lengths[1] = 3");
    let message = refusal(QueryTokens::trees(&view, &[&[None]]));
    assert_eq!(message, "parents: got 1 trees, expected one per sequence (2)");

    let plain = Problem::new(AttentionShape::new(8, 2, 128, Dtype::F16).unwrap(), 16);
    let queries = QueryTokens::tree(&view, &[None]).unwrap();
    let message = planner(plain, PlanOptions::default()).plan(&queries.batch()).unwrap_err().to_string();
    assert_eq!(message, "query tree of the batch: got yes, expected none: the planner's problem has no query tree");
    let mut of_chains = planner(plain, PlanOptions::default());
    let mut plan = of_chains.plan(&view).unwrap();
    let message = of_chains.advance(&queries.batch(), None, &mut plan).unwrap_err().to_string();
    assert_eq!(message, "query tree of the batch: got yes, expected none: the planner's problem has no query tree");
    // What is left of trees names parts of pages: nobody takes it for a batch of sequences.
    let visible = VisibleBatch::new(&queries.batch(), Reach::Full).unwrap();
    let message = of_chains.plan(&visible.batch()).unwrap_err().to_string();
    assert!(message.starts_with("batch: got what is left of query trees, expected the batch"), "{message}");
    let message = of_chains.advance(&visible.batch(), None, &mut plan).unwrap_err().to_string();
    assert!(message.starts_with("batch: got what is left of query trees, expected the batch"), "{message}");
    let message = VisibleBatch::new(&visible.batch(), Reach::Window(4)).unwrap_err().to_string();
    assert_eq!(message, "batch: got what is left of query trees, expected the batch that it was made from");
    for batch in [queries.batch(), visible.batch()] {
        let message = refusal(QueryTokens::uniform(&batch, 1));
        assert_eq!(message, "batch: got rows that form query trees, expected a batch of sequences");
    }
    let forced = PlanOptions::default().with_variants([pat_rs::TileVariant::Wgmma128]);
    let refused = Planner::new(plain.with_query_tree(4), DeviceProfile::h200(), forced).unwrap_err().to_string();
    assert!(refused.contains("query tree: got yes, expected none"), "{refused}");
    assert_eq!(supports(&plain.with_query_tree(4), None, None), Ok(()));
}

#[test]
fn the_largest_trees_that_are_accepted() {
    let chain = |count: u32| (0..count).map(|token| token.checked_sub(1)).collect::<Vec<Option<u32>>>();
    let tables: [&[u32]; 1] = [&[0; 32]];
    let view = DecodeBatch::from_block_tables(&tables, &[300], 16, 1).unwrap();
    assert_eq!(QueryTokens::tree(&view, &chain(256)).unwrap().batch().sequence_count(), 256);
    QueryTokens::tree(&view, &chain(257)).unwrap_err();

    // Each page that a row sees a part of counts as whole: 32,766 of 65,536 tokens, and the drafts behind the first.
    let table = vec![0; 32_767];
    let refusal = |drafts: u32| {
        let (tables, lengths) = ([&table[..]], [32_766 * 65_536 + drafts - 1]);
        let view = DecodeBatch::from_block_tables(&tables, &lengths, 1 << 16, 1).unwrap();
        let queries = QueryTokens::tree(&view, &chain(drafts)).unwrap();
        let problem =
            Problem::new(AttentionShape::new(8, 2, 128, Dtype::F16).unwrap(), 1 << 16).with_query_tree(drafts);
        let plan = planner(problem, PlanOptions::default()).plan(&queries.batch());
        plan.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(refusal(2), Ok(()));
    let message = refusal(3).unwrap_err();
    assert!(message.starts_with("query tree of sequence 0: got 32768, expected pages and drafts"), "{message}");
}
