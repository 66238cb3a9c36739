//! Query trees: plans cover the context, ancestors and self of each row once and read shared drafts once per tile; on the CPU executor
//! and in interpreted PTX, random trees agree with the f64 oracle. (Not run on a device yet.)

use half::{bf16, f16};
use pat_rs::plan::{PlanCapacity, PlanChange};
use pat_rs::{
    AttentionShape, DecodeBatch, DeviceProfile, Dtype, Element, Engine, PlanOptions, Planner, Problem, QueryTokens,
    Reach, supports,
};
use pat_tests::executor::{Executor, Interpreter};
use pat_tests::invariants::{check_visible, modes, random_forest};
use pat_tests::{Case, random_case};
use pat_workloads::{Oracle, OwnedBatch, RowSample, Tensors};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEED: u32 = 29;

type Parents = Vec<Vec<Option<u32>>>;

/// A tree of each sequence, of up to 16 tokens: random ones, chains, and such whose root is all drafts' ancestor.
fn draw_trees(rng: &mut impl Rng, batch: &OwnedBatch) -> Parents {
    let tree = |length: &u32| {
        let most = if *length == 0 { 3 } else { (*length).min(16) };
        let tokens = if rng.random_bool(0.2) { 1.min(most) } else { rng.random_range(0..=most) };
        let kind = rng.random_range(0..4);
        let parent = |token: u32| match (token, kind) {
            (0, _) => None,
            (_, 0) => Some(token - 1),
            (_, 1) => Some(rng.random_range(0..token)),
            // Often one of the latest: deep trees.
            (_, 2) => Some(token - rng.random_range(1..=token.min(3))),
            _ => rng.random_bool(0.7).then(|| rng.random_range(0..token)),
        };
        (0..tokens).map(parent).collect()
    };
    batch.lengths.iter().map(tree).collect()
}

/// The rows written out, and the tokens that each sees: those of the context that are within reach, its ancestors that are, itself.
fn written_out(batch: &OwnedBatch, trees: &Parents, reach: Reach) -> (OwnedBatch, Vec<Vec<u32>>) {
    let mut rows = OwnedBatch { lengths: Vec::new(), block_tables: Vec::new(), ..*batch };
    let mut visible = Vec::new();
    for ((&length, table), tree) in batch.lengths.iter().zip(&batch.block_tables).zip(trees) {
        let context = length.saturating_sub(tree.len() as u32);
        for token in 0..tree.len() as u32 {
            rows.lengths.push(if length == 0 { 0 } else { context + token + 1 });
            rows.block_tables.push(table.clone());
            if length == 0 {
                visible.push(Vec::new());
                continue;
            }
            let mut path: Vec<u32> = std::iter::successors(Some(token), |&at| tree[at as usize]).collect();
            path.reverse();
            // By position along the path.
            let tokens = (0..context).chain(path.iter().map(|&at| context + at));
            let position = context + path.len() as u32 - 1;
            let first = reach.first_token(position) as usize;
            visible.push(tokens.skip(first).collect());
        }
    }
    (rows, visible)
}

fn slices(trees: &Parents) -> Vec<&[Option<u32>]> {
    trees.iter().map(Vec::as_slice).collect()
}

fn planner(problem: Problem, options: impl Into<PlanOptions>) -> Planner {
    Planner::new(problem, DeviceProfile::h200(), options.into()).unwrap()
}

fn draw_reach(rng: &mut impl Rng) -> Reach {
    let tokens = *[1, 3, 16, 40].choose(rng).unwrap();
    *[Reach::Full, Reach::Full, Reach::Full, Reach::Window(tokens), Reach::Chunk(tokens)].choose(rng).unwrap()
}

#[test]
fn plans_cover_what_rows_of_random_trees_see() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..200 {
        let batch = random_forest(&mut rng);
        let shape = random_case(&mut rng, Dtype::F16).shape;
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

fn agree<T: Element>(executor: &impl Executor, rng: &mut impl Rng, index: usize) {
    let case = random_case(rng, T::DTYPE);
    // Drafts across the borders of pages.
    let page_size = *[1u32, 8, 16].choose(rng).unwrap();
    let case = Case { batch: repaged(&case.batch, page_size), ..case };
    let trees = draw_trees(rng, &case.batch);
    let mut problem = case.batch.problem(case.shape).with_query_tree(16).with_reach(draw_reach(rng));
    let sinks: Option<Vec<f32>> =
        rng.random_bool(0.3).then(|| (0..case.shape.q_heads()).map(|_| rng.random_range(-4.0..4.0)).collect());
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    let (rows, visible) = written_out(&case.batch, &trees, problem.visibility().reach);
    let tensors = Tensors::<T>::draw(&rows, case.shape, case.layout, SEED).unwrap();
    let everything = RowSample::for_batch(&rows, case.shape);
    let oracle = Oracle::compute_visible::<T>(&rows, (problem, sinks.as_deref()), &visible, SEED, everything).unwrap();
    let tables = case.batch.rows();
    let view = case.batch.view(&tables).unwrap();
    let queries = QueryTokens::trees(&view, &slices(&trees)).unwrap();
    let mode = modes(case.batch.page_size)[index % 5];
    let variants = DeviceProfile::h200().variants(&problem);
    let options = PlanOptions::from(mode).with_variants([variants[index % variants.len()], *variants.last().unwrap()]);
    let plan = planner(problem, options).plan(&queries.batch()).unwrap();
    let mut host = tensors.host(problem.score().scale);
    (host.problem, host.sinks) = (problem, sinks.as_deref());
    let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
    let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
    executor.run_host(&plan, &host, &mut out, Some(&mut lse)).unwrap();
    let report = pat_workloads::check(&oracle, case.shape.q_heads(), &out, Some(&lse));
    assert!(report.passed, "forest {index}, {mode:?}, {problem:?}: {report:?}\n{trees:?}\n{case:?}");
}

/// The same sequences in pages of another size, of which those are shared that lie in shared pages.
fn repaged(batch: &OwnedBatch, page_size: u32) -> OwnedBatch {
    // A token's place in the pool, cut into pages anew; page sizes of cases are 1 or multiples of the new ones.
    if batch.page_size < page_size {
        return batch.clone();
    }
    let parts = batch.page_size / page_size;
    let cut = |table: &Vec<u32>| {
        let page = |&page: &u32| (0..parts).map(move |part| page.saturating_mul(parts).saturating_add(part));
        table.iter().flat_map(page).collect()
    };
    OwnedBatch {
        page_size,
        num_pages: batch.num_pages * parts,
        lengths: batch.lengths.clone(),
        block_tables: batch.block_tables.iter().map(cut).collect(),
    }
}

#[test]
fn random_trees_agree_with_the_oracle_on_the_cpu() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for index in 0..120 {
        if index % 2 == 0 {
            agree::<f16>(&Engine::cpu(), &mut rng, index);
        } else {
            agree::<bf16>(&Engine::cpu(), &mut rng, index);
        }
    }
}

#[test]
fn random_trees_agree_with_the_oracle_in_interpreted_ptx() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for index in 0..24 {
        if index % 2 == 0 {
            agree::<f16>(&Interpreter, &mut rng, index);
        } else {
            agree::<bf16>(&Interpreter, &mut rng, index);
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
                let mut host = tensors.host(problem.score().scale);
                host.problem = problem;
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
    assert_eq!(message, "pages of the batch: got 11, expected at most capacity.max_pages = 10");
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
    let forced = PlanOptions::default().with_variants([pat_rs::TileVariant::Wgmma64]);
    let refused = Planner::new(plain.with_query_tree(4), DeviceProfile::h200(), forced).unwrap_err().to_string();
    assert!(refused.contains("query tree: got yes, expected none"), "{refused}");
    assert_eq!(supports(&plain.with_query_tree(4), None, None), Ok(()));
}
