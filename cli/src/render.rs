//! Text and pictures for people.

use crate::run::Report;
use comfy_table::{Table, presets};
use pat_rs::DecodeBatch;
use pat_rs::plan::forest::{Forest, Node};
use pat_rs::plan::readers;
use pat_rs::plan::tiling::RowTile;
use std::fmt::Write;

/// A run as a table.
pub(crate) fn report(report: &Report) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let plan = &report.plan;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut row = |name: &str, value: String| {
        table.add_row([name, &value]);
    };
    row("batch", report.batch.clone());
    row("device", format!("{} ({})", report.device, report.device_reason));
    row(
        "sequences",
        format!("{} ({} merged, at most {} partials each)", plan.sequences, plan.merge_rows, plan.max_splits),
    );
    row("sharing factor", format!("{:.2}", plan.sharing_factor));
    row(
        "KV bytes",
        format!(
            "{} planned, {} unique, {} without sharing",
            mib(plan.planned_kv_bytes),
            mib(plan.unique_kv_bytes),
            mib(plan.flat_kv_bytes)
        ),
    );
    for variant in &plan.variants {
        row(&format!("items {}", variant.variant), variant.items.to_string());
    }
    row("plan", format!("{:.0} us, {} bytes to upload", report.plan_us, plan.upload_bytes));
    row("execution", format!("{:.1} us, {:.1} GB/s of unique bytes", report.execution_us, report.bandwidth_gb_s));
    match &report.numerics {
        None => row("verification", "none (--check none)".into()),
        Some(n) => {
            let verdict = if n.passed { "passed" } else { "FAILED" };
            row("verification", format!("{verdict}: {} rows ({})", n.rows, n.sample));
            row(
                "error",
                format!(
                    "relative L2 {:.2e} (plain f32 implementation: {:.2e}), largest {:.2e} ({:.2e})",
                    n.relative_l2_error, n.plain_relative_l2_error, n.max_abs_error, n.plain_max_abs_error
                ),
            );
            if let Some(failure) = &n.first_failure {
                row("first failure", failure.clone());
            }
        }
    }
    table.to_string()
}

/// One node of a forest for drawing: a shared run, or a summary of the private runs below one.
struct Line {
    depth: usize,
    text: String,
}

/// The forest as an indented tree. Private runs are summed up per node; long lists of equal siblings are cut.
pub(crate) fn forest(forest: &Forest, tiles: &[RowTile], batch: &DecodeBatch<'_>) -> String {
    let mut text = String::new();
    for line in lines(forest, tiles, batch) {
        let _ = writeln!(text, "{}{}", "  ".repeat(line.depth), line.text);
    }
    text
}

/// `1 thing`, `2 things`.
fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// Siblings drawn below one node before the rest is counted only.
const SIBLINGS: usize = 12;

/// Tokens of a sequence that no other shares, and where they begin.
fn private_run(forest: &Forest, batch: &DecodeBatch<'_>, sequence: u32) -> (u32, u32) {
    let shared_pages = forest.innermost(sequence).map_or(0, |node| forest.nodes()[node as usize].page_end);
    let begin = shared_pages * batch.page_size();
    (begin, batch.length(sequence as usize) - begin)
}

fn lines(forest: &Forest, tiles: &[RowTile], batch: &DecodeBatch<'_>) -> Vec<Line> {
    let mut lines = Vec::new();
    let children = |parent: Option<u32>| {
        let of_parent = move |(_, node): &(usize, &Node)| node.parent == parent;
        forest.nodes().iter().enumerate().filter(of_parent).map(|(index, _)| index as u32).collect::<Vec<_>>()
    };
    let mut stack: Vec<(Option<u32>, usize)> = vec![(None, 0)];
    while let Some((parent, depth)) = stack.pop() {
        if let Some(index) = parent {
            let node = &forest.nodes()[index as usize];
            let (tokens, sequences) = (node.page_count() * batch.page_size(), node.sequence_count());
            let reads = match readers(node, tiles) {
                1 => "read once".into(),
                several => format!("read {several} times"),
            };
            let text = format!("[{tokens} tokens x {sequences} sequences] {reads}");
            lines.push(Line { depth, text });
        }
        let below = depth + usize::from(parent.is_some());
        let ending = forest.order().iter().filter(|&&sequence| forest.innermost(sequence) == parent);
        let (mut runs, mut without, mut least, mut most) = (0, 0, u32::MAX, 0);
        for &sequence in ending {
            match private_run(forest, batch, sequence).1 {
                0 => without += 1,
                tokens => (runs, least, most) = (runs + 1, least.min(tokens), most.max(tokens)),
            }
        }
        if runs > 0 {
            let tokens = if least == most { format!("{least}") } else { format!("{least} to {most}") };
            lines.push(Line { depth: below, text: format!("{} of {tokens} tokens", count(runs, "private run")) });
        }
        if without > 0 {
            lines.push(Line {
                depth: below,
                text: match without {
                    1 => "1 sequence ends here".into(),
                    several => format!("{several} sequences end here"),
                },
            });
        }
        let children = children(parent);
        if children.len() > SIBLINGS {
            lines.push(Line {
                depth: below,
                text: format!("and {} more shared runs like these:", children.len() - SIBLINGS),
            });
        }
        stack.extend(children.into_iter().take(SIBLINGS).rev().map(|child| (Some(child), below)));
    }
    lines
}

/// The forest as a picture: every shared run a bar, as long as its tokens and as high as its sequences; private runs of a
/// node one bar. Lines separate the sequences that one CTA serves together: within them a run is read once.
pub(crate) fn svg(forest: &Forest, tiles: &[RowTile], batch: &DecodeBatch<'_>, title: &str) -> String {
    const WIDTH: f64 = 1000.0;
    const HEIGHT: f64 = 560.0;
    const LEFT: f64 = 20.0;
    const TOP: f64 = 70.0;
    const SHARED: &str = "#0072b2";
    const BOUNDARY: &str = "#d55e00";
    const PRIVATE: &str = "#999999";
    let rows = forest.order().len().max(1) as f64;
    let depth = forest.order().iter().map(|&sequence| batch.length(sequence as usize)).max().unwrap_or(1).max(1);
    let (sx, sy) = ((WIDTH - 2.0 * LEFT) / f64::from(depth), (HEIGHT - TOP - 50.0) / rows);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\" fill=\"#222\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"46\" fill=\"#444\">across: tokens (0 to {depth}); down: {} sequences; labels: tokens x sequences. \
         <tspan fill=\"{SHARED}\">\u{25a0} shared</tspan> <tspan fill=\"{PRIVATE}\">\u{25a0} private</tspan> \
         <tspan fill=\"{BOUNDARY}\">\u{2014} between row tiles: each reads a run once</tspan></text>\n",
        escape(title),
        forest.order().len()
    );
    // Written last, on a ground of their own: boundaries may run through them.
    let mut labels = String::new();
    let mut bar = |begin_token: u32,
                   tokens: u32,
                   order_begin: u32,
                   order_end: u32,
                   fill: &str,
                   label: Option<String>| {
        let (x, y) = (LEFT + f64::from(begin_token) * sx, TOP + f64::from(order_begin) * sy);
        let (w, h) = (f64::from(tokens) * sx, f64::from(order_end - order_begin) * sy);
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"{fill}\" stroke=\"#fff\" stroke-width=\"0.4\"/>",
            w.max(0.5),
            h.max(0.5)
        );
        if let Some(label) = label
            && w > 70.0
            && h > 16.0
        {
            let (x, y) = (x + 5.0, y + h.min(40.0) / 2.0 + 5.0);
            let _ = writeln!(
                labels,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"15\" fill=\"{fill}\"/>\n\
                 <text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"#fff\">{label}</text>",
                x - 2.0,
                y - 11.5,
                label.len() as f64 * 7.5 + 4.0
            );
        }
    };
    for node in forest.nodes() {
        let tokens = node.page_count() * batch.page_size();
        let label = format!("{tokens} x {}", node.sequence_count());
        bar(node.page_begin * batch.page_size(), tokens, node.order_begin, node.order_end, SHARED, Some(label));
    }
    for (position, &sequence) in (0u32..).zip(forest.order()) {
        let (begin, tokens) = private_run(forest, batch, sequence);
        if tokens > 0 {
            bar(begin, tokens, position, position + 1, PRIVATE, None);
        }
    }
    for tile in tiles.iter().skip(1) {
        let y = TOP + f64::from(tile.order_begin) * sy;
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.2}\" x2=\"{:.2}\" y2=\"{y:.2}\" stroke=\"{BOUNDARY}\" stroke-width=\"1.5\"/>",
            WIDTH - LEFT
        );
    }
    svg.push_str(&labels);
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
