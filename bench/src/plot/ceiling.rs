//! Time against the reachable time.

use super::PlotError;
use super::data::Figures;
use super::layout::{Reference, Scatter};
use crate::ceiling::Rates;

/// Why there is no such picture of a device.
pub(super) const UNKNOWN: &str = "nobody has measured what can be reached on the device of the files";

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let Some(Rates { bytes_per_us, flop_per_us }) = figures.reached else {
        return Err(PlotError::Empty(UNKNOWN));
    };
    let series = figures.series(|point, method| Some((point.ceiling_us?, *point.cold_us.get(method)?)));
    if series.is_empty() {
        return Err(PlotError::Empty("the files have no times"));
    }
    Ok(Scatter {
        title: "Time against what the device allows".into(),
        subtitle: format!("{}; one point for each configuration; {}", figures.device, figures.source),
        x_label: format!(
            "reachable time, us: max(bytes / {} TB/s, FLOP / {} TFLOP/s)",
            bytes_per_us / 1e6,
            flop_per_us / 1e6
        ),
        y_label: figures.time_label(),
        series,
        references: vec![Reference::Diagonal(1.0, "1x"), Reference::Diagonal(2.0, "2x")],
    })
}
