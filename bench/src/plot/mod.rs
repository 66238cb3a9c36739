//! Pictures of result files.

mod bars;
mod ceiling;
mod data;
mod layout;
mod planning;
pub mod serve;
mod sharing;
mod theme;

pub use data::{Figures, Point};
use theme::MAX_SERIES;
pub use theme::Theme;

use crate::result::ResultError;
use crate::serve::RecordError;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::{Path, PathBuf};

/// A picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Picture {
    /// Figure 10: each tree a group of bars, each head configuration a panel, relative to one method.
    Bars,
    /// Time against the time that the device's bandwidth and arithmetic allow.
    Ceiling,
    /// Speed-up against sharing factor.
    Sharing,
    /// Time of planning against the number of sequences.
    Planning,
}

impl Picture {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Bars, Self::Ceiling, Self::Sharing, Self::Planning];

    /// As in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bars => "bars",
            Self::Ceiling => "ceiling",
            Self::Sharing => "sharing",
            Self::Planning => "planning",
        }
    }
}

/// File format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text stays text, in the reader's sans-serif font.
    Svg,
    /// Text is drawn with an embedded font.
    Png,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Svg, Self::Png];

    /// As in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Svg => "svg",
            Self::Png => "png",
        }
    }
}

/// What is drawn, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Colours.
    pub theme: Theme,
    /// File format.
    pub format: Format,
    /// What the bars are relative to, a method or [`CEILING`]; see [`default_baseline`].
    pub baseline: Option<String>,
}

/// Baseline of the bars that is no method: the reachable time.
pub const CEILING: &str = "ceiling";

/// PAT, whose figure it is; else the peer that is slowest on the whole, so that most bars are below 1; the reachable time where
/// there is no peer.
pub fn default_baseline(figures: &Figures) -> String {
    bars::default_baseline(figures)
}

/// Why a picture was not drawn.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlotError {
    /// A result file cannot be used.
    #[error(transparent)]
    Result(#[from] ResultError),
    /// A file of records cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Two files are of different devices.
    #[error("{}: measured on {device}, the others on {expected}", file.display())]
    Device {
        /// The file.
        file: PathBuf,
        /// Its device.
        device: String,
        /// That of the first file.
        expected: String,
    },
    /// A method that is not there.
    #[error("got {name:?}, expected one of the methods of the files: {known}")]
    Method {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// More series than there are colours.
    #[error("{count} {what}, expected at most {MAX_SERIES}: choose some of them")]
    TooMany {
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
    },
    /// The files have nothing that this picture shows.
    #[error("{0}")]
    Empty(&'static str),
    /// The file cannot be written.
    #[error("{}: {message}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The system's message, or the drawing library's.
        message: String,
    },
}

/// Draws a picture into a file, replacing it.
///
/// # Errors
/// See [`PlotError`]; of [`PlotError::Empty`] nothing is written.
pub fn draw(picture: Picture, figures: &Figures, options: &Options, file: &Path) -> Result<(), PlotError> {
    if figures.methods.len() > MAX_SERIES {
        return Err(PlotError::TooMany { count: figures.methods.len(), what: "methods" });
    }
    let scene = match picture {
        Picture::Bars => Scene::Bars(bars::Bars::new(figures, options.baseline.as_deref())?),
        Picture::Ceiling => Scene::Scatter(ceiling::scatter(figures)?),
        Picture::Sharing => Scene::Scatter(sharing::scatter(figures)?),
        Picture::Planning => Scene::Scatter(planning::scatter(figures)?),
    };
    write(&scene, options.theme, options.format, file)
}

fn write(scene: &Scene<'_>, theme: Theme, format: Format, file: &Path) -> Result<(), PlotError> {
    let write = |message: String| PlotError::Write { file: file.into(), message };
    match format {
        Format::Svg => {
            let mut text = String::new();
            let area = SVGBackend::with_string(&mut text, scene.size()).into_drawing_area();
            scene.draw(&area, theme).map_err(|error| write(error.to_string()))?;
            drop(area);
            std::fs::write(file, text).map_err(|error| write(error.to_string()))
        }
        Format::Png => {
            let area = BitMapBackend::new(file, scene.size()).into_drawing_area();
            scene.draw(&area, theme).map_err(|error| write(error.to_string()))
        }
    }
}

/// A picture before it is known where it goes.
enum Scene<'a> {
    Bars(bars::Bars<'a>),
    Scatter(layout::Scatter),
    Latency(serve::latency::Latency<'a>),
    Capacity(serve::capacity::Bars<'a>),
    Steps(serve::steps::Steps<'a>),
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

impl Scene<'_> {
    /// In pixels.
    fn size(&self) -> (u32, u32) {
        match self {
            Self::Bars(bars) => bars.size(),
            Self::Scatter(scatter) => scatter.size(),
            Self::Latency(latency) => latency.size(),
            Self::Capacity(bars) => bars.size(),
            Self::Steps(steps) => steps.size(),
        }
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        area.fill(&theme.background())?;
        match self {
            Self::Bars(bars) => bars.draw(area, theme)?,
            Self::Scatter(scatter) => scatter.draw(area, theme)?,
            Self::Latency(latency) => latency.draw(area, theme)?,
            Self::Capacity(bars) => bars.draw(area, theme)?,
            Self::Steps(steps) => steps.draw(area, theme)?,
        }
        area.present()
    }
}
