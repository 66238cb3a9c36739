//! Latency against the rate: three rows of panels, a column for each model and workload.

use super::super::layout::{Header, MARGIN, Symbol, range, ticks};
use super::super::theme::{Theme, font, marker};
use super::super::{Drawn, PlotError};
use super::data::{Panel, Run, ServeFigures};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const PANEL_WIDTH: u32 = 420;
const PANEL_HEIGHT: u32 = 250;
const TITLE_HEIGHT: u32 = 34;
/// Of the picture, so that the title fits.
const LEAST_WIDTH: u32 = 900;

/// A row of panels.
struct Row {
    label: &'static str,
    value: fn(&Run) -> Option<f64>,
    /// Limits of service, in the row's unit.
    limits: &'static [f64],
}

const ROWS: [Row; 3] = [
    Row { label: "mean TTFT, s", value: |run| run.mean_ttft_ms.map(|ms| ms / 1e3), limits: &[1.0] },
    Row { label: "mean TPOT, ms", value: |run| run.mean_tpot_ms, limits: &[50.0, 100.0] },
    Row { label: "P99 TPOT, ms", value: |run| run.p99_tpot_ms, limits: &[] },
];

pub(in super::super) struct Latency<'a> {
    figures: &'a ServeFigures,
}

/// Good runs alone: of others the slow requests are missing.
fn points(runs: &[Run], row: &Row) -> Vec<(f64, f64)> {
    runs.iter().filter(|run| run.good).filter_map(|run| Some((run.rate, (row.value)(run)?))).collect()
}

impl<'a> Latency<'a> {
    pub(super) fn new(figures: &'a ServeFigures) -> Result<Self, PlotError> {
        let drawn = figures.panels.iter().flat_map(|panel| &panel.runs).any(|runs| !points(runs, &ROWS[0]).is_empty());
        if drawn { Ok(Self { figures }) } else { Err(PlotError::Empty("the files have no run without failures")) }
    }

    pub(in super::super) fn size(&self) -> (u32, u32) {
        let width = (self.figures.panels.len() as u32 * PANEL_WIDTH).max(LEAST_WIDTH);
        let header = self.header().height(width as i32) as u32;
        (width, header + TITLE_HEIGHT + ROWS.len() as u32 * PANEL_HEIGHT + MARGIN as u32)
    }

    fn header(&self) -> Header {
        let mut subtitle = self.figures.source.clone();
        match self.figures.with_failures() {
            0 => {}
            1 => subtitle += "; 1 run with failures is left out",
            count => subtitle += &format!("; {count} runs with failures are left out"),
        }
        Header {
            title: "Serving: latency against requests per second".into(),
            subtitle,
            legend: self.figures.series.iter().cloned().enumerate().collect(),
            symbol: Symbol::Marker,
        }
    }

    pub(in super::super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let header = self.header();
        header.draw(area, theme)?;
        let width = self.size().0;
        let (_, below) = area.split_vertically(header.height(width as i32));
        let columns = below.split_evenly((1, self.figures.panels.len()));
        for (column, panel) in columns.iter().zip(&self.figures.panels) {
            let (title, charts) = column.split_vertically(TITLE_HEIGHT);
            let centre = Pos::new(HPos::Center, VPos::Top);
            let style = font(21).color(&theme.foreground()).pos(centre);
            title.draw_text(&panel.title, &style, (column.dim_in_pixel().0 as i32 / 2, 4))?;
            for (index, row) in ROWS.iter().enumerate() {
                let top = index as u32 * PANEL_HEIGHT;
                let chart = charts.margin(top, 0, 0, 0).split_vertically(PANEL_HEIGHT).0;
                draw_panel((area, &chart), theme, panel, row, index + 1 == ROWS.len())?;
            }
        }
        Ok(())
    }
}

/// Within `area`; `picture` is the whole one, whose pixels a chart's coordinates are.
fn draw_panel<DB: DrawingBackend>(
    (picture, area): (&DrawingArea<DB, Shift>, &DrawingArea<DB, Shift>),
    theme: Theme,
    panel: &Panel,
    row: &Row,
    is_last: bool,
) -> Drawn<DB> {
    let text = theme.foreground();
    let series: Vec<_> = panel.runs.iter().map(|runs| points(runs, row)).collect();
    let all = || series.iter().flatten();
    if all().next().is_none() {
        return Ok(());
    }
    // The rates of all rows, so that a column has one axis.
    let rates = || panel.runs.iter().flatten().filter(|run| run.good).map(|run| run.rate);
    let (least, most) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
    let space = ((most - least) * 0.06).max(0.25);
    let (y_begin, y_end) = range(all().map(|point| point.1).chain(row.limits.iter().copied()));
    let mut chart = ChartBuilder::on(area)
        .margin_left(MARGIN / 2)
        .margin_right(MARGIN)
        .margin_top(6)
        .x_label_area_size(if is_last { 54 } else { 28 })
        .y_label_area_size(74)
        .build_cartesian_2d(
            least - space..most + space,
            (y_begin..y_end).log_scale().with_key_points(ticks(y_begin, y_end)),
        )?;
    chart
        .configure_mesh()
        .axis_style(text)
        .bold_line_style(theme.grid())
        .max_light_lines(0)
        .x_labels(8)
        .label_style(font(16).color(&text))
        .axis_desc_style(font(17).color(&text))
        .x_desc(if is_last { "requests per second" } else { "" })
        .y_desc(row.label)
        // Ticks are sums of steps, 8.200000000000001 among them.
        .x_label_formatter(&|rate| ((rate * 100.0).round() / 100.0).to_string())
        .y_label_formatter(&|value| value.to_string())
        .draw()?;
    for &limit in row.limits {
        let line = vec![(least - space, limit), (most + space, limit)];
        chart.draw_series(DashedLineSeries::new(line, 6, 4, text.mix(0.6).stroke_width(1)))?;
    }
    // The first series lies on top.
    for (index, points) in series.iter().enumerate().rev() {
        let color = theme.series(index);
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        for point in points {
            marker(picture, index, chart.backend_coord(point), 4, color)?;
        }
    }
    Ok(())
}
