//! Time of planning against the number of sequences.

use super::PlotError;
use super::data::Figures;
use super::layout::Scatter;

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    // Nothing that takes no time or has no rows has a place on a logarithmic axis.
    let series = figures.series(|point, method| {
        let plan_us = *point.plan_us.get(method)?;
        (point.sequences > 0.0 && plan_us > 0.0).then_some((point.sequences, plan_us))
    });
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
