//! The forest of a batch as an SVG picture, for light and for dark pages.

use crate::forest_text::private_run;
use pat_rs::DecodeBatch;
use pat_rs::plan::forest::Forest;
use pat_rs::plan::tiling::RowTile;
use std::fmt::Write;

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 600.0;
/// Space for the numbers of sequences.
const LEFT: f64 = 56.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 78.0;
/// Space for the numbers of tokens.
const BOTTOM: f64 = 56.0;

/// Rows lower than this are not drawn one by one: the ends of their sequences are one outline for each node.
const LEAST_ROW_HEIGHT: f64 = 3.0;

/// Boundaries of row tiles that are closer are marked at the edge only, since lines across would hide the bars.
const LEAST_TILE_HEIGHT: f64 = 12.0;

/// The reader's page decides on the colours of everything but the bars, which are readable on both.
const STYLE: &str = "<style>\
.ground{fill:#ffffff}.ink{fill:#1f2328}.grid{stroke:#d8dee4}.edge{stroke:#ffffff}\
.shared{fill:#0072b2}.private{fill:#8b949e}.tile{stroke:#d55e00}.tile-text{fill:#d55e00}\
@media (prefers-color-scheme: dark){\
.ground{fill:#0d1117}.ink{fill:#e6edf3}.grid{stroke:#30363d}.edge{stroke:#0d1117}}\
</style>";

/// Every shared run is a bar, as long as its tokens and as high as its sequences; what each sequence has for itself lies
/// behind it. Lines separate the sequences that one CTA serves together: within them a run is read once.
pub fn svg(forest: &Forest, tiles: &[RowTile], batch: &DecodeBatch<'_>, title: &str) -> String {
    let sequences = forest.order().len();
    let tokens = forest.order().iter().map(|&sequence| batch.length(sequence as usize)).max().unwrap_or(0).max(1);
    let mut picture = Picture {
        tokens,
        x_scale: (WIDTH - LEFT - RIGHT) / f64::from(tokens),
        y_scale: (HEIGHT - TOP - BOTTOM) / sequences.max(1) as f64,
        svg: String::new(),
        labels: String::new(),
    };
    picture.head(title, sequences, tiles.len());
    picture.axes(sequences);
    for node in forest.nodes() {
        let tokens = node.page_count() * batch.page_size();
        let label = format!("{tokens} x {}", node.sequence_count());
        let begin = node.page_begin * batch.page_size();
        picture.shared(begin, tokens, (node.order_begin, node.order_end), &label);
    }
    picture.private_runs(forest, batch);
    picture.boundaries(tiles);
    let Picture { mut svg, labels, .. } = picture;
    svg.push_str(&labels);
    svg.push_str("</svg>\n");
    svg
}

struct Picture {
    /// Of the longest sequence.
    tokens: u32,
    /// Pixels per token.
    x_scale: f64,
    /// Pixels per sequence.
    y_scale: f64,
    svg: String,
    /// Written last, on a ground of their own: boundaries may run through them.
    labels: String,
}

impl Picture {
    fn x(&self, token: u32) -> f64 {
        LEFT + f64::from(token) * self.x_scale
    }

    fn y(&self, position: u32) -> f64 {
        TOP + f64::from(position) * self.y_scale
    }

    fn head(&mut self, title: &str, sequences: usize, tiles: usize) {
        let _ = writeln!(
            self.svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n{STYLE}\n<rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n\
             <text class=\"ink\" x=\"20\" y=\"26\" font-size=\"16\">{}</text>\n\
             <text class=\"ink\" x=\"20\" y=\"50\">{sequences} sequences in {tiles} row tiles; labels: tokens x sequences. \
             <tspan class=\"shared\">\u{25a0}</tspan> shared <tspan class=\"private\">\u{25a0}</tspan> private \
             <tspan class=\"tile-text\">\u{2014}</tspan> between row tiles: each reads a run once</text>",
            escape(title)
        );
    }

    fn axes(&mut self, sequences: usize) {
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for token in ticks(self.tokens) {
            let x = self.x(token);
            let _ = writeln!(
                self.svg,
                "<line class=\"grid\" x1=\"{x:.2}\" y1=\"{TOP}\" x2=\"{x:.2}\" y2=\"{:.2}\"/>\n\
                 <text class=\"ink\" x=\"{x:.2}\" y=\"{:.2}\" text-anchor=\"middle\">{token}</text>",
                bottom + 5.0,
                bottom + 20.0
            );
        }
        for position in ticks(sequences as u32) {
            let y = self.y(position);
            let _ = writeln!(
                self.svg,
                "<line class=\"grid\" x1=\"{:.2}\" y1=\"{y:.2}\" x2=\"{right}\" y2=\"{y:.2}\"/>\n\
                 <text class=\"ink\" x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"end\">{position}</text>",
                LEFT - 5.0,
                LEFT - 9.0,
                y + 4.5
            );
        }
        let _ = writeln!(
            self.svg,
            "<text class=\"ink\" x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"middle\">tokens</text>\n\
             <text class=\"ink\" x=\"16\" y=\"{:.2}\" text-anchor=\"middle\" transform=\"rotate(-90 16 {:.2})\">sequences</text>",
            (LEFT + right) / 2.0,
            bottom + 42.0,
            (TOP + bottom) / 2.0,
            (TOP + bottom) / 2.0
        );
    }

    fn shared(&mut self, begin: u32, tokens: u32, (order_begin, order_end): (u32, u32), label: &str) {
        let (x, y) = (self.x(begin), self.y(order_begin));
        let (width, height) = (f64::from(tokens) * self.x_scale, f64::from(order_end - order_begin) * self.y_scale);
        self.bar("shared", (x, y), (width, height));
        if width > 70.0 && height > 16.0 {
            let (x, y) = (x + 5.0, y + height.min(40.0) / 2.0 + 5.0);
            let _ = writeln!(
                self.labels,
                "<rect class=\"shared\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"15\"/>\n\
                 <text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"#fff\">{label}</text>",
                x - 2.0,
                y - 11.5,
                label.len() as f64 * 7.5 + 4.0
            );
        }
    }

    fn bar(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64)) {
        let _ = writeln!(
            self.svg,
            "<rect class=\"{class} edge\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{:.2}\" stroke-width=\"0.4\"/>",
            width.max(0.5),
            height.max(0.5)
        );
    }

    /// What each sequence has for itself: a bar each, or where these would be too low, one outline for the neighbouring
    /// sequences that end in the same node.
    fn private_runs(&mut self, forest: &Forest, batch: &DecodeBatch<'_>) {
        let runs: Vec<(u32, u32)> =
            forest.order().iter().map(|&sequence| private_run(forest, batch, sequence)).collect();
        if self.y_scale >= LEAST_ROW_HEIGHT {
            for (position, (begin, tokens)) in (0u32..).zip(runs) {
                if tokens > 0 {
                    let at = (self.x(begin), self.y(position));
                    self.bar("private", at, (f64::from(tokens) * self.x_scale, self.y_scale));
                }
            }
            return;
        }
        let nodes: Vec<_> = forest.order().iter().map(|&sequence| forest.innermost(sequence)).collect();
        let mut first = 0u32;
        for group in nodes.chunk_by(|a, b| a == b) {
            let end = first + group.len() as u32;
            let rows = &runs[first as usize..end as usize];
            if rows.iter().any(|&(_, tokens)| tokens > 0) {
                // All of them begin where their node ends.
                let left = self.x(rows[0].0);
                let mut outline = format!("{left:.2},{:.2}", self.y(first));
                for (position, &(begin, tokens)) in (first..).zip(rows) {
                    let x = self.x(begin + tokens);
                    let (top, bottom) = (self.y(position), self.y(position + 1));
                    let _ = write!(outline, " {x:.2},{top:.2} {x:.2},{bottom:.2}");
                }
                let _ = write!(outline, " {left:.2},{:.2}", self.y(end));
                let _ = writeln!(self.svg, "<polygon class=\"private\" points=\"{outline}\"/>");
            }
            first = end;
        }
    }

    fn boundaries(&mut self, tiles: &[RowTile]) {
        let spacing = (HEIGHT - TOP - BOTTOM) / tiles.len().max(1) as f64;
        let end = if spacing >= LEAST_TILE_HEIGHT { WIDTH - RIGHT } else { LEFT + 8.0 };
        // Of fixed chunks the first ones.
        for tile in tiles.iter().skip(1).filter(|tile| tile.page_begin == 0) {
            let y = self.y(tile.order_begin);
            let _ = writeln!(
                self.svg,
                "<line class=\"tile\" x1=\"{LEFT}\" y1=\"{y:.2}\" x2=\"{end}\" y2=\"{y:.2}\" stroke-width=\"1.5\"/>"
            );
        }
    }
}

/// Round numbers from 0 to `most`, at most nine.
fn ticks(most: u32) -> Vec<u32> {
    let steps = (0..10u32).flat_map(|exponent| [1, 2, 5].map(|digit| digit * 10u64.pow(exponent)));
    let step = steps.into_iter().find(|step| u64::from(most) / step <= 8).unwrap_or(u64::from(most).max(1));
    (0..=u64::from(most) / step).map(|index| (index * step) as u32).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_few_and_round() {
        assert_eq!(ticks(0), [0]);
        assert_eq!(ticks(3), [0, 1, 2, 3]);
        assert_eq!(ticks(336), [0, 50, 100, 150, 200, 250, 300]);
        assert_eq!(ticks(131_072), [0, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000]);
        assert_eq!(ticks(u32::MAX).len(), 9);
    }
}
