//! Incremental planning: whatever a step changes, `advance` gives the plan that planning from scratch gives.

use pat_rs::plan::{PlanChange, PlanMode};
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Plan, Planner, Problem};
use pat_workloads::{OwnedBatch, RaggedGroups};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

/// Rows whose entries in use have changed: the hint.
fn changed_rows(before: &OwnedBatch, after: &OwnedBatch) -> Vec<u32> {
    let pages = |batch: &OwnedBatch, row: usize| batch.lengths[row].div_ceil(batch.page_size) as usize;
    (0..before.lengths.len().min(after.lengths.len()))
        .filter(|&row| {
            let common = pages(before, row).min(pages(after, row));
            before.block_tables[row][..common] != after.block_tables[row][..common]
        })
        .map(|row| row as u32)
        .collect()
}

/// A batch that lives: every step most sequences grow by a token, and now and then something else happens.
struct Walk {
    rng: ChaCha8Rng,
    batch: OwnedBatch,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_size = [1, 4, 16, 32][rng.random_range(0..4)];
        let batch = OwnedBatch { page_size, num_pages: POOL, lengths: Vec::new(), block_tables: Vec::new() };
        let mut walk = Self { rng, batch };
        for _ in 0..walk.rng.random_range(1..24) {
            walk.join();
        }
        walk
    }

    fn any_row(&mut self) -> Option<usize> {
        let rows = self.batch.lengths.len();
        (rows > 0).then(|| self.rng.random_range(0..rows))
    }

    fn page(&mut self) -> u32 {
        self.rng.random_range(0..POOL)
    }

    /// Makes a table long enough for its length, sometimes by the page that another row has there: two sequences that
    /// generate the same tokens come to share the page once it is full.
    fn extend(&mut self, row: usize) {
        while (self.batch.block_tables[row].len() as u32) < self.batch.lengths[row].div_ceil(self.batch.page_size) {
            let at = self.batch.block_tables[row].len();
            let other = self.any_row().expect("there is this row");
            let twin = self.batch.block_tables[other].get(at).copied();
            let page = twin.filter(|_| self.rng.random_bool(0.3)).unwrap_or_else(|| self.page());
            self.batch.block_tables[row].push(page);
        }
    }

    fn join(&mut self) {
        let parent = self.any_row();
        let (table, length) = match parent {
            Some(row) if self.rng.random_bool(0.7) => {
                let (table, length) = (self.batch.block_tables[row].clone(), self.batch.lengths[row]);
                (table, if self.rng.random_bool(0.3) { length } else { self.rng.random_range(0..=length) })
            }
            _ => (Vec::new(), 0),
        };
        let more = [0, 1, 3, 40, 200][self.rng.random_range(0..5)];
        self.batch.lengths.push(length + more);
        self.batch.block_tables.push(table);
        self.extend(self.batch.lengths.len() - 1);
    }

    fn permute(&mut self) {
        let mut order: Vec<usize> = (0..self.batch.lengths.len()).collect();
        order.shuffle(&mut self.rng);
        self.batch.lengths = order.iter().map(|&row| self.batch.lengths[row]).collect();
        self.batch.block_tables = order.iter().map(|&row| self.batch.block_tables[row].clone()).collect();
    }

    fn step(&mut self) {
        if self.rng.random_bool(0.95) {
            for row in 0..self.batch.lengths.len() {
                // Empty rows are padding; now and then one stalls.
                if self.batch.lengths[row] > 0 && self.rng.random_bool(0.995) {
                    self.batch.lengths[row] += 1;
                    self.extend(row);
                }
            }
        }
        match (self.rng.random_range(0..24), self.any_row()) {
            (0, _) => self.join(),
            (1, Some(row)) => {
                self.batch.lengths.remove(row);
                self.batch.block_tables.remove(row);
            }
            (2, _) => self.permute(),
            // A page in the middle is replaced: by a copy, or by that of another row.
            (3 | 4, Some(row)) if !self.batch.block_tables[row].is_empty() => {
                let at = self.rng.random_range(0..self.batch.block_tables[row].len());
                let other = self.any_row().expect("there is a row");
                let page = self.batch.block_tables[other].get(at).copied().unwrap_or(0);
                self.batch.block_tables[row][at] = if self.rng.random_bool(0.5) { page } else { self.page() };
            }
            // A whole prefix is replaced by another row's: engines de-duplicate after the fact.
            (5, Some(row)) => {
                let other = self.any_row().expect("there is a row");
                let common = self.batch.block_tables[row].len().min(self.batch.block_tables[other].len());
                let prefix = self.batch.block_tables[other][..common].to_vec();
                self.batch.block_tables[row][..common].copy_from_slice(&prefix);
            }
            // Rejected tokens are taken back.
            (6, Some(row)) => {
                self.batch.lengths[row] = self.batch.lengths[row].saturating_sub(self.rng.random_range(0..6));
            }
            (7, Some(row)) => {
                let other = self.any_row().expect("there is a row");
                self.batch.lengths.swap(row, other);
                self.batch.block_tables.swap(row, other);
            }
            (8, Some(row)) => self.batch.lengths[row] = 0,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if std::env::var_os("PAT_LONG").is_some() { 400 } else { 40 }, ..ProptestConfig::default() })]

    #[test]
    fn random_walks_of_200_steps(seed: u64, mode in 0..4usize) {
        let mut walk = Walk::new(seed);
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
