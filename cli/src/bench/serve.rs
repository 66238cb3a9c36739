//! `pat bench serve`: the serving benchmark over HTTP.

use crate::{output, workload};
use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use pat_bench::serve::{
    self, Config, Event, Job, PAT_RATES, Patience, QUICK_RATES, Record, ServerCommand, Status, Sweep, Target, Window,
};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Where a server is looked for, or put, unless it is said.
const FIRST_PORT: u16 = 9000;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  pat bench serve --url http://127.0.0.1:8000 --workload conversation.jsonl --rates 4,8,12 --output serve.jsonl
  pat bench serve --server-cmd 'vllm serve MODEL --port {port} --attention-backend {backend}' --backend FLASH_ATTN,CUSTOM \\
    --gpus all --workload conversation.jsonl,toolagent.jsonl --sweep --output serve.jsonl

Takes: about a minute for each rate, and the start of the server for each backend.")]
pub(crate) struct Args {
    /// Workload files of `pat workload make`.
    #[arg(long, required = true, value_delimiter = ',', value_name = "FILE,...")]
    workload: Vec<PathBuf>,
    /// Arrivals per second.
    #[arg(long, value_delimiter = ',', value_name = "RATE,...", value_parser = positive)]
    rates: Vec<f64>,
    /// The 15 rates of PAT's experiment: 4 to 11 by 0.5.
    #[arg(long, conflicts_with_all = ["rates", "quick"])]
    sweep: bool,
    /// Two rates: 7 and 9.
    #[arg(long, conflicts_with = "rates")]
    quick: bool,
    /// A server that runs already.
    #[arg(long, value_name = "URL", conflicts_with = "server_cmd")]
    url: Option<String>,
    /// Shell command that starts a server; {port}, {gpu} and {backend} are replaced, and it is stopped at the end.
    #[arg(long, value_name = "COMMAND")]
    server_cmd: Option<String>,
    /// With --server-cmd: GPUs that runs are dealt over, one server each, by number; or all.
    #[arg(long, value_delimiter = ',', value_name = "N,... or all", requires = "server_cmd")]
    gpus: Vec<String>,
    /// With --server-cmd: port of the first server; each further one has the next.
    #[arg(long, default_value_t = FIRST_PORT, value_name = "PORT")]
    port: u16,
    /// With --server-cmd: path that answers with 200 when the server is ready.
    #[arg(long, default_value = "/health", value_name = "PATH")]
    health_path: String,
    /// With --server-cmd: time until it is ready.
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS", value_parser = positive)]
    server_limit: f64,
    /// With --server-cmd: file that its output is added to [default: --output with .server.log behind it]; of several servers,
    /// with the port behind it.
    #[arg(long, value_name = "FILE")]
    server_log: Option<PathBuf>,
    /// Name of the server's attention backend, for the record; with --server-cmd there may be several.
    #[arg(long, value_delimiter = ',', default_value = "default", value_name = "NAME,...")]
    backend: Vec<String>,
    /// What the record is to say of the server's mode: graphs, compiled, eager.
    #[arg(long, default_value = "graphs", value_name = "NAME")]
    mode: String,
    /// The server's name of the model [default: its first].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Records, JSON lines (docs/serving.md); one is added when a run has ended.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Continue the file: runs that it holds figures of are not made again.
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Overwrite the file.
    #[arg(long)]
    force: bool,
    /// Seconds of arrivals before the measured ones.
    #[arg(long, default_value_t = 15.0, value_name = "SECONDS", value_parser = positive)]
    warm_up: f64,
    /// Seconds of arrivals that are measured; arrivals go on until the last of these has ended.
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS", value_parser = positive)]
    measured: f64,
    /// Give a run up when a measured request waits longer for its first token.
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS", value_parser = positive)]
    patience: f64,
    /// Give a run up when its measured requests have not ended after this time.
    #[arg(long, default_value_t = 600.0, value_name = "SECONDS", value_parser = positive)]
    run_limit: f64,
    /// Of the arrivals.
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u32,
}

fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| "expected a positive number".into())
}

/// Whether every run was without failures.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut sweep = args.sweep()?;
    // What a command left that found no server holds nothing that could be lost.
    let holds_records = args.output.metadata().is_ok_and(|file| file.len() > 0);
    let former = match (holds_records, args.resume, args.force) {
        (true, true, _) => serve::read(&args.output).context("--resume")?,
        (true, false, false) => {
            bail!("{} exists: --resume continues it, --force overwrites it", args.output.display())
        }
        _ => Vec::new(),
    };
    let total = sweep.jobs.len();
    let known = sweep.drop_known(&former);
    if known > 0 {
        output::print(format_args!("{known} of {total} runs are in {} already", args.output.display()))?;
    }
    if !args.resume {
        // Before anything is started: a place that cannot be written to costs nothing then.
        std::fs::write(&args.output, "").with_context(|| format!("--output {}", args.output.display()))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("tokio")?;
    if let Target::Url(url) = &sweep.target {
        let connect = serve::Endpoint::connect(url, sweep.model.as_deref(), sweep.patience);
        runtime.block_on(connect).context("--url")?;
    }
    output::print(header())?;
    let mut interrupts = {
        let _context = runtime.enter();
        Interrupts::new().context("signals")?
    };
    let report = Report::new(args, sweep.jobs.len() as u64);
    let interrupted = runtime.block_on(async {
        tokio::select! {
            () = sweep.run(|event| report.take(event)) => false,
            () = interrupts.come() => true,
        }
    });
    let Ended { made, failed, unwritten } = report.end();
    if let Some(error) = unwritten {
        return Err(error);
    }
    if interrupted {
        bail!("interrupted: {made} of {} runs were made, --resume goes on with the others", sweep.jobs.len());
    }
    if failed > 0 {
        output::print(format_args!(
            "{failed} of {made} runs have failures, marked as such in {}",
            args.output.display()
        ))?;
    }
    Ok(failed == 0)
}

/// What ends a sweep early. Without them, a server that was started here would outlive the command.
struct Interrupts([Signal; 3]);

impl Interrupts {
    fn new() -> std::io::Result<Self> {
        let [a, b, c] = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([a?, b?, c?]))
    }

    async fn come(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}

impl Args {
    fn sweep(&self) -> Result<Sweep> {
        let rates: &[f64] = match (self.sweep, self.quick) {
            (true, _) => &PAT_RATES,
            (_, true) => &QUICK_RATES,
            _ if self.rates.is_empty() => bail!("--rates, --sweep or --quick is missing, expected one of them"),
            _ => &self.rates,
        };
        let workloads = self.workload.iter().map(|file| workload::read(file)).collect::<Result<Vec<_>>>();
        let workloads = workloads.context("--workload")?;
        let mut jobs = Vec::new();
        for backend in &self.backend {
            for workload in 0..workloads.len() {
                jobs.extend(rates.iter().map(|&rate| Job { backend: backend.clone(), workload, rate }));
            }
        }
        let target = match &self.server_cmd {
            None if self.backend.len() > 1 => {
                bail!("--backend: got {} names, expected one for a server that runs already", self.backend.len())
            }
            None => Target::Url(self.url.clone().unwrap_or_else(|| "http://127.0.0.1:8000".into())),
            Some(command) => {
                let gpus: Vec<Option<String>> = match self.gpus.as_slice() {
                    [] => vec![None],
                    [all] if all == "all" => serve::gpus().context("--gpus")?.into_iter().map(Some).collect(),
                    numbers => numbers.iter().cloned().map(Some).collect(),
                };
                if usize::from(self.port) + gpus.len() > usize::from(u16::MAX) {
                    bail!("--port: got {}, expected room for {} ports from there on", self.port, gpus.len());
                }
                let log = self.server_log.clone().unwrap_or_else(|| {
                    let mut name = self.output.clone().into_os_string();
                    name.push(".server.log");
                    name.into()
                });
                let (health_path, start_limit) = (self.health_path.clone(), Duration::from_secs_f64(self.server_limit));
                let command = ServerCommand { command: command.clone(), health_path, start_limit, log };
                Target::Started { command, gpus, first_port: self.port }
            }
        };
        let more = [("output_file", self.output.display().to_string()), ("mode", self.mode.clone())];
        Ok(Sweep {
            workloads,
            jobs,
            target,
            model: self.model.clone(),
            window: Window {
                warm_up: self.warm_up,
                measured: self.measured,
                first_token: self.patience,
                limit: self.run_limit,
            },
            patience: Patience::default(),
            arrival_seed: self.seed,
            more: more.into_iter().map(|(name, value)| (name.into(), value)).collect::<Config>(),
        })
    }
}

/// What is shown and written while a sweep runs.
struct Report<'a> {
    args: &'a Args,
    bars: MultiProgress,
    total: ProgressBar,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ended: Ended,
    /// By backend, workload and rate.
    running: BTreeMap<String, ProgressBar>,
}

#[derive(Default)]
struct Ended {
    made: usize,
    failed: usize,
    /// A record that could not be written.
    unwritten: Option<anyhow::Error>,
}

impl<'a> Report<'a> {
    fn new(args: &'a Args, runs: u64) -> Self {
        let bars = MultiProgress::new();
        let total = bars.add(ProgressBar::new(runs));
        total.set_style(
            ProgressStyle::with_template("{pos}/{len} runs {elapsed} (left {eta})").expect("a valid template"),
        );
        total.enable_steady_tick(Duration::from_millis(500));
        Self { args, bars, total, state: Mutex::default() }
    }

    fn take(&self, event: Event<'_>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let name =
            |job: &Job| format!("{} {} at {}/s", job.backend, self.args.workload[job.workload].display(), job.rate);
        match event {
            Event::Starting(job) => {
                let bar =
                    self.bars.add(ProgressBar::new_spinner().with_message(format!("{}: server starts", name(job))));
                bar.enable_steady_tick(Duration::from_millis(500));
                state.running.insert(name(job), bar);
            }
            Event::Running(job, counters) => {
                let bar = state.running.entry(name(job)).or_insert_with(|| self.bars.add(ProgressBar::new_spinner()));
                let counters = std::sync::Arc::clone(counters);
                let style =
                    ProgressStyle::with_template("{spinner} {msg} {elapsed}: {counts}").expect("a valid template");
                let counts = move |_: &indicatif::ProgressState, text: &mut dyn std::fmt::Write| {
                    let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
                    let (sent, ended, failed) = (of(&counters.sent), of(&counters.ended), of(&counters.failed));
                    // A progress line that cannot be written is no loss.
                    let _ = write!(text, "{sent} sent, {ended} ended, {failed} failed");
                };
                bar.set_style(style.with_key("counts", counts));
                bar.set_message(name(job));
                bar.enable_steady_tick(Duration::from_millis(500));
            }
            Event::Ended(job, record) => {
                if let Some(bar) = state.running.remove(&name(job)) {
                    bar.finish_and_clear();
                }
                state.ended.made += 1;
                state.ended.failed += usize::from(record.status != Status::Success);
                if let Err(error) = serve::append(&self.args.output, record) {
                    state.ended.unwritten.get_or_insert(anyhow::Error::new(error).context("--output"));
                }
                // A terminal that has gone ends nothing: the records are in the file.
                let _ = self.bars.suspend(|| output::print(row(record)));
                self.total.inc(1);
            }
        }
    }

    fn end(self) -> Ended {
        // Nothing may be left on the terminal; if it is gone there is nothing to clear.
        let _ = self.bars.clear();
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).ended
    }
}

fn header() -> String {
    format!(
        "{:16} {:14} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7}",
        "workload", "backend", "rate", "TTFT ms", "TPOT ms", "P99 TPOT", "tokens/s", "measured", "failed"
    )
}

fn row(record: &Record) -> String {
    let figure =
        |name: &str, digits: usize| record.metric(name).map_or("-".into(), |value| format!("{value:.digits$}"));
    let requests = record.requests.clone().unwrap_or_default();
    let mut line = format!(
        "{:16} {:14} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7}",
        record.config("trace"),
        record.config("ATTENTION_BACKEND"),
        record.config("request_rate"),
        figure("mean_ttft_ms", 1),
        figure("mean_tpot_ms", 2),
        figure("p99_tpot_ms", 2),
        figure("output_token_throughput", 0),
        requests.measured,
        requests.failed
    );
    if let Some(error) = &record.error_log {
        line += "  ";
        line += error;
    }
    line
}
