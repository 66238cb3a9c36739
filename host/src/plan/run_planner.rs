//! Plans for pages of one token, most of which lie in runs: the runs are planned as pages of 16 tokens, what is in no run page by
//! page, and the two plans become one.

use super::run_tables::{Look, RunTables};
use super::{PageRuns, Plan, PlanChange, PlanMode, PlanOptions, Planner};
use crate::eligibility::variant_supports;
use crate::{DecodeBatch, DeviceProfile, Part, Problem, Reach, Result, Visibility};
use pat_abi::{RUN_PAGES, TileVariant};
use std::sync::Arc;

/// What a launch and a merge for the pages that are in no run may take, in parts of reading the batch once: a plan is made
/// once per step and run once per layer.
const MOST_COST: f64 = 0.02;

/// Plans the two parts of a batch.
#[derive(Clone, Debug)]
pub(super) struct RunPlanner {
    problem: Problem,
    when: PageRuns,
    profile: Arc<DeviceProfile>,
    /// Of a part, where rows are merged whatever its tiling: a merge costs it no launch.
    merging_profile: Arc<DeviceProfile>,
    tables: RunTables,
    pub(super) runs: Planner,
    singles: Planner,
    /// Of these planners.
    plans: [Plan; 2],
    /// Memory for the plan of both.
    slots: Vec<u32>,
}

impl RunPlanner {
    /// `None` where pages of `problem` cannot be planned in runs: they have more than one token, rows see part of their
    /// sequences, or the options say otherwise. Fixed chunks are cut alike whatever the page ids, which runs would not be.
    ///
    /// # Errors
    /// Those of [`Planner::new`].
    pub(super) fn new(problem: Problem, profile: &DeviceProfile, options: &PlanOptions) -> Result<Option<Self>> {
        let Visibility { reach, is_tree, .. } = problem.visibility();
        let has_fixed_chunks = matches!(options.mode, PlanMode::FixedChunk { .. });
        let when = options.runs;
        if problem.page_size() != 1 || reach != Reach::Full || is_tree || has_fixed_chunks || when == PageRuns::Never {
            return Ok(None);
        }
        let in_runs = problem.with_page_size(RUN_PAGES);
        let options = options.clone().with_runs(PageRuns::Never);
        let variants = options.variants.clone().unwrap_or_else(|| variants_of_runs(&problem, &in_runs, profile));
        let runs = Planner::new(in_runs, profile.clone(), options.clone().with_variants(variants))?;
        let singles = Planner::new(problem, profile.clone(), for_page_size(&problem, profile, options))?;
        let profile = Arc::new(profile.clone());
        let merging_profile = Arc::new(DeviceProfile { merge_us: 0.0, ..(*profile).clone() });
        let plans = [in_runs, problem].map(|problem| Plan::empty(problem, profile.clone()));
        let (tables, slots) = (RunTables::default(), Vec::new());
        Ok(Some(Self { problem, when, profile, merging_profile, tables, runs, singles, plans, slots }))
    }

    /// Plans a batch from scratch; `false`, and nothing is done, where not most of its pages are in runs.
    ///
    /// # Errors
    /// Those of [`Planner::plan_into`]; `plan` is as before.
    pub(super) fn plan_into(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<bool> {
        let look = Look::at(batch);
        if !look.are_most_in_runs() || look.has_singles() && self.costs_too_much(look.tokens, MOST_COST) {
            return Ok(false);
        }
        self.tables.take(batch);
        if !self.tables.are_most_in_runs() {
            return Ok(false);
        }
        let singles = self.tables.single_tokens();
        if singles > 0 {
            let run_tokens = self.runs.unique_pages(&self.tables.runs()) * u64::from(RUN_PAGES);
            if self.costs_too_much(run_tokens + singles, MOST_COST) {
                return Ok(false);
            }
        }
        self.weigh_merge();
        let [of_runs, of_singles] = &mut self.plans;
        self.runs.plan_into(&self.tables.runs(), of_runs)?;
        self.singles.plan_into(&self.tables.singles(), of_singles)?;
        self.join(batch, plan).map(|()| true)
    }

    /// As [`Planner::advance`], of a plan in runs; `None`, and nothing is done to `plan`, where it should not be one any more.
    ///
    /// # Errors
    /// Those of [`Planner::advance`]; `plan` is as before.
    pub(super) fn advance(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        plan: &mut Plan,
    ) -> Result<Option<PlanChange>> {
        let is_known = self.tables.update(batch, changed_rows);
        let singles = self.tables.single_tokens();
        let tokens = self.runs.tiling.pages.unique * u64::from(RUN_PAGES) + singles;
        // A plan is not made anew for a little more.
        if !self.tables.are_most_in_runs() || singles > 0 && self.costs_too_much(tokens, 1.5 * MOST_COST) {
            return Ok(None);
        }
        self.weigh_merge();
        let changed = is_known.then(|| self.tables.changed());
        let [of_runs, of_singles] = &mut self.plans;
        let change = self.runs.advance(&self.tables.runs(), changed, of_runs)?;
        let change = change.max(self.singles.advance(&self.tables.singles(), changed, of_singles)?);
        if change != PlanChange::Nothing {
            self.join(batch, plan)?;
        }
        Ok(Some(change))
    }

    /// The runs of the batch planned last.
    pub(super) fn batch_of_runs(&self) -> DecodeBatch<'_> {
        self.tables.runs()
    }

    /// The plan of the runs of the batch planned last.
    pub(super) fn plan_of_runs(&self) -> &Plan {
        &self.plans[0]
    }

    /// Whether singles beside runs take more than `most`, in parts of reading as many distinct tokens once.
    fn costs_too_much(&self, tokens: u64, most: f64) -> bool {
        let bytes = tokens as f64 * self.problem.shape().kv_bytes_per_token() as f64;
        let cost_us = self.profile.launch_us + self.merge_us(self.tables.divided_rows());
        self.when == PageRuns::WhereFree && cost_us > most * bytes / self.profile.hbm_bytes_per_us
    }

    /// What merging rows takes that have a partial in both parts. What exceeds that the parts count.
    fn merge_us(&self, rows: usize) -> f64 {
        let partial_bytes = (2 * rows) as f64 * self.problem.shape().partial_bytes() as f64;
        self.profile.merge_us + self.profile.partials_us(partial_bytes)
    }

    /// Tells the parts whether there is a merge anyway.
    fn weigh_merge(&mut self) {
        let profile = if self.tables.divided_rows() > 0 { &self.merging_profile } else { &self.profile };
        for planner in [&mut self.runs, &mut self.singles] {
            planner.profile.clone_from(profile);
        }
    }

    fn join(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<()> {
        let [of_runs, of_singles] = &self.plans;
        let mut prediction = of_runs.prediction().and(of_singles.prediction());
        let divided_rows = self.tables.divided_rows();
        prediction.merge_us += if divided_rows > 0 { self.merge_us(divided_rows) } else { 0.0 };
        plan.join((self.problem, &self.profile), batch, (of_runs, of_singles), prediction, &mut self.slots)
    }
}

/// The wgmma stream where it serves runs, whose pages overlap in its tensor maps; else what serves pages of one token.
fn variants_of_runs(problem: &Problem, in_runs: &Problem, profile: &DeviceProfile) -> Vec<TileVariant> {
    if profile.variants(in_runs).contains(&TileVariant::Wgmma64) {
        return vec![TileVariant::Wgmma64];
    }
    profile.variants(problem)
}

/// The options with those variants alone that serve such pages, if there are any: others may be meant for runs.
pub(super) fn for_page_size(problem: &Problem, profile: &DeviceProfile, options: PlanOptions) -> PlanOptions {
    let Some(forced) = &options.variants else { return options };
    let serves = |variant: &_| {
        let reason = variant_supports(*variant, problem, profile.compute_capability).err();
        reason.is_none_or(|reason| reason.part != Part::PageSize)
    };
    let kept: Vec<_> = forced.iter().copied().filter(serves).collect();
    if kept.is_empty() { options } else { options.with_variants(kept) }
}
