//! Speed-up against the sharing factor.

use super::PlotError;
use super::ceiling;
use super::data::{Figures, Point, has_place};
use super::layout::{Reference, Scatter, Series};
use super::theme::MAX_SERIES;
use crate::result::METHOD;

pub(super) fn scatter(figures: &Figures) -> Result<Scatter, PlotError> {
    let has_peers = figures.peers().next().is_some();
    let speed_up = |point: &Point| {
        let other = if has_peers { point.best_peer_us()? } else { point.unshared_ceiling_us? };
        Some((point.sharing_factor, other / point.cold_us.get(METHOD)?)).filter(has_place)
    };
    let mut series: Vec<Series> = Vec::new();
    for point in &figures.points {
        let Some(coordinates) = speed_up(point) else { continue };
        let label = format!("{} heads", point.shape);
        match series.iter_mut().find(|series| series.label == label) {
            Some(series) => series.points.push(coordinates),
            None => series.push(Series { label, index: series.len(), points: vec![coordinates] }),
        }
    }
    if series.is_empty() && !has_peers && figures.reached.is_none() {
        return Err(PlotError::Empty(ceiling::UNKNOWN));
    }
    if series.is_empty() {
        return Err(PlotError::Empty(
            "the files have no configuration that pat-rs and another method were measured on",
        ));
    }
    if series.len() > MAX_SERIES {
        return Err(PlotError::TooMany { count: series.len(), what: "head configurations" });
    }
    let (title, y_label, level) = if has_peers {
        ("Speed-up over the best peer of each configuration", "time of the best peer / time of pat-rs", "as fast")
    } else {
        (
            "Speed-up over reading every sequence by itself",
            "reachable time without sharing / time of pat-rs",
            "the bound without sharing",
        )
    };
    Ok(Scatter {
        title: title.into(),
        subtitle: format!("{}; {}", figures.device, figures.source),
        x_label: "sharing factor: KV bytes without sharing / unique KV bytes".into(),
        y_label,
        series,
        references: vec![Reference::Level(1.0, level)],
    })
}
