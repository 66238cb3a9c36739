//! `pat plot`: pictures of measurements.

mod kernels;
mod serve;

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pat_bench::plot::{Format, PlotError, Theme};
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Figure 10 as bars, time against the reachable time, speed-up against sharing, time of planning.
    #[command(after_help = "Examples:
  pat plot kernels bench/results/2026-11-24-h200-eb98a1f.json --with bench/results/peers-h200-recorded.json --output pictures
  pat plot kernels result.json --format png --theme light --baseline ceiling")]
    Kernels(kernels::Kernels),
    /// Latency against the rate, capacity, what a decode step's time is spent on.
    #[command(after_help = "Examples:
  pat plot serve serve.jsonl --output pictures
  pat plot serve e2e_perf.jsonl --format png --picture latency")]
    Serve(serve::Serve),
}

/// Where pictures go, and how they look.
#[derive(clap::Args)]
struct Pages {
    /// Folder to write PICTURE-THEME.FORMAT into, the command's name before it; made if it is not there.
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
    /// Draws `asked` of `all` pictures in each theme and format. What nobody asked for by name may be left out.
    fn draw<P: Copy>(
        &self,
        command: &str,
        (asked, all): (&[P], &[P]),
        name: fn(P) -> &'static str,
        draw: impl Fn(P, Theme, Format, &Path) -> Result<(), PlotError>,
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
        if let Some((.., file)) = files.iter().find(|(.., file)| !self.force && file.exists()) {
            bail!("{} exists: --force overwrites it", file.display());
        }
        std::fs::create_dir_all(&self.output).with_context(|| format!("--output {}", self.output.display()))?;
        let mut drawn = 0;
        for (picture, theme, format, file) in files {
            match draw(picture, theme, format, &file) {
                Ok(()) => {
                    println!("{}", file.display());
                    drawn += 1;
                }
                // Not every file has what every picture shows.
                Err(PlotError::Empty(reason)) if asked.is_empty() => {
                    println!("{}: left out: {reason}", file.display());
                }
                Err(error) => return Err(error.into()),
            }
        }
        if drawn == 0 {
            bail!("the files have nothing to draw");
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
