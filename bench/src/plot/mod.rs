//! Pictures of result files.

mod bars;
mod ceiling;
mod data;
mod layout;
mod planning;
mod sharing;
mod theme;

pub use data::{Figures, Point};
use theme::MAX_SERIES;
pub use theme::Theme;

use crate::result::ResultError;
use image::ImageEncoder;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::PathBuf;

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
    /// Two files are of different devices.
    ///
    /// Fix: draw files of one device together.
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
    ///
    /// Fix: name a method of the files, in `--methods` or `--baseline`.
    #[error("got {name:?}, expected one of the methods of the files: {known}")]
    Method {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// More series than there are colours.
    ///
    /// Fix: choose some by `--methods`, or draw a file with fewer head configurations.
    #[error("{count} {what}, expected at most {MAX_SERIES}: choose some of them")]
    TooMany {
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
    },
    /// The files have nothing that this picture shows.
    ///
    /// Fix: measure what the picture shows, or ask for other pictures by `--picture`.
    #[error("{0}")]
    Empty(&'static str),
    /// The drawing library fails.
    ///
    /// Fix: report it: the drawing library failed.
    #[error("the picture cannot be drawn: {0}")]
    Draw(String),
}

/// Draws a picture: the contents of a file of the format asked for.
///
/// # Errors
/// See [`PlotError`].
pub fn draw(picture: Picture, figures: &Figures, options: &Options) -> Result<Vec<u8>, PlotError> {
    if figures.methods.len() > MAX_SERIES {
        return Err(PlotError::TooMany { count: figures.methods.len(), what: "methods" });
    }
    let scene = match picture {
        Picture::Bars => Scene::Bars(bars::Bars::new(figures, options.baseline.as_deref())?),
        Picture::Ceiling => Scene::Scatter(ceiling::scatter(figures)?),
        Picture::Sharing => Scene::Scatter(sharing::scatter(figures)?),
        Picture::Planning => Scene::Scatter(planning::scatter(figures)?),
    };
    match options.format {
        Format::Svg => {
            let mut text = String::new();
            let area = SVGBackend::with_string(&mut text, scene.size()).into_drawing_area();
            scene.draw(&area, options.theme).map_err(|error| PlotError::Draw(error.to_string()))?;
            drop(area);
            Ok(text.into_bytes())
        }
        Format::Png => {
            let (width, height) = scene.size();
            let mut pixels = vec![0; 3 * width as usize * height as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
            scene.draw(&area, options.theme).map_err(|error| PlotError::Draw(error.to_string()))?;
            drop(area);
            let mut file = Vec::new();
            let encoder = image::codecs::png::PngEncoder::new(&mut file);
            let written = encoder.write_image(&pixels, width, height, image::ColorType::Rgb8);
            written.map_err(|error| PlotError::Draw(error.to_string()))?;
            Ok(file)
        }
    }
}

/// A picture before it is known where it goes.
enum Scene<'a> {
    Bars(bars::Bars<'a>),
    Scatter(layout::Scatter),
}

type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

impl Scene<'_> {
    /// In pixels.
    fn size(&self) -> (u32, u32) {
        match self {
            Self::Bars(bars) => bars.size(),
            Self::Scatter(scatter) => scatter.size(),
        }
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        area.fill(&theme.background())?;
        match self {
            Self::Bars(bars) => bars.draw(area, theme)?,
            Self::Scatter(scatter) => scatter.draw(area, theme)?,
        }
        area.present()
    }
}
