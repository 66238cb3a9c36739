//! Suites of regular trees.

use super::{Configuration, Source};
use pat_rs::Dtype;
use pat_workloads::{ElementParts, FIGURE_10_HEADS, FIGURE_10_TREES, TreeSpec};

/// Tokens per page of these suites, as in PAT's benchmark.
pub(super) const PAGE_SIZE: u32 = 32;

const HEADS: (u32, u32) = (32, 8);

/// PAT's Figure 10: each tree with each head configuration, in the paper's order.
pub fn figure10() -> Vec<Configuration> {
    let with_heads = |tree: &'static str| FIGURE_10_HEADS.map(|heads| tree_of("figure10", tree, tree, heads));
    FIGURE_10_TREES.into_iter().flat_map(with_heads).collect()
}

/// Figure 10's trees in bf16.
pub fn bf16() -> Vec<Configuration> {
    let elements = ElementParts { dtype: Some(Dtype::Bf16), ..ElementParts::default() };
    let of_tree = |tree| Configuration { elements, ..tree_of("bf16", tree, tree, HEADS) };
    FIGURE_10_TREES.into_iter().map(of_tree).collect()
}

/// Figure 10's trees with the heads of one rank of a tensor-parallel model: 64/8 and 32/8 over 8 ranks, 32/8 over 4.
pub fn tensor_parallel() -> Vec<Configuration> {
    let with_heads = |tree| [(8, 1), (4, 1), (8, 2)].map(|heads| tree_of("tensor-parallel", tree, tree, heads));
    FIGURE_10_TREES.into_iter().flat_map(with_heads).collect()
}

/// `decode_BxL`: B sequences of L tokens that share nothing.
pub fn unshared() -> Vec<Configuration> {
    let mut configurations = Vec::new();
    for sequences in [1, 2, 4, 8, 16] {
        for tokens in [1024, 8192, 32_768, 131_072] {
            let name = format!("decode_{sequences}x{tokens}");
            configurations.push(tree_of("unshared", &name, &format!("{sequences}_{tokens}"), HEADS));
        }
    }
    configurations
}

/// Around 64 sequences of 256 tokens of their own behind one prefix of 4096: `batch_N` with N sequences, `prefix_N` with N
/// tokens of prefix; and `fanout_N`, 256 sequences of which N at a time share a prefix.
pub fn sweeps() -> Vec<Configuration> {
    let batches = [4, 16, 64, 256, 1024].map(|n| (format!("batch_{n}"), format!("1,{n}_4096,256")));
    let prefixes = [256, 1024, 4096, 16_384, 65_536].map(|n| (format!("prefix_{n}"), format!("1,64_{n},256")));
    let fanouts = [1, 4, 16, 64, 256].map(|n| (format!("fanout_{n}"), format!("{},256_4096,256", 256 / n)));
    let points = batches.into_iter().chain(prefixes).chain(fanouts);
    points.map(|(name, tree)| tree_of("sweeps", &name, &tree, HEADS)).collect()
}

fn tree_of(suite: &'static str, name: &str, tree: &str, (q_heads, kv_heads): (u32, u32)) -> Configuration {
    let tree: TreeSpec = tree.parse().expect("a tree written here");
    Configuration {
        suite,
        name: name.into(),
        q_heads,
        kv_heads,
        elements: ElementParts::default(),
        source: Source::Tree(tree),
    }
}
