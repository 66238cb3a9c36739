//! Figure 10: groups of bars, relative to one method.

use super::ceiling::UNKNOWN;
use super::data::{FIGURE_10, Figures, Point};
use super::layout::{Header, MARGIN, Symbol};
use super::theme::{MAX_SERIES, Theme, font};
use super::{CEILING, Drawn, PlotError};
use crate::result::METHOD;
use crate::statistics::geometric_mean;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Bars end here and have their value written in them: a few slow ones would flatten all others.
const LARGEST: f64 = 4.0;

const WIDTH: u32 = 1280;
const PANEL_HEIGHT: i32 = 200;
/// Of a panel with its title and the trees' numbers.
const PANEL_STEP: i32 = PANEL_HEIGHT + 70;
const KEY_LINE: i32 = 24;
const LEFT: i32 = 56;

pub(super) struct Bars<'a> {
    figures: &'a Figures,
    baseline: String,
    /// In the order of the file; their numbers are what the panels show.
    trees: Vec<&'a str>,
    panels: Vec<Panel<'a>>,
}

struct Panel<'a> {
    shape: &'a str,
    /// For each tree, if it was measured with these heads.
    points: Vec<Option<&'a Point>>,
}

pub(super) fn default_baseline(figures: &Figures) -> String {
    if figures.methods.iter().any(|method| method == "pat") {
        return "pat".into();
    }
    let slowness = |method: &String| {
        let ratios = figures.points.iter().filter_map(|point| Some(point.cold_us.get(method)? / point.ceiling_us?));
        geometric_mean(ratios)
    };
    let slowest = figures.peers().max_by(|a, b| slowness(a).total_cmp(&slowness(b)));
    slowest.cloned().unwrap_or_else(|| CEILING.into())
}

impl<'a> Bars<'a> {
    pub(super) fn new(figures: &'a Figures, baseline: Option<&str>) -> Result<Self, PlotError> {
        let baseline = baseline.map_or_else(|| default_baseline(figures), str::to_owned);
        if baseline != CEILING {
            figures.require_method(&baseline)?;
        } else if figures.reached.is_none() {
            return Err(PlotError::Empty(UNKNOWN));
        }
        let points: Vec<&Point> = figures.points.iter().filter(|point| point.suite == FIGURE_10).collect();
        if points.is_empty() {
            return Err(PlotError::Empty("the files have no record of the suite figure10"));
        }
        let (mut trees, mut shapes): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
        for point in &points {
            if !trees.contains(&point.name.as_str()) {
                trees.push(&point.name);
            }
            if !shapes.contains(&point.shape.as_str()) {
                shapes.push(&point.shape);
            }
        }
        if shapes.len() > MAX_SERIES {
            return Err(PlotError::TooMany { count: shapes.len(), what: "head configurations" });
        }
        let panel = |shape| Panel {
            shape,
            points: trees
                .iter()
                .map(|tree| points.iter().find(|point| point.name == *tree && point.shape == shape).copied())
                .collect(),
        };
        let panels = shapes.into_iter().map(panel).collect();
        Ok(Self { figures, baseline, panels, trees })
    }

    fn key_lines(&self) -> i32 {
        self.trees.len().div_ceil(2) as i32
    }

    pub(super) fn size(&self) -> (u32, u32) {
        let panels = self.panels.len() as i32 * PANEL_STEP;
        let height = self.header().height(WIDTH as i32) + panels + 8 + self.key_lines() * KEY_LINE + MARGIN;
        (WIDTH, height as u32)
    }

    fn header(&self) -> Header {
        let all = || self.panels.iter().flat_map(|panel| panel.points.iter().flatten());
        let total = all().count();
        let label = |method: &String| match all().filter(|point| point.cold_us.contains_key(method)).count() {
            count if count == total => method.clone(),
            count => format!("{method} ({count} of {total})"),
        };
        let baseline = if self.baseline == CEILING { "the reachable time" } else { self.baseline.as_str() };
        Header {
            title: format!("PAT's Figure 10: time relative to {baseline}, lower is faster"),
            subtitle: format!("{}; {}", self.figures.device, self.figures.source),
            legend: self.figures.methods.iter().map(label).enumerate().collect(),
            symbol: Symbol::Square,
        }
    }

    fn relative(&self, point: &Point, method: &str) -> Option<f64> {
        let baseline_us = match self.baseline.as_str() {
            CEILING => point.ceiling_us?,
            baseline => *point.cold_us.get(baseline)?,
        };
        Some(point.cold_us.get(method)? / baseline_us).filter(|ratio| ratio.is_finite())
    }

    pub(super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let header = self.header();
        header.draw(area, theme)?;
        let mut top = header.height(WIDTH as i32);
        for panel in &self.panels {
            self.draw_panel(area, theme, panel, top)?;
            top += PANEL_STEP;
        }
        self.draw_key(area, theme, top + 8)
    }

    fn draw_panel<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        theme: Theme,
        panel: &Panel<'_>,
        top: i32,
    ) -> Drawn<DB> {
        let text = theme.foreground();
        let (left, right) = (LEFT, WIDTH as i32 - MARGIN);
        let (chart_top, bottom) = (top + 34, top + 34 + PANEL_HEIGHT);
        let y = |value: f64| bottom - (value / LARGEST * f64::from(PANEL_HEIGHT)) as i32;
        let mut title = format!("{} query/KV heads", panel.shape);
        if self.baseline != METHOD {
            let ratios = panel.points.iter().flatten().filter_map(|point| self.relative(point, METHOD));
            title += &format!("; {METHOD} in the geometric mean: {:.2}", geometric_mean(ratios));
        }
        area.draw_text(&title, &font(21).color(&text), (left, top))?;

        let end = Pos::new(HPos::Right, VPos::Center);
        for half in 0..=(2.0 * LARGEST) as i32 {
            let value = f64::from(half) / 2.0;
            let line = vec![(left, y(value)), (right, y(value))];
            area.draw(&PathElement::new(line, theme.grid().stroke_width(1)))?;
            if half % 2 == 0 {
                area.draw_text(&value.to_string(), &font(18).color(&text).pos(end), (left - 8, y(value)))?;
            }
        }
        let group_width = f64::from(right - left) / panel.points.len() as f64;
        let bar_width = group_width * 0.92 / self.figures.methods.len() as f64;
        for (tree, point) in panel.points.iter().enumerate() {
            let group_left = f64::from(left) + group_width * tree as f64;
            let center = (group_left + group_width / 2.0) as i32;
            let below = font(18).color(&text).pos(Pos::new(HPos::Center, VPos::Top));
            area.draw_text(&(tree + 1).to_string(), &below, (center, bottom + 6))?;
            let Some(point) = point else { continue };
            for (index, method) in self.figures.methods.iter().enumerate() {
                let Some(value) = self.relative(point, method) else { continue };
                let bar_left = group_left + group_width * 0.04 + bar_width * index as f64;
                let corners = [
                    (bar_left.round() as i32, y(value.min(LARGEST))),
                    ((bar_left + bar_width).round() as i32 - 1, bottom),
                ];
                area.draw(&Rectangle::new(corners, theme.series(index).filled()))?;
                if value > LARGEST {
                    let inside = font(14)
                        .color(&theme.on(theme.series(index)))
                        .transform(FontTransform::Rotate270)
                        .pos(Pos::new(HPos::Right, VPos::Center));
                    let middle = (bar_left + bar_width / 2.0).round() as i32 - 1;
                    // Those of neighbouring bars do not stand beside each other.
                    let down = 3 + index as i32 % 2 * 30;
                    area.draw_text(&format!("{value:.1}"), &inside, (middle, chart_top + down))?;
                }
            }
        }
        area.draw(&PathElement::new(vec![(left, y(1.0)), (right, y(1.0))], text.stroke_width(1)))?;
        area.draw(&PathElement::new(vec![(left, bottom), (right, bottom)], text.stroke_width(1)))
    }

    fn draw_key<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme, top: i32) -> Drawn<DB> {
        let style = font(18).color(&theme.foreground());
        for (index, tree) in self.trees.iter().enumerate() {
            let (column, line) = (index as i32 / self.key_lines(), index as i32 % self.key_lines());
            let place = (LEFT + column * (WIDTH as i32 - LEFT) / 2, top + line * KEY_LINE);
            area.draw_text(&format!("{}: {tree}", index + 1), &style, place)?;
        }
        Ok(())
    }
}
