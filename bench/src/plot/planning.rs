//! Time of planning against the number of sequences.

use super::PlotError;
use super::data::{Figures, Point};
use super::layout::{Scatter, Series};

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let series: Vec<Series> = figures
        .methods
        .iter()
        .enumerate()
        .map(|(index, method)| {
            let point = |point: &Point| Some((point.sequences, *point.plan_us.get(method)?));
            // Nothing that takes no time or has no rows has a place on a logarithmic axis.
            let points = figures.points.iter().filter_map(point).filter(|point| point.0 > 0.0 && point.1 > 0.0);
            Series { label: method.clone(), index, points: points.collect() }
        })
        .filter(|series| !series.points.is_empty())
        .collect();
    if series.is_empty() {
        return Err(PlotError::Empty("the files have no times of planning"));
    }
    Ok(Scatter {
        title: "Planning a decode step".into(),
        subtitle: format!("{}; once per step, for all layers; {}", figures.device, figures.source),
        x_label: "sequences in the batch",
        y_label: "host time of planning, us",
        series,
        references: Vec::new(),
    })
}
