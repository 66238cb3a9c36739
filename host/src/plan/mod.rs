//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].
//!
//! batch -> [`forest`] (who shares which pages) -> [`tiling`] (which sequences one CTA serves, how their KV is cut) ->
//! emit (streams, masks, order, slots) -> [`Plan`]. The cost model ([`cost`]) compares candidate tilings, from no sharing
//! at all to as many sequences per CTA as its tile has rows. From step to step ([`Planner::advance`]) tiles are kept
//! (`keep.rs`), and sequences that have only grown get their pages in place.

mod balance;
mod buffer;
mod capacity;
mod choice;
pub mod cost;
mod deal;
mod emit;
pub mod forest;
mod generation;
mod join;
mod keep;
mod run_planner;
mod run_tables;
mod search;
mod sharing;
mod snapshot;
mod summary;
pub mod tiling;

use crate::visible::Hidden;
use crate::{DecodeBatch, DeviceProfile, Error, Problem, Reach, Result, Visibility, VisibleBatch};
pub use buffer::Plan;
use buffer::{Records, TokenCounts};
pub use capacity::PlanCapacity;
use choice::{TileChoices, widths};
use cost::{CostModel, Prediction, VariantTerms};
use emit::Emitter;
use forest::Forest;
pub use generation::PlanGeneration;
use keep::KeptTiles;
use pat_abi::{NO_MASKS, TileVariant};
use run_planner::RunPlanner;
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
    /// When pages of one token are planned in runs of consecutive ones.
    pub runs: PageRuns,
}

/// When pages of one token, at least half of which lie in runs of consecutive ones, are planned as such: 16 of them are a page
/// of 16 tokens, and planning and uploading take less. Never with fixed chunks, nor under a capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageRuns {
    /// Never.
    #[default]
    Never,
    /// Where running the plan takes no longer: pages that are in no run need a launch of their own, whose results are merged.
    /// There are none, or that is predicted to be at most 2% of reading the batch once.
    WhereFree,
    /// Also where running takes longer: for steps in which planning counts, not layers.
    Always,
}

impl PlanOptions {
    /// With another way of tiling.
    pub fn with_mode(self, mode: PlanMode) -> Self {
        Self { mode, ..self }
    }

    /// With pages of one token planned in runs then.
    pub fn with_runs(self, runs: PageRuns) -> Self {
        Self { runs, ..self }
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
    /// KV split every `tokens` tokens, so that a sequence's bits do not depend on the rest of the batch. Sequences that share
    /// a whole chunk are served together there, as many as the tile of one sequence has rows for.
    FixedChunk {
        /// Chunk length, a positive multiple of the page size.
        tokens: u32,
    },
}

/// Makes plans for one problem on one device; keeps its scratch memory between calls, so that a step of a batch that
/// does not grow, and in which no row gets more pages than it had, allocates nothing ([`Planner::plan_into`],
/// [`Planner::advance`]), but where rows do not see all of their sequences.
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
    tiling: Tiling,
    /// Those tiles.
    kept: KeptTiles,
    /// For pages of one token.
    runs: Option<Box<RunPlanner>>,
    /// Whether it made the newest plan.
    is_in_runs: bool,
}

/// How the tiles of a plan were cut, and what has become of them since.
#[derive(Clone, Copy, Debug, Default)]
struct Tiling {
    rule: TilingRule,
    pages: PageCounts,
    /// Predicted time by distinct page, when other tilings were looked at last.
    us_per_page: f64,
    /// Pages that came and went since then.
    changed_pages: u64,
    /// Steps with such pages since then.
    steps: u32,
}

/// Pages of a batch.
#[derive(Clone, Copy, Debug, Default)]
struct PageCounts {
    /// Distinct ones.
    unique: u64,
    /// Those of the sequences beyond the distinct ones.
    repeated: u64,
    /// Distinct ones that several sequences read.
    shared: u64,
    /// Of the longest sequence.
    longest: u32,
}

/// Tokens by which every sequence can grow in place, in a plan that [`Planner::advance`] has laid out.
const ROOM_TOKENS: u32 = 16;

/// How much slower a plan in kept tiles may be predicted to be than another tiling, when [`Planner::advance`] looks at others;
/// and how much its predicted time by page may rise before it does.
const MOST_LOSS: f64 = 0.01;

/// With fewer sequences it looks at others at every step: one more page may decide, and looking takes little.
const FEW_SEQUENCES: usize = 32;

/// Steps after which it looks at others in any case.
const MOST_STEPS: u32 = 4;

/// Part of the pages that may change before it does.
const MOST_CHANGED: f64 = 0.25;

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
        let runs = RunPlanner::new(problem, &profile, &options)?.map(Box::new);
        let options = if runs.is_some() { run_planner::for_page_size(&problem, &profile, options) } else { options };
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
            tiling: Tiling::default(),
            kept: KeptTiles::default(),
            runs,
            is_in_runs: false,
        })
    }

    /// Plans within `capacity` only: larger batches are refused, and among the tilings of a batch that fits those are
    /// chosen from that fit. At least the uncut ones do. Beside `wgmma64`, `wgmma128` (of 8-bit K and V the mma.sync tiles) is
    /// then used only where it is forced ([`PlanOptions::variants`]): a captured graph would launch both kernels at every step.
    ///
    /// # Errors
    /// `max_items` is below `max_sequences`.
    pub fn with_capacity(self, capacity: PlanCapacity) -> Result<Self> {
        let capacity = Some(capacity.validated()?);
        Ok(Self {
            capacity,
            choices: self.choices.without_special(),
            newest: None,
            runs: None,
            is_in_runs: false,
            ..self
        })
    }

    /// What plans are made for.
    pub fn problem(&self) -> Problem {
        self.problem
    }

    /// The tile variants that plans may use.
    pub fn tile_variants(&self) -> Vec<TileVariant> {
        let mut variants = self.choices.variants();
        variants.extend(self.runs.iter().flat_map(|runs| runs.runs.tile_variants()));
        variants.sort_unstable();
        variants.dedup();
        variants
    }

    /// Of a batch that was planned in runs of pages last ([`PlanOptions::runs`]), what [`Self::forest`], [`Self::tiles`] and
    /// [`Self::shared_nodes`] are about: its runs, as pages of 16 tokens.
    pub fn batch_of_runs(&self) -> Option<DecodeBatch<'_>> {
        self.in_runs().map(RunPlanner::batch_of_runs)
    }

    fn in_runs(&self) -> Option<&RunPlanner> {
        self.runs.as_deref().filter(|_| self.is_in_runs)
    }

    /// The forest of the batch planned last.
    pub fn forest(&self) -> &Forest {
        self.in_runs().map_or(&self.forest, |runs| runs.runs.forest())
    }

    /// The row tiles of the batch planned last: in forest order; of fixed chunks by their first pages, then in forest order.
    pub fn tiles(&self) -> &[RowTile] {
        self.in_runs().map_or(&self.scratch.tiles, |runs| runs.runs.tiles())
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
        if let Some(runs) = self.in_runs() {
            return runs.runs.shared_nodes(runs.plan_of_runs(), most);
        }
        let Scratch { extents, tiles, .. } = &self.scratch;
        let page_size = self.problem.page_size();
        let sharing = sharing::Sharing {
            forest: &self.forest,
            extents,
            tiles,
            rule: self.tiling.rule,
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
        let Visibility { reach, is_tree, .. } = self.problem.visibility();
        if batch.trees().is_some() && !is_tree {
            let expected = "none: the planner's problem has no query tree";
            return Err(Error::invalid("query tree of the batch", "yes", expected));
        }
        if batch.is_of_entries() {
            let expected = "the batch that it was made from: the planner leaves out what rows do not see";
            return Err(Error::invalid("batch", "what is left of query trees", expected));
        }
        if reach == Reach::Full && batch.trees().is_none() {
            return self.plan_tokens(batch, Hidden::default(), plan);
        }
        let visible = VisibleBatch::new(batch, reach)?;
        self.plan_tokens(&visible.batch(), visible.hidden(), plan)
    }

    /// Plans a batch from scratch, but for what is hidden of it.
    fn plan_tokens(&mut self, batch: &DecodeBatch<'_>, hidden: Hidden<'_>, plan: &mut Plan) -> Result<()> {
        self.check_batch(batch)?;
        if self.plan_in_runs(batch, plan)? {
            return Ok(());
        }
        self.take(batch, hidden);
        self.plan_best(batch, hidden, plan, 0)
    }

    /// Plans a batch from scratch in runs of pages, where most of them are in some.
    fn plan_in_runs(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan) -> Result<bool> {
        let Some(runs) = &mut self.runs else { return Ok(false) };
        self.newest = None;
        self.is_in_runs = runs.plan_into(batch, plan)?;
        self.newest = self.is_in_runs.then(|| plan.generation());
        Ok(self.is_in_runs)
    }

    /// The distinct pages of a batch.
    fn unique_pages(&mut self, batch: &DecodeBatch<'_>) -> u64 {
        self.newest = None;
        self.forest.build(batch);
        tiling::measure(batch, &self.forest, &mut self.scratch.extents);
        PageCounts::new(&self.scratch.extents, &self.forest).unique
    }

    /// Takes a batch for the one that is planned.
    fn take(&mut self, batch: &DecodeBatch<'_>, hidden: Hidden<'_>) {
        self.newest = None;
        self.forest.build_windowed(batch, hidden.first_tokens);
        self.snapshot.take(batch, &self.forest);
    }

    /// Makes `plan`, the plan this planner made last, the plan of the next decode step. Sequences may have grown or shrunk, got
    /// or lost pages, joined, left, or been permuted, and pages anywhere may have been replaced by others.
    ///
    /// With fixed chunks the plan equals, bit for bit, the one from scratch. In the other modes it is one that covers the batch
    /// exactly as well, about as fast: who is served together stays, until another tiling is predicted to be faster by more
    /// than 1% when the planner looks. The same steps give the same plans.
    ///
    /// `changed_rows`, where given, names the rows of the batch whose table entries *that were in use before* may differ
    /// (a row that only grew is not among them); with `None` all entries are compared. Lengths and appended entries are
    /// looked at in any case. A plan that this planner did not make last is planned from scratch, and so is one under a window
    /// or in chunks, since what a row sees moves, and one for query trees.
    ///
    /// # Errors
    /// As [`Self::plan`]; or a changed row is not in the batch. `plan` is as before.
    pub fn advance(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        plan: &mut Plan,
    ) -> Result<PlanChange> {
        if let Some(&row) = changed_rows.into_iter().flatten().find(|&&row| row as usize >= batch.sequence_count()) {
            let expected = format!("rows of the batch, below {}", batch.sequence_count());
            return Err(Error::invalid("changed_rows", row, expected));
        }
        let Visibility { reach, is_tree, .. } = self.problem.visibility();
        let is_plain = reach == Reach::Full && !is_tree && batch.is_of_sequences();
        if self.newest != Some(plan.generation()) || !is_plain {
            self.plan_into(batch, plan)?;
            return Ok(PlanChange::Forest);
        }
        self.check_batch(batch)?;
        if self.is_in_runs {
            return self.advance_in_runs(batch, changed_rows, plan);
        }
        // Fixed chunks are where they are, whatever the step: there is nothing to keep, and no room for another page.
        let keeps_tiles = !matches!(self.options.mode, PlanMode::FixedChunk { .. });
        let room = if keeps_tiles { ROOM_TOKENS.div_ceil(self.problem.page_size()) } else { 0 };
        // From here on the members are changed in place: what ends in between leaves no plan to go on from.
        let newest = self.newest.take();
        let known = self.snapshot.update(batch, changed_rows, keeps_tiles);
        if known == Some(PlanChange::Nothing) {
            self.newest = newest;
            return Ok(PlanChange::Nothing);
        }
        let change = known.unwrap_or(PlanChange::Forest);
        let mut step = if change < PlanChange::Forest { self.grow(plan) } else { Step::Impossible };
        // A few sequences that share nothing are planned anew in less time than it takes to keep their tiles and to look at
        // others.
        let has_few =
            change == PlanChange::Forest && self.tiling.pages.shared == 0 && batch.sequence_count() < FEW_SEQUENCES;
        if step == Step::Impossible && keeps_tiles && known.is_some() && !has_few {
            step = self.keep(batch, plan, change, room)?;
        }
        if step == Step::Done {
            self.newest = Some(plan.generation());
            return Ok(change);
        }
        if change == PlanChange::Forest && self.plan_in_runs(batch, plan)? {
            return Ok(change);
        }
        if keeps_tiles || change == PlanChange::Forest {
            self.take(batch, Hidden::default());
        }
        match self.plan_best(batch, Hidden::default(), plan, room) {
            // A plan that is slow is better than none: what is faster exceeds the capacity. The next step is planned from
            // scratch.
            Err(_) if step == Step::Slow => Ok(change),
            result => result.map(|()| change),
        }
    }

    /// As [`Self::advance`], where the plan is in runs of pages.
    fn advance_in_runs(
        &mut self,
        batch: &DecodeBatch<'_>,
        changed_rows: Option<&[u32]>,
        plan: &mut Plan,
    ) -> Result<PlanChange> {
        let Some(runs) = &mut self.runs else { return Ok(PlanChange::Nothing) };
        let advanced = runs.advance(batch, changed_rows, plan);
        // What ends in between leaves no plan to go on from.
        self.newest = None;
        if let Some(change) = advanced? {
            self.newest = Some(plan.generation());
            return Ok(change);
        }
        self.plan_into(batch, plan)?;
        Ok(PlanChange::Forest)
    }

    /// Makes `plan`, the newest, that of sequences which have but grown. Impossible where it has no room for their pages.
    fn grow(&mut self, plan: &mut Plan) -> Step {
        let Some(growths) = self.snapshot.growths() else { return Step::Impossible };
        let Scratch { records, tiles, extents, .. } = &mut self.scratch;
        let mut pages = 0;
        for growth in growths {
            let of_row = growth.pages.len() as u32;
            if of_row > 0 && !records.take_room(growth.row, of_row) {
                return Step::Impossible;
            }
            pages += u64::from(of_row);
        }
        let growths = self.snapshot.growths().into_iter().flatten();
        plan.grow(growths, &mut records.tails, |tile, pages, item_pages| {
            let tile = &mut tiles[tile as usize];
            tile.page_count += pages;
            if tile.sequence_count() == 1 {
                tile.common_pages = tile.page_count;
            }
            tile.chunk_pages = tile.chunk_pages.max(item_pages);
        });
        if pages == 0 {
            return Step::Done;
        }
        self.snapshot.measure(&self.forest, extents);
        self.tiling.pages = PageCounts::new(extents, &self.forest);
        self.judge(plan, pages)
    }

    /// Plans `batch` in the tiles of the plan before, with the sequences that have left and joined since. Impossible where
    /// that exceeds the capacity.
    fn keep(&mut self, batch: &DecodeBatch<'_>, plan: &mut Plan, change: PlanChange, room: u32) -> Result<Step> {
        let Scratch { extents, tiles, .. } = &mut self.scratch;
        let (rule, choice) = (self.tiling.rule, self.choices.in_use());
        let unique = self.tiling.pages.unique;
        let mut changed_pages = 0;
        if change == PlanChange::Forest {
            changed_pages = self.kept.change_sequences(batch, &mut self.snapshot, &mut self.forest, extents, rule);
        } else {
            self.snapshot.measure(&self.forest, extents);
        }
        self.kept.tiles(extents, choice, rule, tiles);
        self.tiling.pages = PageCounts::new(extents, &self.forest);
        changed_pages = changed_pages.max(self.tiling.pages.unique.abs_diff(unique));
        self.write_records(batch, Hidden::default(), room)?;
        if self.capacity.is_some_and(|capacity| capacity.check_records(&self.scratch.records).is_err()) {
            return Ok(Step::Impossible);
        }
        let prediction = plan.prediction();
        let counts = self.token_counts(batch, Hidden::default());
        plan.write(self.problem, &self.profile, (batch, Hidden::default()), &self.scratch.records, counts, prediction)?;
        Ok(self.judge(plan, changed_pages))
    }

    /// Predicts `plan`, whose tiles were kept while so many pages changed. Where that, or what has changed so far, gives reason
    /// to, looks whether another tiling is predicted to be faster by more than [`MOST_LOSS`].
    fn judge(&mut self, plan: &mut Plan, changed_pages: u64) -> Step {
        let Tiling { pages, us_per_page, changed_pages: all_changed_pages, steps, .. } = &mut self.tiling;
        *all_changed_pages += changed_pages;
        *steps += 1;
        let Scratch { extents, search: search_scratch, .. } = &mut self.scratch;
        let model = pages.model(self.problem, &self.profile, &self.variants);
        let choices = &self.choices;
        let capacity = self.capacity.as_ref();
        let search = Search { model: &model, choice: &choices.usual, extents, longest: pages.longest, capacity };
        // As the search sees them: items of several sequences.
        let group = self.problem.shape().group();
        let prediction = search.predict_plan(plan, |item| item.row_count > group, search_scratch);
        plan.predict(prediction);
        let now_us_per_page = pages.us_per_page(&prediction);
        let is_due = now_us_per_page > (1.0 + MOST_LOSS) * *us_per_page
            || *all_changed_pages as f64 > MOST_CHANGED * pages.unique as f64
            || *steps >= MOST_STEPS
            || extents.len() < FEW_SEQUENCES;
        if !is_due {
            return Step::Done;
        }
        (*us_per_page, *all_changed_pages, *steps) = (now_us_per_page, 0, 0);
        let limit_us = prediction.total_us() / (1.0 + MOST_LOSS);
        let widest = choices.usual.widest();
        let (from, to) = match self.options.mode {
            PlanMode::FixedChunk { .. } => return Step::Done,
            PlanMode::Flat => (1, 1),
            PlanMode::PerNode | PlanMode::Packed => (widest, widest),
            PlanMode::Auto => (widest, 1),
        };
        let tried = widths(from).chain([1]).filter(|width| (to..=from).contains(width));
        let is_beaten = search.is_beaten(limit_us, |_| true, tried, search_scratch);
        let is_slow = is_beaten
            || choices.special_for(&prediction, (pages.unique, pages.repeated)).is_some_and(|special| {
                let counts = |other: &Prediction| choices.is_special_in_use() || special.is_better(other, &prediction);
                let search = Search { choice: &special.choice, ..search };
                search.is_beaten(limit_us, counts, special.widths(), search_scratch)
            });
        if is_slow { Step::Slow } else { Step::Done }
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

    /// Plans a batch whose forest is there in the tiling that is predicted to be best, with room for `room` more pages of each
    /// sequence.
    fn plan_best(&mut self, batch: &DecodeBatch<'_>, hidden: Hidden<'_>, plan: &mut Plan, room: u32) -> Result<()> {
        self.newest = None;
        let page_size = self.problem.page_size();
        let choices = &mut self.choices;
        let Scratch { extents, tiles, search: search_scratch, .. } = &mut self.scratch;
        tiling::measure(batch, &self.forest, extents);
        let pages = PageCounts::new(extents, &self.forest);
        let model = pages.model(self.problem, &self.profile, &self.variants);
        let capacity = self.capacity.as_ref();
        let search = Search { model: &model, choice: &choices.usual, extents, longest: pages.longest, capacity };
        let widest = choices.usual.widest();
        let (mut rule, mut prediction) = match self.options.mode {
            PlanMode::FixedChunk { tokens } => {
                let rule = TilingRule { most_sequences: widest, chunk_pages: tokens / page_size, exact: true };
                // Of the form that shares nothing; what is shared, the plan tells.
                (rule, search.predict(TilingRule { most_sequences: 1, ..rule }, search_scratch))
            }
            PlanMode::Flat => search.best([1], search_scratch),
            PlanMode::PerNode | PlanMode::Packed => search.best([widest], search_scratch),
            PlanMode::Auto => search.best(std::iter::once(1).chain(widths(widest)), search_scratch),
        };
        let mut takes_special = false;
        if let Some(special) = choices.special_for(&prediction, (pages.unique, pages.repeated)) {
            let (other_rule, other) =
                Search { choice: &special.choice, ..search }.best(special.widths(), search_scratch);
            takes_special = special.is_better(&other, &prediction);
            if takes_special {
                (rule, prediction) = (other_rule, other);
            }
        }
        choices.take(takes_special);
        let choice = choices.in_use();
        tiles.clear();
        tiles.reserve(extents.len());
        if rule.exact {
            tiling::cut_fixed(extents, rule, tiles);
        } else {
            tiling::cut(extents, rule, |tile| {
                let key_tile_pages = choice.key_tile_pages(choice.variant(tile.sequence_count()));
                let chunks = rule.chunks(tile.page_count, key_tile_pages);
                tiles.push(RowTile { chunk_pages: chunks.pages, chunks: chunks.count, ..tile });
            });
            self.kept.take(tiles);
        }
        let shares_chunks = rule.exact && tiles.iter().any(|tile| tile.sequence_count() > 1);
        self.write_records(batch, hidden, room)?;
        let Scratch { records, .. } = &self.scratch;
        if let Some(capacity) = &self.capacity {
            capacity.check_records(records)?;
        }
        self.tiling = Tiling { rule, pages, us_per_page: pages.us_per_page(&prediction), changed_pages: 0, steps: 0 };
        let counts = self.token_counts(batch, hidden);
        plan.write(self.problem, &self.profile, (batch, hidden), &self.scratch.records, counts, prediction)?;
        if shares_chunks {
            let Scratch { extents, search: search_scratch, .. } = &mut self.scratch;
            let model = pages.model(self.problem, &self.profile, &self.variants);
            let capacity = self.capacity.as_ref();
            let search =
                Search { model: &model, choice: &self.choices.usual, extents, longest: pages.longest, capacity };
            let prediction = search.predict_plan(plan, |item| item.mask_begin != NO_MASKS, search_scratch);
            plan.predict(prediction);
            self.tiling.us_per_page = pages.us_per_page(&prediction);
        }
        self.newest = Some(plan.generation());
        Ok(())
    }

    /// The tokens that the rows of the batch see, and of them those beyond the distinct ones.
    fn token_counts(&self, batch: &DecodeBatch<'_>, hidden: Hidden<'_>) -> TokenCounts {
        let page_size = u64::from(batch.page_size());
        let rows = (0..batch.sequence_count()).map(|row| u64::from(batch.length(row)));
        let mut counts = TokenCounts { logical: rows.sum(), repeated: self.tiling.pages.repeated * page_size };
        if !hidden.parts.is_empty() {
            let missing = |ids: &[u32]| -> u64 {
                let parts = ids.iter().filter_map(|&id| hidden.part(batch.num_pages(), id));
                parts.map(|part| page_size - u64::from(part.token_end - part.first_token)).sum()
            };
            for (&row, extent) in self.forest.order().iter().zip(&self.scratch.extents) {
                let (shared, own) = batch.pages(row as usize).split_at(extent.shared as usize);
                counts.logical -= missing(shared) + missing(own);
                counts.repeated -= missing(shared);
            }
        }
        counts
    }

    /// Writes the records of the tiles, with room for `room` more pages of each sequence where the capacity has it.
    fn write_records(&mut self, batch: &DecodeBatch<'_>, hidden: Hidden<'_>, room: u32) -> Result<()> {
        let Scratch { extents, tiles, emit: emit_scratch, records, .. } = &mut self.scratch;
        let with_room = || {
            let stream_pages: u64 = tiles.iter().map(|tile| u64::from(tile.page_count)).sum();
            stream_pages + u64::from(room) * extents.len() as u64
        };
        let has_room = self.capacity.is_none_or(|capacity| with_room() <= u64::from(capacity.max_pages));
        let emitter = Emitter {
            batch,
            shape: self.problem.shape(),
            hidden,
            has_first_tokens: self.problem.switches().window,
            forest: &self.forest,
            extents,
            choice: self.choices.in_use(),
            mode: self.options.mode,
            room: if has_room { room } else { 0 },
        };
        emitter.emit(tiles, emit_scratch, records)
    }
}

/// What became of a step that was not planned from scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Done,
    /// The plan is one of the step, but another tiling is faster.
    Slow,
    /// It must be planned in another way.
    Impossible,
}

impl PageCounts {
    fn new(extents: &[Extent], forest: &Forest) -> Self {
        Self {
            unique: extents.iter().map(|extent| u64::from(extent.pages - extent.shared)).sum(),
            repeated: extents.iter().map(|extent| u64::from(extent.shared)).sum(),
            shared: forest.nodes().iter().map(|node| u64::from(node.page_count())).sum(),
            longest: extents.iter().map(|extent| extent.pages).max().unwrap_or(0),
        }
    }

    /// Predicted time by distinct page.
    fn us_per_page(&self, prediction: &Prediction) -> f64 {
        prediction.total_us() / self.unique.max(1) as f64
    }

    fn model<'a>(
        &self,
        problem: Problem,
        profile: &'a DeviceProfile,
        variants: &'a [VariantTerms; TileVariant::ALL.len()],
    ) -> CostModel<'a> {
        CostModel {
            profile,
            shape: problem.shape(),
            page_size: problem.page_size(),
            variants,
            unique_pages: self.unique,
            shared_pages: self.shared,
        }
    }
}
