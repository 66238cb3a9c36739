//! Pictures of the serving benchmark.

pub(super) mod capacity;
mod data;
pub(super) mod latency;
pub(super) mod steps;

pub use data::{Capacity, Panel, Run, ServeFigures, capacity};

use super::{Format, PlotError, Scene, Theme, encode};

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

/// Draws a picture: the contents of a file of the format asked for.
///
/// # Errors
/// See [`PlotError`].
pub fn draw(picture: ServePicture, figures: &ServeFigures, theme: Theme, format: Format) -> Result<Vec<u8>, PlotError> {
    let scene = match picture {
        ServePicture::Latency => Scene::Latency(latency::Latency::new(figures)?),
        ServePicture::Capacity => Scene::Capacity(capacity::Bars::new(figures)?),
        ServePicture::Steps => Scene::Steps(steps::Steps::new(figures)?),
    };
    encode(&scene, theme, format)
}
