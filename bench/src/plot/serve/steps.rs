//! What a step's time is spent on: for each series and workload a bar for steps of decode alone, and one for steps with a prompt.

use super::super::layout::{Header, MARGIN, Symbol};
use super::super::theme::{Theme, font};
use super::super::{Drawn, PlotError};
use super::data::{Panel, Run, ServeFigures};
use crate::serve::{LIMITS, StepTime};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::collections::BTreeSet;

const WIDTH: u32 = 1080;
const TITLE_HEIGHT: i32 = 40;
const BAR_STEP: i32 = 44;
/// Of the bars' labels.
const LEFT: i32 = 330;
/// Of the sum behind a bar.
const RIGHT: i32 = 90;

pub(in super::super) struct Steps<'a> {
    figures: &'a ServeFigures,
    /// In the order of the legend.
    parts: Vec<String>,
    groups: Vec<(&'a str, Vec<Bar<'a>>)>,
}

struct Bar<'a> {
    label: String,
    step: &'a StepTime,
}

impl Bar<'_> {
    fn total_ms(&self) -> f64 {
        self.step.ms.values().sum()
    }
}

/// The runs with a breakdown at the highest rate that all series of the panel serve within the tighter limit, or at least have a breakdown
/// at; each series' highest where there is none.
fn bars<'a>(panel: &'a Panel, series: &[String]) -> Vec<Bar<'a>> {
    let with: Vec<(usize, Vec<&Run>)> = panel
        .runs
        .iter()
        .map(|runs| runs.iter().filter(|run| run.step_time.is_some()).collect::<Vec<_>>())
        .enumerate()
        .filter(|(_, runs)| !runs.is_empty())
        .collect();
    let rates = || with.first().map(|(_, runs)| runs.as_slice()).unwrap_or_default().iter().map(|run| run.rate);
    let common = |enough: &dyn Fn(&Run) -> bool| {
        let in_all = |rate: &f64| with.iter().all(|(_, runs)| runs.iter().any(|run| run.rate == *rate && enough(run)));
        rates().filter(in_all).fold(None, |most: Option<f64>, rate| Some(most.map_or(rate, |most| most.max(rate))))
    };
    let common = common(&|run| run.within(LIMITS[1])).or_else(|| common(&|_| true));
    let bars = |(index, runs): &(usize, Vec<&'a Run>)| {
        let run = runs.iter().rfind(|run| common.is_none_or(|rate| run.rate == rate)).copied();
        let decode = run.and_then(|run| run.step_time.as_ref().map(|step| (run, step))).map(|(run, step)| Bar {
            label: format!("{}, {}/s: {:.0} requests", series[*index], run.rate, step.requests),
            step,
        });
        let mixed = run.and_then(|run| run.mixed_step_time.as_ref()).map(|step| Bar {
            label: format!("with a prompt: {:.0} tokens", step.tokens.unwrap_or(step.requests)),
            step,
        });
        decode.into_iter().chain(mixed)
    };
    with.iter().flat_map(bars).collect()
}

impl<'a> Steps<'a> {
    pub(super) fn new(figures: &'a ServeFigures) -> Result<Self, PlotError> {
        let groups: Vec<_> = figures
            .panels
            .iter()
            .map(|panel| (panel.title.as_str(), bars(panel, &figures.series)))
            .filter(|(_, bars)| !bars.is_empty())
            .collect();
        if groups.is_empty() {
            return Err(PlotError::Empty("the files have no run with a breakdown of its decode steps"));
        }
        let parts: BTreeSet<&String> =
            groups.iter().flat_map(|(_, bars)| bars).flat_map(|bar| bar.step.ms.keys()).collect();
        Ok(Self { figures, parts: parts.into_iter().cloned().collect(), groups })
    }

    pub(in super::super) fn size(&self) -> (u32, u32) {
        let bars: usize = self.groups.iter().map(|(_, bars)| bars.len()).sum();
        let height = self.header().height(WIDTH as i32)
            + self.groups.len() as i32 * TITLE_HEIGHT
            + bars as i32 * BAR_STEP
            + 2 * MARGIN;
        (WIDTH, height as u32)
    }

    fn header(&self) -> Header {
        Header {
            title: "A step: milliseconds by what the device does".into(),
            subtitle: self.figures.source.clone(),
            legend: self.parts.iter().cloned().enumerate().collect(),
            symbol: Symbol::Square,
        }
    }

    pub(in super::super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let header = self.header();
        header.draw(area, theme)?;
        let text = theme.foreground();
        let most = self.groups.iter().flat_map(|(_, bars)| bars).map(Bar::total_ms).fold(f64::MIN_POSITIVE, f64::max);
        let scale = f64::from(WIDTH as i32 - LEFT - RIGHT) / most;
        let mut top = header.height(WIDTH as i32);
        for (title, bars) in &self.groups {
            area.draw_text(title, &font(20).color(&text), (MARGIN, top + 8))?;
            top += TITLE_HEIGHT;
            for bar in bars {
                let middle = top + BAR_STEP / 2;
                let end = Pos::new(HPos::Right, VPos::Center);
                area.draw_text(&bar.label, &font(17).color(&text).pos(end), (LEFT - 10, middle))?;
                let mut from = 0.0;
                for (index, part) in self.parts.iter().enumerate() {
                    let Some(&ms) = bar.step.ms.get(part) else { continue };
                    let corners = [
                        (LEFT + (from * scale).round() as i32, top + 5),
                        (LEFT + ((from + ms) * scale).round() as i32, top + BAR_STEP - 5),
                    ];
                    area.draw(&Rectangle::new(corners, theme.series(index).filled()))?;
                    from += ms;
                }
                let begin = Pos::new(HPos::Left, VPos::Center);
                let sum = (LEFT + (from * scale).round() as i32 + 8, middle);
                area.draw_text(&format!("{from:.1} ms"), &font(17).color(&text).pos(begin), sum)?;
                top += BAR_STEP;
            }
        }
        Ok(())
    }
}
