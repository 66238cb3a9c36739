//! Random forests whose lengths are those of a row.

use super::{Combination, Contexts, Row};
use pat_rs::{AttentionShape, Problem};
use pat_workloads::{OwnedBatch, PoolLayout, TreeSpec};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use std::collections::HashMap;

/// How the sequences of a batch share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each continues a prefix of an earlier one, as far as it may.
    Uneven,
    /// All behind one prefix.
    Star,
    /// In halves, quarters and so on.
    Halves,
    /// Each continues the one before it.
    Chain,
    /// Every other one is a copy.
    Copies,
    /// Every other one shares nothing.
    Loners,
    /// Every third one ends inside another.
    EndsInside,
    /// Uneven, with lengths before, on and behind the ends of pages.
    Borders,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Uneven,
        Self::Star,
        Self::Halves,
        Self::Chain,
        Self::Copies,
        Self::Loners,
        Self::EndsInside,
        Self::Borders,
    ];
}

/// How much is made of a row.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Combinations of each row.
    pub cases: usize,
    /// Of a case; batches that take more have fewer sequences, and below five of them, fewer tokens.
    pub flop: f64,
    /// Elements of K and V of a case, likewise.
    pub elements: u64,
    /// Of the rows of a case that the oracle computes.
    pub oracle_flop: f64,
    /// Query tokens of a sequence.
    pub query_tokens: u32,
}

/// One combination of a row.
#[derive(Clone, Debug)]
pub struct Forest {
    /// Sequences.
    pub batch: OwnedBatch,
    /// Query tokens of each.
    pub counts: Vec<u32>,
    /// What is computed.
    pub problem: Problem,
    /// Of K and V.
    pub layout: PoolLayout,
    /// How they share.
    pub kind: Kind,
    /// Whether it is smaller than the row says.
    pub is_cut: bool,
}

/// Tokens and query tokens.
type Sequence = (u32, u32);

/// Fewest sequences that a batch is cut to: one more than are run alone.
const FEWEST: usize = 5;

/// What a row gives for a combination.
struct Picked<'a> {
    sequences: Vec<Sequence>,
    /// Tokens that sequences may share, if it is not all.
    shared: Option<u32>,
    /// Nodes by level, where the tree is given.
    levels: Option<Vec<&'a [u32]>>,
}

/// Draws the forest of a combination.
///
/// # Panics
/// Never: the rows hold valid parameters.
pub fn draw(row: &Row, Combination { at }: Combination, kind: Kind, size: Size, rng: &mut impl Rng) -> Forest {
    let [context, sequences, query_tokens, page_size, heads, head_dim, dtypes, layout, soft_cap, window, sinks] = at;
    let page_size = row.page_sizes[page_size];
    let ((q_heads, kv_heads), head_dim, (dtype, kv_dtype)) =
        (row.heads[heads], row.head_dims[head_dim], row.dtypes[dtypes]);
    let v_head_dim = if head_dim == 192 { 128 } else { head_dim };
    let shape = AttentionShape::new(q_heads, kv_heads, head_dim, dtype)
        .and_then(|shape| shape.with_v_head_dim(v_head_dim))
        .expect("a valid shape")
        .with_kv_dtype(kv_dtype);

    let mut tree_levels = Vec::new();
    if let Contexts::Trees(trees) = row.contexts {
        let tree: TreeSpec = trees[context].parse().expect("a tree");
        tree_levels = tree.nodes().iter().zip(tree.tokens()).map(|(&nodes, &of)| vec![of; nodes as usize]).collect();
    }
    let levels = match row.contexts {
        Contexts::Levels(trees) => Some(trees[context].to_vec()),
        Contexts::Trees(_) => Some(tree_levels.iter().map(Vec::as_slice).collect()),
        _ => None,
    };
    let picked = pick(row, context, (row.sequences[sequences], row.query_tokens[query_tokens]), levels, rng);

    let (most, mut kept, mut divisor) = (picked.sequences.len(), picked.sequences.len(), 1);
    let (mut batch, counts) = loop {
        let thinned = thin(&picked, kept, divisor, size.query_tokens);
        let (batch, counts) = match &picked.levels {
            Some(levels) => (of_levels(levels, kept, divisor, page_size), vec![thinned[0].1; kept]),
            None => sharing(&thinned, picked.shared.map(|tokens| tokens / divisor), page_size, kind, rng),
        };
        let row_flop = 2.0 * f64::from(head_dim + v_head_dim) * f64::from(q_heads);
        let tokens: f64 = batch.lengths.iter().zip(&counts).map(|(&l, &n)| f64::from(l) * f64::from(n)).sum();
        let elements = u64::from(batch.num_pages) * u64::from(page_size * kv_heads * (head_dim + v_head_dim));
        // Of one token a batch is as small as it gets.
        if row_flop * tokens <= size.flop && elements <= size.elements || divisor >= 1 << 16 {
            break (batch, counts);
        }
        if kept > FEWEST {
            kept = (kept / 2).max(FEWEST);
        } else {
            divisor *= 2;
        }
    };
    let mut counts = counts;
    if rng.random_bool(0.2) {
        // A row that a captured graph leaves empty.
        batch.lengths.push(0);
        batch.block_tables.push(Vec::new());
        counts.push(*row.query_tokens.first().expect("not empty"));
    }
    shuffle(&mut batch, &mut counts, rng);

    let mut problem = Problem::new(shape, page_size);
    if let Some(cap) = row.soft_caps[soft_cap] {
        problem = problem.with_soft_cap(cap);
    }
    if let Some(tokens) = row.windows[window] {
        problem = problem.with_window(tokens);
    }
    if row.sinks[sinks] {
        problem = problem.with_sinks();
    }
    let most_query_tokens = counts.iter().max().copied().unwrap_or(1);
    if most_query_tokens > 1 {
        problem = problem.with_query_tokens(most_query_tokens);
    }
    let layout = row.layouts[layout];
    Forest { batch, counts, problem, layout, kind, is_cut: kept < most || divisor > 1 }
}

/// The sequences of a context, in any order.
fn pick<'a>(
    row: &Row,
    context: usize,
    (sequences, query_tokens): (u32, u32),
    levels: Option<Vec<&'a [u32]>>,
    rng: &mut impl Rng,
) -> Picked<'a> {
    let all = |tokens: u32| vec![(tokens, query_tokens); sequences as usize];
    let (mut sequences, shared) = match row.contexts {
        Contexts::Uniform(tokens) => (all(tokens[context]), None),
        Contexts::Behind(shared, own) => {
            let (shared, own) = (shared[context / own.len()], own[context % own.len()]);
            (all(shared + own), Some(shared))
        }
        Contexts::Between(ranges) => {
            let (least, most) = ranges[context];
            ((0..sequences).map(|_| (rng.random_range(least..=most), query_tokens)).collect(), None)
        }
        Contexts::Mixes(mixes) => {
            let mix = mixes[context];
            let part = |&(count, tokens, query_tokens): &(u32, u32, u32)| {
                std::iter::repeat_n((tokens, query_tokens), (count * mix.repeated) as usize)
            };
            (mix.parts.iter().flat_map(part).collect(), mix.shared)
        }
        Contexts::Levels(_) | Contexts::Trees(_) => {
            let leaves = levels.as_ref().map_or(0, |levels| levels[levels.len() - 1].len());
            (vec![(u32::MAX, query_tokens); leaves], None)
        }
    };
    sequences.shuffle(rng);
    Picked { sequences, shared, levels }
}

/// So many of the sequences, evenly spread, with that part of their tokens.
fn thin(picked: &Picked<'_>, kept: usize, divisor: u32, most_query_tokens: u32) -> Vec<Sequence> {
    let all = &picked.sequences;
    let one = |index: usize| {
        let (tokens, query_tokens) = all[index * all.len() / kept];
        let tokens = (tokens / divisor).max(1);
        (tokens, query_tokens.min(tokens).min(most_query_tokens))
    };
    (0..kept).map(one).collect()
}

/// Lays sequences out that share as the kind says, `shared` tokens at most.
fn sharing(
    sequences: &[Sequence],
    shared: Option<u32>,
    page_size: u32,
    kind: Kind,
    rng: &mut impl Rng,
) -> (OwnedBatch, Vec<u32>) {
    let count = sequences.len() as u32;
    let bits = count.next_power_of_two().trailing_zeros().max(1);
    let mut next_page = 0u32;
    let (mut lengths, mut tables): (Vec<u32>, Vec<Vec<u32>>) = (Vec::new(), Vec::new());
    for (index, &(tokens, _)) in (0u32..).zip(sequences) {
        let earlier = rng.random_range(0..index.max(1));
        let trunk = shared.unwrap_or(tokens / 4 * 3);
        let most = shared.unwrap_or(tokens);
        let uneven = |rng: &mut _| (earlier, Rng::random_range(rng, 0..=most));
        let mut length = tokens;
        let (parent, from_parent) = match kind {
            Kind::Star => (0, trunk),
            Kind::Halves => {
                let level = bits - index.trailing_zeros().min(bits - 1);
                (index & index.wrapping_sub(1), (u64::from(trunk) * u64::from(level) / u64::from(bits)) as u32)
            }
            Kind::Chain => {
                length = (u64::from(tokens) * u64::from(index + 1) / u64::from(count)).max(1) as u32;
                (index.saturating_sub(1), most)
            }
            Kind::Copies if index % 2 == 1 => {
                length = lengths[index as usize - 1];
                (index - 1, u32::MAX)
            }
            Kind::Loners if index % 2 == 1 => (0, 0),
            Kind::Loners => (0, trunk),
            Kind::EndsInside if index % 3 == 2 => {
                let of_parent: u32 = lengths[earlier as usize];
                length = (rng.random_range(0..=of_parent) / page_size * page_size).max(1);
                (earlier, u32::MAX)
            }
            Kind::Borders => {
                let beyond = *[0, 1, page_size - 1].choose(rng).expect("not empty");
                length = (tokens / page_size * page_size + beyond).max(1);
                uneven(rng)
            }
            Kind::Uneven | Kind::Copies | Kind::EndsInside => uneven(rng),
        };
        let mut table: Vec<u32> = Vec::new();
        if index > 0 {
            let (of_parent, pages): (u32, &Vec<u32>) = (lengths[parent as usize], &tables[parent as usize]);
            let is_inside = from_parent == u32::MAX && length <= of_parent;
            // A page that is not full is shared by those alone that have nothing behind it.
            let common = from_parent.min(of_parent).min(length) / page_size;
            let common = if is_inside { length.div_ceil(page_size) } else { common };
            table.extend_from_slice(&pages[..common as usize]);
        }
        while (table.len() as u32) < length.div_ceil(page_size) {
            table.push(next_page);
            next_page += 1;
        }
        lengths.push(length);
        tables.push(table);
    }
    let counts = sequences.iter().zip(&lengths).map(|(&(_, query_tokens), &length)| query_tokens.min(length)).collect();
    (OwnedBatch { page_size, num_pages: next_page, lengths, block_tables: tables }, counts)
}

/// Lays a tree out whose nodes have these lengths: so many of its leaves, evenly spread. Sequences share a page if all of it is in
/// nodes that they share.
fn of_levels(levels: &[&[u32]], kept: usize, divisor: u32, page_size: u32) -> OwnedBatch {
    let leaves = levels[levels.len() - 1].len();
    let mut ids: HashMap<(usize, usize, u32), u32> = HashMap::new();
    let (mut lengths, mut block_tables) = (Vec::new(), Vec::new());
    for leaf in (0..kept).map(|index| index * leaves / kept) {
        let node = |level: usize| leaf * levels[level].len() / leaves;
        let mut end = 0;
        let ends: Vec<u32> = (0..levels.len())
            .map(|level| {
                end += levels[level][node(level)].div_ceil(divisor);
                end
            })
            .collect();
        let page = |page: u32| {
            let level = ends.partition_point(|&end| end < (page + 1) * page_size).min(levels.len() - 1);
            let next = ids.len() as u32;
            *ids.entry((level, node(level), page)).or_insert(next)
        };
        block_tables.push((0..end.div_ceil(page_size)).map(page).collect());
        lengths.push(end);
    }
    OwnedBatch { page_size, num_pages: ids.len() as u32, lengths, block_tables }
}

/// Gives sequences and pages any order, the pool pages that nobody owns, and tables an entry that is none behind their last.
fn shuffle(batch: &mut OwnedBatch, counts: &mut Vec<u32>, rng: &mut impl Rng) {
    batch.num_pages += rng.random_range(1..4);
    let mut ids: Vec<u32> = (0..batch.num_pages).collect();
    ids.shuffle(rng);
    let (lengths, tables) = (std::mem::take(&mut batch.lengths), std::mem::take(&mut batch.block_tables));
    let mut sequences: Vec<_> = lengths.into_iter().zip(tables).zip(std::mem::take(counts)).collect();
    sequences.shuffle(rng);
    for ((length, mut table), count) in sequences {
        table.iter_mut().for_each(|page| *page = ids[*page as usize]);
        table.push(u32::MAX);
        batch.lengths.push(length);
        batch.block_tables.push(table);
        counts.push(count);
    }
}

#[cfg(test)]
mod tests {
    use super::super::ROWS;
    use super::*;
    use pat_rs::DecodeBatch;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const LARGE: Size =
        Size { cases: 16, flop: 1e13, elements: 1 << 33, oracle_flop: 0.0, query_tokens: DecodeBatch::MAX_TOKENS };

    fn row(name: &str) -> &'static Row {
        ROWS.iter().find(|row| row.name == name).unwrap()
    }

    #[test]
    fn forests_of_every_row_are_valid_and_as_long_as_it_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for row in ROWS {
            for (index, combination) in row.draw(16, &mut rng).into_iter().enumerate() {
                let kind = Kind::ALL[index % Kind::ALL.len()];
                let forest = draw(row, combination, kind, LARGE, &mut rng);
                let (batch, what) = (&forest.batch, format!("{}, {kind:?}", row.name));
                batch.view(&batch.rows()).unwrap();
                assert!(!forest.is_cut, "{what}");
                assert_eq!(batch.lengths.len(), forest.counts.len(), "{what}");
                let fits = |(&length, &count): (&u32, &u32)| count >= 1 && (count <= length || length == 0);
                assert!(batch.lengths.iter().zip(&forest.counts).all(fits), "{what}");
                if let (Contexts::Uniform(tokens), Kind::Uneven | Kind::Star | Kind::Halves | Kind::Loners) =
                    (row.contexts, kind)
                {
                    let expected = [0, tokens[combination.at[0]]];
                    assert!(batch.lengths.iter().all(|length| expected.contains(length)), "{what}");
                }
                let small = Size { flop: 1e7, elements: 1 << 21, query_tokens: 9, ..LARGE };
                let forest = draw(row, combination, kind, small, &mut rng);
                let shape = forest.problem.shape();
                let tokens: u32 = forest.batch.lengths.iter().zip(&forest.counts).map(|(l, n)| l * n).sum();
                assert!(tokens * shape.q_heads() * 2 * (shape.head_dim() + shape.v_head_dim()) <= 10_000_000, "{what}");
                assert!(forest.counts.iter().all(|&count| count <= 9), "{what}");
            }
        }
    }

    /// Part of its pages that a batch holds once.
    fn unique(kind: Kind) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let (batch, _) = sharing(&[(640, 1); 16], None, 16, kind, &mut rng);
        let pages: u32 = batch.lengths.iter().map(|length| length.div_ceil(16)).sum();
        batch.unique_pages() as f64 / f64::from(pages)
    }

    #[test]
    fn kinds_share_what_they_say() {
        // 30 of 40 pages of 16 sequences; of every other sequence.
        assert_eq!(unique(Kind::Star), f64::from(30 + 16 * 10) / 640.0);
        assert_eq!(unique(Kind::Loners), f64::from(30 + 8 * 10 + 8 * 40) / 640.0);
        // Pages 0 to 7 once, to 15 twice, to 22 four times, to 30 eight times, the others 16 times.
        assert_eq!(unique(Kind::Halves), f64::from(7 + 2 * 8 + 4 * 7 + 8 * 8 + 16 * 10) / 640.0);
        // The longest has all pages: lengths are 40 to 640.
        let chain = unique(Kind::Chain);
        assert!((0.1..0.2).contains(&chain), "{chain}");
        for kind in [Kind::Uneven, Kind::Copies, Kind::EndsInside, Kind::Borders] {
            let part = unique(kind);
            assert!((0.1..0.9).contains(&part), "{kind:?}: {part}");
        }
    }

    #[test]
    fn a_prefix_bounds_what_is_shared() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let row = row("behind a shared prefix");
        for combination in row.draw(24, &mut rng) {
            let forest = draw(row, combination, Kind::Star, LARGE, &mut rng);
            let Contexts::Behind(shared, own) = row.contexts else { panic!("{row:?}") };
            let (shared, own) = (shared[combination.at[0] / own.len()], own[combination.at[0] % own.len()]);
            let page_size = forest.batch.page_size;
            let sequences = row.sequences[combination.at[1]];
            let of_own = (shared + own).div_ceil(page_size) - shared / page_size;
            assert_eq!(forest.batch.unique_pages() as u32, shared / page_size + sequences * of_own);
        }
    }

    #[test]
    fn trees_by_levels_share_the_pages_that_lie_in_common_nodes() {
        let tree: &[&[u32]] = &[&[7, 7], &[9, 10, 11, 4], &[129, 2, 3, 4, 5, 6, 7, 128]];
        let batch = of_levels(tree, 8, 1, 1);
        assert_eq!(batch.lengths, [145, 18, 20, 21, 23, 24, 18, 139]);
        assert_eq!(batch.num_pages, 14 + 34 + 284);
        // Pages of 4: one is in each of both roots; of sequences 0 and 1, that have 16 tokens in common, 4.
        let batch = of_levels(tree, 8, 1, 4);
        let common = |a: usize, b: usize| {
            batch.block_tables[a].iter().zip(&batch.block_tables[b]).take_while(|(a, b)| a == b).count()
        };
        assert_eq!([common(0, 1), common(0, 2), common(0, 4), common(4, 7)], [4, 1, 0, 1]);
        let half = of_levels(tree, 4, 2, 1);
        assert_eq!(half.lengths, [4 + 5 + 65, 4 + 5 + 2, 4 + 6 + 3, 4 + 2 + 4]);
    }
}
