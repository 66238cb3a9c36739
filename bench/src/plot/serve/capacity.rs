//! Capacity: bars by model, workload and limit.

use super::super::layout::{Header, MARGIN, Symbol};
use super::super::theme::{Theme, font};
use super::super::{Drawn, PlotError};
use super::data::{Capacity, ServeFigures, capacity};
use crate::serve::{LIMITS, Limit};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const CHART_HEIGHT: i32 = 340;
const LEAST_GROUP_WIDTH: u32 = 250;
/// Of a bar, so that what stands above it does not run into its neighbours' figures.
const BAR_WIDTH: u32 = 42;
/// Of a group's width.
const BARS_SHARE: f64 = 0.88;
const LEAST_WIDTH: u32 = 900;
/// Left of the chart.
const LEFT: i32 = 64;
/// Two lines below each group.
const LABELS_HEIGHT: i32 = 64;

pub(in super::super) struct Bars<'a> {
    figures: &'a ServeFigures,
    groups: Vec<Group<'a>>,
}

/// A panel at a limit.
struct Group<'a> {
    title: &'a str,
    limit: Limit,
    /// Of the series that have runs here, by number.
    capacities: Vec<(usize, Capacity)>,
}

impl<'a> Bars<'a> {
    pub(super) fn new(figures: &'a ServeFigures) -> Result<Self, PlotError> {
        let group = |panel: &'a super::Panel, limit| Group {
            title: &panel.title,
            limit,
            capacities: (panel.runs.iter().enumerate())
                .filter_map(|(series, runs)| Some((series, capacity(runs, limit)?)))
                .collect(),
        };
        let groups: Vec<_> = figures.panels.iter().flat_map(|panel| LIMITS.map(|limit| group(panel, limit))).collect();
        if groups.iter().all(|group| group.capacities.is_empty()) {
            return Err(PlotError::Empty("the files have no runs"));
        }
        Ok(Self { figures, groups })
    }

    /// Of the group that has most.
    fn most_bars(&self) -> usize {
        self.groups.iter().map(|group| group.capacities.len()).max().unwrap_or(0)
    }

    pub(in super::super) fn size(&self) -> (u32, u32) {
        let group = ((self.most_bars() as u32 * BAR_WIDTH) as f64 / BARS_SHARE) as u32;
        let width = (self.groups.len() as u32 * group.max(LEAST_GROUP_WIDTH) + LEFT as u32).max(LEAST_WIDTH);
        (width, (self.header().height(width as i32) + 30 + CHART_HEIGHT + LABELS_HEIGHT + MARGIN) as u32)
    }

    fn header(&self) -> Header {
        Header {
            title: "Capacity: requests per second within a mean latency".into(),
            subtitle: self.figures.source.clone(),
            legend: self.figures.series.iter().cloned().enumerate().collect(),
            symbol: Symbol::Square,
        }
    }

    pub(in super::super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let header = self.header();
        header.draw(area, theme)?;
        let (width, text) = (self.size().0 as i32, theme.foreground());
        let (left, right) = (LEFT, width - MARGIN);
        let top = header.height(width) + 30;
        let bottom = top + CHART_HEIGHT;
        let value = |capacity: &Capacity| match *capacity {
            Capacity::Reached(rate) | Capacity::AtLeast(rate) => rate,
            Capacity::Below(_) => 0.0,
        };
        let all = self.groups.iter().flat_map(|group| &group.capacities);
        let most = all.map(|(_, capacity)| value(capacity)).fold(1.0, f64::max);
        let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|step| most / step <= 8.0).unwrap_or(100.0);
        let y = |rate: f64| bottom - (rate / most * f64::from(CHART_HEIGHT)) as i32;
        let end = Pos::new(HPos::Right, VPos::Center);
        for index in 0..=(most / step) as u32 {
            let rate = f64::from(index) * step;
            let line = vec![(left, y(rate)), (right, y(rate))];
            area.draw(&PathElement::new(line, theme.grid().stroke_width(1)))?;
            area.draw_text(&rate.to_string(), &font(18).color(&text).pos(end), (left - 8, y(rate)))?;
        }
        let group_width = f64::from(right - left) / self.groups.len() as f64;
        let bar_width = group_width * BARS_SHARE / self.most_bars() as f64;
        for (index, group) in self.groups.iter().enumerate() {
            let group_left = f64::from(left) + group_width * index as f64;
            let centre = (group_left + group_width / 2.0) as i32;
            let below = font(16).color(&text).pos(Pos::new(HPos::Center, VPos::Top));
            area.draw_text(group.title, &below, (centre, bottom + 8))?;
            let Limit { ttft_ms, tpot_ms } = group.limit;
            area.draw_text(&format!("TTFT {} s, TPOT {tpot_ms} ms", ttft_ms / 1e3), &below, (centre, bottom + 32))?;
            let bars_left = group_left + (group_width - bar_width * group.capacities.len() as f64) / 2.0;
            for (place, (series, capacity)) in group.capacities.iter().enumerate() {
                let bar_left = bars_left + bar_width * place as f64;
                let (from, to) = (bar_left.round() as i32, (bar_left + bar_width).round() as i32 - 2);
                area.draw(&Rectangle::new([(from, y(value(capacity))), (to, bottom)], theme.series(*series).filled()))?;
                let label = match *capacity {
                    Capacity::Reached(rate) => format!("{rate:.1}"),
                    Capacity::AtLeast(rate) => format!("> {rate:.1}"),
                    Capacity::Below(rate) => format!("< {rate:.1}"),
                };
                let above = font(16).color(&text).pos(Pos::new(HPos::Center, VPos::Bottom));
                area.draw_text(&label, &above, ((from + to) / 2, y(value(capacity)) - 4))?;
            }
        }
        area.draw(&PathElement::new(vec![(left, bottom), (right, bottom)], text.stroke_width(1)))
    }
}
