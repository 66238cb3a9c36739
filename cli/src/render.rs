//! Text for people.

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
    row("model", report.model.model());
    row("pool", report.model.pool());
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
pub(crate) fn private_run(forest: &Forest, batch: &DecodeBatch<'_>, sequence: u32) -> (u32, u32) {
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
