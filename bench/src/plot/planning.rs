//! Time of planning against the number of sequences.

use super::PlotError;
use super::data::Figures;
use super::layout::Scatter;

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let series = figures.series(|point, method| Some((point.sequences, *point.plan_us.get(method)?)));
    if series.is_empty() {
        return Err(PlotError::Empty("the files have no times of planning"));
    }
    Ok(Scatter {
        title: "Planning a decode step".into(),
        subtitle: format!("{}; once per step, for all layers; {}", figures.device, figures.source),
        x_label: "sequences in the batch".into(),
        y_label: "host time of planning, us",
        series,
        references: Vec::new(),
    })
}
