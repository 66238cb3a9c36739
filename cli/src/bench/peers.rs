//! `pat bench peers`: the methods of a result file side by side, as Markdown.

use crate::output;
use anyhow::{Result, bail};
use comfy_table::{Cell, CellAlignment, Table, presets};
use pat_bench::peers::versus;
use pat_bench::plot::Figures;
use pat_bench::result::METHOD;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Result file of `pat bench kernels`.
    #[arg(value_name = "RESULT")]
    result: PathBuf,
    /// Files with more methods of the same configurations and device; what RESULT has itself is kept.
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    with: Vec<PathBuf>,
    /// Only configurations whose `suite: name Q/KV` contains this text.
    #[arg(long, default_value = "")]
    filter: String,
    /// Show the time of every method in every configuration.
    #[arg(long)]
    all: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut figures = Figures::read(&args.result, &args.with)?;
    let label = |suite: &str, name: &str, shape: &str| format!("{suite}: {name} {shape}");
    figures.points.retain(|point| label(&point.suite, &point.name, &point.shape).contains(&args.filter));
    if figures.points.is_empty() {
        bail!("--filter: got {:?}, which no configuration's `suite: name Q/KV` contains", args.filter);
    }
    let entries = versus(&figures);
    if entries.is_empty() {
        bail!(
            "{} has no method beside {METHOD}: bench/peers measures some, --with adds others' files",
            args.result.display()
        );
    }
    let mut table = markdown(["time of pat-rs /", "configurations", "geometric mean", "largest", "slower in"]);
    for entry in entries {
        table.add_row([
            entry.method,
            entry.configurations.to_string(),
            format!("{:.3}", entry.geometric_mean),
            format!("{:.3}", entry.worst),
            entry.slower.to_string(),
        ]);
    }
    output::print(table)?;
    if args.all {
        let fixed = ["configuration", "heads"].map(str::to_owned);
        let mut table = markdown(fixed.into_iter().chain(figures.methods.iter().map(|method| format!("{method}, us"))));
        for point in &figures.points {
            let fastest = point.cold_us.values().copied().fold(f64::INFINITY, f64::min);
            let times = figures.methods.iter().map(|method| match point.cold_us.get(method) {
                Some(&us) if us == fastest => format!("**{us:.1}**"),
                Some(us) => format!("{us:.1}"),
                None => "-".into(),
            });
            let name = format!("`{}`", point.name);
            table.add_row([name, point.shape.clone()].into_iter().chain(times));
        }
        output::print(format_args!("\n{table}"))?;
    }
    Ok(true)
}

/// An empty Markdown table; all columns but the first are numbers.
fn markdown(header: impl IntoIterator<Item = impl Into<Cell>>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
