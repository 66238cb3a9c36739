//! The search for a tiling: candidates are compared by prediction, from counts alone; only the winner is made.

use super::Plan;
use super::capacity::PlanCapacity;
use super::choice::TileChoice;
use super::cost::{CostModel, Prediction, Work};
use super::deal::Deal;
use super::tiling::{self, Extent, TileClass, TilingRule};
use pat_abi::WorkItem;

/// Chunk lengths that are tried: each slot would get so many items, if all were equal.
const ROUNDS: [u64; 3] = [1, 2, 6];

/// Shortest chunk that is tried: a CTA's fixed costs are those of a few key tiles.
const LEAST_CHUNK_TOKENS: u32 = 128;

/// A plan that moves more bytes than one tried before it must be predicted to be faster by as much, up to this part of the time:
/// the model's error is 6% (8% when this was measured), and where it did not tell plans apart, those that move less were
/// measured faster (docs/planner-quality.md). No sharing is tried first: no plan is predicted to be slower than that.
const MOST_DOUBT: f64 = 0.05;

/// The best rule so far.
#[derive(Clone, Copy, Debug)]
struct Best {
    rule: TilingRule,
    prediction: Prediction,
    /// [`CostModel::moved_bytes`].
    moved_bytes: f64,
}

impl Best {
    /// What a plan that moves so many bytes must be faster than to be better.
    fn limit_us(&self, moved_bytes: f64) -> f64 {
        self.prediction.total_us() * (self.moved_bytes / moved_bytes.max(1.0)).clamp(1.0 - MOST_DOUBT, 1.0)
    }
}

/// Memory reused between calls.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    uncut: Vec<TileClass>,
    narrowed: Vec<TileClass>,
    work: Vec<Work>,
    deal: Deal,
}

/// What is searched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search<'a> {
    pub(super) model: &'a CostModel<'a>,
    pub(super) choice: &'a TileChoice,
    pub(super) extents: &'a [Extent],
    /// Pages of the longest sequence.
    pub(super) longest: u32,
    pub(super) capacity: Option<&'a PlanCapacity>,
}

impl Search<'_> {
    /// The rule with the best prediction among tiles of at most each of `widths` sequences (one at least) and a range of
    /// chunk lengths: never worse than the first width, uncut. One that moves more bytes than one before it must be faster
    /// accordingly ([`MOST_DOUBT`]); of equally good ones the first counts. From the second on, widths descend.
    pub(super) fn best(self, widths: impl IntoIterator<Item = u32>, scratch: &mut Scratch) -> (TilingRule, Prediction) {
        self.reserve(scratch);
        let mut best: Option<Best> = None;
        for width in widths {
            if !self.try_width(width, scratch, &mut best) {
                break;
            }
        }
        let Best { rule, prediction, .. } = best.expect("there is a width, and its uncut tiling is always tried");
        (rule, prediction)
    }

    /// The prediction of one rule.
    pub(super) fn predict(self, rule: TilingRule, scratch: &mut Scratch) -> Prediction {
        self.reserve(scratch);
        let Scratch { uncut, work, deal, .. } = scratch;
        self.classes(rule, uncut);
        let prediction = self.model.predict_below(|_| f64::INFINITY, uncut, rule, self.choice, (work, deal));
        prediction.expect("every time is below infinity").0
    }

    /// What the items of a plan are predicted to take, `has_masks` of them with masks.
    pub(super) fn predict_plan(
        self,
        plan: &Plan,
        has_masks: impl Fn(&WorkItem) -> bool,
        scratch: &mut Scratch,
    ) -> Prediction {
        let Scratch { work, deal, .. } = scratch;
        self.model.predict_plan(plan, has_masks, (work, deal))
    }

    /// Whether some tiling of those that [`Self::best`] tries is predicted to take less than `limit_us`, and counts. `widths`
    /// descend.
    pub(super) fn is_beaten(
        self,
        limit_us: f64,
        counts: impl Fn(&Prediction) -> bool,
        widths: impl Iterator<Item = u32>,
        scratch: &mut Scratch,
    ) -> bool {
        self.reserve(scratch);
        let prediction = Prediction { busy_us: limit_us, ..Prediction::default() };
        // Whatever a tiling moves, it must be faster than this.
        let limit = Best { rule: TilingRule::default(), prediction, moved_bytes: f64::INFINITY };
        for width in widths {
            let mut best = Some(limit);
            let is_last = !self.try_width(width, scratch, &mut best);
            if best.is_some_and(|best| best.moved_bytes < f64::INFINITY && counts(&best.prediction)) {
                return true;
            }
            if is_last {
                break;
            }
        }
        false
    }

    /// Whatever is tried, there are no more classes than sequences: no candidate grows the memory.
    fn reserve(self, scratch: &mut Scratch) {
        let Scratch { uncut, narrowed, work, deal } = scratch;
        uncut.clear();
        uncut.reserve(self.extents.len());
        narrowed.clear();
        narrowed.reserve(self.extents.len());
        work.clear();
        work.reserve(self.extents.len());
        deal.reserve(self.choice.variants().map(|variant| self.model.places(variant)).max().unwrap_or(0));
    }

    /// Tries one width; returns whether narrower ones, which read no less, could still be better.
    fn try_width(self, width: u32, scratch: &mut Scratch, best: &mut Option<Best>) -> bool {
        let Scratch { uncut, narrowed, work, deal } = scratch;
        let page_size = self.choice.page_size();
        let mut rule = TilingRule { most_sequences: width, chunk_pages: u32::MAX, exact: false };
        self.classes(rule, uncut);
        let pages = uncut.iter().map(TileClass::stream_pages).sum();
        let even_pages =
            uncut.first().map_or(0, |tile| self.model.pages_per_slot(pages, self.choice.variant(tile.sequences)));
        // What keeps a tile from being as wide in a tiling with shorter chunks.
        let unshared = uncut.iter().map(|tile| tile.page_count - tile.common_pages).max().unwrap_or(0);
        let longest_stream = uncut.iter().map(|tile| u64::from(tile.page_count)).max().unwrap_or(0);
        let least_chunk_pages = u64::from((LEAST_CHUNK_TOKENS / page_size).max(1));
        for rounds in std::iter::once(None).chain(ROUNDS.map(Some)) {
            if let Some(rounds) = rounds {
                let even = even_pages.div_ceil(rounds).max(least_chunk_pages);
                // In one piece less rather than one more: the last round would be nearly empty.
                let chunk_pages = longest_stream.div_ceil((longest_stream / even).max(1));
                // Chunks that cut nothing were tried first.
                let chunk_pages = u32::try_from(chunk_pages).unwrap_or(u32::MAX);
                if chunk_pages >= rule.chunk_pages || u64::from(chunk_pages) >= longest_stream {
                    continue;
                }
                rule.chunk_pages = chunk_pages;
            }
            // Narrower tiles read no less, and where even one sequence is cut there is a merge.
            let is_hopeless = |pages| {
                let floor_us = self.model.floor_us(pages, self.choice, rule.chunk_pages < self.longest);
                best.is_some_and(|best| best.limit_us(self.model.moved_bytes(pages, 0)) <= floor_us)
            };
            if is_hopeless(pages) {
                if rounds.is_none() {
                    return false;
                }
                continue;
            }
            let classes = if unshared > rule.chunk_pages {
                self.classes(rule, narrowed);
                if is_hopeless(narrowed.iter().map(TileClass::stream_pages).sum()) {
                    continue;
                }
                &*narrowed
            } else {
                &*uncut
            };
            if !self.fits(classes, rule) {
                continue;
            }
            let limit_us = |moved_bytes| best.map_or(f64::INFINITY, |best| best.limit_us(moved_bytes));
            let prediction = self.model.predict_below(limit_us, classes, rule, self.choice, (work, deal));
            if let Some((prediction, moved_bytes)) = prediction {
                *best = Some(Best { rule, prediction, moved_bytes });
            }
        }
        true
    }

    /// Whether the plan is within the capacity. Every sequence of a tile is counted as a reader of each of its chunks.
    fn fits(self, classes: &[TileClass], rule: TilingRule) -> bool {
        let Some(capacity) = self.capacity else { return true };
        let (mut items, mut slots) = (0u64, 0u64);
        for class in classes {
            let chunks =
                rule.chunks(class.page_count, self.choice.key_tile_pages(self.choice.variant(class.sequences)));
            let of_class = u64::from(chunks.count) * u64::from(class.count);
            items += of_class;
            slots += if chunks.count > 1 { of_class * u64::from(class.sequences) } else { 0 };
        }
        items <= u64::from(capacity.max_items) && slots <= u64::from(capacity.max_slots)
    }

    /// The tiles of a rule, equal ones together as far as that is cheap.
    fn classes(self, rule: TilingRule, classes: &mut Vec<TileClass>) {
        classes.clear();
        // By its page count, where the class of the last such tile stands.
        let mut last = [0u32; 256];
        tiling::cut(self.extents, rule, |tile| {
            let class = TileClass::from(tile);
            let last = &mut last[class.page_count as usize % 256];
            match classes.get_mut(*last as usize) {
                Some(known) if known.is_like(&class) => known.count += 1,
                _ => {
                    *last = classes.len() as u32;
                    classes.push(class);
                }
            }
        });
    }
}
