//! `pat bench export`: the measured batches for programs that measure other libraries on them.

use super::select::{Selection, shape};
use crate::options::Elements;
use crate::output;
use anyhow::{Context, Result};
use pat_bench::exchange;
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
    #[command(flatten)]
    elements: Elements,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let asked = args.elements.asked();
    let configurations = args.selection.configurations(&asked)?;
    let shapes = configurations.iter().map(|configuration| shape(configuration, &asked)).collect::<Result<Vec<_>>>()?;
    let written = exchange::write(&args.output, configurations.iter().zip(shapes), args.force).context("--output")?;
    output::print(format_args!(
        "{}: {} configurations, {} batches, {:.1} MB",
        args.output.display(),
        written.configurations,
        written.batches,
        written.bytes as f64 / 1e6
    ))?;
    Ok(true)
}
