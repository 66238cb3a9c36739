//! `pat bench export`: the measured batches for programs that measure other libraries on them.

use anyhow::{Context, Result, bail};
use pat_bench::exchange::{self, Configuration};
use pat_rs::{AttentionShape, Dtype};
use pat_workloads::{FIGURE_10_HEADS, FIGURE_10_TREES, TreeSpec};
use std::path::PathBuf;
use std::str::FromStr;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder to write: manifest.json and one batch file for each distinct batch.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Write into a folder that has something in it.
    #[arg(long)]
    force: bool,
    /// Only configurations whose `tree Q/KV` contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// Element type: f16 or bf16.
    #[arg(long, default_value = "f16")]
    dtype: String,
    /// Elements per head.
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let configurations = configurations(args)?;
    if configurations.is_empty() {
        bail!("--filter {:?}: no configuration has that in its name", args.filter);
    }
    let written = exchange::write(&args.output, configurations, args.force).context("--output")?;
    println!(
        "{}: {} configurations, {} batches, {:.1} MB",
        args.output.display(),
        written.configurations,
        written.batches,
        written.bytes as f64 / 1e6
    );
    Ok(true)
}

fn configurations(args: &Args) -> Result<Vec<Configuration>> {
    let dtype = match args.dtype.as_str() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::Bf16,
        other => bail!("--dtype: got {other:?}, expected f16 or bf16"),
    };
    let mut configurations = Vec::new();
    for tree in FIGURE_10_TREES {
        let batch = TreeSpec::from_str(tree)?.batch(32, Some(1))?;
        for (q_heads, kv_heads) in FIGURE_10_HEADS {
            if format!("{tree} {q_heads}/{kv_heads}").contains(&args.filter) {
                let shape = AttentionShape::new(q_heads, kv_heads, args.head_dim, dtype).context("--head-dim")?;
                let (suite, name) = ("figure10".into(), tree.into());
                configurations.push(Configuration { suite, name, batch: batch.clone(), shape });
            }
        }
    }
    Ok(configurations)
}
