//! The batches that are measured, and what the cost model says of each.

use pat_abi::{Family, TileVariant, manifest};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Error, PlanOptions, Problem, Result};
use pat_workloads::OwnedBatch;

/// Tokens per page: all variants read such pages.
const PAGE_SIZE: u32 = 32;
/// Tokens of the shortest items: so few that even all CTAs together are not bound by the memory.
const LEAF_TOKENS: u32 = 16;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
/// Query heads per KV head where rows do not matter.
const GROUP: u32 = 4;
/// Waves of CTAs where the number is not what is varied: what one item waits for, others cover.
const WAVES: u32 = 8;

/// A batch to measure.
#[derive(Clone, Debug)]
pub struct Probe {
    /// For reports.
    pub name: String,
    /// What its time says.
    pub quantity: Quantity,
    /// The batch; its pages do not depend on the device's contents.
    pub batch: OwnedBatch,
    /// Heads.
    pub shape: AttentionShape,
    /// Forced tile variant and chunk.
    pub options: PlanOptions,
}

/// What the time of a probe says, in the terms of the cost model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quantity {
    /// One sequence, `steps` main-loop steps in one CTA per KV head: `launch + 2 item latencies + steps * tile latency`.
    Steps {
        /// Main-loop steps.
        steps: f64,
    },
    /// `waves` waves of CTAs of one step: a constant, and `waves * (item latency + tile latency)`.
    Waves {
        /// Waves.
        waves: f64,
    },
    /// Distinct pages that are read once: `fixed costs + kv_bytes / DRAM bandwidth`.
    Dram {
        /// KV bytes.
        kv_bytes: f64,
    },
    /// Equal rows, whose pages lie in L2: `fixed costs + max(kv_bytes / L2 bandwidth, flop / tensor rate)`.
    Resident {
        /// The kernel.
        variant: TileVariant,
        /// KV bytes read.
        kv_bytes: f64,
        /// Whole tiles multiplied.
        flop: f64,
    },
    /// Items of one length, enough for part of the device. `halves` of the same pair are alike but for the merge, which
    /// adds `merge` and [`pat_rs::DeviceProfile::partials_us`].
    Merge {
        /// Which probes belong together.
        pair: u32,
        /// Bytes of partials; 0 without a merge.
        partial_bytes: f64,
    },
}

impl Probe {
    fn new(
        name: String,
        quantity: Quantity,
        batch: OwnedBatch,
        group: u32,
        chunk: u32,
        variant: TileVariant,
    ) -> Result<Self> {
        let mode = PlanMode::FixedChunk { tokens: chunk };
        Ok(Self {
            name,
            quantity,
            batch,
            shape: AttentionShape::new(group * KV_HEADS, KV_HEADS, HEAD_DIM, Dtype::F16)?,
            options: PlanOptions::from(mode).with_variants([variant]),
        })
    }
}

/// What is measured on a device of this kind: only `compute_capability` and `sm_count` of the profile are used.
///
/// # Errors
/// The profile is of no device that the kernels run on.
pub fn probes(device: &DeviceProfile) -> Result<Vec<Probe>> {
    let shape = AttentionShape::new(GROUP * KV_HEADS, KV_HEADS, HEAD_DIM, Dtype::F16)?;
    let variants = device.variants(&Problem::new(shape, PAGE_SIZE));
    let wgmma = Some(TileVariant::Wgmma64).filter(|variant| variants.contains(variant));
    // What serves single sequences.
    let narrow = wgmma.unwrap_or(TileVariant::Mma16);
    let mut probes = Vec::new();
    for steps in [4, 8, 16, 32, 64] {
        let tokens = steps * narrow.keys(HEAD_DIM, Dtype::F16);
        let quantity = Quantity::Steps { steps: f64::from(steps) };
        let name = format!("{}: 1 sequence of {tokens} tokens", narrow.name());
        probes.push(Probe::new(name, quantity, distinct(1, tokens, PAGE_SIZE), GROUP, tokens, narrow)?);
    }
    for waves in [WAVES, 3 * WAVES, 5 * WAVES] {
        let sequences = sequences(device, narrow, waves)?;
        let quantity = Quantity::Waves { waves: f64::from(waves) };
        let name = format!("{}: {sequences} sequences of {LEAF_TOKENS} tokens", narrow.name());
        let batch = distinct(sequences, LEAF_TOKENS, LEAF_TOKENS);
        probes.push(Probe::new(name, quantity, batch, GROUP, LEAF_TOKENS, narrow)?);
    }
    for tokens in [512, 1024, 2048] {
        let sequences = sequences(device, narrow, WAVES)?;
        let quantity = Quantity::Dram { kv_bytes: kv_bytes(sequences, tokens) };
        let name = format!("{}: {sequences} sequences of {tokens} tokens", narrow.name());
        probes.push(Probe::new(name, quantity, distinct(sequences, tokens, PAGE_SIZE), GROUP, tokens, narrow)?);
    }
    for variant in [TileVariant::Mma16, TileVariant::Mma64].into_iter().chain(wgmma) {
        for waves in [WAVES, 2 * WAVES, 3 * WAVES] {
            let (sequences, tokens) = (sequences(device, variant, waves)?, 2048);
            // Full tiles: one sequence has as many query heads as the tile has rows.
            let rows = f64::from(variant.rows());
            let flop = 4.0 * rows * f64::from(HEAD_DIM) * f64::from(sequences) * f64::from(KV_HEADS * tokens);
            let quantity = Quantity::Resident { variant, kv_bytes: kv_bytes(sequences, tokens), flop };
            let name = format!("{}: {sequences} equal sequences of {tokens} tokens", variant.name());
            probes.push(Probe::new(name, quantity, equal(sequences, tokens), variant.rows(), tokens, variant)?);
        }
    }
    for (pair, sequences) in [(0, 1), (1, 2), (2, 4), (3, 8), (4, 16)] {
        // Short: a merge is the difference of two times, each with its noise.
        let tokens = 2 * narrow.keys(HEAD_DIM, Dtype::F16);
        let partials = 2.0 * f64::from(sequences);
        let partial_bytes = partials * f64::from(GROUP * KV_HEADS) * 4.0 * (f64::from(HEAD_DIM) + 1.0);
        for (sequences, tokens_each, partial_bytes) in
            [(2 * sequences, tokens, 0.0), (sequences, 2 * tokens, partial_bytes)]
        {
            let quantity = Quantity::Merge { pair, partial_bytes };
            let cut = if partial_bytes > 0.0 { ", cut in two" } else { "" };
            let name = format!("{}: {sequences} sequences of {tokens_each} tokens{cut}", narrow.name());
            probes.push(Probe::new(
                name,
                quantity,
                distinct(sequences, tokens_each, PAGE_SIZE),
                GROUP,
                tokens,
                narrow,
            )?);
        }
    }
    Ok(probes)
}

/// Sequences whose CTAs fill the device `waves` times, a multiple of the KV heads.
fn sequences(device: &DeviceProfile, variant: TileVariant, waves: u32) -> Result<u32> {
    let kernel = manifest::find(Family::Forward(variant), Dtype::F16, HEAD_DIM)
        .ok_or_else(|| Error::invalid("variant", variant.name(), "one of the manifest"))?;
    Ok(device.sm_count * device.limits().occupancy(kernel) * (waves / KV_HEADS))
}

/// K and V of all heads.
fn kv_bytes(sequences: u32, tokens: u32) -> f64 {
    f64::from(sequences) * f64::from(tokens) * f64::from(KV_HEADS * HEAD_DIM) * 4.0
}

/// Sequences that share nothing; their pages lie as if they had grown together.
fn distinct(sequences: u32, tokens: u32, page_size: u32) -> OwnedBatch {
    let pages = tokens.div_ceil(page_size);
    let table = |sequence: u32| (0..pages).map(|page| page * sequences + sequence).collect();
    OwnedBatch {
        page_size,
        num_pages: pages * sequences,
        lengths: vec![tokens; sequences as usize],
        block_tables: (0..sequences).map(table).collect(),
    }
}

/// Sequences of the same pages.
fn equal(sequences: u32, tokens: u32) -> OwnedBatch {
    let mut batch = distinct(1, tokens, PAGE_SIZE);
    batch.lengths = vec![tokens; sequences as usize];
    batch.block_tables = vec![batch.block_tables.swap_remove(0); sequences as usize];
    batch
}
