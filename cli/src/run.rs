//! `pat run`: plan, execute, verify, report.

use crate::options::{Loaded, ModelReport, Planning, Shape, Source};
use crate::{output, render};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pat_bench::device::{DeviceCase, Repeats, SEED};
use pat_bench::memory;
use pat_bench::sample::exact_rows;
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::plan::PlanSummary;
use pat_rs::{Element, Engine, KvElement, Plan, Planner, Problem};
use pat_workloads::tensors::sinks;
use pat_workloads::{NumericsReport, Oracle, OwnedBatch, PoolLayout, RowSample, Tensors, check, with_element_types};
use serde::Serialize;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    planning: Planning,
    /// auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Seed of the tensors (on a CUDA device only the default).
    #[arg(long, default_value_t = SEED, allow_negative_numbers = true)]
    seed: u32,
    /// What is verified: auto (all rows, or a named sample of a large batch), sample, or none.
    #[arg(long, default_value = "auto")]
    check: String,
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

/// What a run gave.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) batch: String,
    #[serde(flatten)]
    pub(crate) model: ModelReport,
    pub(crate) device: String,
    pub(crate) device_reason: String,
    pub(crate) plan: PlanSummary,
    /// Host time of planning, in microseconds.
    pub(crate) plan_us: f64,
    /// One execution: wall time on the CPU, cold-L2 median on a device.
    pub(crate) execution_us: f64,
    /// Unique KV, Q and O bytes over the execution time.
    pub(crate) bandwidth_gb_s: f64,
    pub(crate) numerics: Option<NumericsReport>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let options = args.planning.resolve()?;
    let engine = engine(&args.device)?;
    if engine.as_cuda().is_some() && args.seed != SEED {
        bail!("--seed: got {}, expected {SEED} on a CUDA device, whose tensors are drawn there", args.seed);
    }
    let Loaded { name, batch, model } = args.source.load()?;
    let asked = args.shape.asked()?;
    let shape = asked.shape(model)?;
    let problem = asked.problem(batch.problem(shape))?;
    let batch = asked.rows(batch)?;
    let model = ModelReport::new(&asked, &problem, &batch);
    // An engine's pool may be far larger than what one batch reads of it: nothing else is drawn.
    let batch = batch.compacted();
    let rows = batch.rows();
    let view = batch.view(&rows)?;
    let profile = args.planning.profile()?.map_or_else(|| engine.profile(), Ok)?;
    let mut planner = Planner::new(problem, profile, options)?;
    planner.plan(&view)?;
    let begin = Instant::now();
    let plan = planner.plan(&view)?;
    let plan_us = begin.elapsed().as_secs_f64() * 1e6;

    let sample = match args.check.as_str() {
        "none" => None,
        "auto" => Some(RowSample::for_batch(&batch, shape)),
        "sample" => Some(pat_bench::sample::sample(&batch, shape)),
        other => bail!("--check: got {other:?}, expected auto, sample or none"),
    };
    let job = Job { batch: &batch, problem, plan: &plan, sample, seed: args.seed };
    let cuda = engine.as_cuda();
    let (execution_us, numerics) = with_element_types!(
        shape,
        |Q, Kv| job.on::<Q, Kv>(cuda)?,
        else bail!("--dtype: got {}, expected f16 or bf16", shape.dtype().name())
    );
    let row_elements = u64::from(shape.head_dim() + shape.v_head_dim());
    let rows_bytes = 2 * batch.lengths.len() as u64 * u64::from(shape.q_heads()) * row_elements;
    let summary = plan.summary();
    let report = Report {
        batch: name,
        model,
        device: engine.name().into(),
        device_reason: engine.reason().into(),
        plan_us,
        execution_us,
        bandwidth_gb_s: (summary.unique_kv_bytes + rows_bytes) as f64 / execution_us / 1e3,
        plan: summary,
        numerics,
    };
    if args.json {
        output::print(serde_json::to_string_pretty(&report)?)?;
    } else {
        output::print(render::report(&report))?;
    }
    Ok(report.numerics.is_none_or(|numerics| numerics.passed))
}

/// `auto` falls back to the CPU and says why; a device that is asked for by name and cannot be used is an error.
pub(crate) fn engine(device: &str) -> Result<Engine> {
    match device {
        "auto" => Ok(Engine::auto()),
        "cpu" => Ok(Engine::cpu()),
        "cuda" => Engine::cuda(0).context("--device cuda"),
        other => {
            let ordinal = other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
            let ordinal =
                ordinal.with_context(|| format!("--device: got {other:?}, expected auto, cpu, cuda or cuda:N"))?;
            Engine::cuda(ordinal).with_context(|| format!("--device {other}"))
        }
    }
}

struct Job<'a> {
    batch: &'a OwnedBatch,
    problem: Problem,
    plan: &'a Plan,
    sample: Option<RowSample>,
    seed: u32,
}

impl Job<'_> {
    /// On a device, or on the CPU.
    fn on<T: Element, C: KvElement>(&self, engine: Option<&CudaEngine>) -> Result<(f64, Option<NumericsReport>)> {
        match engine {
            Some(engine) => self.on_device::<T, C>(engine),
            None => self.on_cpu::<T, C>(),
        }
    }

    fn oracle<T: Element, C: KvElement>(&self, seed: u32) -> Result<Option<Oracle>> {
        let Some(sample) = self.sample.clone() else { return Ok(None) };
        let _spinner = spinner("computing the oracle");
        Ok(Some(exact_rows::<T, C>(self.batch, self.problem, seed, sample)?))
    }

    fn on_cpu<T: Element, C: KvElement>(&self) -> Result<(f64, Option<NumericsReport>)> {
        let shape = self.problem.shape();
        memory::check_fits(self.batch, shape, self.plan)?;
        let drawing = spinner("drawing Q, K and V");
        let tensors = Tensors::<T, C>::draw_stored(self.batch, shape, PoolLayout::Nhd, self.seed)?;
        drop(drawing);
        let sinks = sinks(&self.problem);
        let rows = self.batch.lengths.len() * shape.q_heads() as usize;
        let mut out = tensors.nan_out();
        let mut lse = vec![f32::NAN; rows];
        let running = spinner("computing attention");
        let begin = Instant::now();
        let host = tensors.host_of(self.problem, sinks.as_deref());
        Engine::cpu().run_host(self.plan, &host, &mut out, Some(&mut lse))?;
        let execution_us = begin.elapsed().as_secs_f64() * 1e6;
        drop(running);
        let oracle = self.oracle::<T, C>(self.seed)?;
        Ok((execution_us, oracle.map(|oracle| check(&oracle, shape.q_heads(), &out, Some(&lse)))))
    }

    fn on_device<T: Element, C: KvElement>(&self, engine: &CudaEngine) -> Result<(f64, Option<NumericsReport>)> {
        let oracle = self.oracle::<T, C>(SEED)?;
        let _spinner = spinner("running on the device");
        let mut case = DeviceCase::new(engine, self.batch, self.problem)?;
        let numerics = oracle.map(|oracle| case.verify::<T>(self.plan, &oracle)).transpose()?;
        let times = case.time(self.plan, &L2Flush::new(engine.device())?, Repeats { warm_ups: 3, timed: 10 })?;
        Ok((times.cold_us, numerics))
    }
}

/// A line that shows that something is going on; nothing where standard error is no terminal.
fn spinner(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what).with_finish(indicatif::ProgressFinish::AndClear);
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
