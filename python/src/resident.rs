//! The device copies of plans that are run directly, and the pool they come from and go back to: allocating device memory at
//! every step would wait for the device.

use crate::device;
use crate::errors::Result;
use crate::foreign;
use crate::operands::Operands;
use crate::torch::Handle;
use pat_rs::Plan;
use pat_rs::cuda::{CudaEngine, PlanBuffers, Workspace};
use pat_rs::plan::PlanGeneration;
use std::sync::{Arc, Mutex, PoisonError};

/// Copies that are kept for later plans: a step ahead, and one behind that is still running.
const KEPT: usize = 4;

/// A plan's copy on a device, with memory for its partial results.
#[derive(Debug)]
pub(crate) struct Resident {
    engine: Arc<CudaEngine>,
    pub(crate) ordinal: usize,
    buffers: PlanBuffers,
    workspace: Workspace,
    /// What was uploaded last.
    uploaded: Option<PlanGeneration>,
}

impl Resident {
    fn new(ordinal: usize, plan: &Plan) -> Result<Self> {
        let engine = device::engine(ordinal)?;
        // Room to grow: the next steps' plans are a little larger.
        let buffers = PlanBuffers::with_capacity(engine.device(), 2 * plan.bytes().len())?;
        let workspace = Workspace::with_capacity(engine.device(), 2 * Workspace::bytes_for(plan))?;
        Ok(Self { engine, ordinal, buffers, workspace, uploaded: None })
    }

    fn holds(&self, ordinal: usize, plan: &Plan) -> bool {
        self.ordinal == ordinal
            && plan.bytes().len() <= self.buffers.capacity_bytes()
            && Workspace::bytes_for(plan) <= self.workspace.span().bytes()
    }

    /// Enqueues the run, and the upload before it where the plan is not there yet.
    pub(crate) fn run(
        &mut self,
        plan: &Plan,
        operands: &Operands,
        workspace: Option<&Workspace>,
        handle: Handle,
    ) -> Result<()> {
        let stream = foreign::stream(self.engine.device(), handle)?;
        if self.uploaded != Some(plan.generation()) {
            self.buffers.upload(plan, &stream)?;
            self.uploaded = Some(plan.generation());
        }
        let workspace = workspace.unwrap_or(&self.workspace);
        Ok(self.engine.run(&self.buffers, &operands.args(), workspace, &stream)?)
    }
}

/// Copies that no plan uses.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<Resident>>,
}

impl Pool {
    /// A copy's memory that holds `plan`.
    pub(crate) fn take(&self, ordinal: usize, plan: &Plan) -> Result<Resident> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        match free.iter().position(|resident| resident.holds(ordinal, plan)) {
            Some(index) => Ok(free.swap_remove(index)),
            None => Resident::new(ordinal, plan),
        }
    }

    /// Keeps a copy's memory for a later plan. What is enqueued with it goes on: its next user is ordered behind it.
    pub(crate) fn give_back(&self, resident: Resident) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() == KEPT {
            free.remove(0);
        }
        free.push(resident);
    }
}

/// Runs a plan on a device; `resident` is its copy, made where there is none that fits.
pub(crate) fn run(
    resident: &mut Option<Resident>,
    pool: &Pool,
    plan: &Plan,
    operands: &Operands,
    (ordinal, workspace, handle): (usize, Option<&Workspace>, Handle),
) -> Result<()> {
    if let Some(former) = resident.take_if(|resident| !resident.holds(ordinal, plan)) {
        pool.give_back(former);
    }
    let resident = match resident {
        Some(resident) => resident,
        None => resident.insert(pool.take(ordinal, plan)?),
    };
    resident.run(plan, operands, workspace, handle)
}
