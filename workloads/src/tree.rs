//! PAT's tree notation: `1,4,256_32,256,32` is one root of 32 tokens, 4 nodes of 256 tokens below it, and 256 leaves of
//! 32 tokens. The last level is the batch; node counts grow from level to level by whole factors.

use crate::OwnedBatch;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use std::fmt;
use std::str::FromStr;

/// The trees of Figure 10 of the PAT paper ("PAT: Prefix-Aware Attention", kernel benchmark), in its order.
pub const FIGURE_10_TREES: [&str; 20] = [
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
];

/// The head configurations (query heads, KV heads) the trees are run with, in the paper's order.
pub const FIGURE_10_HEADS: [(u32, u32); 4] = [(32, 32), (16, 8), (32, 8), (64, 8)];

/// A regular prefix tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeSpec {
    nodes: Vec<u32>,
    tokens: Vec<u32>,
}

/// Why a tree cannot be used.
///
/// Fix: write the tree as nodes per level `_` tokens per level, such as `1,4,256_32,256,32`; shared levels are
/// multiples of the page size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("tree {tree:?}: {problem}")]
pub struct TreeError {
    tree: String,
    problem: String,
}

impl FromStr for TreeSpec {
    type Err = TreeError;

    fn from_str(tree: &str) -> Result<Self, TreeError> {
        let fail = |problem: String| TreeError { tree: tree.into(), problem };
        let (nodes, tokens) = tree.trim().split_once('_').ok_or_else(|| {
            fail("no '_' between nodes per level and tokens per level (as in 1,4,256_32,256,32)".into())
        })?;
        let numbers = |part: &str, what: &str| -> Result<Vec<u32>, TreeError> {
            part.split(',')
                .enumerate()
                .map(|(level, text)| {
                    text.trim().parse().ok().filter(|&n| n > 0 && n <= 1 << 24).ok_or_else(|| {
                        fail(format!("{what} of level {level}: got {text:?}, expected a number from 1 to 16777216"))
                    })
                })
                .collect()
        };
        let (nodes, tokens) = (numbers(nodes, "nodes")?, numbers(tokens, "tokens")?);
        if nodes.len() != tokens.len() {
            return Err(fail(format!("{} levels of nodes but {} levels of tokens", nodes.len(), tokens.len())));
        }
        for (level, pair) in nodes.windows(2).enumerate() {
            if pair[1] % pair[0] != 0 {
                return Err(fail(format!(
                    "nodes of level {}: got {}, expected a multiple of the {} nodes above",
                    level + 1,
                    pair[1],
                    pair[0]
                )));
            }
        }
        Ok(Self { nodes, tokens })
    }
}

impl fmt::Display for TreeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        write!(f, "{}_{}", join(&self.nodes), join(&self.tokens))
    }
}

impl TreeSpec {
    /// Nodes per level, root level first.
    pub fn nodes(&self) -> &[u32] {
        &self.nodes
    }

    /// Tokens of each node, per level.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of sequences: the nodes of the last level.
    pub fn sequence_count(&self) -> u32 {
        self.nodes[self.nodes.len() - 1]
    }

    /// Lays the tree out in pages, level by level and node by node, sequences in the order of the leaves. With a seed,
    /// batch slots and physical page ids are shuffled (ChaCha8), as an engine that has served for a while has them.
    ///
    /// # Errors
    /// A level that has children is not a multiple of `page_size` (its last page could not be shared), or the pool
    /// would need 2^31 pages or more, or the tables more than 2^31 entries.
    pub fn batch(&self, page_size: u32, shuffle_seed: Option<u64>) -> Result<OwnedBatch, TreeError> {
        let fail = |problem: String| TreeError { tree: self.to_string(), problem };
        if page_size == 0 {
            return Err(fail("page_size: got 0, expected at least 1".into()));
        }
        let last = self.nodes.len() - 1;
        for (level, tokens) in self.tokens[..last].iter().enumerate() {
            if tokens % page_size != 0 {
                return Err(fail(format!(
                    "tokens of level {level}: got {tokens}, expected a multiple of the page size {page_size}"
                )));
            }
        }
        let pages_per_node: Vec<u64> = self.tokens.iter().map(|t| u64::from(t.div_ceil(page_size))).collect();
        let num_pages: u64 = self.nodes.iter().zip(&pages_per_node).map(|(&n, p)| u64::from(n) * p).sum();
        let entries = u64::from(self.sequence_count()) * pages_per_node.iter().sum::<u64>();
        let length: u64 = self.tokens.iter().map(|&t| u64::from(t)).sum();
        if num_pages.max(entries).max(length) >= 1 << 31 {
            return Err(fail(format!(
                "{num_pages} pages, {entries} table entries, {length} tokens per sequence: expected less than 2^31"
            )));
        }

        let mut rng = shuffle_seed.map(rand_chacha::ChaCha8Rng::seed_from_u64);
        let mut page_ids: Vec<u32> = (0..num_pages as u32).collect();
        let mut slots: Vec<u32> = (0..self.sequence_count()).collect();
        if let Some(rng) = &mut rng {
            page_ids.shuffle(rng);
            slots.shuffle(rng);
        }
        let table = |leaf: u32| -> Vec<u32> {
            let mut pages = Vec::with_capacity((entries / u64::from(self.sequence_count())) as usize);
            let mut level_begin = 0usize;
            for (&nodes, &node_pages) in self.nodes.iter().zip(&pages_per_node) {
                let node = (leaf / (self.sequence_count() / nodes)) as usize;
                let begin = level_begin + node * node_pages as usize;
                pages.extend_from_slice(&page_ids[begin..begin + node_pages as usize]);
                level_begin += nodes as usize * node_pages as usize;
            }
            pages
        };
        Ok(OwnedBatch {
            page_size,
            num_pages: num_pages as u32,
            lengths: vec![length as u32; self.sequence_count() as usize],
            block_tables: slots.into_iter().map(table).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figure_10_trees_have_the_papers_unique_tokens() {
        let unique = [
            8256, 8448, 34816, 17920, 9248, 135_200, 147_488, 135_680, 11296, 20480, 278_912, 43264, 47360, 42240,
            46336, 11264, 51712, 28672, 262_144, 1_048_576,
        ];
        for (tree, unique) in FIGURE_10_TREES.iter().zip(unique) {
            let spec: TreeSpec = tree.parse().expect(tree);
            assert_eq!(spec.to_string(), *tree);
            for seed in [None, Some(1)] {
                let batch = spec.batch(32, seed).expect(tree);
                assert_eq!(batch.num_pages * 32, unique, "{tree}");
                assert_eq!(batch.unique_pages() as u32, batch.num_pages, "{tree}");
                batch.view(&batch.rows()).expect(tree);
            }
        }
    }

    #[test]
    fn nodes_are_shared_by_consecutive_leaves_and_a_shuffle_only_renames() {
        let spec: TreeSpec = "1,2,4_32,16,5".parse().expect("a tree");
        let batch = spec.batch(16, None).expect("a batch");
        assert_eq!(batch.block_tables, [vec![0, 1, 2, 4], vec![0, 1, 2, 5], vec![0, 1, 3, 6], vec![0, 1, 3, 7]]);
        assert_eq!(batch.lengths, [53; 4]);
        let shuffled = spec.batch(16, Some(3)).expect("a batch");
        assert_ne!(shuffled, batch);
        assert_eq!(shuffled, spec.batch(16, Some(3)).expect("a batch"));
    }

    #[test]
    fn errors_name_the_part() {
        for (tree, part) in [
            ("1,4", "no '_'"),
            ("1,x_3,4", "nodes of level 1: got \"x\""),
            ("1,2_3", "2 levels of nodes but 1 levels of tokens"),
            ("1,2_0,4", "tokens of level 0: got \"0\""),
            ("2,3_16,16", "nodes of level 1: got 3"),
            ("", "no '_'"),
        ] {
            let message = tree.parse::<TreeSpec>().expect_err(tree).to_string();
            assert!(message.contains(part), "{message}");
        }
        let spec: TreeSpec = "1,2_33,4".parse().expect("a tree");
        assert!(spec.batch(32, None).expect_err("not whole pages").to_string().contains("tokens of level 0: got 33"));
    }
}
