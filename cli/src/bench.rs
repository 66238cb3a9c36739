//! `pat bench`: measurements on a CUDA device, and their comparison.

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pat_bench::device::Repeats;
use pat_bench::grid::{dtype_name, measure};
use pat_bench::result::{self, ResultFile, SCHEMA_VERSION};
use pat_rs::cuda::CudaEngine;
use pat_rs::cuda::bench_support::L2Flush;
use pat_rs::{AttentionShape, Dtype};
use pat_workloads::{FIGURE_10_HEADS, FIGURE_10_TREES, TreeSpec};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::options::Planning;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// PAT's Figure 10: 20 trees, 4 head configurations; every answer is verified before it is timed.
    Kernels(Kernels),
    /// Compare result files; status 1 where a configuration has become slower by more than the noise.
    Compare(crate::compare::Args),
}

#[derive(clap::Args)]
pub(crate) struct Kernels {
    /// cuda or cuda:N.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Result file, rewritten after each configuration.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Continue the result file: configurations it holds are not run again.
    #[arg(long, conflicts_with = "force")]
    resume: bool,
    /// Overwrite the result file.
    #[arg(long)]
    force: bool,
    /// Only configurations whose `tree Q/KV` contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// Fewer repetitions, and without the largest tree.
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

pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Kernels(args) => kernels(args),
        Command::Compare(args) => crate::compare::run(args),
    }
}

fn kernels(args: &Kernels) -> Result<bool> {
    let begin = Instant::now();
    let dtype = match args.dtype.as_str() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::Bf16,
        other => bail!("--dtype: got {other:?}, expected f16 or bf16"),
    };
    let options = args.planning.resolve()?;
    let ordinal = match args.device.as_str() {
        "cuda" => 0,
        other => other
            .strip_prefix("cuda:")
            .and_then(|ordinal| ordinal.parse().ok())
            .with_context(|| format!("--device: got {other:?}, expected cuda or cuda:N"))?,
    };
    let mut file = match &args.output {
        Some(path) if path.exists() && args.resume => Some(result::read(path)?),
        Some(path) if path.exists() && !args.force => {
            bail!("{} exists: --resume continues it, --force overwrites it", path.display())
        }
        _ => None,
    };
    let engine = CudaEngine::new(ordinal)?;
    let device = engine.device().name().to_owned();
    let file = file.get_or_insert_with(|| ResultFile {
        schema_version: SCHEMA_VERSION,
        device: device.clone(),
        records: Vec::new(),
    });
    if file.device != device {
        bail!("the result file was measured on {}, this is {device}", file.device);
    }
    let profile = args.planning.profile()?.map_or_else(|| engine.device().profile(), Ok)?;
    let flush = L2Flush::new(engine.device())?;
    let repeats = if args.quick { Repeats { warm_ups: 2, timed: 7 } } else { Repeats { warm_ups: 5, timed: 21 } };
    let mut configurations = Vec::new();
    for tree in FIGURE_10_TREES {
        for heads in FIGURE_10_HEADS {
            let name = format!("{tree} {}/{}", heads.0, heads.1);
            if name.contains(&args.filter) && !(args.quick && tree == "256_4096") {
                configurations.push((tree, heads));
            }
        }
    }
    let bar = ProgressBar::new(configurations.len() as u64);
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {msg} {elapsed} (left {eta})").expect("a valid template"));
    println!(
        "{:48} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>8}  check",
        "tree", "heads", "cold us", "warm us", "graph us", "ceil us", "cold/c", "plan us", "TFLOP/s", "items"
    );
    let mut passed = true;
    for (tree, (q_heads, kv_heads)) in configurations {
        if args.time_limit.is_some_and(|limit| begin.elapsed() > Duration::from_secs(limit)) {
            println!("time limit reached: --resume continues");
            break;
        }
        bar.set_message(tree);
        bar.inc(1);
        let key = (tree.to_owned(), q_heads, kv_heads, args.head_dim, dtype_name(dtype).to_owned());
        if file.records.iter().any(|record| record.key() == key) {
            continue;
        }
        let shape = AttentionShape::new(q_heads, kv_heads, args.head_dim, dtype)?;
        let batch = TreeSpec::from_str(tree)?.batch(32, Some(1))?;
        let record = measure(&engine, &flush, tree, &batch, shape, (&profile, &options), repeats)?;
        let ok = record.correctness.values().all(|c| c.status == "PASSED");
        passed &= ok;
        println!(
            "{tree:48} {:>6} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>7.2} {:>7.0} {:>7.1} {:>8}  {}",
            format!("{q_heads}/{kv_heads}"),
            record.cold_us,
            record.warm_us,
            record.graph_us,
            record.ceiling_us,
            record.cold_us / record.ceiling_us,
            record.plan_us,
            record.flop / record.cold_us / 1e6,
            record.items.values().sum::<u32>(),
            if ok { "ok" } else { "FAILED" }
        );
        file.records.push(record);
        if let Some(path) = &args.output {
            result::write(path, file)?;
        }
    }
    bar.finish_and_clear();
    Ok(passed)
}
