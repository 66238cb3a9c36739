//! `Plan`.

use crate::device::Device;
use crate::errors::{Result, invalid};
use crate::resident::{Pool, Resident};
use crate::tables::Tables;
use pat_report::Candidate;
use pat_rs::plan::PlanCapacity;
use pat_rs::{AttentionShape, DecodeBatch, DeviceProfile, Plan, PlanOptions, Planner, Problem, Reach, VisibleBatch};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a planner was made with: makes another one that plans alike.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) shape: AttentionShape,
    /// Where runs cap scores: plans then name kernels that can.
    pub(crate) soft_cap: Option<f32>,
    /// How far back rows see.
    pub(crate) reach: Reach,
    /// Whether query tokens may form trees.
    pub(crate) query_tree: bool,
    pub(crate) profile: DeviceProfile,
    pub(crate) options: PlanOptions,
    pub(crate) capacity: Option<PlanCapacity>,
}

impl Origin {
    pub(crate) fn problem(&self, page_size: u32) -> Problem {
        let problem = Problem::new(self.shape, page_size).with_reach(self.reach);
        // Plans do not depend on how many tokens a tree has.
        let problem = if self.query_tree { problem.with_query_tree(1) } else { problem };
        self.soft_cap.map_or(problem, |cap| problem.with_soft_cap(cap))
    }

    /// For pages of `page_size` tokens.
    pub(crate) fn planner(&self, page_size: u32) -> pat_rs::Result<Planner> {
        let planner = Planner::new(self.problem(page_size), self.profile.clone(), self.options.clone())?;
        match self.capacity {
            None => Ok(planner),
            Some(capacity) => planner.with_capacity(capacity),
        }
    }
}

/// Who is served together in one decode step, for all layers. Made by :meth:`Planner.plan`.
#[pyclass(frozen, module = "prefix_attn", name = "Plan")]
pub(crate) struct PyPlan {
    state: Mutex<PlanState>,
    pub(crate) device: Option<Device>,
    pub(crate) origin: Arc<Origin>,
    pool: Arc<Pool>,
}

/// What :meth:`Planner.advance` changes.
pub(crate) struct PlanState {
    pub(crate) plan: Plan,
    /// The batch that it is of.
    pub(crate) tables: Tables,
    /// Memory for the next ones.
    pub(crate) spare: Tables,
    /// Its copy on a device.
    pub(crate) resident: Option<Resident>,
}

impl PyPlan {
    pub(crate) fn new(
        plan: Plan,
        tables: Tables,
        device: Option<Device>,
        origin: Arc<Origin>,
        pool: Arc<Pool>,
    ) -> Self {
        Self {
            state: Mutex::new(PlanState { plan, tables, spare: Tables::default(), resident: None }),
            device,
            origin,
            pool,
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, PlanState> {
        // A plan is written as a whole or left as it was: a panic elsewhere leaves one of the two.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pages(&self) -> (u32, u32) {
        let state = self.lock();
        (state.plan.page_size(), state.plan.num_pages())
    }

    /// What a planner like the plan's makes of the batch, for what the plan itself does not keep: forest and tiles.
    fn planned_again<R: Send>(
        &self,
        py: Python<'_>,
        use_it: impl FnOnce(&Origin, &Candidate, &DecodeBatch<'_>) -> pat_rs::Result<R> + Send,
    ) -> Result<R> {
        let (origin, tables) = (&*self.origin, self.lock().tables.clone());
        Ok(py.detach(|| {
            tables.with_batch(|batch| {
                let mut planner = origin.planner(batch.page_size())?;
                let plan = planner.plan(batch)?;
                use_it(origin, &Candidate { summary: plan.summary(), planner, plan }, batch)
            })
        })?)
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

impl Drop for PyPlan {
    fn drop(&mut self) {
        if let Some(resident) = self.lock().resident.take() {
            self.pool.give_back(resident);
        }
    }
}

#[pymethods]
impl PyPlan {
    /// The plan in numbers: sequences, sharing factor, KV bytes read with sharing and without, work items by tile variant,
    /// predicted time in us.
    #[pyo3(signature = () -> "dict[str, object]")]
    fn summary<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyAny>> {
        let text = serde_json::to_string(&self.lock().plan.summary())
            .map_err(|error| invalid("plan", error, "finite numbers"))?;
        Ok(py.import("json")?.call_method1("loads", (text,))?)
    }

    /// Why the batch is planned so: what planning it from scratch gives, which an advanced plan may differ from, beside no
    /// sharing and beside the widest tiles, in predicted us, what bounds it, and how often the largest shared runs are read. As
    /// text; plans the batch again.
    fn explain(&self, py: Python<'_>) -> Result<String> {
        self.planned_again(py, |origin, chosen, batch| pat_report::explain(chosen, &origin.options, batch))
    }

    /// A picture of the batch, as SVG: every shared run a bar, as long as its tokens and as high as its sequences; lines between
    /// the sequences that are served together where the batch is planned from scratch. Notebooks show it for a plan that ends a
    /// cell. Plans the batch again.
    fn svg(&self, py: Python<'_>) -> Result<String> {
        self.planned_again(py, |origin, chosen, batch| {
            let title = format!("{} sequences, planned for {}", batch.sequence_count(), origin.profile.name);
            // What is planned is what rows see.
            let visible = VisibleBatch::new(batch, origin.reach)?;
            let planned = chosen.planner.batch_of_runs().unwrap_or_else(|| visible.batch());
            Ok(pat_report::svg(chosen.planner.forest(), chosen.planner.tiles(), &planned, &title))
        })
    }

    fn _repr_svg_(&self, py: Python<'_>) -> Result<String> {
        self.svg(py)
    }

    /// Rows of the batch, empty ones included.
    #[getter]
    fn sequence_count(&self) -> u32 {
        self.lock().plan.sequence_count()
    }

    /// A number that no two results of planning in this process share; :meth:`Planner.advance` changes it unless it returns
    /// ``"nothing"``.
    #[getter]
    fn generation(&self) -> u64 {
        self.lock().plan.generation().number()
    }

    /// Tokens per page.
    #[getter]
    fn page_size(&self) -> u32 {
        self.pages().0
    }

    /// Pages of the K and V caches.
    #[getter]
    fn num_pages(&self) -> u32 {
        self.pages().1
    }

    fn __repr__(&self) -> String {
        let state = self.lock();
        format!("Plan(sequences={}, generation={})", state.plan.sequence_count(), state.plan.generation())
    }
}
