//! `pat bench kernels`: suites of batches, measured one after the other.

use super::select::Selection;
use super::table::{Columns, duration};
use crate::options::Planning;
use crate::run::engine;
use anyhow::{Context, Result, bail};
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use pat_bench::device::Repeats;
use pat_bench::measure::{Target, batch_flop, dtype_name};
use pat_bench::memory::pool_bytes;
use pat_bench::provenance;
use pat_bench::result::{self, METHOD, Method, RecordKey, ResultFile, SCHEMA_VERSION};
use pat_bench::suites::{Configuration, SUITES};
use pat_rs::{AttentionShape, Dtype};
use pat_workloads::OwnedBatch;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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
    /// Stop before this many seconds have passed.
    #[arg(long, value_name = "SECONDS")]
    time_limit: Option<u64>,
    /// Element type: f16 or bf16.
    #[arg(long, default_value = "f16")]
    dtype: String,
    /// Elements per head.
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
    #[command(flatten)]
    planning: Planning,
}

/// Whether every answer was verified.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let begin = Instant::now();
    let dtype = match args.dtype.as_str() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::Bf16,
        other => bail!("--dtype: got {other:?}, expected f16 or bf16"),
    };
    if args.list {
        println!("{}", list(args, dtype)?);
        return Ok(true);
    }
    let options = args.planning.resolve()?;
    let configurations = args.selection.configurations()?;
    let former = former_results(args)?;
    let target = Target::new(engine(&args.device)?)?;
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
    let mut file = begun_file(former, &target, method)?;

    let mut planned = Vec::new();
    for configuration in &configurations {
        let shape = AttentionShape::new(configuration.q_heads, configuration.kv_heads, args.head_dim, dtype)?;
        let is_done = file.records.iter().any(|record| record.key() == key(configuration, shape));
        if !is_done && (!args.quick || is_quick(&configuration.batch()?, shape, target.is_cuda())) {
            planned.push((configuration, shape));
        }
    }
    let columns = if target.is_cuda() { Columns::Cuda } else { Columns::Cpu };
    let bar = ProgressBar::new(planned.len() as u64);
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {msg} {elapsed} (left {eta})").expect("a valid template"));
    println!("{}", columns.header());
    let mut failures = 0;
    for (number, &(configuration, shape)) in (1..).zip(&planned) {
        if args.time_limit.is_some_and(|limit| begin.elapsed() > Duration::from_secs(limit)) {
            bar.suspend(|| println!("time limit reached: --resume continues"));
            break;
        }
        bar.set_message(configuration.label());
        let batch = configuration.batch()?;
        let name = (configuration.suite, configuration.name.as_str());
        match target.measure(name, &batch, shape, &options, repeats) {
            Ok(record) => {
                bar.suspend(|| println!("{}", columns.row((number, planned.len()), &record)));
                file.records.push(record);
                if let Some(path) = &args.output {
                    result::write(path, &file)?;
                }
            }
            // A batch that is too large for this machine does not keep the others from being measured.
            Err(error) => {
                bar.suspend(|| eprintln!("{}: not measured: {error}", configuration.label()));
                failures += 1;
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    let mut passed = true;
    let keys: Vec<RecordKey> = configurations
        .iter()
        .map(|configuration| {
            let (q, kv) = (configuration.q_heads, configuration.kv_heads);
            Ok(key(configuration, AttentionShape::new(q, kv, args.head_dim, dtype)?))
        })
        .collect::<Result<_>>()?;
    let mut by_suite: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for record in file.records.iter().filter(|record| keys.contains(&record.key())) {
        passed &= record.is_verified();
        by_suite.entry(&record.suite).or_default().push(record);
    }
    for (suite, records) in by_suite {
        println!("{}", columns.summary(suite, &records));
    }
    println!("{} in {}", target.name(), duration(begin.elapsed()));
    if failures > 0 {
        bail!("{failures} of {} configurations could not be measured (see above)", planned.len());
    }
    Ok(passed)
}

fn key(configuration: &Configuration, shape: AttentionShape) -> RecordKey {
    RecordKey {
        suite: configuration.suite.into(),
        tree: configuration.name.clone(),
        nheads_q: shape.q_heads(),
        nheads_kv: shape.kv_heads(),
        head_dim: shape.head_dim(),
        dtype: dtype_name(shape.dtype()).into(),
    }
}

/// What the output file holds already, if it is to be continued.
fn former_results(args: &Args) -> Result<Option<(&Path, ResultFile)>> {
    match &args.output {
        Some(path) if path.exists() && args.resume => Ok(Some((path, result::read(path)?))),
        Some(path) if path.exists() && !args.force => {
            bail!("{} exists: --resume continues it, --force overwrites it", path.display())
        }
        _ => Ok(None),
    }
}

/// The file to go on with. Refuses to mix figures that were not taken alike.
fn begun_file(former: Option<(&Path, ResultFile)>, target: &Target, method: Method) -> Result<ResultFile> {
    let (device, commit) = (target.name(), provenance::commit());
    let Some((path, mut file)) = former else {
        return Ok(ResultFile {
            schema_version: SCHEMA_VERSION,
            device,
            date: Some(provenance::date()),
            commit,
            methods: BTreeMap::from([(METHOD.into(), method)]),
            records: Vec::new(),
        });
    };
    let differs = |what: &str, before: &str, now: &str| {
        anyhow::anyhow!(
            "--resume: {} was measured with {what} {before}, this is {now}: --force begins it anew, another --output keeps both",
            path.display()
        )
    };
    if file.device != device {
        return Err(differs("device", &file.device, &device));
    }
    if let (Some(before), Some(now)) = (&file.commit, &commit)
        && before != now
    {
        return Err(differs("commit", before, now));
    }
    let before = file.methods.entry(METHOD.into()).or_insert_with(|| method.clone());
    if *before != method {
        let text = |method: &Method| format!("version {} ({})", method.version, method.note);
        return Err(differs("", &text(before), &text(&method)));
    }
    file.commit = file.commit.or(commit);
    Ok(file)
}

/// Whether a batch is measured by --quick: on a device all but the largest tree of Figure 10 and its like, on the CPU what takes a
/// second or two on two cores.
fn is_quick(batch: &OwnedBatch, shape: AttentionShape, is_cuda: bool) -> bool {
    if is_cuda {
        u64::from(batch.num_pages) * u64::from(batch.page_size) <= 1 << 19
    } else {
        batch_flop(batch, shape) <= 2e9 && pool_bytes(batch, shape) <= 256 << 20
    }
}

/// The suites with their counts, or the configurations selected.
fn list(args: &Args, dtype: Dtype) -> Result<Table> {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if !args.selection.is_explicit() {
        table.set_header(["suite", "configurations", ""]);
        for (name, about) in SUITES {
            let count = args.selection.suite(name)?.len();
            table.add_row([name, &count.to_string(), about]);
        }
        return Ok(table);
    }
    table.set_header(["suite", "tree", "heads", "page size", "sequences", "tokens", "pool MB", "sharing"]);
    for configuration in args.selection.configurations()? {
        let shape = AttentionShape::new(configuration.q_heads, configuration.kv_heads, args.head_dim, dtype)?;
        let batch = configuration.batch().with_context(|| configuration.label())?;
        let tokens: u64 = batch.lengths.iter().map(|&length| u64::from(length)).sum();
        let unique: u64 = pat_workloads::tensors::owned_tokens(&batch).into_iter().map(u64::from).sum();
        table.add_row([
            configuration.suite.into(),
            configuration.name.clone(),
            format!("{}/{}", configuration.q_heads, configuration.kv_heads),
            batch.page_size.to_string(),
            batch.lengths.len().to_string(),
            tokens.to_string(),
            format!("{:.0}", pool_bytes(&batch, shape) as f64 / 1e6),
            format!("{:.2}", tokens as f64 / unique.max(1) as f64),
        ]);
    }
    Ok(table)
}
