//! Measuring one configuration into a record.

use crate::ceiling::DeviceRates;
use crate::cpu::CpuCase;
use crate::device::{DeviceCase, Repeats};
use crate::memory::{self, TooLarge};
use crate::provenance::cpu_name;
use crate::result::{Correctness, METHOD, Record};
use crate::sample::oracle;
use crate::statistics::{median, quartiles};
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::{DeviceProfile, Element, Engine, Error, KvElement, Plan, PlanOptions, Planner, Problem};
use pat_workloads::{NumericsReport, OwnedBatch, with_element_types};
use std::collections::BTreeMap;
use std::time::Instant;

/// Why a configuration could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// The planner's, the executor's or the driver's.
    #[error(transparent)]
    Library(#[from] pat_rs::Error),
    /// Too large for the CPU executor here.
    #[error(transparent)]
    Memory(#[from] TooLarge),
}

/// What is measured on.
#[derive(Debug)]
pub struct Target {
    engine: Engine,
    profile: DeviceProfile,
    /// On a CUDA device only.
    flush: Option<L2Flush>,
}

impl Target {
    /// Allocates what the protocol needs. `profile` is what is planned for.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(engine: Engine, profile: DeviceProfile) -> pat_rs::Result<Self> {
        let flush = engine.as_cuda().map(|cuda| L2Flush::new(cuda.device())).transpose()?;
        Ok(Self { engine, profile, flush })
    }

    /// The device's name for result files.
    pub fn name(&self) -> String {
        self.engine.as_cuda().map_or_else(cpu_name, |cuda| cuda.device().name().to_owned())
    }

    /// Whether it is a CUDA device.
    pub fn is_cuda(&self) -> bool {
        self.flush.is_some()
    }

    /// How times are taken, for result files.
    pub fn protocol(&self) -> &'static str {
        if self.is_cuda() {
            "cold L2: a buffer of four times its size is read before each call; CUDA events around the call alone"
        } else {
            "CPU executor, wall time"
        }
    }

    /// Plans, verifies and times a batch, over a pool that holds only the pages that it reads. `suite` and `name` are what the
    /// record is called.
    ///
    /// # Errors
    /// See [`MeasureError`].
    pub fn measure(
        &self,
        (suite, name): (&str, &str),
        batch: &OwnedBatch,
        problem: Problem,
        options: &PlanOptions,
        repeats: Repeats,
    ) -> Result<Record, MeasureError> {
        let shape = problem.shape();
        batch.view(&batch.rows())?;
        let batch = &batch.compacted();
        let rows = batch.rows();
        let view = batch.view(&rows)?;
        let mut planner = Planner::new(problem, self.profile.clone(), options.clone())?;
        let plan = planner.plan(&view)?;
        let mut plan_times = Vec::new();
        for _ in 0..9 {
            let begin = Instant::now();
            planner.plan(&view)?;
            plan_times.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        let plan_us = median(&mut plan_times);
        let (report, times) = with_element_types!(
            shape,
            |Q, Kv| self.verify_and_time::<Q, Kv>(batch, problem, &plan, repeats)?,
            else return Err(Error::invalid("dtype", shape.dtype().name(), "f16 or bf16").into())
        );
        let summary = plan.summary();
        let row_elements = u64::from(shape.head_dim() + shape.v_head_dim());
        let rows_bytes = 2 * batch.lengths.len() as u64 * u64::from(shape.q_heads()) * row_elements;
        let bytes = summary.unique_kv_bytes + rows_bytes;
        let flop = batch_flop(batch, &problem);
        let cold_us = times.cold_us;
        let by_method = |us: f64| BTreeMap::from([(METHOD.to_owned(), us / 1e3)]);
        let correctness = Correctness {
            status: if report.passed { "PASSED" } else { "FAILED" }.into(),
            max_diff: report.max_abs_error,
            relative_l2: report.relative_l2_error,
            sample: Some(report.sample),
        };
        let mut record = Record {
            suite: suite.into(),
            tree: name.into(),
            nheads_q: shape.q_heads(),
            nheads_kv: shape.kv_heads(),
            head_dim: shape.head_dim(),
            block_size: batch.page_size,
            dtype: shape.dtype().name().into(),
            features: problem.features(),
            sequences: summary.sequences,
            latencies: by_method(cold_us),
            warm_latencies: times.warm_us.map(by_method).unwrap_or_default(),
            plan_latencies: by_method(plan_us),
            correctness: BTreeMap::from([(METHOD.to_owned(), correctness)]),
            cold_us,
            cold_us_quartiles: Some(times.cold_us_quartiles),
            warm_us: times.warm_us,
            graph_us: times.graph_us,
            plan_us,
            upload_us: times.upload_us,
            predicted_us: summary.predicted_us,
            bytes,
            flop,
            floor_us: None,
            ceiling_us: None,
            ceiling_fraction: None,
            sharing_factor: summary.sharing_factor,
            planned_kv_bytes: summary.planned_kv_bytes,
            partial_bytes: summary.partial_bytes,
            items: Record::items_of(&summary),
        };
        record.set_ceiling(DeviceRates::of(&self.name()));
        Ok(record)
    }

    fn verify_and_time<T: Element, C: KvElement>(
        &self,
        batch: &OwnedBatch,
        problem: Problem,
        plan: &Plan,
        repeats: Repeats,
    ) -> Result<(NumericsReport, Times), MeasureError> {
        if let (Some(cuda), Some(flush)) = (self.engine.as_cuda(), &self.flush) {
            let mut case = DeviceCase::new(cuda, batch, problem)?;
            let report = case.verify::<T>(plan, &oracle::<T, C>(batch, problem)?)?;
            let times = case.time(plan, flush, repeats)?;
            return Ok((
                report,
                Times {
                    cold_us: times.cold_us,
                    cold_us_quartiles: times.cold_us_quartiles,
                    warm_us: Some(times.warm_us),
                    graph_us: Some(times.graph_us),
                    upload_us: Some(times.upload_us),
                },
            ));
        }
        memory::check_fits(batch, problem.shape(), plan)?;
        let mut case = CpuCase::<T, C>::new(batch, problem)?;
        let report = case.verify(plan, &oracle::<T, C>(batch, problem)?)?;
        let mut wall_times = (0..repeats.timed).map(|_| case.run_us(plan)).collect::<pat_rs::Result<Vec<_>>>()?;
        let times = Times {
            cold_us: median(&mut wall_times),
            cold_us_quartiles: quartiles(&mut wall_times),
            warm_us: None,
            graph_us: None,
            upload_us: None,
        };
        Ok((report, times))
    }
}

/// In microseconds; options are what only a GPU gives.
struct Times {
    cold_us: f64,
    cold_us_quartiles: [f64; 2],
    warm_us: Option<f64>,
    graph_us: Option<f64>,
    upload_us: Option<f64>,
}

/// Multiplications and additions of Q·K and P·V, over all sequences, as far as they are seen.
pub fn batch_flop(batch: &OwnedBatch, problem: &Problem) -> f64 {
    let (shape, reach) = (problem.shape(), problem.visibility().reach);
    let seen = |length: u32| length - reach.first_token(length.saturating_sub(1));
    let tokens: f64 = batch.lengths.iter().map(|&length| f64::from(seen(length))).sum();
    2.0 * tokens * f64::from(shape.q_heads()) * f64::from(shape.head_dim() + shape.v_head_dim())
}
