//! Planners and plans behind locks, so that C may share them between threads.

use crate::types::{PatPlanSummary, PatPlannerOptions};
use pat_rs::plan::{PlanCapacity, PlanChange};
use pat_rs::{DecodeBatch, DeviceProfile, Error, Plan, PlanOptions, Planner, Problem, QueryTokens, Result};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

/// Makes plans for one problem on one device; keeps its scratch memory from step to step.
pub struct PatPlanner {
    planner: Mutex<Planner>,
    pub(crate) capacity: Option<PlanCapacity>,
}

/// Who is served together in one decode step, for all layers.
pub struct PatPlan {
    plan: RwLock<Plan>,
}

/// Block tables of C, as slices.
pub(crate) struct Tables<'a> {
    pub(crate) form: Form<'a>,
    pub(crate) query_tokens: Option<&'a [u32]>,
    pub(crate) num_pages: u32,
}

pub(crate) enum Form<'a> {
    Padded { page_ids: &'a [i32], row_stride: usize, lengths: &'a [i32] },
    Csr { indptr: &'a [i32], page_ids: &'a [i32], last_page_len: &'a [i32] },
}

impl Tables<'_> {
    /// Hands the batch, a row per query token, to `use_it`.
    fn with_batch<R>(&self, page_size: u32, use_it: impl FnOnce(&DecodeBatch<'_>) -> Result<R>) -> Result<R> {
        let sequences = match self.form {
            Form::Padded { page_ids, row_stride, lengths } => {
                DecodeBatch::from_padded(page_ids, row_stride, lengths, page_size, self.num_pages)
            }
            Form::Csr { indptr, page_ids, last_page_len } => {
                DecodeBatch::from_csr(indptr, page_ids, last_page_len, page_size, self.num_pages)
            }
        }?;
        match self.query_tokens {
            None => use_it(&sequences),
            Some(counts) => use_it(&QueryTokens::ragged(&sequences, counts)?.batch()),
        }
    }
}

impl PatPlanner {
    pub(crate) fn new(problem: Problem, profile: DeviceProfile, options: &PatPlannerOptions) -> Result<Self> {
        let bounds = options.bounds()?;
        let capacity = bounds.map(|(rows, pages)| PlanCapacity::for_batches(rows, pages, &profile));
        let planner = Planner::new(problem, profile, PlanOptions::from(options.plan_mode()?))?;
        let planner = match capacity {
            None => planner,
            Some(capacity) => planner.with_capacity(capacity)?,
        };
        Ok(Self { planner: Mutex::new(planner), capacity })
    }

    /// The planner; after a panic elsewhere it is what it was before that plan, which it then makes from scratch.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Planner> {
        self.planner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn plan(&self, tables: &Tables<'_>) -> Result<PatPlan> {
        let mut planner = self.lock();
        let plan = tables.with_batch(planner.problem().page_size(), |batch| planner.plan(batch))?;
        Ok(PatPlan { plan: RwLock::new(plan) })
    }

    /// With query tokens, `changed_rows` would name sequences, not rows: all entries are compared.
    pub(crate) fn advance(
        &self,
        plan: &PatPlan,
        tables: &Tables<'_>,
        changed_rows: Option<&[u32]>,
    ) -> Result<PlanChange> {
        let mut planner = self.lock();
        let mut plan = plan.plan.write().unwrap_or_else(PoisonError::into_inner);
        let (of_planner, of_plan) = (planner.problem(), plan.problem());
        if of_planner.shape() != of_plan.shape() || of_planner.page_size() != of_plan.page_size() {
            return Err(Error::PlanMismatch {
                what: "the planner".into(),
                plan: format!("{:?} in pages of {}", of_plan.shape(), of_plan.page_size()),
                call: format!("{:?} in pages of {}", of_planner.shape(), of_planner.page_size()),
            });
        }
        let changed_rows = changed_rows.filter(|_| tables.query_tokens.is_none());
        tables.with_batch(of_planner.page_size(), |batch| planner.advance(batch, changed_rows, &mut plan))
    }
}

impl PatPlan {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Plan> {
        // A plan is written as a whole or left as it was: a panic elsewhere leaves one of the two.
        self.plan.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn summary(&self) -> PatPlanSummary {
        let plan = self.read();
        let summary = plan.summary();
        PatPlanSummary {
            rows: summary.sequences,
            merge_rows: summary.merge_rows,
            items: summary.variants.iter().map(|variant| variant.items).sum(),
            max_splits: summary.max_splits,
            sharing_factor: summary.sharing_factor,
            unique_kv_bytes: summary.unique_kv_bytes,
            planned_kv_bytes: summary.planned_kv_bytes,
            flat_kv_bytes: summary.flat_kv_bytes,
            partial_bytes: summary.partial_bytes,
            upload_bytes: summary.upload_bytes,
            imbalance: summary.imbalance,
            predicted_us: summary.predicted_us,
            generation: plan.generation().number(),
        }
    }
}
