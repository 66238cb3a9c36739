//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].
//!
//! batch -> [`forest`] (who shares which pages) -> [`tiling`] (which sequences one CTA serves, how their KV is cut) ->
//! emit (streams, masks, order, slots) -> [`Plan`]. The cost model ([`cost`]) compares candidate tilings, from no sharing
//! at all to as many sequences per CTA as its tile has rows.

mod balance;
mod buffer;
mod capacity;
mod choice;
pub mod cost;
mod deal;
mod emit;
pub mod forest;
mod generation;
mod search;
mod sharing;
mod snapshot;
mod summary;
pub mod tiling;

use crate::{DecodeBatch, DeviceProfile, Error, Problem, Result, WindowedBatch};
pub use buffer::Plan;
use buffer::Records;
pub use capacity::PlanCapacity;
use choice::{TileChoices, is_wide_better, widths};
use cost::{CostModel, VariantTerms};
use emit::Emitter;
use forest::Forest;
pub use generation::PlanGeneration;
use pat_abi::TileVariant;
use search::Search;
use serde::Serialize;
pub use sharing::{ReadReason, SharedNodes, readers};
pub use snapshot::PlanChange;
use snapshot::Snapshot;
use std::sync::Arc;
pub use summary::{PlanSummary, VariantSummary};
use tiling::{Extent, RowTile, TilingRule};

/// How to plan: the default, changed field by field or by [`Self::with_mode`] and [`Self::with_variants`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// Which tiling to use.
    pub mode: PlanMode,
    /// Only these tile variants (where `None`, those that are best for the problem and the device).
    pub variants: Option<Vec<TileVariant>>,
}

impl PlanOptions {
    /// With another way of tiling.
    pub fn with_mode(self, mode: PlanMode) -> Self {
        Self { mode, ..self }
    }

    /// With these tile variants only.
    pub fn with_variants(self, variants: impl Into<Vec<TileVariant>>) -> Self {
        Self { variants: Some(variants.into()), ..self }
    }
}

impl From<PlanMode> for PlanOptions {
    fn from(mode: PlanMode) -> Self {
        Self::default().with_mode(mode)
    }
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

/// Makes plans for one problem on one device; keeps its scratch memory between calls, so that a step of a batch that
/// does not grow allocates nothing ([`Planner::plan_into`], [`Planner::advance`]), but where there is a sliding window.
#[derive(Clone, Debug)]
pub struct Planner {
    problem: Problem,
    /// Plans share it.
    profile: Arc<DeviceProfile>,
    options: PlanOptions,
    capacity: Option<PlanCapacity>,
    variants: [VariantTerms; TileVariant::ALL.len()],
    choices: TileChoices,
    forest: Forest,
    snapshot: Snapshot,
    scratch: Scratch,
    /// The plan that the members above are about.
    newest: Option<PlanGeneration>,
    /// How that plan's tiles were cut.
    rule: TilingRule,
}

#[derive(Clone, Debug, Default)]
struct Scratch {
    extents: Vec<Extent>,
    tiles: Vec<RowTile>,
    search: search::Scratch,
    emit: emit::Scratch,
    records: Records,
}

impl Planner {
    /// # Errors
    /// No kernel can compute `problem` on the device ([`crate::supports`]), the options name no variant or one whose kernels
    /// cannot, a fixed chunk is not a positive multiple of the page size, or the profile is not plausible
    /// ([`DeviceProfile::validate`]).
    pub fn new(problem: Problem, profile: DeviceProfile, options: PlanOptions) -> Result<Self> {
        profile.validate()?;
        let choices = TileChoices::new(&problem, &profile, &options)?;
        if let PlanMode::FixedChunk { tokens } = options.mode
            && (tokens == 0 || !tokens.is_multiple_of(problem.page_size()))
        {
            let expected = format!("a positive multiple of page_size = {}", problem.page_size());
            return Err(Error::invalid("fixed chunk", tokens, expected));
        }
        Ok(Self {
            problem,
            variants: VariantTerms::all(&profile, problem.shape()),
            profile: Arc::new(profile),
            options,
            capacity: None,
            choices,
            forest: Forest::default(),
            snapshot: Snapshot::default(),
            scratch: Scratch::default(),
            newest: None,
            rule: TilingRule::default(),
        })
    }

    /// Plans within `capacity` only: larger batches are refused, and among the tilings of a batch that fits those are
    /// chosen from that fit. At least the uncut ones do. `wgmma128` is then used only where it is forced
    /// ([`PlanOptions::variants`]): a captured graph would launch its kernel and `wgmma64`'s at every step.
    ///
    /// # Errors
    /// `max_items` is below `max_sequences`.
    pub fn with_capacity(self, capacity: PlanCapacity) -> Result<Self> {
        let capacity = Some(capacity.validated()?);
        Ok(Self { capacity, choices: self.choices.without_wide(), newest: None, ..self })
    }

    /// What plans are made for.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// The tile variants that plans may use.
    pub fn tile_variants(&self) -> Vec<TileVariant> {
        self.choices.variants()
    }

    /// The forest of the batch planned last.
    pub fn forest(&self) -> &Forest {
        &self.forest
    }

    /// The row tiles of the batch planned last, in forest order.
    pub fn tiles(&self) -> &[RowTile] {
        &self.scratch.tiles
    }

    /// The at most `most` largest kinds of shared nodes of the batch that `plan` is about, those first that save most where
    /// they are read once: how often they are read, and why.
    ///
    /// # Errors
    /// `plan` is not the one that this planner made last.
    pub fn shared_nodes(&self, plan: &Plan, most: usize) -> Result<Vec<SharedNodes>> {
        if self.newest != Some(plan.generation()) {
            return Err(Error::PlanMismatch {
                what: "the planner's last plan".into(),
                plan: format!("generation {}", plan.generation()),
                call: self.newest.map_or("none".into(), |newest| format!("generation {newest}")),
            });
        }
        let Scratch { extents, tiles, .. } = &self.scratch;
        let page_size = self.problem.page_size();
        let sharing = sharing::Sharing {
            forest: &self.forest,
            extents,
            tiles,
            rule: self.rule,
            widest: self.choices.in_use().widest(),
            mode: self.options.mode,
            page_size,
            page_bytes: u64::from(page_size) * self.problem.shape().kv_bytes_per_token(),
        };
        Ok(sharing.largest(most))
    }

    /// The profile plans are made for.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// What the cost model makes of a plan that was made elsewhere, to compare with: `packs`, each one work item per KV head,
    /// with `partials` partials in all, of a batch with `unique_pages` distinct pages.
    ///
    /// # Errors
    /// No tile holds a pack, or it has more than [`DecodeBatch::MAX_TOKENS`] tokens.
    pub fn predict_packs(&self, unique_pages: u64, packs: &[cost::Pack], partials: u64) -> Result<cost::Prediction> {
        let choice = &self.choices.usual;
        if let Some(pack) = packs.iter().find(|pack| !(1..=choice.widest()).contains(&pack.sequences)) {
            let expected = format!("1 to {}, what the largest tile has rows for", choice.widest());
            return Err(Error::invalid("sequences of a pack", pack.sequences, expected));
        }
        let (profile, shape, variants) = (&*self.profile, self.problem.shape(), &self.variants);
        let page_size = self.problem.page_size();
        let most_pages = DecodeBatch::MAX_TOKENS / page_size;
        if let Some(pack) = packs.iter().find(|pack| pack.pages > most_pages) {
            let expected = format!("at most {most_pages}, {} tokens", DecodeBatch::MAX_TOKENS);
            return Err(Error::invalid("pages of a pack", pack.pages, expected));
        }
        // Which pages are read again is not known: as if all were.
        let model = CostModel { profile, shape, page_size, variants, unique_pages, shared_pages: unique_pages };
        Ok(model.predict_packs(packs, partials, choice))
    }

    /// Plans a batch from scratch.
    ///
    /// # Errors
    /// The batch has pages of another size than the problem, the batch or (in the modes that leave no choice) the plan exceeds
    /// the capacity, or the plan would exceed what its records can express (2^31 rows, items, page ids, slots or bytes).
    pub fn plan(&mut self, batch: &DecodeBatch<'_>) -> Result<Plan> {
        let mut plan = Plan::empty(self.problem, self.profile.clone());
        self.plan_into(batch, &mut plan)?;
        Ok(plan)
    }

    /// As [`Self::plan`], in the memory of an earlier plan of any batch and shape.
    ///
    /// # Errors
    /// As [`Self::plan`]; `plan` is as before.
    pub fn plan_into(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<()> {
        match self.problem.visibility().window {
            None => self.plan_tokens(batch, &[], plan),
            Some(window) => {
                let windowed = WindowedBatch::new(batch, window);
                self.plan_tokens(&windowed.batch(), windowed.hidden_tokens(), plan)
            }
        }
    }

    /// Plans a batch from scratch, but for `hidden_tokens` where a window leaves no more of it
    /// ([`WindowedBatch::hidden_tokens`]).
    fn plan_tokens(&mut self, batch: &DecodeBatch<'_>, hidden_tokens: &[u32], plan: &mut Plan) -> Result<()> {
        self.check_batch(batch)?;
        self.newest = None;
        self.forest.build_windowed(batch, hidden_tokens);
        self.snapshot.take(batch, &self.forest);
        self.plan_forest(batch, hidden_tokens, plan)
    }

    /// Makes `plan`, the plan this planner made last, the plan of the next decode step: equal, bit for bit, to planning
    /// `batch` from scratch. Sequences may have grown or shrunk, got or lost pages, joined, left, or been permuted, and
    /// pages anywhere may have been replaced by others.
    ///
    /// `changed_rows`, where given, names the rows of the batch whose table entries *that were in use before* may differ
    /// (a row that only grew is not among them); with `None` all entries are compared. Lengths and appended entries are
    /// looked at in any case. A plan that this planner did not make last is planned from scratch, and so is one under a sliding
    /// window, which moves with every token.
    ///
    /// # Errors
    /// As [`Self::plan`]; or a changed row is not in the batch. `plan` is as before.
    pub fn advance(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        plan: &mut Plan,
    ) -> Result<PlanChange> {
        if self.newest != Some(plan.generation()) || self.problem.visibility().window.is_some() {
            self.plan_into(batch, plan)?;
            return Ok(PlanChange::Forest);
        }
        self.check_batch(batch)?;
        let change = self.snapshot.update(batch, changed_rows)?;
        match change {
            PlanChange::Nothing => {}
            PlanChange::Lengths => {
                let tails = &self.scratch.records.tails;
                plan.change_lengths(self.snapshot.grown_rows().map(|(row, tokens)| (tails[row as usize], tokens)));
                self.newest = Some(plan.generation());
            }
            PlanChange::Pages => self.plan_forest(batch, &[], plan)?,
            PlanChange::Forest => self.plan_into(batch, plan)?,
        }
        Ok(change)
    }

    /// Refuses a batch that this planner can make no plan of, whatever the plan.
    fn check_batch(&self, batch: &DecodeBatch<'_>) -> Result<()> {
        let page_size = self.problem.page_size();
        if batch.page_size() != page_size {
            let expected = format!("the planner's page_size = {page_size}");
            return Err(Error::invalid("page_size of the batch", batch.page_size(), expected));
        }
        self.capacity.map_or(Ok(()), |capacity| capacity.check_batch(batch))
    }

    /// Plans a batch whose forest is there.
    fn plan_forest(&mut self, batch: &DecodeBatch<'_>, hidden_tokens: &[u32], plan: &mut Plan) -> Result<()> {
        self.newest = None;
        let (shape, page_size) = (self.problem.shape(), self.problem.page_size());
        let choices = &mut self.choices;
        let Scratch { extents, tiles, search: search_scratch, emit: emit_scratch, records } = &mut self.scratch;
        tiling::measure(batch, &self.forest, extents);
        let unique_pages = extents.iter().map(|extent| u64::from(extent.pages - extent.shared)).sum();
        let repeated_pages = extents.iter().map(|extent| u64::from(extent.shared)).sum();
        let shared_pages = self.forest.nodes().iter().map(|node| u64::from(node.page_count())).sum();
        let model = CostModel {
            profile: &self.profile,
            shape,
            page_size,
            variants: &self.variants,
            unique_pages,
            shared_pages,
        };
        let longest = extents.iter().map(|extent| extent.pages).max().unwrap_or(0);
        let capacity = self.capacity.as_ref();
        let search = Search { model: &model, choice: &choices.usual, extents, longest, capacity };
        let widest = choices.usual.widest();
        let (mut rule, mut prediction) = match self.options.mode {
            PlanMode::FixedChunk { tokens } => {
                let rule = TilingRule { most_sequences: 1, chunk_pages: tokens / page_size, exact: true };
                (rule, search.predict(rule, search_scratch))
            }
            PlanMode::Flat => search.best([1], search_scratch),
            PlanMode::PerNode | PlanMode::Packed => search.best([widest], search_scratch),
            PlanMode::Auto => search.best(std::iter::once(1).chain(widths(widest)), search_scratch),
        };
        let mut takes_wide = false;
        if let Some(wide) = choices.wide_for(&prediction) {
            let (wide_rule, wide_prediction) =
                Search { choice: wide, ..search }.best(widths(wide.widest()), search_scratch);
            takes_wide = is_wide_better(&wide_prediction, &prediction);
            if takes_wide {
                (rule, prediction) = (wide_rule, wide_prediction);
            }
        }
        choices.take(takes_wide);
        let choice = choices.in_use();
        tiles.clear();
        tiles.reserve(extents.len());
        tiling::cut(extents, rule, |tile| {
            let key_tile_pages = choice.key_tile_pages(choice.variant(tile.sequence_count()));
            let chunks = rule.chunks(tile.page_count, key_tile_pages);
            tiles.push(RowTile { chunk_pages: chunks.pages, chunks: chunks.count, ..tile });
        });
        let emitter = Emitter {
            shape,
            batch,
            hidden_tokens,
            forest: &self.forest,
            extents,
            choice,
            per_node: self.options.mode == PlanMode::PerNode,
        };
        emitter.emit(tiles, emit_scratch, records)?;
        if let Some(capacity) = &self.capacity {
            capacity.check_records(records)?;
        }
        plan.write(self.problem, &self.profile, batch, records, repeated_pages, prediction)?;
        self.newest = Some(plan.generation());
        self.rule = rule;
        Ok(())
    }
}
