//! Preference: which of the variants that could serve a batch are looked at, how many sequences to a tile, and when wide
//! tiles are worth it. What *can* serve it is [`crate::eligibility`]'s to say.

use super::cost::Prediction;
use super::{PlanMode, PlanOptions};
use crate::eligibility::variant_supports;
use crate::{AttentionShape, DeviceProfile, Error, Part, Problem, Result, supports};
use pat_abi::{Arch, GroupParts, TileVariant};
use std::cmp::Reverse;

/// Part of the forward pass that the tensor cores must take before wider tiles are looked at (docs/planner-quality.md).
const LEAST_TENSOR_PART: f64 = 0.6;

/// As [`LEAST_TENSOR_PART`], where the usual tiles compute scores twice.
const LEAST_TENSOR_PART_OF_TWICE: f64 = 0.45;

/// Memory time that wider tiles may take, in parts of what the usual ones take.
const MOST_WIDE_MEMORY: f64 = 0.95;

/// Time that mma.sync tiles over 8-bit K and V may take, in parts of what the usual ones take.
const MOST_UNSHARED_TIME: f64 = 0.92;

/// What they take longer than the model says: of short items it knows less (docs/performance-log.md, 29 November 2026).
const UNSHARED_LATENCY_US: f64 = 2.0;

/// Of so many distinct pages one may be read once more where they serve.
const PAGES_PER_REPEATED: u64 = 16;

/// What tiles a batch may be cut into.
#[derive(Clone, Debug)]
pub(super) struct TileChoices {
    pub(super) usual: TileChoice,
    /// Other tiles, for batches whose tensor cores are the limit.
    special: Option<Special>,
    /// Whether the plan made last has these.
    is_special_in_use: bool,
}

/// Tiles for some batches whose tensor cores are the limit.
#[derive(Clone, Debug)]
pub(super) struct Special {
    pub(super) choice: TileChoice,
    purpose: Purpose,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// More rows: what is shared is read less often.
    Wide,
    /// Likewise, where the usual tiles compute scores twice and these do not.
    WideOnce,
    /// mma.sync over 8-bit K and V, where next to nothing is shared: its narrow tiles multiply less, and widen as much.
    Unshared,
}

impl Special {
    /// Sequences per tile that are tried.
    pub(super) fn widths(&self) -> impl Iterator<Item = u32> {
        let (widest, narrowest) = match self.purpose {
            Purpose::Wide | Purpose::WideOnce => (self.choice.widest(), None),
            Purpose::Unshared => (1, Some(1)),
        };
        widths(widest).chain(narrowest)
    }

    /// Part of the usual plan's forward pass that the tensor cores take at least where these tiles are looked at.
    fn least_tensor_part(&self) -> f64 {
        if self.purpose == Purpose::WideOnce { LEAST_TENSOR_PART_OF_TWICE } else { LEAST_TENSOR_PART }
    }

    /// Whether a plan in these tiles is to be preferred to one in the usual ones. Wide ones must be faster and read clearly less:
    /// where they read as much, they are slower than predicted (docs/planner-quality.md), but where they multiply less.
    pub(super) fn is_better(&self, special: &Prediction, usual: &Prediction) -> bool {
        match self.purpose {
            Purpose::Wide => {
                special.total_us() < usual.total_us() && special.memory_us <= MOST_WIDE_MEMORY * usual.memory_us
            }
            Purpose::WideOnce => special.total_us() < usual.total_us(),
            Purpose::Unshared => special.total_us() + UNSHARED_LATENCY_US <= MOST_UNSHARED_TIME * usual.total_us(),
        }
    }
}

impl TileChoices {
    /// # Errors
    /// No variant can serve the problem on the device, or one of those that are asked for cannot.
    pub(super) fn new(problem: &Problem, profile: &DeviceProfile, options: &PlanOptions) -> Result<Self> {
        supports(problem, None, Some(profile.compute_capability))?;
        let possible = profile.variants(problem);
        let (shape, page_size) = (problem.shape(), problem.page_size());
        let only = |variants: &[TileVariant]| {
            let usual = TileChoice::new(variants, shape, page_size);
            // Kernels sum in different orders: which one computes a sequence must not depend on those beside it.
            let is_fixed = matches!(options.mode, PlanMode::FixedChunk { .. });
            let usual = if is_fixed { TileChoice::new(&[usual.variant(1)], shape, page_size) } else { usual };
            Self { usual, special: None, is_special_in_use: false }
        };
        if let Some(forced) = &options.variants {
            return Self::check_forced(forced, &possible, problem, profile).map(|()| only(forced));
        }
        let streams = is_for_streams(problem);
        let usual: Vec<_> =
            possible.iter().copied().filter(|variant| streams || variant.arch() == Arch::Sm80).collect();
        // A group may be one that wgmma's tiles alone take.
        let possible = if usual.is_empty() { possible } else { usual };
        // The wgmma stream serves leaves as fast as the narrow tiles do, and shared nodes in the same launch.
        if possible.contains(&TileVariant::Wgmma64) {
            let mma: Vec<_> = possible.iter().copied().filter(|variant| variant.arch() == Arch::Sm80).collect();
            let (variants, purpose) = if problem.shape().kv_dtype().bytes() == 1 {
                (&mma[..], Purpose::Unshared)
            } else {
                let is_twice = TileVariant::Wgmma64.config(problem.shape().head_dim()).column_splits > 1;
                (&[TileVariant::Wgmma128][..], if is_twice { Purpose::WideOnce } else { Purpose::Wide })
            };
            // No other mode has a choice.
            let has_special =
                variants.iter().all(|variant| possible.contains(variant)) && options.mode == PlanMode::Auto;
            let special = || Special { choice: TileChoice::new(variants, shape, page_size), purpose };
            return Ok(Self { special: has_special.then(special), ..only(&[TileVariant::Wgmma64]) });
        }
        Ok(only(&possible))
    }

    /// Of the variants that are asked for, those with fewer rows than one sequence needs may stand beside others.
    fn check_forced(
        forced: &[TileVariant],
        possible: &[TileVariant],
        problem: &Problem,
        profile: &DeviceProfile,
    ) -> Result<()> {
        if forced.is_empty() {
            return Err(Error::invalid("variants", "none", "at least one tile variant"));
        }
        let reason = |variant: TileVariant| variant_supports(variant, problem, profile.compute_capability).err();
        let has_possible = forced.iter().any(|variant| possible.contains(variant));
        let mut refused = forced.iter().filter_map(|variant| Some((variant, reason(*variant)?)));
        match refused.find(|(_, reason)| reason.part != Part::Group || !has_possible) {
            None => Ok(()),
            Some((variant, reason)) => {
                let names: Vec<_> = possible.iter().map(|variant| variant.name()).collect();
                let expected = format!("some of {} ({}: {reason})", names.join(", "), variant.name());
                Err(Error::invalid("variants", variant.name(), expected))
            }
        }
    }

    /// The usual ones alone.
    pub(super) fn without_special(self) -> Self {
        Self { special: None, is_special_in_use: false, ..self }
    }

    /// Takes the usual tiles or the special ones.
    pub(super) fn take(&mut self, special: bool) {
        self.is_special_in_use = special;
    }

    /// Whether the plan made last has special tiles.
    pub(super) fn is_special_in_use(&self) -> bool {
        self.is_special_in_use
    }

    /// The special tiles, where they may help a batch of so many distinct and repeated pages whose plan in the usual ones is
    /// predicted so.
    pub(super) fn special_for(&self, usual: &Prediction, (unique, repeated): (u64, u64)) -> Option<&Special> {
        let may_help = |special: &&Special| {
            usual.tensor_us >= special.least_tensor_part() * usual.busy_us
                && (special.purpose != Purpose::Unshared || repeated <= unique / PAGES_PER_REPEATED)
        };
        self.special.as_ref().filter(may_help)
    }

    /// Those that the plan made last has.
    pub(super) fn in_use(&self) -> &TileChoice {
        let special = self.special.as_ref().filter(|_| self.is_special_in_use);
        special.map_or(&self.usual, |special| &special.choice)
    }

    /// Every variant that a plan may use, in the order of [`TileVariant::ALL`].
    pub(super) fn variants(&self) -> Vec<TileVariant> {
        let mut variants: Vec<_> =
            self.usual.variants().chain(self.special.iter().flat_map(|special| special.choice.variants())).collect();
        variants.sort_unstable();
        variants
    }
}

/// Whether wgmma tiles, if they can serve the pages of a problem, are the usual ones. Where TMA fills pages up, mma.sync is faster over
/// what is not shared, and up to head dim 128 over what is where pages are large and tiles begin and end within them
/// (docs/performance-log.md, 29 November 2026).
fn is_for_streams(problem: &Problem) -> bool {
    const LARGE_PAGE: u32 = 256;
    let (page_size, head_dim) = (problem.page_size(), problem.shape().head_dim());
    let is_filled_up = TileVariant::Wgmma64.page_keys(page_size) > page_size;
    let is_cut = !page_size.is_power_of_two() && page_size >= LARGE_PAGE && head_dim <= 128;
    page_size == 1 || !is_filled_up && !is_cut
}

/// Sequences per tile that are tried, where more than one. Wide ones first: what they take spares looking at narrower ones that
/// read more than that.
pub(super) fn widths(widest: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(widest), |width| Some(width.div_ceil(2))).take_while(|width| *width > 1)
}

/// Which tile variant serves how many sequences, for one group size and page size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TileChoice {
    page_size: u32,
    /// Rows of a sequence in a tile: those of its group, or of one part of it.
    sequence_rows: u32,
    /// For 1, 2, ... sequences, up to as many as the largest variant holds.
    by_sequences: Vec<TileVariant>,
    /// The variants in use, narrowest first.
    distinct: Vec<TileVariant>,
    /// Keys of a main-loop step, by [`TileVariant::index`].
    keys: [u32; TileVariant::ALL.len()],
}

impl TileChoice {
    /// The smallest of `variants` that holds the rows of each number of sequences, of equally large ones the kernel of the newer
    /// architecture. Where none holds those of one, the largest holds a part of them.
    fn new(variants: &[TileVariant], shape: AttentionShape, page_size: u32) -> Self {
        let group = shape.group();
        let largest = variants.iter().copied().max_by_key(|variant| (variant.rows(), *variant));
        let parts = largest.map(|variant| GroupParts::new(group, variant)).filter(|parts| parts.count > 1);
        let most_rows = largest.map_or(0, TileVariant::rows);
        let smallest = |rows| {
            let holding = variants.iter().copied().filter(|variant| variant.rows() >= rows);
            holding.min_by_key(|variant| (variant.rows(), Reverse(*variant)))
        };
        let by_sequences: Vec<_> = match parts {
            Some(_) => largest.into_iter().collect(),
            None => (1..=most_rows / group).filter_map(|sequences| smallest(sequences * group)).collect(),
        };
        let sequence_rows = parts.map_or(group, |parts| parts.rows);
        let distinct = by_sequences.chunk_by(|a, b| a == b).map(|equal| equal[0]).collect();
        let keys = TileVariant::ALL.map(|variant| variant.keys(shape.head_dim(), shape.kv_dtype()));
        Self { page_size, sequence_rows, by_sequences, distinct, keys }
    }

    pub(super) fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Rows of a sequence in a tile.
    pub(super) fn sequence_rows(&self) -> u32 {
        self.sequence_rows
    }

    /// Most sequences of a tile.
    pub(super) fn widest(&self) -> u32 {
        self.by_sequences.len() as u32
    }

    /// The variant for `sequences` sequences, 1 to [`Self::widest`].
    pub(super) fn variant(&self, sequences: u32) -> TileVariant {
        self.by_sequences[sequences as usize - 1]
    }

    /// The variants in use, narrowest first.
    pub(super) fn variants(&self) -> impl Iterator<Item = TileVariant> {
        self.distinct.iter().copied()
    }

    /// Keys of a main-loop step of the variant.
    pub(super) fn keys(&self, variant: TileVariant) -> u32 {
        self.keys[variant.index()]
    }

    /// Pages of the variant's key tile.
    pub(super) fn key_tile_pages(&self, variant: TileVariant) -> u32 {
        (self.keys(variant) / variant.page_keys(self.page_size)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn a_wgmma_stream_is_taken_where_there_is_one() {
        let variants = |problem: Problem| {
            let choices = TileChoices::new(&problem, &DeviceProfile::h200(), &PlanOptions::default());
            choices.expect("a problem that is served").variants()
        };
        let problem = |head_dim| Problem::new(AttentionShape::new(32, 8, head_dim, Dtype::Bf16).unwrap(), 16);
        assert_eq!(variants(problem(128)), [TileVariant::Wgmma64, TileVariant::Wgmma128]);
        assert_eq!(variants(problem(256)), [TileVariant::Wgmma64, TileVariant::Wgmma128]);
        // mma.sync is faster over pages of 24, but wider tiles hold the group.
        let group_of_65 = Problem::new(AttentionShape::new(65, 1, 256, Dtype::Bf16).unwrap(), 24);
        assert_eq!(variants(group_of_65), [TileVariant::Wgmma128]);
        let eight_bit = Problem::new(problem(128).shape().with_kv_dtype(Dtype::E4m3), 16);
        let mma = [TileVariant::Mma16, TileVariant::Mma32, TileVariant::Mma64];
        assert_eq!(variants(eight_bit), [&mma[..], &[TileVariant::Wgmma64]].concat());
        assert_eq!(variants(problem(128).with_window(1024)), [TileVariant::Wgmma64]);
        assert_eq!(variants(problem(256).with_window(1024)), mma);
        assert_eq!(variants(eight_bit.with_window(1024)), mma);
        for (page_size, head_dim, streams) in [(48, 64, true), (784, 256, true), (784, 128, false), (24, 256, false)] {
            let usual = variants(problem(head_dim).with_page_size(page_size));
            assert_eq!(usual.contains(&TileVariant::Wgmma64), streams, "{page_size} tokens, {head_dim} elements");
        }
        // Its tiles of 64 rows do not hold this group, the wide ones do, and mma.sync's as wide.
        let group_of_100 = Problem::new(AttentionShape::new(100, 1, 128, Dtype::F16).unwrap(), 16);
        assert_eq!(variants(group_of_100), [TileVariant::Wgmma128]);
    }

    #[test]
    fn variants_that_are_asked_for_serve_the_problem() {
        let forced = |problem: Problem, variants: &[TileVariant]| {
            let options = PlanOptions::default().with_variants(variants);
            let choices = TileChoices::new(&problem, &DeviceProfile::h200(), &options);
            choices.map(|choices| choices.variants()).map_err(|error| error.to_string())
        };
        let group_of_32 = Problem::new(AttentionShape::new(32, 1, 128, Dtype::F16).unwrap(), 16);
        // Too few rows for one sequence: no error beside a variant that has enough.
        assert_eq!(forced(group_of_32, &[TileVariant::Mma16, TileVariant::Mma64]), Ok(vec![TileVariant::Mma64]));
        let message = forced(group_of_32, &[TileVariant::Mma16]).unwrap_err();
        assert!(message.starts_with("variants: got mma16,"), "{message}");
        // What a variant does not compute is an error also there.
        let eight_bit = Problem::new(group_of_32.shape().with_kv_dtype(Dtype::E4m3), 16);
        let in_a_window = eight_bit.with_window(40);
        let message = forced(in_a_window, &[TileVariant::Wgmma64, TileVariant::Mma64]).unwrap_err();
        assert!(message.starts_with("variants: got wgmma64,") && message.contains("window: got 40"), "{message}");
    }
}
