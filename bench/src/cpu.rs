//! One batch on the CPU executor: checked, then timed.

use crate::device::SEED;
use pat_rs::{Element, Engine, KvElement, Plan, Problem, Result};
use pat_workloads::tensors::sinks;
use pat_workloads::{NumericsReport, Oracle, OwnedBatch, PoolLayout, Tensors, check};
use std::time::Instant;

/// A batch with its tensors and outputs in memory.
#[derive(Debug)]
pub struct CpuCase<T, C> {
    engine: Engine,
    tensors: Tensors<T, C>,
    problem: Problem,
    sinks: Option<Vec<f32>>,
    out: Vec<T>,
    lse: Vec<f32>,
}

impl<T: Element, C: KvElement> CpuCase<T, C> {
    /// Draws the tensors: the same elements as on a device, [`sinks`] among them where the problem has some.
    ///
    /// # Errors
    /// The batch is not valid.
    pub fn new(batch: &OwnedBatch, problem: Problem) -> Result<Self> {
        let shape = problem.shape();
        let rows = batch.lengths.len() * shape.q_heads() as usize;
        Ok(Self {
            engine: Engine::cpu(),
            tensors: Tensors::draw_stored(batch, shape, PoolLayout::Nhd, SEED)?,
            problem,
            sinks: sinks(&problem),
            out: vec![T::from_f32(f32::NAN); rows * shape.head_dim() as usize],
            lse: vec![f32::NAN; rows],
        })
    }

    /// Runs the plan once; wall time in microseconds.
    ///
    /// # Errors
    /// Those of the run.
    pub fn run_us(&mut self, plan: &Plan) -> Result<f64> {
        let tensors = self.tensors.host_of(self.problem, self.sinks.as_deref());
        let begin = Instant::now();
        self.engine.run_host(plan, &tensors, &mut self.out, Some(&mut self.lse))?;
        Ok(begin.elapsed().as_secs_f64() * 1e6)
    }

    /// Runs the plan into poisoned outputs and compares with the oracle.
    ///
    /// # Errors
    /// Those of the run.
    pub fn verify(&mut self, plan: &Plan, oracle: &Oracle) -> Result<NumericsReport> {
        self.out.fill(T::from_f32(f32::NAN));
        self.lse.fill(f32::NAN);
        self.run_us(plan)?;
        Ok(check(oracle, self.problem.shape().q_heads(), &self.out, Some(&self.lse)))
    }
}
