//! From the forest to packs: which nodes read their KV once for all their sequences, and which are folded into what lies
//! below them (read again by each, but with one partial fewer per row).

use super::forest::Forest;
use crate::DecodeBatch;

/// A query set and the run of pages it reads: the unit that reads KV once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// A sequence whose block table holds the run.
    pub sequence: u32,
    /// First page, as a position in that block table.
    pub page_begin: u32,
    /// End of the run, likewise.
    pub page_end: u32,
    /// KV tokens of the run; only its last page may be partial.
    pub token_count: u32,
    /// First of its sequences in [`Forest::order`].
    pub order_begin: u32,
    /// End of its sequences, likewise.
    pub order_end: u32,
}

impl Pack {
    /// Sequences.
    pub fn query_count(&self) -> u32 {
        self.order_end - self.order_begin
    }

    /// Pages.
    pub fn page_count(&self) -> u32 {
        self.page_end - self.page_begin
    }
}

/// Builds the packs. `folded[node]` says which nodes get no pack of their own. Ancestors' packs come before descendants'.
pub fn build(batch: &DecodeBatch<'_>, forest: &Forest, folded: &[bool], packs: &mut Vec<Pack>) {
    packs.clear();
    // Where the pages that a node's descendants must read begin, because it and perhaps nodes above it are folded.
    let mut begins: Vec<u32> = Vec::with_capacity(forest.nodes().len());
    let inherited = |begins: &[u32], parent: Option<u32>, own_begin: u32| match parent {
        Some(parent) if folded[parent as usize] => begins[parent as usize],
        _ => own_begin,
    };
    for (index, node) in forest.nodes().iter().enumerate() {
        let page_begin = inherited(&begins, node.parent, node.page_begin);
        begins.push(page_begin);
        if !folded[index] {
            packs.push(Pack {
                sequence: forest.order()[node.order_begin as usize],
                page_begin,
                page_end: node.page_end,
                token_count: (node.page_end - page_begin) * batch.page_size(),
                order_begin: node.order_begin,
                order_end: node.order_end,
            });
        }
    }
    for (position, &sequence) in forest.order().iter().enumerate() {
        let innermost = forest.innermost(sequence);
        let shared_end = innermost.map_or(0, |node| forest.nodes()[node as usize].page_end);
        let page_begin = inherited(&begins, innermost, shared_end);
        let length = batch.length(sequence as usize);
        let page_end = length.div_ceil(batch.page_size());
        if page_begin < page_end {
            packs.push(Pack {
                sequence,
                page_begin,
                page_end,
                token_count: length - page_begin * batch.page_size(),
                order_begin: position as u32,
                order_end: position as u32 + 1,
            });
        }
    }
}
