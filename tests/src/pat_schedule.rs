//! The plans of PAT's scheduler for its own benchmark, as something to compare with: which packs it makes of a regular tree,
//! after "PAT: Prefix-Aware Attention" and the behaviour of its released Python scheduler.

use pat_rs::plan::cost::Pack;
use pat_workloads::{FIGURE_10_HEADS, FIGURE_10_TREES, TreeSpec};

/// Tokens per block in PAT's benchmark.
pub const BLOCK_TOKENS: u32 = 32;

/// A pack of PAT's: up to 64 rows (query, head in group) and the KV tokens they read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatPack {
    /// Its sequences.
    pub sequences: Vec<u32>,
    /// KV tokens.
    pub tokens: u32,
}

impl PatPack {
    fn blocks(&self) -> u32 {
        self.tokens.div_ceil(BLOCK_TOKENS)
    }
}

/// PAT's plan of one tree and head configuration.
#[derive(Clone, Debug)]
pub struct PatSchedule {
    /// Packs, split.
    pub packs: Vec<PatPack>,
    /// Partials of each sequence.
    pub splits: Vec<u32>,
}

/// A node of the tree while it is packed.
struct Node {
    tokens: u32,
    sequences: Vec<u32>,
    children: Vec<Node>,
}

impl PatSchedule {
    /// Schedules a tree for `q_heads` over `kv_heads` heads.
    pub fn new(tree: &TreeSpec, q_heads: u32, kv_heads: u32) -> Self {
        let batch = tree.sequence_count();
        let roots = tree.nodes()[0];
        let per_root = batch / roots;
        let mut schedule = Self { packs: Vec::new(), splits: vec![0; batch as usize] };
        // Packs have 64 rows at most.
        let queries_per_pack = (64 / (q_heads / kv_heads)).max(1) as usize;
        for root in 0..roots {
            let node = subtree(tree, 0, root * per_root..(root + 1) * per_root);
            schedule.pack(&node, 0, queries_per_pack);
        }
        schedule.crop_long();
        schedule.fill(kv_heads);
        schedule
    }

    /// KV tokens that the packs read, per KV head.
    pub fn kv_tokens(&self) -> u64 {
        self.packs.iter().map(|pack| u64::from(pack.tokens)).sum()
    }

    /// Largest number of partials of a sequence.
    pub fn max_splits(&self) -> u32 {
        self.splits.iter().copied().max().unwrap_or(0)
    }

    /// Partials of all sequences; 0 where no sequence has two (then PAT writes the output at once).
    pub fn partials(&self) -> u64 {
        if self.max_splits() < 2 { 0 } else { self.splits.iter().map(|&splits| u64::from(splits)).sum() }
    }

    /// The packs as the cost model takes them.
    pub fn cost_packs(&self) -> Vec<Pack> {
        let pack = |pack: &PatPack| Pack { sequences: pack.sequences.len() as u32, pages: pack.blocks() };
        self.packs.iter().map(pack).collect()
    }

    fn pack(&mut self, node: &Node, inherited_tokens: u32, queries_per_pack: usize) {
        let tokens = inherited_tokens + node.tokens;
        if node.children.is_empty() {
            return self.emit(&node.sequences, tokens, queries_per_pack);
        }
        let packs = |sequences: usize| sequences.div_ceil(queries_per_pack) as i64;
        let mut remaining = node.sequences.len();
        let (mut apart, mut merged): (Vec<&Node>, Vec<&Node>) = Default::default();
        for child in &node.children {
            let sequences = child.sequences.len();
            let fewer_packs = packs(remaining - sequences) + packs(sequences) - packs(remaining);
            if remaining == sequences || 4 * sequences as i64 >= fewer_packs * i64::from(tokens) {
                merged.push(child);
                remaining -= sequences;
            } else {
                apart.push(child);
            }
        }
        if remaining > 0 {
            let sequences: Vec<u32> = apart.iter().flat_map(|child| child.sequences.iter().copied()).collect();
            self.emit(&sequences, tokens, queries_per_pack);
        }
        apart.into_iter().for_each(|child| self.pack(child, 0, queries_per_pack));
        merged.into_iter().for_each(|child| self.pack(child, tokens, queries_per_pack));
    }

    fn emit(&mut self, sequences: &[u32], tokens: u32, queries_per_pack: usize) {
        for sequences in sequences.chunks(queries_per_pack) {
            sequences.iter().for_each(|&sequence| self.splits[sequence as usize] += 1);
            self.packs.push(PatPack { sequences: sequences.to_vec(), tokens });
        }
    }

    /// Packs of more than five times the mean number of blocks (over packs of more than 256 tokens) are cut into pieces of
    /// about the mean.
    fn crop_long(&mut self) {
        let long: Vec<u32> = self.packs.iter().filter(|pack| pack.tokens > 256).map(PatPack::blocks).collect();
        if long.is_empty() {
            return;
        }
        let mean = f64::from(long.iter().sum::<u32>()) / long.len() as f64;
        for pack in std::mem::take(&mut self.packs) {
            let blocks = pack.blocks();
            if f64::from(blocks) <= 5.0 * mean {
                self.packs.push(pack);
                continue;
            }
            let pieces = (f64::from(blocks) / mean).ceil() as u32;
            self.cut(&pack, blocks.div_ceil(pieces));
        }
    }

    /// Halves the longest pack until there are enough for the device.
    fn fill(&mut self, kv_heads: u32) {
        let wanted = match kv_heads {
            0..=4 => 54,
            5..=8 => 27,
            9..=16 => 13,
            17..=32 => 6,
            _ => 4,
        };
        while self.packs.len() < wanted && self.max_splits() < 32 {
            // The first of the longest.
            let longest = self.packs.iter().map(PatPack::blocks).max().expect("a tree has packs");
            if longest <= 8 {
                break;
            }
            let index = self.packs.iter().position(|pack| pack.blocks() == longest).expect("it is one of them");
            let pack = self.packs.remove(index);
            self.cut(&pack, longest.div_ceil(2));
        }
    }

    fn cut(&mut self, pack: &PatPack, blocks: u32) {
        let tokens = blocks * BLOCK_TOKENS;
        for begin in (0..pack.tokens).step_by(tokens as usize) {
            self.packs.push(PatPack { tokens: tokens.min(pack.tokens - begin), sequences: pack.sequences.clone() });
            if begin > 0 {
                pack.sequences.iter().for_each(|&sequence| self.splits[sequence as usize] += 1);
            }
        }
    }
}

fn subtree(tree: &TreeSpec, level: usize, sequences: std::ops::Range<u32>) -> Node {
    let children = match tree.nodes().get(level + 1) {
        None => Vec::new(),
        Some(&nodes) => {
            let per_child = tree.sequence_count() / nodes;
            sequences
                .clone()
                .step_by(per_child as usize)
                .map(|begin| subtree(tree, level + 1, begin..begin + per_child))
                .collect()
        }
    };
    Node { tokens: tree.tokens()[level], sequences: sequences.collect(), children }
}

/// (packs, most partials of a sequence, KV tokens read per KV head), as recorded from runs of PAT's scheduler: a row per
/// tree of [`FIGURE_10_TREES`], a column per head configuration of [`FIGURE_10_HEADS`].
pub const RECORDED: [[(usize, u32, u64); FIGURE_10_HEADS.len()]; FIGURE_10_TREES.len()] = [
    [(16, 7, 8256), (27, 14, 8256), (27, 14, 8256), (27, 10, 12352)],
    [(260, 2, 9216), (264, 2, 10240), (272, 2, 12288), (288, 2, 16384)],
    [(1040, 2, 65536), (1056, 2, 98304), (1088, 2, 163_840), (1152, 2, 294_912)],
    [(67, 3, 17920), (66, 2, 18944), (68, 2, 21504), (72, 2, 26624)],
    [(260, 2, 9344), (264, 2, 10496), (272, 2, 12800), (288, 2, 17408)],
    [(520, 2, 135_424), (528, 2, 139_776), (544, 2, 148_480), (576, 2, 165_888)],
    [(520, 2, 147_712), (528, 2, 164_352), (544, 2, 197_632), (576, 2, 264_192)],
    [(520, 2, 139_264), (528, 2, 147_456), (544, 2, 163_840), (576, 2, 196_608)],
    [(268, 3, 11392), (264, 2, 12544), (272, 2, 16896), (288, 2, 25600)],
    [(536, 3, 28672), (528, 2, 38912), (544, 2, 61440), (576, 2, 106_496)],
    [(1360, 4, 283_136), (1376, 4, 291_840), (1344, 3, 309_248), (1408, 3, 348_160)],
    [(1232, 4, 49152), (1184, 3, 55296), (1216, 3, 67584), (1152, 2, 98304)],
    [(1360, 4, 53248), (1376, 4, 57344), (1344, 3, 71680), (1408, 3, 102_400)],
    [(1232, 4, 48128), (1184, 3, 56320), (1216, 3, 69632), (1152, 2, 102_400)],
    [(1360, 4, 52224), (1376, 4, 58368), (1344, 3, 73728), (1408, 3, 106_496)],
    [(284, 4, 11776), (280, 3, 12800), (272, 2, 16896), (288, 2, 25600)],
    [(792, 4, 53760), (784, 3, 57856), (800, 3, 66560), (832, 3, 83968)],
    [(312, 4, 28672), (312, 4, 28672), (304, 3, 32768), (288, 2, 49152)],
    [(256, 1, 262_144); 4],
    [(256, 1, 1_048_576); 4],
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_the_recorded_ones() {
        for (tree, row) in FIGURE_10_TREES.iter().zip(RECORDED) {
            let spec: TreeSpec = tree.parse().expect("a tree");
            for ((q_heads, kv_heads), (packs, splits, tokens)) in FIGURE_10_HEADS.into_iter().zip(row) {
                let schedule = PatSchedule::new(&spec, q_heads, kv_heads);
                let got = (schedule.packs.len(), schedule.max_splits(), schedule.kv_tokens());
                assert_eq!(got, (packs, splits, tokens), "{tree} with {q_heads}/{kv_heads} heads");
            }
        }
    }
}
