//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].
//!
//! batch -> [`forest`] (who shares which pages) -> [`packs`] (which nodes are read once) -> split (tile variant, KV
//! chunks) -> emit (order, slots) -> [`Plan`]. The cost model ([`cost`]) compares candidates: no sharing at all, every
//! node its own pack, and nodes folded where a partial would cost more than reading again.

mod buffer;
pub mod cost;
mod emit;
pub mod forest;
mod generation;
pub mod packs;
mod split;
mod summary;

use crate::{AttentionShape, DecodeBatch, DeviceProfile, Error, Result};
pub use buffer::{Plan, PlanParts};
use cost::{CostModel, Prediction, Split};
use forest::Forest;
pub use generation::PlanGeneration;
use packs::Pack;
use pat_abi::TileVariant;
use serde::Serialize;
pub use summary::{PlanSummary, VariantSummary};

/// How to plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Which packing to use.
    pub mode: PlanMode,
    /// Only these tile variants (where `None`, all that the device and the page size allow and that are the best of
    /// their kind).
    pub variants: Option<Vec<TileVariant>>,
}

/// Which packing to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanMode {
    /// What the cost model predicts to be fastest.
    #[default]
    Auto,
    /// No sharing: every sequence reads its own KV.
    Flat,
    /// Every node of the forest its own pack (PAT's naive form).
    PerNode,
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
    packs: Vec<Pack>,
    splits: Vec<Split>,
    counts: Vec<u32>,
    folded: Vec<bool>,
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

    /// The packs of the batch planned last; ancestors before descendants.
    pub fn packs(&self) -> &[Pack] {
        &self.scratch.packs
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
        self.forest.build(batch);
        self.scratch.counts.resize(batch.sequence_count(), 0);
        let model = CostModel {
            profile: &self.profile,
            shape: self.shape,
            page_size: batch.page_size(),
            unique_kv_bytes: unique_tokens(batch, &self.forest) as f64 * self.shape.kv_bytes_per_token() as f64,
        };
        let nodes = self.forest.nodes().len();
        let Scratch { packs, splits, counts, folded } = &mut self.scratch;
        let mut candidate = |folded: &[bool], packs: &mut Vec<Pack>, splits: &mut Vec<Split>| {
            packs::build(batch, &self.forest, folded, packs);
            split::best(&model, &variants, self.forest.order(), packs, counts, splits)
        };
        let prediction = match self.options.mode {
            PlanMode::Flat => {
                folded.clear();
                folded.resize(nodes, true);
                candidate(folded, packs, splits)
            }
            PlanMode::PerNode => {
                folded.clear();
                folded.resize(nodes, false);
                candidate(folded, packs, splits)
            }
            PlanMode::Auto => {
                let mut best: Option<(Option<f64>, Prediction)> = None;
                for keep_above in [None, Some(0.0), Some(1.0), Some(4.0)] {
                    // Without a shared page all candidates are the same plan.
                    if nodes == 0 && best.is_some() {
                        break;
                    }
                    fold(&self.forest, batch.page_size(), self.shape, keep_above, folded);
                    let prediction = candidate(folded, packs, splits);
                    if best.is_none_or(|(_, best)| prediction.total_us() < best.total_us()) {
                        best = Some((keep_above, prediction));
                    }
                }
                let (keep_above, _) = best.expect("the flat plan is always a candidate");
                fold(&self.forest, batch.page_size(), self.shape, keep_above, folded);
                candidate(folded, packs, splits)
            }
            PlanMode::FixedChunk { tokens } => {
                if !tokens.is_multiple_of(batch.page_size()) {
                    let expected = format!("a multiple of page_size = {}", batch.page_size());
                    return Err(Error::invalid("fixed chunk", tokens, expected));
                }
                folded.clear();
                folded.resize(nodes, true);
                packs::build(batch, &self.forest, folded, packs);
                split::split_all(&model, &variants, packs, tokens, true, splits);
                let rows = split::partial_rows(self.forest.order(), packs, splits, counts, self.shape.q_heads());
                model.predict(packs, splits, rows)
            }
        };
        let parts = emit::emit(self.shape, batch, &self.forest, packs, splits, counts)?;
        let mut plan = Plan::assemble(self.shape, batch, &parts)?;
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
        // Leaf16 is for many short leaves, which the choice by rows alone cannot know.
        Ok(possible.into_iter().filter(|&variant| variant != TileVariant::Leaf16).collect())
    }
}

/// Tokens of distinct pages: each node's once, and what lies below once per sequence.
fn unique_tokens(batch: &DecodeBatch<'_>, forest: &Forest) -> u64 {
    let shared: u64 = forest.nodes().iter().map(|node| u64::from(node.page_count())).sum();
    let private: u64 = forest
        .order()
        .iter()
        .map(|&sequence| {
            let shared_end = forest.innermost(sequence).map_or(0, |node| forest.nodes()[node as usize].page_end);
            u64::from(batch.length(sequence as usize)) - u64::from(shared_end) * u64::from(batch.page_size())
        })
        .sum();
    shared * u64::from(batch.page_size()) + private
}

/// Decides which nodes are folded: those whose pack would not save more than `keep_above` times what it costs. Saved are
/// the KV bytes that the sequences would otherwise read again; it costs a partial, written and read, per row. `None` folds
/// everything (no sharing).
fn fold(forest: &Forest, page_size: u32, shape: AttentionShape, keep_above: Option<f64>, folded: &mut Vec<bool>) {
    folded.clear();
    folded.extend(forest.nodes().iter().map(|node| {
        let Some(factor) = keep_above else { return true };
        let sequences = f64::from(node.sequence_count());
        let tokens = f64::from(node.page_count()) * f64::from(page_size);
        let saved_bytes = (sequences - 1.0) * tokens * shape.kv_bytes_per_token() as f64;
        let partial_bytes = sequences * f64::from(shape.q_heads()) * 2.0 * (4.0 * f64::from(shape.head_dim()) + 4.0);
        saved_bytes < factor * partial_bytes
    }));
}
