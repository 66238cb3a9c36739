//! The forest of a batch as an indented tree.

use pat_rs::DecodeBatch;
use pat_rs::plan::forest::{Forest, Node};
use pat_rs::plan::readers;
use pat_rs::plan::tiling::RowTile;
use std::fmt::Write;

/// One node of a forest for drawing: a shared run, or a summary of the private runs below one.
struct Line {
    depth: usize,
    text: String,
}

/// The forest as an indented tree. Private runs are summed up per node; long lists of equal siblings are cut.
pub fn forest(forest: &Forest, tiles: &[RowTile], batch: &DecodeBatch<'_>) -> String {
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
