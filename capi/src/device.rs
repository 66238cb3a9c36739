//! Runs in device memory: buffers for plans and partial results, and runs that were checked once.

use crate::planning::{PatPlan, PatPlanner};
use pat_rs::cuda::{BoundRun, CudaDevice, CudaEngine, PlanBuffers, RunArgs, Stream, Uploaded, Workspace};
use pat_rs::{Error, Problem, Result};
use std::sync::{Arc, PoisonError, RwLock};

/// Memory on a device for the plans of one planner and for their partial results.
pub struct PatBuffers {
    shared: Arc<Shared>,
    problem: Problem,
}

/// One layer's run, checked once. It keeps the buffers' memory.
pub struct PatRun {
    shared: Arc<Shared>,
    run: BoundRun,
}

struct Shared {
    engine: CudaEngine,
    /// Uploads lock it for writing, launches for reading: they do not wait for each other.
    buffers: RwLock<PlanBuffers>,
    workspace: Workspace,
}

impl Shared {
    /// Hands the plan that was uploaded last to `launch`.
    fn with_uploaded(&self, launch: impl FnOnce(Uploaded<'_>) -> Result<()>) -> Result<()> {
        launch(self.buffers.read().unwrap_or_else(PoisonError::into_inner).uploaded()?)
    }
}

impl PatBuffers {
    /// Launches of such buffers do not depend on the plan, so that one run, and one graph, serves every step.
    pub(crate) fn new(planner: &PatPlanner, ordinal: u32) -> Result<Self> {
        let Some(capacity) = planner.capacity else {
            let expected = "one whose options have max_rows and max_pages";
            return Err(Error::invalid("planner", "one without bounds", expected));
        };
        let engine = CudaEngine::new(ordinal as usize)?;
        let (problem, variants) = {
            let planner = planner.lock();
            (planner.problem(), planner.tile_variants())
        };
        let buffers = PlanBuffers::for_capacity(engine.device(), &capacity, &variants)?;
        let workspace = Workspace::with_capacity(engine.device(), capacity.partial_bytes(problem.shape()))?;
        // The driver compiles them now, not at the first step or under a capture.
        engine.prepare_variants(&problem, &variants)?;
        Ok(Self { shared: Arc::new(Shared { engine, buffers: RwLock::new(buffers), workspace }), problem })
    }

    pub(crate) fn device(&self) -> &CudaDevice {
        self.shared.engine.device()
    }

    pub(crate) fn problem(&self) -> Problem {
        self.problem
    }

    pub(crate) fn upload(&self, plan: &PatPlan, stream: &Stream) -> Result<()> {
        let plan = plan.read();
        self.shared.buffers.write().unwrap_or_else(PoisonError::into_inner).upload(&plan, stream).map(drop)
    }

    pub(crate) fn bind(&self, args: &RunArgs) -> Result<PatRun> {
        let Shared { engine, buffers, workspace } = &*self.shared;
        let run = engine.bind(&buffers.read().unwrap_or_else(PoisonError::into_inner), args, workspace)?;
        Ok(PatRun { shared: self.shared.clone(), run })
    }
}

impl PatRun {
    pub(crate) fn device(&self) -> &CudaDevice {
        self.shared.engine.device()
    }

    pub(crate) fn launch(&self, stream: &Stream) -> Result<()> {
        self.shared.with_uploaded(|uploaded| self.run.run(uploaded, stream))
    }

    /// `launch` enqueues the run that it is given.
    pub(crate) fn launch_with(&self, launch: impl FnOnce(&BoundRun, Uploaded<'_>) -> Result<()>) -> Result<()> {
        self.shared.with_uploaded(|uploaded| launch(&self.run, uploaded))
    }
}
