//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].
//!
//! batch -> [`forest`] (who shares which pages) -> [`tiling`] (which sequences one CTA serves, how their KV is cut) ->
//! emit (streams, masks, order, slots) -> [`Plan`]. The cost model ([`cost`]) compares candidate tilings, from no sharing
//! at all to as many sequences per CTA as its tile has rows.

mod balance;
mod buffer;
mod capacity;
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

use crate::{AttentionShape, DecodeBatch, DeviceProfile, Error, Result};
pub use buffer::Plan;
use buffer::Records;
pub use capacity::PlanCapacity;
use cost::{CostModel, VariantTerms};
use emit::Emitter;
use forest::Forest;
pub use generation::PlanGeneration;
use pat_abi::{PageMask, TileVariant};
use search::Search;
use serde::Serialize;
pub use sharing::{ReadReason, SharedNodes, readers};
pub use snapshot::PlanChange;
use snapshot::Snapshot;
use std::sync::Arc;
pub use summary::{PlanSummary, VariantSummary};
use tiling::{Extent, RowTile, TileChoice, TilingRule};

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

/// Makes plans for one model shape on one device; keeps its scratch memory between calls, so that a step of a batch that
/// does not grow allocates nothing ([`Planner::plan_into`], [`Planner::advance`]).
#[derive(Clone, Debug)]
pub struct Planner {
    shape: AttentionShape,
    /// Plans share it.
    profile: Arc<DeviceProfile>,
    options: PlanOptions,
    capacity: Option<PlanCapacity>,
    variants: [VariantTerms; TileVariant::ALL.len()],
    /// For the page size of the batch planned last.
    choices: Option<TileChoices>,
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
    /// The options name no variant, one that the device cannot run, or a chunk of 0 tokens; or the profile is not plausible
    /// ([`DeviceProfile::validate`]).
    pub fn new(shape: AttentionShape, profile: DeviceProfile, options: PlanOptions) -> Result<Self> {
        profile.validate()?;
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
        Ok(Self {
            shape,
            variants: VariantTerms::all(&profile, shape),
            profile: Arc::new(profile),
            options,
            capacity: None,
            choices: None,
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
        Ok(Self { capacity: Some(capacity.validated()?), choices: None, newest: None, ..self })
    }

    /// The tile variants that plans for pages of `page_size` tokens may use.
    ///
    /// # Errors
    /// As [`Self::plan`], of the page size.
    pub fn tile_variants(&self, page_size: u32) -> Result<Vec<TileVariant>> {
        let TileChoices { usual, wide, .. } = self.tile_choices(page_size)?;
        let mut variants: Vec<_> = usual.variants().chain(wide.iter().flat_map(TileChoice::variants)).collect();
        variants.sort_unstable();
        Ok(variants)
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
        let choices = self.choices.as_ref().filter(|_| self.newest == Some(plan.generation()));
        let choices = choices.ok_or_else(|| Error::PlanMismatch {
            what: "the planner's last plan".into(),
            plan: format!("generation {}", plan.generation()),
            call: self.newest.map_or("none".into(), |newest| format!("generation {newest}")),
        })?;
        let Scratch { extents, tiles, .. } = &self.scratch;
        let page_bytes = u64::from(plan.page_size()) * self.shape.kv_bytes_per_token();
        let sharing = sharing::Sharing {
            forest: &self.forest,
            extents,
            tiles,
            rule: self.rule,
            widest: choices.in_use().widest(),
            mode: self.options.mode,
            page_size: plan.page_size(),
            page_bytes,
        };
        Ok(sharing.largest(most))
    }

    /// The profile plans are made for.
    pub fn profile(&self) -> &DeviceProfile {
        &self.profile
    }

    /// What the cost model makes of a plan that was made elsewhere, to compare with: `packs`, each one work item per KV head,
    /// with `partials` partials in all, of a batch with `unique_pages` distinct pages of `page_size` tokens.
    ///
    /// # Errors
    /// As [`Self::plan`], of the page size; or no tile holds a pack.
    pub fn predict_packs(
        &self,
        page_size: u32,
        unique_pages: u64,
        packs: &[cost::Pack],
        partials: u64,
    ) -> Result<cost::Prediction> {
        let choice = self.tile_choices(page_size)?.usual;
        if let Some(pack) = packs.iter().find(|pack| !(1..=choice.widest()).contains(&pack.sequences)) {
            let expected = format!("1 to {}, what the largest tile has rows for", choice.widest());
            return Err(Error::invalid("sequences of a pack", pack.sequences, expected));
        }
        let (profile, shape, variants) = (&*self.profile, self.shape, &self.variants);
        // Which pages are read again is not known: as if all were.
        let model = CostModel { profile, shape, page_size, variants, unique_pages, shared_pages: unique_pages };
        Ok(model.predict_packs(packs, partials, &choice))
    }

    /// Plans a batch from scratch.
    ///
    /// # Errors
    /// The forced variants cannot read pages of the batch's size, no variant holds the query heads of one KV head, a fixed
    /// chunk is not a multiple of the page size, pages have more than 65,536 tokens, the batch or (in the modes that leave
    /// no choice) the plan exceeds the capacity, or the plan would exceed what its records can express (2^31 rows, items,
    /// page ids, slots or bytes).
    pub fn plan(&mut self, batch: &DecodeBatch<'_>) -> Result<Plan> {
        let mut plan = Plan::empty(self.shape, self.profile.clone());
        self.plan_into(batch, &mut plan)?;
        Ok(plan)
    }

    /// As [`Self::plan`], in the memory of an earlier plan of any batch and shape.
    ///
    /// # Errors
    /// As [`Self::plan`]; `plan` is as before.
    pub fn plan_into(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<()> {
        self.newest = None;
        self.forest.build(batch);
        self.snapshot.take(batch, &self.forest);
        self.plan_forest(batch, plan)
    }

    /// Makes `plan`, the plan this planner made last, the plan of the next decode step: equal, bit for bit, to planning
    /// `batch` from scratch. Sequences may have grown or shrunk, got or lost pages, joined, left, or been permuted, and
    /// pages anywhere may have been replaced by others.
    ///
    /// `changed_rows`, where given, names the rows of the batch whose table entries *that were in use before* may differ
    /// (a row that only grew is not among them); with `None` all entries are compared. Lengths and appended entries are
    /// looked at in any case. A plan that this planner did not make last is planned from scratch.
    ///
    /// # Errors
    /// As [`Self::plan`]; or a changed row is not in the batch. `plan` is as before.
    pub fn advance(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        plan: &mut Plan,
    ) -> Result<PlanChange> {
        if self.newest != Some(plan.generation()) {
            self.plan_into(batch, plan)?;
            return Ok(PlanChange::Forest);
        }
        let change = self.snapshot.update(batch, changed_rows)?;
        match change {
            PlanChange::Nothing => {}
            PlanChange::Lengths => {
                let tails = &self.scratch.records.tails;
                plan.change_lengths(self.snapshot.grown_rows().map(|(row, tokens)| (tails[row as usize], tokens)));
                self.newest = Some(plan.generation());
            }
            PlanChange::Pages => self.plan_forest(batch, plan)?,
            PlanChange::Forest => self.plan_into(batch, plan)?,
        }
        Ok(change)
    }

    /// Plans a batch whose forest is there.
    fn plan_forest(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<()> {
        self.newest = None;
        let page_size = batch.page_size();
        if let Some(capacity) = &self.capacity {
            capacity.check_batch(batch)?;
        }
        let exact_tokens = match self.options.mode {
            PlanMode::FixedChunk { tokens } if !tokens.is_multiple_of(page_size) => {
                let expected = format!("a multiple of page_size = {page_size}");
                return Err(Error::invalid("fixed chunk", tokens, expected));
            }
            PlanMode::FixedChunk { tokens } => Some(tokens),
            _ => None,
        };
        let choices = match self.choices.take() {
            Some(choices) if choices.usual.page_size() == page_size => choices,
            _ => self.tile_choices(page_size)?,
        };
        let choices = self.choices.insert(choices);
        let Scratch { extents, tiles, search: search_scratch, emit: emit_scratch, records } = &mut self.scratch;
        tiling::measure(batch, &self.forest, extents);
        let unique_pages = extents.iter().map(|extent| u64::from(extent.pages - extent.shared)).sum();
        let repeated_pages = extents.iter().map(|extent| u64::from(extent.shared)).sum();
        let shared_pages = self.forest.nodes().iter().map(|node| u64::from(node.page_count())).sum();
        let model = CostModel {
            profile: &self.profile,
            shape: self.shape,
            page_size,
            variants: &self.variants,
            unique_pages,
            shared_pages,
        };
        let longest = extents.iter().map(|extent| extent.pages).max().unwrap_or(0);
        let capacity = self.capacity.as_ref();
        let search = Search { model: &model, choice: &choices.usual, extents, longest, capacity };
        let widest = choices.usual.widest();
        let (mut rule, mut prediction) = match (self.options.mode, exact_tokens) {
            (_, Some(tokens)) => {
                let rule = TilingRule { most_sequences: 1, chunk_pages: tokens / page_size, exact: true };
                (rule, search.predict(rule, search_scratch))
            }
            (PlanMode::Flat, _) => search.best([1], search_scratch),
            (PlanMode::PerNode | PlanMode::Packed, _) => search.best([widest], search_scratch),
            _ => search.best(std::iter::once(1).chain(widths(widest)), search_scratch),
        };
        choices.is_wide_in_use = false;
        if let Some(wide) = choices.wide.as_ref().filter(|_| prediction.is_bound_by_tensor_cores()) {
            let (wide_rule, wide_prediction) =
                Search { choice: wide, ..search }.best(widths(wide.widest()), search_scratch);
            if wide_prediction.is_worth_wider_tiles_than(&prediction) {
                (rule, prediction) = (wide_rule, wide_prediction);
                choices.is_wide_in_use = true;
            }
        }
        let choice = choices.in_use();
        tiles.clear();
        tiles.reserve(extents.len());
        tiling::cut(extents, rule, |tile| {
            let key_tile_pages = choice.key_tile_pages(choice.variant(tile.sequence_count()));
            let chunks = rule.chunks(tile.page_count, key_tile_pages);
            tiles.push(RowTile { chunk_pages: chunks.pages, chunks: chunks.count, ..tile });
        });
        let emitter = Emitter {
            shape: self.shape,
            batch,
            forest: &self.forest,
            extents,
            choice,
            per_node: self.options.mode == PlanMode::PerNode,
        };
        emitter.emit(tiles, emit_scratch, records)?;
        if let Some(capacity) = &self.capacity {
            capacity.check_records(records)?;
        }
        plan.write(self.shape, &self.profile, batch, records, repeated_pages, prediction)?;
        self.newest = Some(plan.generation());
        self.rule = rule;
        Ok(())
    }

    /// Tile variants to choose from for this page size.
    ///
    /// # Errors
    /// A forced variant cannot read such pages, or none holds the rows of a KV head.
    fn tile_choices(&self, page_size: u32) -> Result<TileChoices> {
        let only = |usual| TileChoices { usual, wide: None, is_wide_in_use: false };
        if page_size > PageMask::MAX_TOKENS {
            let expected = format!("at most {} tokens", PageMask::MAX_TOKENS);
            return Err(Error::invalid("page_size", page_size, expected));
        }
        let possible = self.profile.variants(page_size);
        let group = self.shape.group();
        if let Some(forced) = &self.options.variants {
            if let Some(variant) = forced.iter().find(|variant| !possible.contains(variant)) {
                let expected = format!("a page size that {} can read", variant.name());
                return Err(Error::invalid("page_size", page_size, expected));
            }
            return TileChoice::new(forced, group, page_size).map(only);
        }
        // The wgmma stream serves leaves as fast as the narrow tiles do, and shared nodes in the same launch.
        if possible.contains(&TileVariant::Wgmma64) && group <= TileVariant::Wgmma64.rows() {
            let usual = TileChoice::new(&[TileVariant::Wgmma64], group, page_size)?;
            // Not under a capacity: a captured graph would launch both kernels at every step. And no other mode has a choice.
            let has_wide = possible.contains(&TileVariant::Wgmma128)
                && self.capacity.is_none()
                && self.options.mode == PlanMode::Auto;
            let wide = has_wide.then(|| TileChoice::new(&[TileVariant::Wgmma128], group, page_size)).transpose()?;
            return Ok(TileChoices { wide, ..only(usual) });
        }
        TileChoice::new(&possible, group, page_size).map(only)
    }
}

/// What tiles a batch may be cut into.
#[derive(Clone, Debug)]
struct TileChoices {
    usual: TileChoice,
    /// Tiles with more rows, for batches whose tensor cores are the limit.
    wide: Option<TileChoice>,
    /// Whether the plan made last has wide ones.
    is_wide_in_use: bool,
}

impl TileChoices {
    fn in_use(&self) -> &TileChoice {
        self.wide.as_ref().filter(|_| self.is_wide_in_use).unwrap_or(&self.usual)
    }
}

/// Sequences per tile that are tried, where more than one. Wide ones first: what they take spares looking at narrower ones that
/// read more than that.
fn widths(widest: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(widest), |width| Some(width.div_ceil(2))).take_while(|width| *width > 1)
}
