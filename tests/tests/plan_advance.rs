//! Incremental planning: whatever a step changes, `advance` gives the plan that planning from scratch gives.

use pat_rs::plan::{PlanChange, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, Planner, Problem};
use pat_tests::walk::{Limits, Walk, changed_rows};
use pat_workloads::{OwnedBatch, RaggedGroups};
use proptest::prelude::*;

const POOL: u32 = 4096;

fn planner(mode: PlanMode, page_size: u32) -> Planner {
    let shape = AttentionShape::new(32, 8, 128, Dtype::F16).expect("a valid shape");
    Planner::new(Problem::new(shape, page_size), DeviceProfile::h200(), mode.into()).expect("a planner")
}

fn from_scratch(planner: &mut Planner, batch: &OwnedBatch) -> Plan {
    let rows = batch.rows();
    planner.plan(&batch.view(&rows).expect("a valid batch")).expect("a plan")
}

fn advance(planner: &mut Planner, batch: &OwnedBatch, changed_rows: Option<&[u32]>, plan: &mut Plan) -> PlanChange {
    let rows = batch.rows();
    let view = batch.view(&rows).expect("a valid batch");
    planner.advance(&view, changed_rows, plan).expect("a plan")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if std::env::var_os("PAT_LONG").is_some() { 400 } else { 40 }, ..ProptestConfig::default() })]

    #[test]
    fn random_walks_of_200_steps(seed: u64, mode in 0..4usize) {
        let mut walk = Walk::new(seed, &[1, 4, 16, 32], Limits::of_pool(POOL));
        let chunk = PlanMode::FixedChunk { tokens: 3 * walk.batch.page_size };
        let mode = [PlanMode::Auto, PlanMode::Flat, PlanMode::PerNode, chunk][mode];
        let [mut scratch, mut comparing, mut hinted] = [(); 3].map(|()| planner(mode, walk.batch.page_size));
        let mut compared = from_scratch(&mut comparing, &walk.batch);
        let mut told = from_scratch(&mut hinted, &walk.batch);
        for step in 0..200 {
            let before = walk.batch.clone();
            walk.step();
            let expected = from_scratch(&mut scratch, &walk.batch);
            let generation = compared.generation();
            let change = advance(&mut comparing, &walk.batch, None, &mut compared);
            prop_assert_eq!(&compared, &expected, "step {}: {:?}", step, change);
            prop_assert_eq!(change == PlanChange::Nothing, generation == compared.generation());
            let rows = changed_rows(&before, &walk.batch);
            let change = advance(&mut hinted, &walk.batch, Some(&rows), &mut told);
            prop_assert_eq!(&told, &expected, "step {}: {:?}, changed rows {:?}", step, change, rows);
        }
    }
}

#[test]
fn a_plain_decode_step_changes_lengths_only() {
    let spec = RaggedGroups { sequences: 64, groups: 4, shared_pages: 8, private_pages: 20, page_size: 16, seed: 7 };
    let mut batch = spec.batch();
    // Away from page borders, and with a full page of their own.
    batch.lengths.iter_mut().for_each(|length| *length = *length / 16 * 16 - 12);
    let mut planner = planner(PlanMode::Auto, 16);
    let mut plan = from_scratch(&mut planner, &batch);
    for _ in 0..11 {
        batch.lengths.iter_mut().for_each(|length| *length += 1);
        assert_eq!(advance(&mut planner, &batch, Some(&[]), &mut plan), PlanChange::Lengths);
    }
    batch.lengths[3] += 1;
    assert_eq!(advance(&mut planner, &batch, Some(&[]), &mut plan), PlanChange::Lengths);
    batch.lengths[3] += 1;
    assert_eq!(advance(&mut planner, &batch, Some(&[]), &mut plan), PlanChange::Pages);
    assert_eq!(advance(&mut planner, &batch, None, &mut plan), PlanChange::Nothing);
    assert_eq!(plan, from_scratch(&mut self::planner(PlanMode::Auto, 16), &batch));
}

/// Engines de-duplicate after the fact: the entry changes, the length does not.
#[test]
fn pages_replaced_in_the_middle_are_noticed() {
    let spec = RaggedGroups { sequences: 8, groups: 1, shared_pages: 4, private_pages: 20, page_size: 16, seed: 9 };
    let before = OwnedBatch { num_pages: POOL, ..spec.batch() };
    let row = (0..8).max_by_key(|&row| before.lengths[row]).expect("a row");
    let replacement = before.block_tables.iter().flatten().max().expect("a page") + 1;
    // A private page, a shared one, the one that tells the row from the others.
    for (at, expected) in [(12, PlanChange::Pages), (2, PlanChange::Forest), (4, PlanChange::Forest)] {
        for hint in [None, Some(&[row as u32][..])] {
            let mut batch = before.clone();
            let mut planner = planner(PlanMode::Auto, 16);
            let mut plan = from_scratch(&mut planner, &batch);
            batch.block_tables[row][at] = replacement;
            assert_eq!(advance(&mut planner, &batch, hint, &mut plan), expected, "entry {at}, hint {hint:?}");
            assert!(plan.pages().contains(&replacement));
            assert_eq!(plan, from_scratch(&mut self::planner(PlanMode::Auto, 16), &batch));
        }
    }
}

#[test]
fn a_plan_of_another_step_is_planned_from_scratch() {
    let spec = RaggedGroups { sequences: 8, groups: 2, shared_pages: 2, private_pages: 3, page_size: 16, seed: 1 };
    let (batch, other) = (spec.batch(), RaggedGroups { seed: 2, ..spec }.batch());
    let mut planner = planner(PlanMode::Auto, 16);
    let mut stale = from_scratch(&mut planner, &batch);
    let expected = from_scratch(&mut planner, &other);
    assert_ne!(stale, expected);
    assert_eq!(advance(&mut planner, &other, Some(&[]), &mut stale), PlanChange::Forest);
    assert_eq!(stale, expected);
}

#[test]
fn a_refused_step_leaves_the_plan_as_it_was() {
    let batch = RaggedGroups { sequences: 4, groups: 1, shared_pages: 2, private_pages: 3, page_size: 16, seed: 1 };
    let batch = batch.batch();
    let mut planner = planner(PlanMode::Auto, 16);
    let mut plan = from_scratch(&mut planner, &batch);
    let before = plan.clone();
    let rows = batch.rows();
    let view = batch.view(&rows).expect("valid");
    let error = planner.advance(&view, Some(&[0, 4]), &mut plan).unwrap_err().to_string();
    assert!(error.contains("changed_rows") && error.contains("got 4") && error.contains("below 4"), "{error}");
    assert_eq!((&plan, plan.generation()), (&before, before.generation()));
    assert_eq!(advance(&mut planner, &batch, None, &mut plan), PlanChange::Nothing);
}
