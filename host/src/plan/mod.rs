//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].
//!
//! batch -> [`forest`] (who shares which pages) -> [`tiling`] (which sequences one CTA serves, how their KV is cut) ->
//! emit (streams, masks, order, slots) -> [`Plan`]. The cost model ([`cost`]) compares candidate tilings, from no sharing
//! at all to as many sequences per CTA as its tile has rows.

mod buffer;
pub mod cost;
mod emit;
pub mod forest;
mod generation;
mod snapshot;
mod summary;
pub mod tiling;

use crate::{AttentionShape, DecodeBatch, DeviceProfile, Error, Result};
pub use buffer::{Plan, PlanParts};
use cost::{CostModel, Prediction, Work};
use emit::Emitter;
use forest::Forest;
pub use generation::PlanGeneration;
use pat_abi::{PageMask, TileVariant};
use serde::Serialize;
pub use summary::{PlanSummary, VariantSummary};
use tiling::{Extent, RowTile, TilingRule, choose_variant};

/// How to plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Which tiling to use.
    pub mode: PlanMode,
    /// Only these tile variants (where `None`, all that the device and the page size allow and that are the best of
    /// their kind).
    pub variants: Option<Vec<TileVariant>>,
}

/// Which tiling to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanMode {
    /// What the cost model predicts to be fastest.
    #[default]
    Auto,
    /// No sharing: every sequence reads its own KV.
    Flat,
    /// As many sequences per CTA as its tile has rows, and no item with pages of more than one node (PAT's naive form).
    PerNode,
    /// As many sequences per CTA as its tile has rows, each CTA along the whole path of its sequences.
    Packed,
    /// No sharing, and KV split every `tokens` tokens, so that a sequence's bits do not depend on the rest of the batch.
    FixedChunk {
        /// Chunk length, a positive multiple of the page size.
        tokens: u32,
    },
}

/// Makes plans for one model shape on one device; keeps its scratch memory between calls.
#[derive(Clone, Debug)]
pub struct Planner {
    shape: AttentionShape,
    profile: DeviceProfile,
    options: PlanOptions,
    forest: Forest,
    scratch: Scratch,
}

#[derive(Clone, Debug, Default)]
struct Scratch {
    extents: Vec<Extent>,
    tiles: Vec<RowTile>,
    candidate: Vec<RowTile>,
    work: Vec<Work>,
    emit: emit::Scratch,
    parts: PlanParts,
}

impl Planner {
    /// # Errors
    /// The options name no variant, one that the device cannot run, or a chunk of 0 tokens.
    pub fn new(shape: AttentionShape, profile: DeviceProfile, options: PlanOptions) -> Result<Self> {
        if let Some(variants) = &options.variants {
            // A page size every variant supports, to ask for the device alone.
            let possible = profile.variants(16);
            if variants.is_empty() {
                return Err(Error::invalid("variants", "none", "at least one tile variant"));
            }
            if let Some(variant) = variants.iter().find(|variant| !possible.contains(variant)) {
                let names: Vec<_> = possible.iter().map(|v| v.name()).collect();
                let expected = format!("one that {} can run: {}", profile.name, names.join(", "));
                return Err(Error::invalid("variants", variant.name(), expected));
            }
        }
        if options.mode == (PlanMode::FixedChunk { tokens: 0 }) {
            return Err(Error::invalid("fixed chunk", 0, "at least one page of tokens"));
        }
        Ok(Self { shape, profile, options, forest: Forest::default(), scratch: Scratch::default() })
    }

    /// The forest of the batch planned last.
    pub fn forest(&self) -> &Forest {
        &self.forest
    }

    /// The row tiles of the batch planned last, in forest order.
    pub fn tiles(&self) -> &[RowTile] {
        &self.scratch.tiles
    }

    /// The profile plans are made for.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// Plans a batch from scratch.
    ///
    /// # Errors
    /// The forced variants cannot read pages of the batch's size, a fixed chunk is not a multiple of the page size, or
    /// the plan would exceed what its records can express (2^31 rows, items, slots or bytes).
    pub fn plan(&mut self, batch: &DecodeBatch<'_>) -> Result<Plan> {
        let variants = self.variants(batch.page_size())?;
        let exact_tokens = match self.options.mode {
            PlanMode::FixedChunk { tokens } if !tokens.is_multiple_of(batch.page_size()) => {
                let expected = format!("a multiple of page_size = {}", batch.page_size());
                return Err(Error::invalid("fixed chunk", tokens, expected));
            }
            PlanMode::FixedChunk { tokens } => Some(tokens),
            _ => None,
        };
        if batch.page_size() > PageMask::MAX_TOKENS {
            let expected = format!("at most {} tokens", PageMask::MAX_TOKENS);
            return Err(Error::invalid("page_size", batch.page_size(), expected));
        }
        self.forest.build(batch);
        let Scratch { extents, tiles, candidate, work, emit, parts } = &mut self.scratch;
        tiling::measure(batch, &self.forest, extents);
        let unique_pages: u64 = extents.iter().map(|extent| u64::from(extent.pages - extent.shared)).sum();
        let unique_tokens = unique_pages * u64::from(batch.page_size()) - missing_tokens(batch);
        let model = CostModel {
            profile: &self.profile,
            shape: self.shape,
            page_size: batch.page_size(),
            unique_kv_bytes: unique_tokens as f64 * self.shape.kv_bytes_per_token() as f64,
        };
        let group = self.shape.group();
        let most_rows = variants.iter().map(|variant| variant.rows()).max().unwrap_or(0);
        let cut = |rule: TilingRule, tiles: &mut Vec<RowTile>| {
            let finish = |tile: &mut RowTile| {
                tile.variant = choose_variant(&variants, tile.sequence_count() * group);
                tile.split(rule, batch.page_size());
            };
            tiling::cut(extents, rule, finish, tiles);
        };
        let prediction = if let Some(tokens) = exact_tokens {
            let chunk_pages = tokens / batch.page_size();
            cut(TilingRule { most_sequences: 1, chunk_pages, exact: true }, tiles);
            model.predict(tiles, work)
        } else {
            let widest = (most_rows / group).max(1);
            let widths = match self.options.mode {
                PlanMode::Flat => &[1][..],
                PlanMode::PerNode | PlanMode::Packed => &[widest][..],
                _ => &[1, widest.div_ceil(4), widest.div_ceil(2), widest][..],
            };
            let mut best: Option<Prediction> = None;
            for (index, &most_sequences) in widths.iter().enumerate() {
                if widths[..index].contains(&most_sequences) {
                    continue;
                }
                let mut rule = TilingRule { most_sequences, chunk_pages: u32::MAX, exact: false };
                let mut even_pages = 0;
                for waves in 0..=MOST_WAVES {
                    if waves > 0 {
                        // So that every slot gets this many items, if all were equal.
                        let key_tile = (LEAST_CHUNK_TOKENS / batch.page_size()).max(1);
                        let pages = u32::try_from(u64::div_ceil(even_pages, waves)).unwrap_or(u32::MAX);
                        let chunk_pages = pages.max(key_tile);
                        if chunk_pages >= rule.chunk_pages {
                            continue;
                        }
                        rule.chunk_pages = chunk_pages;
                    }
                    cut(rule, candidate);
                    let prediction = model.predict(candidate, work);
                    if waves == 0 {
                        let pages = candidate.iter().map(|tile| u64::from(tile.page_count)).sum();
                        even_pages = candidate.first().map_or(0, |tile| model.pages_per_slot(pages, tile.variant));
                    }
                    if best.is_none_or(|best| prediction.total_us() < best.total_us()) {
                        best = Some(prediction);
                        std::mem::swap(tiles, candidate);
                    }
                }
            }
            best.expect("the first width is always tried")
        };
        let emitter = Emitter {
            shape: self.shape,
            batch,
            forest: &self.forest,
            extents,
            variants: &variants,
            per_node: self.options.mode == PlanMode::PerNode,
        };
        emitter.emit(tiles, emit, parts)?;
        let mut plan = Plan::assemble(self.shape, batch, parts)?;
        plan.set_prediction(prediction, model.unique_kv_bytes as u64);
        Ok(plan)
    }

    /// Tile variants to choose from for this page size.
    fn variants(&self, page_size: u32) -> Result<Vec<TileVariant>> {
        let possible = self.profile.variants(page_size);
        if let Some(forced) = &self.options.variants {
            if let Some(variant) = forced.iter().find(|variant| !possible.contains(variant)) {
                let expected = format!("a page size that {} can read", variant.name());
                return Err(Error::invalid("page_size", page_size, expected));
            }
            return Ok(forced.clone());
        }
        // The wgmma stream serves leaves as fast as the narrow tiles do, and shared nodes in the same launch.
        if possible.contains(&TileVariant::Wgmma64) {
            return Ok(vec![TileVariant::Wgmma64]);
        }
        if possible.is_empty() {
            let got = format!("compute capability {}", self.profile.compute_capability);
            return Err(Error::invalid("device profile", got, "8.0 or later"));
        }
        Ok(possible)
    }
}

/// Waves of equal items up to which chunk lengths are tried.
const MOST_WAVES: u64 = 6;

/// Shortest chunk that is tried: a CTA's fixed costs are those of a few key tiles.
const LEAST_CHUNK_TOKENS: u32 = 128;

/// Tokens that the last pages of all sequences are short of full.
fn missing_tokens(batch: &DecodeBatch<'_>) -> u64 {
    let page_size = u64::from(batch.page_size());
    (0..batch.sequence_count())
        .map(|sequence| u64::from(batch.length(sequence)))
        .map(|length| length.next_multiple_of(page_size) - length)
        .sum()
}
