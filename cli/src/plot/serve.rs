//! `pat plot serve`: pictures of the serving benchmark.

use super::{Pages, named};
use anyhow::Result;
use pat_bench::plot::serve::{self, ServeFigures, ServePicture};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Serve {
    /// Records of `pat bench serve` or bench/serve, or PAT's e2e_perf.jsonl.
    #[arg(required = true, value_name = "FILE")]
    records: Vec<PathBuf>,
    #[command(flatten)]
    pages: Pages,
    /// Only these pictures [default: all that the files allow].
    #[arg(long, value_delimiter = ',', value_name = "PICTURE,...",
        value_parser = named(&ServePicture::ALL, ServePicture::name))]
    picture: Vec<ServePicture>,
}

impl Serve {
    pub(super) fn run(&self) -> Result<()> {
        let figures = ServeFigures::read(&self.records)?;
        let files: Vec<_> = self.records.iter().map(|file| file.display().to_string()).collect();
        let pictures = (&self.picture[..], &ServePicture::ALL[..]);
        self.pages.write(("serve", &files.join(" and ")), pictures, ServePicture::name, |picture, theme, format| {
            serve::draw(picture, &figures, theme, format)
        })
    }
}
