//! `pat plot`: pictures of measurements.

mod kernels;
mod serve;

use crate::output;
use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pat_bench::plot::{Format, PlotError, Theme};
use pat_workloads::{Existing, whole_file};
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Figure 10 as bars, time against the reachable time, speed-up against sharing, time of planning.
    #[command(after_help = "Examples:
  pat plot kernels bench/results/2026-11-24-h200-eb98a1f.json --with bench/results/peers-h200-recorded.json --output pictures
  pat plot kernels result.json --format png --theme light --baseline ceiling

Takes: under a second for each picture.")]
    Kernels(kernels::Kernels),
    /// Latency against the rate, capacity, what a decode step's time is spent on.
    #[command(after_help = "Examples:
  pat plot serve serve.jsonl --output pictures
  pat plot serve e2e_perf.jsonl --format png --picture latency

Takes: under a second for each picture.")]
    Serve(serve::Serve),
}

/// Where pictures go, and how they look.
#[derive(clap::Args)]
struct Pages {
    /// Folder to write COMMAND-PICTURE-THEME.FORMAT into; made if it is not there.
    #[arg(long, default_value = ".", value_name = "DIR")]
    output: PathBuf,
    /// File formats.
    #[arg(long, value_delimiter = ',', default_value = "svg", value_name = "FORMAT,...",
        value_parser = named(&Format::ALL, Format::name))]
    format: Vec<Format>,
    /// What the page is like that the pictures stand on.
    #[arg(long, value_delimiter = ',', default_value = "light,dark", value_name = "THEME,...",
        value_parser = named(&Theme::ALL, Theme::name))]
    theme: Vec<Theme>,
    /// Overwrite pictures.
    #[arg(long)]
    force: bool,
}

/// A value that is given by its name.
fn named<T: Copy + Send + Sync + 'static>(
    all: &'static [T],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(all.iter().map(|&value| name(value)))
        .map(move |given| *all.iter().find(|&&value| name(value) == given).expect("one of the names"))
}

impl Pages {
    /// Writes `asked` of `all` pictures of `source` in each theme and format. What nobody asked for by name may be left out.
    fn write<P: Copy>(
        &self,
        (command, source): (&str, &str),
        (asked, all): (&[P], &[P]),
        name: fn(P) -> &'static str,
        draw: impl Fn(P, Theme, Format) -> Result<Vec<u8>, PlotError>,
    ) -> Result<()> {
        let mut files = Vec::new();
        for &picture in if asked.is_empty() { all } else { asked } {
            for &theme in &self.theme {
                for &format in &self.format {
                    let file = format!("{command}-{}-{}.{}", name(picture), theme.name(), format.name());
                    files.push((picture, theme, format, self.output.join(file)));
                }
            }
        }
        let existing = Existing::replaced_if(self.force);
        std::fs::create_dir_all(&self.output).with_context(|| format!("--output {}", self.output.display()))?;
        for (.., file) in &files {
            whole_file::check(file, existing).context("--output")?;
        }
        let (mut staged, mut left_out) = (Vec::new(), Vec::new());
        for (picture, theme, format, file) in files {
            match draw(picture, theme, format) {
                Ok(contents) => {
                    let picture = whole_file::stage(&file, &contents, existing).context("--output")?;
                    staged.push((file, picture));
                }
                // Not every file has what every picture shows.
                Err(PlotError::Empty(reason)) if asked.is_empty() => left_out.push((file, reason)),
                Err(error) => return Err(error.into()),
            }
        }
        if let (true, Some((_, reason))) = (staged.is_empty(), left_out.first()) {
            bail!("{source} has nothing to draw: {reason}");
        }
        for (file, picture) in staged {
            picture.commit().context("--output")?;
            output::print(file.display())?;
        }
        for (file, reason) in left_out {
            output::print(format_args!("{}: left out: {reason}", file.display()))?;
        }
        Ok(())
    }
}

pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Kernels(args) => args.run(),
        Command::Serve(args) => args.run(),
    }?;
    Ok(true)
}
