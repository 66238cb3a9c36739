//! Ragged prefix trees by rule: how many nodes, how many tokens, what is below. One small notation covers prompts with
//! questions, rollouts, agents, trees of thoughts, chains of prefixes, and sequences that share nothing.
//!
//! Each node is a run of tokens that everything below it begins with. Only whole pages are shared, as prefix caches do:
//! where a node ends inside a page, whatever continues it has its own copy of that page.

use crate::OwnedBatch;
use pat_rs::DecodeBatch;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Most sequences of a batch that a specification may give.
pub const MAX_SEQUENCES: usize = 1 << 16;
/// Most pages of a pool, and most levels of a tree, that a specification may give.
const MAX_PAGES: u32 = 1 << 26;
const MAX_LEVELS: u32 = 1 << 10;
/// Most entries of all block tables together: 256 MiB.
const MAX_TABLE_ENTRIES: usize = 1 << 26;

/// A node and what is below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    /// How many such nodes there are, below each node above; 1 if not given.
    #[serde(default = "once")]
    pub count: Draw,
    /// Tokens of each.
    pub tokens: Draw,
    /// Levels: with 3, below each node are again `count` of this kind, and below those again; 1 if not given.
    #[serde(default = "one_level")]
    pub depth: u32,
    /// Sequences that end at each node; if not given, 1 where nothing is below it and else 0. Where nothing is below a node,
    /// at least one sequence ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends: Option<Draw>,
    /// What is below each node of the last level.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<NodeSpec>,
}

fn once() -> Draw {
    Draw::Fixed(1)
}

fn one_level() -> u32 {
    1
}

/// A number, or how to draw it, anew for each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, {\"uniform\": [FROM, TO]} or {\"log_uniform\": [FROM, TO]} with whole numbers from 0 up"
)]
pub enum Draw {
    /// Always this.
    Fixed(u32),
    /// One of a range.
    Range(Range),
}

/// Both ends are included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Range {
    /// All alike.
    Uniform([u32; 2]),
    /// Equal factors alike: as many from 64 to 128 as from 4096 to 8192. The ends are positive.
    LogUniform([u32; 2]),
}

impl Draw {
    fn ends(self) -> [u32; 2] {
        match self {
            Self::Fixed(value) => [value; 2],
            Self::Range(Range::Uniform(ends) | Range::LogUniform(ends)) => ends,
        }
    }

    fn check(self, least: u32, most: u32, argument: impl Fn() -> String) -> Result<(), NodeError> {
        let [from, to] = self.ends();
        let least = if matches!(self, Self::Range(Range::LogUniform(_))) { least.max(1) } else { least };
        if least <= from && from <= to && to <= most {
            return Ok(());
        }
        let got = if from == to { from.to_string() } else { format!("{from} to {to}") };
        Err(NodeError { argument: argument(), got, expected: format!("{least} to {most}, the smaller number first") })
    }

    fn sample(self, rng: &mut ChaCha8Rng) -> u32 {
        match self {
            Self::Fixed(value) => value,
            Self::Range(Range::Uniform([from, to])) => rng.random_range(from..=to),
            Self::Range(Range::LogUniform([from, to])) => {
                let (low, high) = (f64::from(from).ln(), (f64::from(to) + 1.0).ln());
                // Rounding may leave the range by one.
                ((low + (high - low) * rng.random::<f64>()).exp() as u32).clamp(from, to)
            }
        }
    }
}

/// Why a specification gives no batch.
///
/// Fix: correct the field of the specification that the message names (docs/workload-spec.md).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{argument}: got {got}, expected {expected}")]
pub struct NodeError {
    argument: String,
    got: String,
    expected: String,
}

/// Lays a forest out in pages. Batch rows and page ids are shuffled, as an engine that has served for a while has them; the
/// same arguments give the same batch.
///
/// # Errors
/// A value is out of its range (the message names it by its place, such as `nodes[0].children[1].tokens`), or the batch
/// would have more than [`MAX_SEQUENCES`] sequences, 2^26 pages, 1024 levels, 2^26 entries of block tables, or a sequence of more
/// than [`DecodeBatch::MAX_TOKENS`] tokens.
pub fn lay_out(nodes: &[NodeSpec], page_size: u32, seed: u64) -> Result<OwnedBatch, NodeError> {
    Draw::Fixed(page_size).check(1, 1 << 16, || "page_size".into())?;
    check(nodes, "nodes")?;
    let mut layout =
        Layout { rng: ChaCha8Rng::seed_from_u64(seed), page_size, num_pages: 0, table_entries: 0, rows: Vec::new() };
    for node in nodes {
        layout.place(node, node.depth, &mut Path::default())?;
    }
    let Layout { mut rng, num_pages, mut rows, .. } = layout;
    let mut ids: Vec<u32> = (0..num_pages).collect();
    ids.shuffle(&mut rng);
    rows.shuffle(&mut rng);
    for page in rows.iter_mut().flat_map(|(table, _)| table) {
        *page = ids[*page as usize];
    }
    let (block_tables, lengths) = rows.into_iter().unzip();
    Ok(OwnedBatch { page_size, num_pages, lengths, block_tables })
}

fn check(nodes: &[NodeSpec], place: &str) -> Result<(), NodeError> {
    for (index, node) in nodes.iter().enumerate() {
        let field = |name: &str| format!("{place}[{index}].{name}");
        node.count.check(0, MAX_SEQUENCES as u32, || field("count"))?;
        node.tokens.check(1, 1 << 24, || field("tokens"))?;
        Draw::Fixed(node.depth).check(1, MAX_LEVELS, || field("depth"))?;
        node.ends.unwrap_or(Draw::Fixed(0)).check(0, MAX_SEQUENCES as u32, || field("ends"))?;
        check(&node.children, &field("children"))?;
    }
    Ok(())
}

struct Layout {
    rng: ChaCha8Rng,
    page_size: u32,
    num_pages: u32,
    /// Of all rows.
    table_entries: usize,
    rows: Vec<(Vec<u32>, u32)>,
}

/// From the root to a node.
#[derive(Default)]
struct Path {
    /// Whole pages.
    pages: Vec<u32>,
    tokens: u32,
    levels: u32,
}

impl Layout {
    fn place(&mut self, node: &NodeSpec, levels_left: u32, above: &mut Path) -> Result<(), NodeError> {
        if above.levels == MAX_LEVELS {
            return Err(too_large("levels", MAX_LEVELS));
        }
        let (pages_above, tokens_above) = (above.pages.len(), above.tokens);
        above.levels += 1;
        for _ in 0..node.count.sample(&mut self.rng) {
            let tokens = tokens_above.saturating_add(node.tokens.sample(&mut self.rng));
            if tokens > DecodeBatch::MAX_TOKENS {
                return Err(too_large("tokens of a sequence", DecodeBatch::MAX_TOKENS));
            }
            above.tokens = tokens;
            if above.tokens / self.page_size > MAX_PAGES {
                return Err(too_large("pages", MAX_PAGES));
            }
            while above.pages.len() < (above.tokens / self.page_size) as usize {
                above.pages.push(self.allocate()?);
            }
            let rows_before = self.rows.len();
            if levels_left > 1 {
                self.place(node, levels_left - 1, above)?;
            } else {
                for child in &node.children {
                    self.place(child, child.depth, above)?;
                }
            }
            let least = u32::from(self.rows.len() == rows_before);
            for _ in 0..node.ends.map_or(0, |ends| ends.sample(&mut self.rng)).max(least) {
                self.end(above)?;
            }
            above.pages.truncate(pages_above);
        }
        (above.tokens, above.levels) = (tokens_above, above.levels - 1);
        Ok(())
    }

    /// A sequence that is the path and nothing more.
    fn end(&mut self, path: &Path) -> Result<(), NodeError> {
        if self.rows.len() == MAX_SEQUENCES {
            return Err(too_large("sequences", MAX_SEQUENCES));
        }
        self.table_entries += path.tokens.div_ceil(self.page_size) as usize;
        if self.table_entries > MAX_TABLE_ENTRIES {
            return Err(too_large("entries of block tables", MAX_TABLE_ENTRIES));
        }
        let mut table = path.pages.clone();
        if !path.tokens.is_multiple_of(self.page_size) {
            table.push(self.allocate()?);
        }
        self.rows.push((table, path.tokens));
        Ok(())
    }

    fn allocate(&mut self) -> Result<u32, NodeError> {
        if self.num_pages == MAX_PAGES {
            return Err(too_large("pages", MAX_PAGES));
        }
        self.num_pages += 1;
        Ok(self.num_pages - 1)
    }
}

fn too_large(what: &str, most: impl std::fmt::Display) -> NodeError {
    NodeError { argument: "nodes".into(), got: format!("more than {most} {what}"), expected: "fewer".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(nodes: &str, page_size: u32, seed: u64) -> Result<OwnedBatch, String> {
        let nodes: Vec<NodeSpec> = serde_json::from_str(nodes).map_err(|error| error.to_string())?;
        let batch = lay_out(&nodes, page_size, seed).map_err(|error| error.to_string())?;
        batch.view(&batch.rows()).expect("a valid batch");
        assert_eq!(batch.unique_pages() as u32, batch.num_pages, "every page is read");
        Ok(batch)
    }

    fn sorted_lengths(batch: &OwnedBatch) -> Vec<u32> {
        let mut lengths = batch.lengths.clone();
        lengths.sort_unstable();
        lengths
    }

    #[test]
    fn only_whole_pages_are_shared() {
        // 40 tokens are 2 pages of 16 and a half one, of which each of the three has a copy before its own 10 tokens.
        let batch = batch(r#"[{"tokens": 40, "children": [{"count": 3, "tokens": 10}]}]"#, 16, 1).unwrap();
        assert_eq!((batch.lengths.as_slice(), batch.num_pages), (&[50; 3][..], 2 + 3 * 2));
        assert!(batch.block_tables.iter().all(|table| table[..2] == batch.block_tables[0][..2]));
    }

    #[test]
    fn depth_repeats_a_node_below_itself() {
        let chain = batch(r#"[{"tokens": 10, "depth": 5, "ends": 1}]"#, 10, 1).unwrap();
        assert_eq!((sorted_lengths(&chain), chain.num_pages), (vec![10, 20, 30, 40, 50], 5));
        let tree = batch(r#"[{"count": 3, "tokens": 16, "depth": 3}]"#, 16, 1).unwrap();
        assert_eq!((sorted_lengths(&tree), tree.num_pages), (vec![48; 27], 3 + 9 + 27));
        let below = r#"[{"tokens": 8, "depth": 2, "children": [{"count": 2, "tokens": 8}]}]"#;
        assert_eq!(sorted_lengths(&batch(below, 8, 1).unwrap()), [24, 24]);
    }

    #[test]
    fn sequences_end_at_inner_nodes_and_where_nothing_came_below() {
        let inner = r#"[{"tokens": 16, "ends": 2, "children": [{"tokens": 3}]}]"#;
        assert_eq!(sorted_lengths(&batch(inner, 16, 1).unwrap()), [16, 16, 19]);
        let nothing_below = r#"[{"tokens": 5, "ends": 0, "children": [{"count": 0, "tokens": 3}]}]"#;
        assert_eq!(sorted_lengths(&batch(nothing_below, 16, 1).unwrap()), [5]);
        assert!(batch("[]", 16, 1).unwrap().lengths.is_empty());
    }

    #[test]
    fn draws_stay_in_their_ranges_and_follow_the_seed() {
        for kind in ["uniform", "log_uniform"] {
            let nodes = format!(r#"[{{"count": 4000, "tokens": {{"{kind}": [64, 8192]}}}}]"#);
            let first = batch(&nodes, 16, 1).unwrap();
            assert_eq!(first, batch(&nodes, 16, 1).unwrap());
            assert_ne!(first, batch(&nodes, 16, 2).unwrap());
            let lengths = sorted_lengths(&first);
            assert!(lengths[0] >= 64 && lengths[3999] <= 8192, "{kind}");
            let middle = f64::from(lengths[2000]);
            let expected = if kind == "uniform" { 4128.0 } else { 724.0 };
            assert!((middle / expected - 1.0).abs() < 0.1, "{kind}: median {middle}");
        }
        let single = batch(r#"[{"count": 50, "tokens": {"log_uniform": [7, 7]}}]"#, 16, 1).unwrap();
        assert_eq!(single.lengths, [7; 50]);
    }

    #[test]
    fn errors_name_the_place() {
        for (nodes, page_size, part) in [
            ("[{}]", 16, "missing field `tokens`"),
            (r#"[{"tokens": 3, "token": 4}]"#, 16, "unknown field `token`"),
            (r#"[{"tokens": -3}]"#, 16, "expected a number, {\"uniform\": [FROM, TO]}"),
            (r#"[{"tokens": {"normal": [1, 2]}}]"#, 16, "expected a number"),
            (r#"[{"tokens": 0}]"#, 16, "nodes[0].tokens: got 0, expected 1 to 16777216"),
            (r#"[{"tokens": 1}, {"tokens": {"uniform": [5, 2]}}]"#, 16, "nodes[1].tokens: got 5 to 2"),
            (r#"[{"tokens": 1, "children": [{"tokens": 1, "depth": 0}]}]"#, 16, "nodes[0].children[0].depth: got 0"),
            (r#"[{"tokens": 1, "count": {"log_uniform": [0, 2]}}]"#, 16, "nodes[0].count: got 0 to 2, expected 1 to"),
            (r#"[{"tokens": 1, "ends": 70000}]"#, 16, "nodes[0].ends: got 70000"),
            (r#"[{"tokens": 1}]"#, 0, "page_size: got 0"),
            (r#"[{"tokens": 1, "count": 50000}, {"tokens": 1, "count": 50000}]"#, 16, "more than 65536 sequences"),
            (r#"[{"tokens": 1, "count": 10, "depth": 1000}]"#, 16, "more than 65536 sequences"),
            (r#"[{"tokens": 16777216, "count": 5}]"#, 1, "more than 67108864 pages"),
            (r#"[{"tokens": 1, "depth": 1024, "children": [{"tokens": 1}]}]"#, 16, "more than 1024 levels"),
            (r#"[{"tokens": 16777216, "ends": 65536}]"#, 1, "more than 67108864 entries of block tables"),
            (r#"[{"tokens": 16777216, "depth": 300}]"#, 65536, "more than 2147483647 tokens of a sequence"),
        ] {
            let message = batch(nodes, page_size, 1).expect_err(part);
            assert!(message.contains(part), "{message}");
        }
    }
}
