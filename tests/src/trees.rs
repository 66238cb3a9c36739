//! Query trees: random ones, what their rows see, and their execution against the f64 oracle.

use crate::executor::Executor;
use crate::invariants::modes;
use crate::{Case, draw_sinks, random_case};
use pat_rs::{DeviceProfile, Element, PlanOptions, Planner, QueryTokens, Reach};
use pat_workloads::{Oracle, OwnedBatch, RowSample, Tensors, check};
use rand::Rng;
use rand::seq::IndexedRandom;

const SEED: u32 = 29;

/// By sequence and query token, the parent among the query tokens of the sequence.
pub type Parents = Vec<Vec<Option<u32>>>;

/// A tree of each sequence, of up to 16 tokens: random ones, chains, and such whose root is all drafts' ancestor.
///
/// # Panics
/// Never.
pub fn draw_trees(rng: &mut impl Rng, batch: &OwnedBatch) -> Parents {
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

/// The rows written out, and the tokens that each sees: those of the context that are within reach, its ancestors that are,
/// itself.
///
/// # Panics
/// Never.
pub fn written_out(batch: &OwnedBatch, trees: &Parents, reach: Reach) -> (OwnedBatch, Vec<Vec<u32>>) {
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

/// As [`QueryTokens::trees`] takes them.
pub fn slices(trees: &Parents) -> Vec<&[Option<u32>]> {
    trees.iter().map(Vec::as_slice).collect()
}

/// Mostly everything.
///
/// # Panics
/// Never.
pub fn draw_reach(rng: &mut impl Rng) -> Reach {
    let tokens = *[1, 3, 16, 40].choose(rng).expect("not empty");
    *[Reach::Full, Reach::Full, Reach::Full, Reach::Window(tokens), Reach::Chunk(tokens)]
        .choose(rng)
        .expect("not empty")
}

/// Draws a forest with trees and runs it through one of the variants that serve it.
///
/// # Panics
/// The output is not the oracle's, or the executor refuses.
pub fn agree<T: Element>(executor: &impl Executor, profile: &DeviceProfile, rng: &mut impl Rng, index: usize) {
    let case = random_case(rng, T::DTYPE);
    // Drafts across the borders of pages.
    let page_size = *[1u32, 8, 16].choose(rng).expect("not empty");
    let case = Case { batch: repaged(&case.batch, page_size), ..case };
    let trees = draw_trees(rng, &case.batch);
    let mut problem = case.batch.problem(case.shape).with_query_tree(16).with_reach(draw_reach(rng));
    let sinks = draw_sinks(rng, case.shape);
    if sinks.is_some() {
        problem = problem.with_sinks();
    }
    let (rows, visible) = written_out(&case.batch, &trees, problem.visibility().reach);
    let tensors = Tensors::<T>::draw(&rows, case.shape, case.layout, SEED).expect("a forest that is served");
    let everything = RowSample::for_batch(&rows, case.shape);
    let oracle = Oracle::compute_visible::<T>(&rows, (problem, sinks.as_deref()), &visible, SEED, everything)
        .expect("a forest that is served");
    let tables = case.batch.rows();
    let view = case.batch.view(&tables).expect("a forest that is served");
    let queries = QueryTokens::trees(&view, &slices(&trees)).expect("a forest that is served");
    let mode = modes(case.batch.page_size)[index % 5];
    let variants = profile.variants(&problem);
    let options = PlanOptions::from(mode)
        .with_variants([variants[index % variants.len()], *variants.last().expect("a forest that is served")]);
    let plan = Planner::new(problem, profile.clone(), options)
        .expect("a forest that is served")
        .plan(&queries.batch())
        .expect("a forest that is served");
    let host = tensors.host_of(problem, sinks.as_deref());
    let mut out = vec![T::from_f32(f32::NAN); tensors.q.len()];
    let mut lse = vec![f32::NAN; tensors.q.len() / case.shape.head_dim() as usize];
    executor.run_host(&plan, &host, &mut out, Some(&mut lse)).expect("a forest that is served");
    let report = check(&oracle, case.shape.q_heads(), &out, Some(&lse));
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
