//! `pat plot`: pictures of result files.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use pat_bench::plot::{self, Figures, Format, Options, Picture, PlotError, Theme};
use std::path::PathBuf;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Figure 10 as bars, time against the reachable time, speed-up against sharing, time of planning.
    #[command(after_help = "Examples:
  pat plot kernels bench/results/2026-11-24-h200-eb98a1f.json --with bench/results/peers-h200-recorded.json --output pictures
  pat plot kernels result.json --format png --theme light --baseline ceiling")]
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
    #[arg(long, value_delimiter = ',', default_value = "svg", value_name = "FORMAT,...")]
    format: Vec<FormatName>,
    /// What the page is like that the pictures stand on.
    #[arg(long, value_delimiter = ',', default_value = "light,dark", value_name = "THEME,...")]
    theme: Vec<ThemeName>,
    /// Only these pictures [default: all that the files allow].
    #[arg(long, value_delimiter = ',', value_name = "PICTURE,...")]
    picture: Vec<PictureName>,
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

#[derive(Clone, Copy, ValueEnum)]
enum FormatName {
    Svg,
    Png,
}

#[derive(Clone, Copy, ValueEnum)]
enum ThemeName {
    Light,
    Dark,
}

#[derive(Clone, Copy, ValueEnum)]
enum PictureName {
    Bars,
    Ceiling,
    Sharing,
    Planning,
}

pub(crate) fn run(command: &Command) -> Result<bool> {
    let Command::Kernels(args) = command;
    let mut figures = Figures::read(&args.result, &args.with)?;
    if !args.methods.is_empty() {
        figures.keep_methods(&args.methods).context("--methods")?;
    }
    let asked: Vec<Picture> = args.picture.iter().map(|picture| picture.picture()).collect();
    let pictures = if asked.is_empty() { &Picture::ALL[..] } else { &asked };
    let mut files = Vec::new();
    for &picture in pictures {
        for theme in &args.theme {
            for format in &args.format {
                let (theme, format) = (theme.theme(), format.format());
                let name = format!("kernels-{}-{}.{}", picture.name(), theme.name(), format.name());
                files.push((picture, theme, format, args.output.join(name)));
            }
        }
    }
    if let Some((.., file)) = files.iter().find(|(.., file)| !args.force && file.exists()) {
        bail!("{} exists: --force overwrites it", file.display());
    }
    std::fs::create_dir_all(&args.output).with_context(|| format!("--output {}", args.output.display()))?;
    let mut drawn = 0;
    for (picture, theme, format, file) in files {
        let options = Options { theme, format, baseline: args.baseline.clone() };
        match plot::draw(picture, &figures, &options, &file) {
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
        bail!("{} has nothing to draw", args.result.display());
    }
    Ok(true)
}

impl FormatName {
    fn format(self) -> Format {
        match self {
            Self::Svg => Format::Svg,
            Self::Png => Format::Png,
        }
    }
}

impl ThemeName {
    fn theme(self) -> Theme {
        match self {
            Self::Light => Theme::Light,
            Self::Dark => Theme::Dark,
        }
    }
}

impl PictureName {
    fn picture(self) -> Picture {
        match self {
            Self::Bars => Picture::Bars,
            Self::Ceiling => Picture::Ceiling,
            Self::Sharing => Picture::Sharing,
            Self::Planning => Picture::Planning,
        }
    }
}
