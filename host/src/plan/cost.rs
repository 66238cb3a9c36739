//! The cost model: what a tiling is predicted to take. Every term has a name and a unit; the rates are the device
//! profile's.

use super::Plan;
use super::choice::TileChoice;
use super::deal::Deal;
use super::tiling::{TileClass, TilingRule};
use crate::{AttentionShape, DeviceProfile, Dtype};
use pat_abi::{Arch, GroupParts, TileVariant, WorkItem};
use serde::Serialize;

/// Predicted time of a plan by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Prediction {
    /// Reading every planned KV byte, first reads from DRAM and repeated ones from L2 as far as they stay there, and writing
    /// partials.
    pub memory_us: f64,
    /// Multiplying padded tiles.
    pub tensor_us: f64,
    /// The forward pass, its items dealt out over the CTA slots: at least the memory and the tensor time, and more where items
    /// are few, short or uneven.
    pub busy_us: f64,
    /// Launches: forward, and one more for each further tile variant.
    pub launch_us: f64,
    /// The merge, if there are partials.
    pub merge_us: f64,
}

impl Prediction {
    /// All of it.
    pub fn total_us(&self) -> f64 {
        self.launch_us + self.busy_us + self.merge_us
    }

    /// Of what runs behind this, too.
    pub(super) fn and(self, next: Self) -> Self {
        Self {
            memory_us: self.memory_us + next.memory_us,
            tensor_us: self.tensor_us + next.tensor_us,
            busy_us: self.busy_us + next.busy_us,
            launch_us: self.launch_us + next.launch_us,
            merge_us: self.merge_us + next.merge_us,
        }
    }
}

/// Sequences that are served together, as another planner packs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Sequences, all of which attend to all of the pages.
    pub sequences: u32,
    /// Pages it reads.
    pub pages: u32,
}

/// What the model needs to know of a tile variant.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct VariantTerms {
    /// KV tokens of a main-loop step.
    pub(super) keys: u32,
    /// CTAs that run at a time.
    slots: u32,
    /// CTAs that share a multiprocessor.
    ctas_per_sm: u32,
    /// Launches, each of which computes all items for a part of their groups.
    launches: u32,
    /// Time in which the device multiplies the padded tiles of one main-loop step of one CTA.
    tensor_per_step_us: f64,
    /// Least time of a step, in parts of the profile's ([`DeviceProfile::tile_latency_us`]).
    step_latency: f64,
}

/// What a step of `wgmma128` takes at least, in parts of one of `wgmma64`, which has half as many keys (measured on an H100).
const WIDE_STEP_LATENCY: f64 = 2.3;

/// What `wgmma128` multiplies in the time in which `wgmma64` multiplies 1 (likewise, on shared nodes).
const WIDE_TENSOR_RATE: f64 = 1.35;

/// What kernels multiply over 8-bit K and V in the time in which they multiply 1 over 16-bit ones: every 16 rows of an mma.sync
/// tile convert the codes anew, `wgmma64` widens a tile once. Fitted to 174 measurements on an H200 (docs/performance-log.md,
/// 254df84 and 5f53cd9).
fn conversion_rate(arch: Arch, kv_dtype: Dtype) -> f64 {
    match (arch, kv_dtype) {
        (_, Dtype::F16 | Dtype::Bf16) => 1.0,
        (Arch::Sm90a, _) => 0.8,
        (Arch::Sm80, Dtype::E5m2) => 0.5,
        (Arch::Sm80, _) => 0.42,
    }
}

// What `pat calibrate` does not measure: fitted to 686 measured plans of 130 batches, together (docs/planner-quality.md).

/// What masks add to the forward pass.
const MASK_COST: f64 = 0.10;

/// What masks add to the latency of a main-loop step, besides.
const MASK_LATENCY: f64 = 0.15;

/// Part of the repeated reads of what does not fit in L2 that DRAM serves: the tiles that share pages read them side by side.
/// (ncu: 0.3 to 0.4 in batches whose shared pages are several times the L2.)
const MISSED_REPEATS: f64 = 0.4;

/// What wgmma kernels multiply at head dim 64 in the time in which they multiply 1 at 128: a tile's exponentials take as long as its
/// products. This and the latencies of head dims 64 and 256 are fitted to 50 and 366 measured plans on an H200
/// (docs/performance-log.md, 29 November 2026).
const NARROW_RATE: f64 = 0.78;

/// Least time of a main-loop step, in parts of one of `wgmma64` at head dim 128 ([`DeviceProfile::tile_latency_us`]).
fn step_latency(variant: TileVariant, head_dim: u32, keys: u32) -> f64 {
    match (variant, head_dim) {
        (TileVariant::Wgmma64, 64) if keys > 64 => 1.4,
        (TileVariant::Wgmma64, 256) => 1.85,
        (TileVariant::Wgmma128, 256) => 1.95,
        (TileVariant::Wgmma128, _) => WIDE_STEP_LATENCY,
        _ => 1.0,
    }
}

impl VariantTerms {
    /// Of every variant, by [`TileVariant::index`].
    pub(super) fn all(profile: &DeviceProfile, shape: AttentionShape) -> [Self; TileVariant::ALL.len()] {
        TileVariant::ALL.map(|variant| {
            let (dtypes, head_dims) = ((shape.dtype(), shape.kv_dtype()), (shape.head_dim(), shape.v_head_dim()));
            let kernel = pat_abi::manifest::find_forward(variant, dtypes, head_dims);
            let rate = match variant {
                TileVariant::Wgmma128 => WIDE_TENSOR_RATE * profile.wgmma_flop_per_us,
                _ if variant.arch() == Arch::Sm90a => profile.wgmma_flop_per_us,
                _ => profile.mma_flop_per_us,
            };
            let is_narrow = variant.arch() == Arch::Sm90a && shape.head_dim() <= 64 && shape.kv_dtype().bytes() == 2;
            let rate = if is_narrow { NARROW_RATE * rate } else { rate };
            let rate = rate * conversion_rate(variant.arch(), shape.kv_dtype());
            let keys = variant.keys(shape.head_dim(), shape.kv_dtype());
            let step_latency = step_latency(variant, shape.head_dim(), keys);
            let row_flop = 2.0 * f64::from(shape.head_dim() + shape.v_head_dim());
            let flop = row_flop * f64::from(variant.rows()) * f64::from(keys);
            let ctas_per_sm = kernel.map_or(1, |kernel| profile.limits().occupancy(kernel)).max(1);
            let (slots, launches) = (profile.sm_count * ctas_per_sm, GroupParts::new(shape.group(), variant).count);
            Self { keys, slots, ctas_per_sm, launches, tensor_per_step_us: flop / rate, step_latency }
        })
    }
}

/// The model of one batch. It sees pages, never tokens: predictions, and with them plans, change when a sequence gets
/// another page.
#[derive(Clone, Copy, Debug)]
pub(super) struct CostModel<'a> {
    pub(super) profile: &'a DeviceProfile,
    pub(super) shape: AttentionShape,
    pub(super) page_size: u32,
    pub(super) variants: &'a [VariantTerms; TileVariant::ALL.len()],
    /// Distinct pages of the batch.
    pub(super) unique_pages: u64,
    /// Those of them that several sequences read.
    pub(super) shared_pages: u64,
}

impl CostModel<'_> {
    /// Pages each CTA slot would get if `page_count` pages (per KV head) could be dealt out evenly.
    pub(super) fn pages_per_slot(&self, page_count: u64, variant: TileVariant) -> u64 {
        (page_count * u64::from(self.shape.kv_heads())).div_ceil(u64::from(self.terms(variant).slots))
    }

    /// What a tiling that reads `page_count` pages in tiles of `choice` takes at least; `merged` says that there is a merge.
    pub(super) fn floor_us(&self, page_count: u64, choice: &TileChoice, merged: bool) -> f64 {
        let merge_us = if merged { self.profile.merge_us } else { 0.0 };
        let pages = page_count as f64 * f64::from(self.shape.kv_heads());
        let tensor_us = |variant: TileVariant| {
            let terms = self.terms(variant);
            let steps = pages * f64::from(variant.page_keys(self.page_size)) / f64::from(terms.keys);
            steps * terms.tensor_per_step_us
        };
        let tensor_us = choice.variants().map(tensor_us).fold(f64::INFINITY, f64::min);
        let forward_us = self.memory_us(page_count, 0.0, true).max(tensor_us);
        // Rounding must not put the floor above the sum it is the floor of.
        (1.0 - 1e-12) * (self.profile.launch_us + 2.0 * self.profile.item_latency_us + forward_us + merge_us)
    }

    /// What reading `page_count` pages moves, and writing and reading `partials` partials.
    pub(super) fn moved_bytes(&self, page_count: u64, partials: u64) -> f64 {
        let page_bytes = f64::from(self.page_size) * self.shape.kv_bytes_per_token() as f64;
        page_count as f64 * page_bytes + 2.0 * self.partial_bytes(partials)
    }

    /// Predicts the tiling of `classes` under `rule`, if it takes less than what `limit_us` makes of its
    /// [`Self::moved_bytes`]; and these. `work` and `deal` are scratch.
    pub(super) fn predict_below(
        &self,
        limit_us: impl Fn(f64) -> f64,
        classes: &[TileClass],
        rule: TilingRule,
        choice: &TileChoice,
        (work, deal): (&mut Vec<Work>, &mut Deal),
    ) -> Option<(Prediction, f64)> {
        work.clear();
        let (mut page_count, mut partials, mut masked_steps) = (0u64, 0u64, 0.0);
        for class in classes {
            let variant = choice.variant(class.sequences);
            let chunks = rule.chunks(class.page_count, choice.key_tile_pages(variant));
            page_count += class.stream_pages() * u64::from(self.terms(variant).launches);
            partials += u64::from(class.partials(chunks)) * u64::from(class.count);
            let steps = self.steps(variant, class.page_count.min(chunks.pages));
            let of_class = Work { variant, steps, items: u64::from(chunks.count) * u64::from(class.count) };
            masked_steps += if class.sequences > 1 { of_class.all_steps() } else { 0.0 };
            work.push(of_class);
        }
        let totals = Totals { page_count, partials, masked_steps, are_packed: masked_steps > 0.0 };
        // What costs most is to sort the work: not for what its sums alone rule out.
        let moved_bytes = self.moved_bytes(page_count, partials);
        let limit_us = limit_us(moved_bytes);
        let least_us = self.least_us(work, totals);
        if least_us >= limit_us {
            return None;
        }
        let prediction = self.predict_work(work, totals, deal);
        debug_assert!(least_us <= prediction.total_us(), "{least_us} us at least, {prediction:?}");
        (prediction.total_us() < limit_us).then_some((prediction, moved_bytes))
    }

    /// Predicts the items of a plan as they are, of which those that `has_masks` names are multiplied with masks. `work` and
    /// `deal` are scratch.
    pub(super) fn predict_plan(
        &self,
        plan: &Plan,
        has_masks: impl Fn(&WorkItem) -> bool,
        (work, deal): (&mut Vec<Work>, &mut Deal),
    ) -> Prediction {
        work.clear();
        let mut totals = Totals { partials: u64::from(plan.header().slot_count), ..Totals::default() };
        for variant in TileVariant::ALL {
            for item in plan.variant_items(variant) {
                let pages = item.token_count.div_ceil(self.page_size);
                let of_item = Work { variant, steps: self.steps(variant, pages), items: 1 };
                totals.page_count += u64::from(pages) * u64::from(self.terms(variant).launches);
                totals.masked_steps += if has_masks(item) { of_item.all_steps() } else { 0.0 };
                // Nearly in order: equal ones stand together.
                match work.last_mut() {
                    Some(last) if last.order() == of_item.order() => last.items += 1,
                    _ => work.push(of_item),
                }
            }
        }
        totals.are_packed = totals.masked_steps > 0.0;
        self.predict_work(work, totals, deal)
    }

    /// Predicts packs without masks, each one item per KV head of the variant that holds it.
    pub(super) fn predict_packs(&self, packs: &[Pack], partials: u64, choice: &TileChoice) -> Prediction {
        let item = |pack: &Pack| {
            let variant = choice.variant(pack.sequences);
            Work { variant, steps: self.steps(variant, pack.pages), items: 1 }
        };
        let read_pages =
            |pack: &Pack| u64::from(pack.pages) * u64::from(self.terms(choice.variant(pack.sequences)).launches);
        let page_count = packs.iter().map(read_pages).sum();
        let are_packed = packs.iter().any(|pack| pack.sequences > 1);
        let totals = Totals { page_count, partials, masked_steps: 0.0, are_packed };
        self.predict_work(&mut packs.iter().map(item).collect(), totals, &mut Deal::default())
    }

    /// What `work`, in any order, takes at least: as if no slot ever waited.
    fn least_us(&self, work: &[Work], totals: Totals) -> f64 {
        let (mut all_steps, mut tensor_us, mut items) = (0.0, 0.0, 0);
        let (mut longest, mut ctas_per_sm) = (0f64, u32::MAX);
        for entry in work {
            let terms = self.terms(entry.variant);
            all_steps += entry.all_steps();
            tensor_us += entry.all_steps() * terms.tensor_per_step_us;
            items += entry.items;
            longest = longest.max(f64::from(entry.steps) * terms.step_latency);
            ctas_per_sm = ctas_per_sm.min(terms.ctas_per_sm);
        }
        if items == 0 {
            return 0.0;
        }
        let heads = u64::from(self.shape.kv_heads());
        let memory_us = self.memory_us(totals.page_count, self.partial_bytes(totals.partials), totals.are_packed);
        let chain_us = longest * self.tile_latency_us(totals, all_steps);
        let forward_us = memory_us.max(tensor_us * heads as f64).max(chain_us);
        // Several launches wait no less often than one of all their items.
        let busy_us = (forward_us + self.waiting_us(items * heads, ctas_per_sm)) * totals.mask_factor(all_steps);
        // Rounding must not put it above what it is the least of.
        (1.0 - 1e-12) * (self.profile.launch_us + busy_us + self.merge_us(totals))
    }

    /// What nothing overlaps with in a launch of `ctas`, of which `ctas_per_sm` share a multiprocessor if there are enough: these
    /// wait for each other's first loads, and for what is behind the last step.
    fn waiting_us(&self, ctas: u64, ctas_per_sm: u32) -> f64 {
        let sharing = ctas.div_ceil(u64::from(self.profile.sm_count)).min(u64::from(ctas_per_sm));
        (sharing + 1) as f64 * self.profile.item_latency_us
    }

    fn partial_bytes(&self, partials: u64) -> f64 {
        partials as f64 * self.shape.partial_bytes() as f64
    }

    fn merge_us(&self, totals: Totals) -> f64 {
        if totals.partials == 0 {
            return 0.0;
        }
        self.profile.merge_us + self.profile.partials_us(self.partial_bytes(totals.partials))
    }

    /// Least time of a main-loop step.
    fn tile_latency_us(&self, totals: Totals, all_steps: f64) -> f64 {
        self.profile.tile_latency_us * (1.0 + MASK_LATENCY * totals.masked_part(all_steps))
    }

    /// Predicts `work` in any order.
    fn predict_work(&self, work: &mut Vec<Work>, totals: Totals, deal: &mut Deal) -> Prediction {
        // Longest first; equal ones together, so that the sums below do not depend on the order of the tiles.
        work.sort_unstable_by_key(Work::order);
        work.dedup_by(|next, kept| {
            let equal = next.order() == kept.order();
            kept.items += if equal { next.items } else { 0 };
            equal
        });
        let memory_us = self.memory_us(totals.page_count, self.partial_bytes(totals.partials), totals.are_packed);
        let kv_heads = f64::from(self.shape.kv_heads());
        let all_steps: f64 = work.iter().map(|entry| self.launched_steps(entry)).sum();
        let memory_per_step_us = memory_us / (all_steps * kv_heads).max(1.0);
        let tile_latency_us = self.tile_latency_us(totals, all_steps);
        let (mut tensor_us, mut busy_us, mut launches) = (0.0, 0.0, 0u32);
        for same_variant in work.chunk_by(|a, b| a.variant == b.variant) {
            let variant = same_variant[0].variant;
            let steps: f64 = same_variant.iter().map(|entry| self.launched_steps(entry)).sum();
            let VariantTerms { tensor_per_step_us, launches: of_variant, .. } = *self.terms(variant);
            tensor_us += steps * kv_heads * tensor_per_step_us;
            let step_us = memory_per_step_us.max(tensor_per_step_us);
            busy_us += f64::from(of_variant) * self.forward_us(variant, same_variant, step_us, tile_latency_us, deal);
            launches += of_variant;
        }
        busy_us *= totals.mask_factor(all_steps);
        Prediction {
            memory_us,
            tensor_us,
            busy_us,
            launch_us: f64::from(launches) * self.profile.launch_us,
            merge_us: self.merge_us(totals),
        }
    }

    /// Time of a launch of items of `steps` main-loop steps each, longest first; of every step the memory takes
    /// `memory_per_step_us`.
    pub(super) fn launch_time_us(
        &self,
        variant: TileVariant,
        steps: impl Iterator<Item = u32>,
        memory_per_step_us: f64,
    ) -> f64 {
        let work: Vec<_> = steps.map(|steps| Work { variant, steps, items: 1 }).collect();
        let step_us = memory_per_step_us.max(self.terms(variant).tensor_per_step_us);
        self.forward_us(variant, &work, step_us, self.profile.tile_latency_us, &mut Deal::default())
    }

    /// CTAs of a variant that run at a time.
    pub(super) fn places(&self, variant: TileVariant) -> u32 {
        self.terms(variant).slots
    }

    /// Main-loop steps of items, per KV head, in all launches of their variant.
    fn launched_steps(&self, work: &Work) -> f64 {
        work.all_steps() * f64::from(self.terms(work.variant).launches)
    }

    /// Main-loop steps over so many pages.
    fn steps(&self, variant: TileVariant, pages: u32) -> u32 {
        let keys = u64::from(pages) * u64::from(variant.page_keys(self.page_size));
        keys.div_ceil(u64::from(self.terms(variant).keys)) as u32
    }

    fn terms(&self, variant: TileVariant) -> &VariantTerms {
        &self.variants[variant.index()]
    }

    /// Reading `page_count` pages and writing partials. Repeated reads are served by L2 as far as what it should keep fits
    /// there: the shared pages, where tiles of several sequences let private ones make room first and read side by side
    /// (`are_packed`), else all. DRAM and L2 work side by side.
    fn memory_us(&self, page_count: u64, partial_bytes: f64, are_packed: bool) -> f64 {
        let page_bytes = f64::from(self.page_size) * self.shape.kv_bytes_per_token() as f64;
        let (read_bytes, unique_bytes) = (page_count as f64 * page_bytes, self.unique_pages as f64 * page_bytes);
        let repeated = (read_bytes - unique_bytes).max(0.0);
        let (kept_bytes, missed) =
            if are_packed { (self.shared_pages as f64 * page_bytes, MISSED_REPEATS) } else { (unique_bytes, 1.0) };
        let resident = (self.profile.l2_bytes as f64 / kept_bytes.max(1.0)).min(1.0);
        let hbm_bytes = unique_bytes.min(read_bytes) + repeated * (1.0 - resident) * missed;
        let l2_us = (read_bytes + partial_bytes) / self.profile.l2_bytes_per_us;
        l2_us.max(hbm_bytes / self.profile.hbm_bytes_per_us)
    }

    /// Time of a launch of `work`, longest first. The places for CTAs work side by side, each through what it is dealt: while
    /// many have work, steps pass at the rate of the memory or the tensor cores (`step_us`, over all places), then at a
    /// latency per step (`tile_latency_us`) of those that are left. Behind its first, an item costs a place its latency
    /// besides, which those whose memory or tensor cores are busy do not notice.
    fn forward_us(
        &self,
        variant: TileVariant,
        work: &[Work],
        step_us: f64,
        tile_latency_us: f64,
        deal: &mut Deal,
    ) -> f64 {
        /// Loads are counted in parts of a step.
        const STEP_LOAD: u64 = 1 << 20;
        let VariantTerms { slots, ctas_per_sm, step_latency, .. } = *self.terms(variant);
        let tile_latency_us = tile_latency_us * step_latency;
        let heads = u64::from(self.shape.kv_heads());
        let item_load = (self.profile.item_latency_us / tile_latency_us * STEP_LOAD as f64) as u64;
        let dealt = |entry: &Work| (u64::from(entry.steps) * STEP_LOAD + item_load, entry.items * heads);
        let ctas: u64 = work.iter().map(|entry| entry.items * heads).sum();
        if ctas == 0 {
            return 0.0;
        }
        let loads = deal.loads(work.iter().map(dealt), slots);
        // The latency of a place's first item is among what nothing overlaps with.
        let loads = || loads.iter().map(|equal| (equal.load.saturating_sub(item_load), u64::from(equal.places)));
        let all_loads: f64 = loads().map(|(load, places)| load as f64 * places as f64).sum();
        let all_steps: f64 = work.iter().map(Work::all_steps).sum::<f64>() * heads as f64;
        let (busy_us, least_us) = (step_us * all_steps / all_loads.max(1.0), tile_latency_us / STEP_LOAD as f64);
        let (mut active, mut done, mut forward_us) = (u64::from(slots), 0, 0.0);
        for (load, places) in loads() {
            forward_us += (load - done) as f64 * side_by_side_us(least_us, active as f64 * busy_us);
            (active, done) = (active - places, load);
        }
        forward_us + self.waiting_us(ctas, ctas_per_sm)
    }
}

/// Time of two things that go on side by side, neither of which the other hides completely where they take about as
/// long: up to 5% more.
fn side_by_side_us(a_us: f64, b_us: f64) -> f64 {
    a_us.max(b_us).max(0.525 * (a_us + b_us))
}

/// What a tiling adds up to.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    /// Pages it reads.
    page_count: u64,
    /// Partials of all sequences.
    partials: u64,
    /// Main-loop steps, per KV head, of items of several sequences: those that may have masks.
    masked_steps: f64,
    /// Whether some item is of several sequences.
    are_packed: bool,
}

impl Totals {
    /// Part of all `all_steps` steps that belongs to items with masks.
    fn masked_part(self, all_steps: f64) -> f64 {
        self.masked_steps / all_steps.max(1.0)
    }

    /// What masks make of the time of `all_steps` steps.
    fn mask_factor(self, all_steps: f64) -> f64 {
        1.0 + MASK_COST * self.masked_part(all_steps)
    }
}

/// Items of one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    variant: TileVariant,
    /// Main-loop steps per item.
    steps: u32,
    /// Items (each once per KV head).
    items: u64,
}

impl Work {
    /// By variant, longest first: one integer, which sorts faster than a pair.
    fn order(&self) -> u64 {
        (self.variant.index() as u64) << 32 | u64::from(u32::MAX - self.steps)
    }

    /// Main-loop steps of all items, per KV head.
    fn all_steps(&self) -> f64 {
        f64::from(self.steps) * self.items as f64
    }
}
