//! The prefix forest: which runs of full pages are shared by which sequences.
//!
//! Sharing is found by comparing page ids, full pages only: a partial last page always belongs to its sequence alone. The
//! rows of a node are contiguous in one permutation of the batch, so a node is three pairs of integers; nothing is hashed.

use crate::DecodeBatch;

/// A maximal run of pages shared by exactly one set of two or more sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// The node above, if any; always at a smaller index.
    pub parent: Option<u32>,
    /// First page of the run, as a position in the block tables of its sequences.
    pub page_begin: u32,
    /// End of the run, likewise.
    pub page_end: u32,
    /// First of its sequences in [`Forest::order`].
    pub order_begin: u32,
    /// End of its sequences, likewise.
    pub order_end: u32,
}

impl Node {
    /// Sequences that share the run.
    pub fn sequence_count(&self) -> u32 {
        self.order_end - self.order_begin
    }

    /// Pages of the run.
    pub fn page_count(&self) -> u32 {
        self.page_end - self.page_begin
    }
}

/// The forest of a batch. Reused between calls: building allocates only while it grows.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    nodes: Vec<Node>,
    order: Vec<u32>,
    innermost: Vec<Option<u32>>,
    pending: Vec<Group>,
    /// Nodes whose ends are not known yet.
    open: Vec<Node>,
    /// Full pages by sequence.
    full_pages: Vec<u32>,
    keys: Vec<Key>,
}

/// Sequences that agree on their first `depth` pages, all of them below `parent`.
#[derive(Clone, Copy, Debug)]
struct Group {
    parent: Option<u32>,
    depth: u32,
    order_begin: u32,
    order_end: u32,
}

/// A sequence with its next full page, as one integer so that sorting compares once and follows no pointer: the page id
/// plus one, 0 where the sequence has no further full page, over the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u64);

impl Key {
    fn new(next_page: Option<u32>, sequence: u32) -> Self {
        // Page ids are below 2^31 - 1.
        let page = next_page.map_or(0, |page| page + 1);
        Self(u64::from(page) << 32 | u64::from(sequence))
    }

    fn has_ended(self) -> bool {
        self.0 >> 32 == 0
    }

    fn same_page(self, other: Self) -> bool {
        self.0 >> 32 == other.0 >> 32
    }

    fn sequence(self) -> u32 {
        self.0 as u32
    }
}

impl Forest {
    /// Finds the forest of a batch; what was in `self` is replaced. Time is linear in pages, times the logarithm of the
    /// number of sequences that part at a node.
    pub fn build(&mut self, batch: &DecodeBatch<'_>) {
        self.build_windowed(batch, &[]);
    }

    /// As [`Self::build`], of what rows see: `hidden_tokens` are [`crate::VisibleBatch::hidden_tokens`], nothing where they
    /// see all. Sequences that do not attend to the same tokens of their first page share nothing.
    pub(crate) fn build_windowed(&mut self, batch: &DecodeBatch<'_>, hidden_tokens: &[u32]) {
        let sequences = batch.sequence_count();
        self.nodes.clear();
        self.order.clear();
        self.innermost.clear();
        self.innermost.resize(sequences, None);
        self.full_pages.clear();
        for sequence in 0..sequences {
            let length = batch.length(sequence);
            self.full_pages.push(length / batch.page_size());
            if length > 0 {
                self.order.push(sequence as u32);
            }
        }
        self.pending.clear();
        if hidden_tokens.is_empty() {
            self.pending.push(Group { parent: None, depth: 0, order_begin: 0, order_end: self.order.len() as u32 });
        } else {
            let hidden = |sequence: u32| hidden_tokens[sequence as usize];
            self.order.sort_by_key(|&sequence| hidden(sequence));
            let mut order_begin = 0;
            for alike in self.order.chunk_by(|&a, &b| hidden(a) == hidden(b)) {
                let order_end = order_begin + alike.len() as u32;
                self.pending.push(Group { parent: None, depth: 0, order_begin, order_end });
                order_begin = order_end;
            }
        }
        while let Some(group) = self.pending.pop() {
            self.divide(batch, group);
        }
    }

    /// Orders a group by next page and makes a node of every two or more sequences that agree on theirs.
    fn divide(&mut self, batch: &DecodeBatch<'_>, group: Group) {
        let depth = group.depth as usize;
        let full_pages = &self.full_pages;
        let rest = |key: Key| {
            let sequence = key.sequence() as usize;
            &batch.first_pages(sequence, full_pages[sequence] as usize)[depth..]
        };
        let rows = &mut self.order[group.order_begin as usize..group.order_end as usize];
        self.keys.clear();
        self.keys.extend(rows.iter().map(|&sequence| {
            let has_next = full_pages[sequence as usize] > group.depth;
            Key::new(has_next.then(|| batch.first_pages(sequence as usize, depth + 1)[depth]), sequence)
        }));
        // Sequences that end here come first.
        self.keys.sort_unstable();
        let mut begin = self.keys.partition_point(|key| key.has_ended());
        // By length: which row of the batch a sequence is decides only between equal ones.
        self.keys[..begin].sort_unstable_by_key(|key| (batch.length(key.sequence() as usize), *key));
        for (row, key) in rows.iter_mut().zip(&self.keys) {
            *row = key.sequence();
        }
        for key in &self.keys[..begin] {
            self.innermost[key.sequence() as usize] = group.parent;
        }
        while begin < self.keys.len() {
            let first_key = self.keys[begin];
            let run = self.keys[begin..].iter().take_while(|key| key.same_page(first_key)).count();
            let end = begin + run;
            if run == 1 {
                self.innermost[first_key.sequence() as usize] = group.parent;
            } else {
                let mut common = rest(first_key);
                for &key in &self.keys[begin + 1..end] {
                    let rest = rest(key);
                    // Mostly all of them agree on what the first ones do.
                    if !rest.starts_with(common) {
                        common = &common[..common_prefix(common, rest)];
                    }
                }
                let index = self.nodes.len() as u32;
                let (order_begin, order_end) = (group.order_begin + begin as u32, group.order_begin + end as u32);
                let page_begin = group.depth;
                let page_end = group.depth + common.len() as u32;
                self.nodes.push(Node { parent: group.parent, page_begin, page_end, order_begin, order_end });
                self.pending.push(Group { parent: Some(index), depth: page_end, order_begin, order_end });
            }
            begin = end;
        }
    }

    /// The order itself, for edits that keep the sequences of every node together; [`Self::find_nodes`] must follow.
    pub(super) fn order_mut(&mut self) -> &mut Vec<u32> {
        &mut self.order
    }

    /// Finds the nodes anew where the order is known, and how many full pages each sequence of it shares with the one before it.
    /// `rows` are the rows of the batch.
    pub(super) fn find_nodes(&mut self, rows: usize, shared_pages: impl Iterator<Item = u32>) {
        self.nodes.clear();
        self.open.clear();
        let end = self.order.len() as u32;
        for (position, shared) in (0..end).zip(shared_pages).chain([(end, 0)]) {
            let mut order_begin = position.saturating_sub(1);
            while let Some(node) = self.open.pop_if(|node| node.page_end > shared) {
                order_begin = node.order_begin;
                self.nodes.push(Node { order_end: position, ..node });
            }
            if shared > self.open.last().map_or(0, |node| node.page_end) {
                let node = Node { parent: None, page_begin: 0, page_end: shared, order_begin, order_end: 0 };
                self.open.push(node);
            }
        }
        self.nodes.sort_unstable_by_key(|node| (node.order_begin, node.page_end));
        self.innermost.clear();
        self.innermost.resize(rows, None);
        for index in 0..self.nodes.len() {
            let Node { order_begin, order_end, .. } = self.nodes[index];
            // Its parent has written there before it.
            let parent = self.innermost[self.order[order_begin as usize] as usize];
            let page_begin = parent.map_or(0, |parent| self.nodes[parent as usize].page_end);
            (self.nodes[index].parent, self.nodes[index].page_begin) = (parent, page_begin);
            for &sequence in &self.order[order_begin as usize..order_end as usize] {
                self.innermost[sequence as usize] = Some(index as u32);
            }
        }
    }

    /// The nodes; a parent comes before its children.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The non-empty sequences, permuted so that those of a node are contiguous.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// Pages, from its first on, that a sequence shares with others.
    pub fn shared_pages(&self, sequence: u32) -> u32 {
        self.innermost(sequence).map_or(0, |node| self.nodes[node as usize].page_end)
    }

    /// The deepest node of a sequence.
    pub fn innermost(&self, sequence: u32) -> Option<u32> {
        self.innermost[sequence as usize]
    }
}

/// Length of the common prefix; compares by blocks, which the compiler vectorises.
pub(super) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    const BLOCK: usize = 16;
    let length = a.len().min(b.len());
    let blocks = a.chunks_exact(BLOCK).zip(b.chunks_exact(BLOCK)).take_while(|(x, y)| x == y).count();
    let done = (blocks * BLOCK).min(length);
    done + a[done..length].iter().zip(&b[done..length]).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forest(tables: &[&[u32]], lengths: &[u32], page_size: u32) -> Forest {
        let batch = DecodeBatch::from_block_tables(tables, lengths, page_size, 1000).unwrap();
        let mut forest = Forest::default();
        forest.build(&batch);
        forest
    }

    #[test]
    fn runs_are_shared_by_full_pages_only() {
        // The third page is partial for both: it stays private although both name it.
        let forest = forest(&[&[1, 2, 3], &[1, 2, 3]], &[20, 21], 8);
        assert_eq!(forest.nodes().len(), 1);
        assert_eq!((forest.nodes()[0].page_begin, forest.nodes()[0].page_end), (0, 2));
    }

    #[test]
    fn sequences_may_end_at_inner_nodes() {
        let forest = forest(&[&[0, 1], &[0], &[0, 1, 2]], &[64, 32, 96], 32);
        let runs: Vec<_> =
            forest.nodes().iter().map(|n| (n.page_begin, n.page_end, n.sequence_count(), n.parent)).collect();
        assert_eq!(runs, [(0, 1, 3, None), (1, 2, 2, Some(0))]);
        assert_eq!(forest.innermost(1), Some(0));
        assert_eq!(forest.innermost(2), Some(1));
    }

    #[test]
    fn common_prefixes_are_exact_around_block_borders() {
        let a: Vec<u32> = (0..70).collect();
        for differing in [0, 1, 15, 16, 17, 31, 32, 63, 64, 69] {
            let mut b = a.clone();
            b[differing] = 1000;
            assert_eq!(common_prefix(&a, &b), differing);
            assert_eq!(common_prefix(&a[..differing], &a), differing);
        }
        assert_eq!(common_prefix(&a, &a), 70);
    }
}
