//! Pictures of the serving benchmark.

pub(super) mod capacity;
mod data;
pub(super) mod latency;
pub(super) mod steps;

pub use data::{Capacity, Panel, Run, ServeFigures, capacity};

use super::{Format, PlotError, Scene, Theme, write};
use std::path::Path;

/// A picture of the serving benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServePicture {
    /// PAT's figure: mean TTFT, mean TPOT and P99 TPOT against the rate, a column for each model and workload.
    Latency,
    /// The rate up to which the means are within a limit, as bars.
    Capacity,
    /// What a decode step's time is spent on.
    Steps,
}

impl ServePicture {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Latency, Self::Capacity, Self::Steps];

    /// As in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Capacity => "capacity",
            Self::Steps => "steps",
        }
    }
}

/// Draws a picture into a file, replacing it.
///
/// # Errors
/// See [`PlotError`]; of [`PlotError::Empty`] nothing is written.
pub fn draw(
    picture: ServePicture,
    figures: &ServeFigures,
    theme: Theme,
    format: Format,
    file: &Path,
) -> Result<(), PlotError> {
    let scene = match picture {
        ServePicture::Latency => Scene::Latency(latency::Latency::new(figures)?),
        ServePicture::Capacity => Scene::Capacity(capacity::Bars::new(figures)?),
        ServePicture::Steps => Scene::Steps(steps::Steps::new(figures)?),
    };
    write(&scene, theme, format, file)
}
