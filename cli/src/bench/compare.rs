//! `pat bench compare`: two measurements side by side.

use crate::output;
use anyhow::{Context, Result, bail};
use comfy_table::{Table, presets};
use pat_bench::compare::compare;
use pat_bench::result::{self, ResultFile};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Result files of the old state; several are repeated runs.
    #[arg(required = true, value_delimiter = ',', value_name = "OLD[,OLD...]")]
    old: Vec<PathBuf>,
    /// Result files of the new state.
    #[arg(long, short, required = true, value_delimiter = ',', value_name = "NEW[,NEW...]")]
    new: Vec<PathBuf>,
}

/// Whether nothing has become slower by more than the noise.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let read = |files: &[PathBuf], argument: &'static str| {
        files.iter().map(|file| result::read(file).context(argument)).collect::<Result<Vec<ResultFile>>>()
    };
    let comparison = compare(&read(&args.old, "OLD")?, &read(&args.new, "--new")?);
    if let [first, others @ ..] = &comparison.devices[..]
        && !others.is_empty()
    {
        output::print(format_args!(
            "The files are of different devices ({first}, {}): the ratios compare these as well.",
            others.join(", ")
        ))?;
    }
    if comparison.changes.is_empty() {
        bail!("the files have no configuration in common");
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["configuration", "old us", "new us", "new/old", "noise", ""]);
    for change in &comparison.changes {
        table.add_row([
            change.name.clone(),
            format!("{:.1}", change.old_us),
            format!("{:.1}", change.new_us),
            format!("{:.3}", change.ratio()),
            format!("{:.3}", change.noise),
            if change.is_regression() { "slower".into() } else { String::new() },
        ]);
    }
    output::print(table)?;
    let regressions = comparison.changes.iter().filter(|change| change.is_regression()).count();
    output::print(format_args!(
        "{} configurations, geometric mean {:.3} of the old times, {regressions} slower by more than the noise, {} in only one \
         measurement",
        comparison.changes.len(),
        comparison.geometric_mean(),
        comparison.unmatched
    ))?;
    Ok(regressions == 0)
}
