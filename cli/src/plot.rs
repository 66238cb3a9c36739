//! `pat plot`: pictures of result files.

use crate::output;
use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use pat_bench::plot::{self, Figures, Format, Options, Picture, PlotError, Theme};
use pat_workloads::{Existing, whole_file};
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Figure 10 as bars, time against the reachable time, speed-up against sharing, time of planning.
    #[command(after_help = "Examples:
  pat plot kernels bench/results/2026-11-24-h200-eb98a1f.json --with bench/results/peers-h200-recorded.json --output pictures
  pat plot kernels result.json --format png --theme light --baseline ceiling

Takes: under a second for each picture.")]
    Kernels(Kernels),
}

#[derive(clap::Args)]
pub(crate) struct Kernels {
    /// Result file of `pat bench kernels`.
    #[arg(value_name = "RESULT")]
    result: PathBuf,
    /// Files with more methods of the same configurations and device; what RESULT has itself is kept.
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    with: Vec<PathBuf>,
    /// Folder to write kernels-PICTURE-THEME.FORMAT into; made if it is not there.
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
    /// Only these pictures [default: all that the files allow].
    #[arg(long, value_delimiter = ',', value_name = "PICTURE,...", value_parser = named(&Picture::ALL, Picture::name))]
    picture: Vec<Picture>,
    /// What the bars are relative to: a method, or `ceiling`, the reachable time [default: pat, else the slowest peer, else
    /// ceiling].
    #[arg(long, value_name = "METHOD")]
    baseline: Option<String>,
    /// Only these methods.
    #[arg(long, value_delimiter = ',', value_name = "METHOD,...")]
    methods: Vec<String>,
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

pub(crate) fn run(command: &Command) -> Result<bool> {
    let Command::Kernels(args) = command;
    let mut figures = Figures::read(&args.result, &args.with)?;
    if !args.methods.is_empty() {
        figures.keep_methods(&args.methods).context("--methods")?;
    }
    let asked = &args.picture;
    let pictures = if asked.is_empty() { &Picture::ALL[..] } else { asked };
    let mut files = Vec::new();
    for &picture in pictures {
        for &theme in &args.theme {
            for &format in &args.format {
                let name = format!("kernels-{}-{}.{}", picture.name(), theme.name(), format.name());
                files.push((picture, theme, format, args.output.join(name)));
            }
        }
    }
    let existing = Existing::replaced_if(args.force);
    std::fs::create_dir_all(&args.output).with_context(|| format!("--output {}", args.output.display()))?;
    for (.., file) in &files {
        whole_file::check(file, existing).context("--output")?;
    }
    let (mut staged, mut left_out) = (Vec::new(), Vec::new());
    for (picture, theme, format, file) in files {
        let options = Options { theme, format, baseline: args.baseline.clone() };
        match plot::draw(picture, &figures, &options) {
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
        bail!("{} has nothing to draw: {reason}", args.result.display());
    }
    for (file, picture) in staged {
        picture.commit().context("--output")?;
        output::print(file.display())?;
    }
    for (file, reason) in left_out {
        output::print(format_args!("{}: left out: {reason}", file.display()))?;
    }
    Ok(true)
}
