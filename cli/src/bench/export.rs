//! `pat bench export`: the measured batches for programs that measure other libraries on them.

use super::select::Selection;
use anyhow::{Context, Result, bail};
use pat_bench::exchange;
use pat_rs::{AttentionShape, Dtype};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    selection: Selection,
    /// Folder to write: manifest.json and one batch file for each distinct batch.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Write into a folder that has something in it.
    #[arg(long)]
    force: bool,
    /// Element type: f16 or bf16.
    #[arg(long, default_value = "f16")]
    dtype: String,
    /// Elements per head.
    #[arg(long, default_value_t = 128)]
    head_dim: u32,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let dtype = match args.dtype.as_str() {
        "f16" => Dtype::F16,
        "bf16" => Dtype::Bf16,
        other => bail!("--dtype: got {other:?}, expected f16 or bf16"),
    };
    let configurations = args.selection.configurations()?;
    let shapes = configurations
        .iter()
        .map(|configuration| {
            AttentionShape::new(configuration.q_heads, configuration.kv_heads, args.head_dim, dtype)
                .with_context(|| configuration.label())
        })
        .collect::<Result<Vec<_>>>()?;
    let written = exchange::write(&args.output, configurations.iter().zip(shapes), args.force).context("--output")?;
    println!(
        "{}: {} configurations, {} batches, {:.1} MB",
        args.output.display(),
        written.configurations,
        written.batches,
        written.bytes as f64 / 1e6
    );
    Ok(true)
}
