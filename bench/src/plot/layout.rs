//! What the pictures have in common: the lines above a chart, and charts of points on logarithmic axes.

use super::Drawn;
use super::theme::{Theme, font, marker};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Space around everything, in pixels.
pub(super) const MARGIN: i32 = 16;

const LEGEND_FONT: u32 = 20;
const LEGEND_LINE: i32 = 28;
const LEGEND_TOP: i32 = 88;
/// Of an entry beside its text.
const SYMBOL_WIDTH: i32 = 22;
const ENTRY_GAP: i32 = 20;

/// How an entry of a legend looks like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Symbol {
    Marker,
    Square,
}

/// Title, subtitle and legend of a picture.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) title: String,
    pub(super) subtitle: String,
    /// Which series' colour and marker, and its name.
    pub(super) legend: Vec<(usize, String)>,
    pub(super) symbol: Symbol,
}

impl Header {
    /// Where each entry of the legend begins, in as many lines as the width needs.
    fn places(&self, width: i32) -> Vec<(i32, i32)> {
        let (mut x, mut line) = (MARGIN, 0);
        let mut places = Vec::with_capacity(self.legend.len());
        for (_, label) in &self.legend {
            // A font that cannot measure a text is found when it is drawn.
            let text_width = font(LEGEND_FONT).box_size(label).map_or(0, |size| size.0 as i32);
            // An SVG's reader may have a wider font.
            let text_width = text_width * 6 / 5;
            let entry_width = SYMBOL_WIDTH + text_width;
            if x > MARGIN && x + entry_width > width - MARGIN {
                (x, line) = (MARGIN, line + 1);
            }
            places.push((x, LEGEND_TOP + line * LEGEND_LINE));
            x += entry_width + ENTRY_GAP;
        }
        places
    }

    /// In pixels.
    pub(super) fn height(&self, width: i32) -> i32 {
        self.places(width).last().map_or(LEGEND_TOP, |(_, y)| y + LEGEND_LINE + 8)
    }

    pub(super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let text = theme.foreground();
        area.draw_text(&self.title, &font(30).color(&text), (MARGIN, 12))?;
        area.draw_text(&self.subtitle, &font(18).color(&text.mix(0.8)), (MARGIN, 54))?;
        let style = font(LEGEND_FONT).color(&text).pos(Pos::new(HPos::Left, VPos::Center));
        let places = self.places(area.dim_in_pixel().0 as i32);
        for ((series, label), (x, y)) in self.legend.iter().zip(places) {
            let (color, middle) = (theme.series(*series), y + LEGEND_LINE / 2);
            match self.symbol {
                Symbol::Marker => marker(area, *series, (x + 8, middle), 6, color)?,
                Symbol::Square => {
                    area.draw(&Rectangle::new([(x, middle - 7), (x + 14, middle + 7)], color.filled()))?;
                }
            }
            area.draw_text(label, &style, (x + SYMBOL_WIDTH, middle))?;
        }
        Ok(())
    }
}

/// Points of one colour.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) label: String,
    /// Which colour and marker.
    pub(super) index: usize,
    pub(super) points: Vec<(f64, f64)>,
}

/// A line that points are read against.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reference {
    /// `y = factor * x`.
    Diagonal(f64, &'static str),
    /// `y = value`.
    Level(f64, &'static str),
}

/// A chart of points on two logarithmic axes.
#[derive(Clone, Debug)]
pub(super) struct Scatter {
    pub(super) title: String,
    pub(super) subtitle: String,
    pub(super) x_label: String,
    pub(super) y_label: &'static str,
    pub(super) series: Vec<Series>,
    pub(super) references: Vec<Reference>,
}

impl Scatter {
    pub(super) fn size(&self) -> (u32, u32) {
        (1040, 760)
    }

    pub(super) fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, theme: Theme) -> Drawn<DB> {
        let header = Header {
            title: self.title.clone(),
            subtitle: self.subtitle.clone(),
            legend: self.series.iter().map(|series| (series.index, series.label.clone())).collect(),
            symbol: Symbol::Marker,
        };
        header.draw(area, theme)?;
        let text = theme.foreground();
        let all = || self.series.iter().flat_map(|series| &series.points);
        let levels = self.references.iter().filter_map(|reference| match reference {
            Reference::Level(value, _) => Some(*value),
            Reference::Diagonal(..) => None,
        });
        let (x_begin, x_end) = range(all().map(|point| point.0));
        let (y_begin, y_end) = range(all().map(|point| point.1).chain(levels));
        let (_, below) = area.split_vertically(header.height(self.size().0 as i32));
        let mut chart = ChartBuilder::on(&below)
            .margin_left(MARGIN)
            .margin_right(MARGIN + 8)
            .margin_bottom(8)
            .x_label_area_size(62)
            .y_label_area_size(84)
            .build_cartesian_2d(
                (x_begin..x_end).log_scale().with_key_points(ticks(x_begin, x_end)),
                (y_begin..y_end).log_scale().with_key_points(ticks(y_begin, y_end)),
            )?;
        chart
            .configure_mesh()
            .axis_style(text)
            .bold_line_style(theme.grid())
            .max_light_lines(0)
            .label_style(font(18).color(&text))
            .axis_desc_style(font(20).color(&text))
            .x_desc(self.x_label.as_str())
            .y_desc(self.y_label)
            .x_label_formatter(&|value| value.to_string())
            .y_label_formatter(&|value| value.to_string())
            .draw()?;
        for reference in &self.references {
            let (line, label) = match *reference {
                Reference::Level(value, label) => ([(x_begin, value), (x_end, value)], label),
                Reference::Diagonal(factor, label) => {
                    let begin = x_begin.max(y_begin / factor);
                    let end = x_end.min(y_end / factor);
                    ([(begin, factor * begin), (end, factor * end)], label)
                }
            };
            chart.draw_series(std::iter::once(PathElement::new(line, text.mix(0.7).stroke_width(1))))?;
            // Where points are least likely: under the beginning of a diagonal, over the end of a level.
            let (end, horizontal, (dx, dy)) = match reference {
                Reference::Diagonal(..) => (line[0], HPos::Left, (24, -4)),
                Reference::Level(..) => (line[1], HPos::Right, (-6, -3)),
            };
            let style = font(18).color(&text).pos(Pos::new(horizontal, VPos::Bottom));
            let (x, y) = chart.backend_coord(&end);
            area.draw_text(label, &style, (x + dx, y + dy))?;
        }
        for series in self.series.iter().rev() {
            for point in &series.points {
                marker(area, series.index, chart.backend_coord(point), 4, theme.series(series.index))?;
            }
        }
        Ok(())
    }
}

/// From somewhat below the least value to somewhat above the largest, of positive values.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (least, most) = values.fold((f64::INFINITY, 0f64), |(least, most), value| (least.min(value), most.max(value)));
    (least / 1.25, most * 1.25)
}

/// Round numbers of a range, the closer the shorter it is.
fn ticks(begin: f64, end: f64) -> Vec<f64> {
    let decades = (end / begin).log10();
    let steps: &[f64] = match decades {
        ..1.2 => &[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
        ..4.6 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let exponents = begin.log10().floor() as i32..=end.log10().ceil() as i32;
    // A step times a negative power of ten would not be the nearest number to what is meant.
    let value = |exponent: i32, step: f64| match exponent {
        0.. => step * 10f64.powi(exponent),
        _ => step / 10f64.powi(-exponent),
    };
    exponents
        .flat_map(|exponent| steps.iter().map(move |&step| value(exponent, step)))
        .filter(|tick| (begin..=end).contains(tick))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_within_the_range() {
        assert_eq!(ticks(0.7, 3.4), [0.8, 1.0, 1.5, 2.0, 2.5, 3.0]);
        assert_eq!(ticks(8.0, 1300.0), [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]);
        assert_eq!(ticks(0.05, 9e4), [0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0]);
    }

    #[test]
    fn a_legend_takes_the_lines_that_it_needs() {
        let header = |count| Header {
            title: String::new(),
            subtitle: String::new(),
            legend: (0..count).map(|index| (index, "a method with a name".into())).collect(),
            symbol: Symbol::Square,
        };
        let one_line = header(1).height(960);
        assert_eq!(header(3).height(960), one_line);
        assert_eq!(header(5).height(960), one_line + LEGEND_LINE);
    }
}
