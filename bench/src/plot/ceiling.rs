//! Time against the reachable time.

use super::PlotError;
use super::data::Figures;
use super::layout::{Reference, Scatter, Series};

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let series: Vec<Series> = figures
        .methods
        .iter()
        .enumerate()
        .map(|(index, method)| {
            let point = |point: &super::Point| Some((point.ceiling_us, *point.cold_us.get(method)?));
            Series { label: method.clone(), index, points: figures.points.iter().filter_map(point).collect() }
        })
        .collect();
    if series.iter().all(|series| series.points.is_empty()) {
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
