//! `pat bench kernels`: suites of batches, measured one after the other.

use super::list::list;
use super::output::{Output, begun_file, former_results};
use super::select::{Selection, shape};
use super::table::{Columns, duration};
use crate::options::{Asked, Attention, Planning};
use crate::output;
use crate::run::engine;
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pat_bench::device::Repeats;
use pat_bench::measure::{Target, batch_flop};
use pat_bench::memory::pool_bytes;
use pat_bench::result::{Method, RecordKey};
use pat_bench::suites::Configuration;
use pat_rs::{AttentionShape, PlanOptions, Problem};
use pat_workloads::OwnedBatch;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Show the suites, or with --suite, --filter and so on the configurations, and measure nothing.
    #[arg(long)]
    list: bool,
    /// cuda, cuda:N, cpu, or auto.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Result file (docs/result-format.md), rewritten after each configuration.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Continue the result file: configurations it holds are not run again.
    #[arg(long, conflicts_with = "force", requires = "output")]
    resume: bool,
    /// Overwrite the result file.
    #[arg(long)]
    force: bool,
    /// Fewer repetitions, and without the largest batches; on the CPU only small ones.
    #[arg(long)]
    quick: bool,
    /// Stop when this many seconds have passed; the configuration in progress is lost.
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,
    #[command(flatten)]
    attention: Attention,
    #[command(flatten)]
    planning: Planning,
}

/// Whether every answer was verified.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let asked = args.attention.asked(args.selection.heads())?;
    if args.list {
        output::print(list(&args.selection, &asked)?)?;
        return Ok(true);
    }
    let options = args.planning.resolve()?;
    let configurations = args.selection.configurations(&asked)?;
    let former = former_results(args.output.as_deref(), args.resume, args.force)?;
    let engine = engine(&args.device)?;
    let profile = args.planning.profile()?.map_or_else(|| engine.profile(), Ok)?;
    let target = Target::new(engine, profile)?;
    let repeats = match (target.is_cuda(), args.quick) {
        (true, false) => Repeats { warm_ups: 5, timed: 21 },
        (true, true) => Repeats { warm_ups: 2, timed: 7 },
        (false, false) => Repeats { warm_ups: 0, timed: 7 },
        (false, true) => Repeats { warm_ups: 0, timed: 3 },
    };
    let method = Method {
        version: env!("CARGO_PKG_VERSION").into(),
        note: format!("{}; {}; median of {} calls", args.planning.label(), target.protocol(), repeats.timed),
    };
    let output = Output { path: args.output.as_deref(), file: begun_file(former, &target, method)? };
    // Before anything is measured: a place that cannot be written to costs nothing then.
    output.write()?;

    let begin = Instant::now();
    let end = args.time_limit.map(|seconds| begin + Duration::from_secs(seconds));
    let mut run = Run { target: Arc::new(target), asked, options, repeats, output, end, selected: BTreeSet::new() };
    let (planned, left_out) = run.choose(&configurations, args.quick)?;
    let failures = run.measure(&planned)?;
    let passed = run.summarise()?;
    if left_out > 0 {
        output::print(format_args!("--quick leaves out {left_out} larger ones"))?;
    }
    output::print(format_args!("{} in {}", run.target.name(), duration(begin.elapsed())))?;
    if failures > 0 {
        bail!("{failures} of {} configurations could not be measured (see above)", planned.len());
    }
    passed.context("nothing was measured: a longer --time-limit, or no --quick, measures more")
}

struct Run<'a> {
    target: Arc<Target>,
    asked: Asked,
    options: PlanOptions,
    repeats: Repeats,
    output: Output<'a>,
    end: Option<Instant>,
    /// What the summary is of: measured now, or earlier.
    selected: BTreeSet<RecordKey>,
}

type Planned<'a> = Vec<(&'a Configuration, AttentionShape)>;

impl Run<'_> {
    /// What is still to be measured, and the number of configurations that are too large for --quick.
    fn choose<'a>(&mut self, all: &'a [Configuration], quick: bool) -> Result<(Planned<'a>, usize)> {
        let (mut planned, mut left_out) = (Vec::new(), 0);
        for configuration in all {
            let shape = shape(configuration, &self.asked)?;
            // Of one page size as of any other: where kernels differ in these, others serve it.
            let problem = self.asked.problem(Problem::new(shape, 1))?;
            let key = self.key(configuration, &problem);
            if !self.output.file.records.iter().any(|record| record.key() == key) {
                if quick && !is_quick(&self.rows(configuration)?, &problem, self.target.is_cuda()) {
                    left_out += 1;
                    continue;
                }
                planned.push((configuration, shape));
            }
            self.selected.insert(key);
        }
        Ok((planned, left_out))
    }

    /// Measures into the output, and counts what could not be measured.
    fn measure(&mut self, planned: &Planned<'_>) -> Result<usize> {
        let columns = self.columns();
        let bar = ProgressBar::new(planned.len() as u64);
        let style = ProgressStyle::with_template("{pos}/{len} {msg} {elapsed} (left {eta})");
        bar.set_style(style.expect("a valid template"));
        output::print(columns.header())?;
        let mut failures = 0;
        for (number, &(configuration, shape)) in (1..).zip(planned) {
            bar.set_message(configuration.label());
            let (target, options, repeats) = (Arc::clone(&self.target), self.options.clone(), self.repeats);
            let batch = self.rows(configuration)?;
            let (suite, name) = (configuration.suite, configuration.name.clone());
            let problem = self.asked.problem(batch.problem(shape))?;
            let measured = within(self.end, move || target.measure((suite, &name), &batch, problem, &options, repeats));
            let Some(measured) = measured else {
                let advice = if self.output.path.is_some() { ": --resume continues" } else { "" };
                bar.suspend(|| output::print(format_args!("time limit reached{advice}")))?;
                break;
            };
            match measured {
                Ok(record) => {
                    bar.suspend(|| output::print(columns.row((number, planned.len()), &record)))?;
                    self.output.file.records.push(record);
                    self.output.write()?;
                }
                // A batch that is too large for this machine does not keep the others from being measured.
                Err(error) => {
                    bar.suspend(|| output::note(format!("{}: not measured: {error}", configuration.label())));
                    failures += 1;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(failures)
    }

    /// Prints what the selected records come to, by suite; whether all are verified, if there are any.
    fn summarise(&self) -> Result<Option<bool>> {
        let mut by_suite: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for record in self.output.file.records.iter().filter(|record| self.selected.contains(&record.key())) {
            by_suite.entry(&record.suite).or_default().push(record);
        }
        for (suite, records) in &by_suite {
            output::print(self.columns().summary(suite, records))?;
        }
        let all_verified = by_suite.values().flatten().all(|record| record.is_verified());
        Ok((!by_suite.is_empty()).then_some(all_verified))
    }

    /// What is planned of a configuration.
    fn rows(&self, configuration: &Configuration) -> Result<OwnedBatch> {
        self.asked.rows(configuration.batch()?).with_context(|| configuration.label())
    }

    fn key(&self, configuration: &Configuration, problem: &Problem) -> RecordKey {
        let shape = problem.shape();
        RecordKey {
            suite: configuration.suite.into(),
            tree: configuration.name.clone(),
            nheads_q: shape.q_heads(),
            nheads_kv: shape.kv_heads(),
            head_dim: shape.head_dim(),
            dtype: shape.dtype().name().into(),
            features: problem.features(),
        }
    }

    fn columns(&self) -> Columns {
        if self.target.is_cuda() { Columns::Cuda } else { Columns::Cpu }
    }
}

/// Does the work, or gives up waiting for it at `end`: what is being measured then is lost, and its thread ends with the
/// program.
fn within<T: Send + 'static>(end: Option<Instant>, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let Some(end) = end else { return Some(work()) };
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        // Nobody waits any more where this fails.
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
        Ok(done) => Some(done),
        Err(mpsc::RecvTimeoutError::Timeout) => None,
        Err(mpsc::RecvTimeoutError::Disconnected) => match worker.join() {
            Ok(()) => None,
            Err(panic) => std::panic::resume_unwind(panic),
        },
    }
}

/// Whether a batch is measured by --quick: on a device all but the largest tree of Figure 10 and its like, on the CPU what takes a
/// second or two on two cores.
fn is_quick(batch: &OwnedBatch, problem: &Problem, is_cuda: bool) -> bool {
    if is_cuda {
        u64::from(batch.num_pages) * u64::from(batch.page_size) <= 1 << 19
    } else {
        batch_flop(batch, problem) <= 2e9 && pool_bytes(batch, problem.shape()) <= 256 << 20
    }
}
