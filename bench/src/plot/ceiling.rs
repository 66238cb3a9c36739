//! Time against the reachable time.

use super::PlotError;
use super::data::Figures;
use super::layout::{Reference, Scatter};

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let series = figures.series(|point, method| Some((point.ceiling_us, *point.cold_us.get(method)?)));
    if series.is_empty() {
        return Err(PlotError::Empty("the files have no times"));
    }
    Ok(Scatter {
        title: "Time against what the device allows".into(),
        subtitle: format!("{}; one point for each configuration; {}", figures.device, figures.source),
        x_label: "reachable time, us: max(bytes / 4.6 TB/s, FLOP / 650 TFLOP/s)",
        y_label: figures.time_label(),
        series,
        references: vec![Reference::Diagonal(1.0, "1x"), Reference::Diagonal(2.0, "2x")],
    })
}
