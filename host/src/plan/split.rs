//! Tile variant and KV split of every pack.

use super::cost::{CostModel, Prediction, Split};
use super::packs::Pack;
use pat_abi::TileVariant;

/// Chunk lengths that are tried, in tokens; the planner takes the one with the best prediction.
const CHUNK_TOKENS: [u32; 8] = [u32::MAX, 8192, 4096, 2048, 1024, 512, 256, 128];

/// The smallest allowed tile that holds the rows, else the largest.
pub(super) fn choose_variant(variants: &[TileVariant], rows: u32) -> TileVariant {
    let fitting = variants.iter().copied().filter(|v| v.rows() >= rows).min_by_key(|v| v.rows());
    fitting.or_else(|| variants.iter().copied().max_by_key(|v| v.rows())).expect("at least one variant is allowed")
}

/// Splits every pack into chunks of about `chunk_tokens` tokens. Depends on page counts, not on tokens: the split mostly
/// stays what it is from step to step.
pub(super) fn split_all(
    model: &CostModel<'_>,
    variants: &[TileVariant],
    packs: &[Pack],
    chunk_tokens: u32,
    exact: bool,
    splits: &mut Vec<Split>,
) {
    splits.clear();
    splits.extend(packs.iter().map(|pack| {
        let rows = pack.query_count() * model.shape.group();
        let variant = choose_variant(variants, rows);
        let most_pages = (chunk_tokens / model.page_size).max(1);
        let mut chunks = pack.page_count().div_ceil(most_pages);
        let mut chunk_pages = most_pages;
        if !exact {
            // Chunks of equal length, rounded up to whole tiles.
            let tile_pages = (variant.keys() / model.page_size).max(1);
            chunk_pages = pack.page_count().div_ceil(chunks).next_multiple_of(tile_pages);
            chunks = pack.page_count().div_ceil(chunk_pages);
        }
        Split { variant, row_tiles: rows.div_ceil(variant.rows()), chunk_pages, chunks }
    }));
}

/// Rows of partials: every row of a sequence with two or more of them. `counts` is scratch, one entry per batch row.
pub(super) fn partial_rows(order: &[u32], packs: &[Pack], splits: &[Split], counts: &mut [u32], q_heads: u32) -> u64 {
    counts.fill(0);
    for (pack, split) in packs.iter().zip(splits) {
        for &sequence in &order[pack.order_begin as usize..pack.order_end as usize] {
            counts[sequence as usize] += split.chunks;
        }
    }
    counts.iter().filter(|&&count| count > 1).map(|&count| u64::from(count)).sum::<u64>() * u64::from(q_heads)
}

/// The best of the chunk lengths by prediction; `splits` holds its split on return.
pub(super) fn best(
    model: &CostModel<'_>,
    variants: &[TileVariant],
    order: &[u32],
    packs: &[Pack],
    counts: &mut [u32],
    splits: &mut Vec<Split>,
) -> Prediction {
    let longest = packs.iter().map(|pack| pack.page_count() * model.page_size).max().unwrap_or(0);
    let mut chosen: Option<(u32, Prediction)> = None;
    for chunk_tokens in CHUNK_TOKENS {
        if chunk_tokens != u32::MAX && chunk_tokens >= longest {
            continue;
        }
        split_all(model, variants, packs, chunk_tokens, false, splits);
        let rows = partial_rows(order, packs, splits, counts, model.shape.q_heads());
        let prediction = model.predict(packs, splits, rows);
        if chosen.is_none_or(|(_, best)| prediction.total_us() < best.total_us()) {
            chosen = Some((chunk_tokens, prediction));
        }
    }
    let (chunk_tokens, prediction) = chosen.expect("the unsplit plan is always tried");
    split_all(model, variants, packs, chunk_tokens, false, splits);
    prediction
}
