//! `pat plot kernels`: pictures of result files.

use super::{Pages, named};
use anyhow::{Context, Result};
use pat_bench::plot::{self, Figures, Options, Picture};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Kernels {
    /// Result file of `pat bench kernels`.
    #[arg(value_name = "RESULT")]
    result: PathBuf,
    /// Files with more methods of the same configurations and device; what RESULT has itself is kept.
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    with: Vec<PathBuf>,
    #[command(flatten)]
    pages: Pages,
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
}

impl Kernels {
    pub(super) fn run(&self) -> Result<()> {
        let mut figures = Figures::read(&self.result, &self.with)?;
        if !self.methods.is_empty() {
            figures.keep_methods(&self.methods).context("--methods")?;
        }
        let source = self.result.display().to_string();
        let pictures = (&self.picture[..], &Picture::ALL[..]);
        self.pages.write(("kernels", &source), pictures, Picture::name, |picture, theme, format| {
            plot::draw(picture, &figures, &Options { theme, format, baseline: self.baseline.clone() })
        })
    }
}
