//! The cost model: what a packing is predicted to take. Every term has a name and a unit; the rates are the device
//! profile's.

use super::packs::Pack;
use crate::{AttentionShape, DeviceProfile};
use pat_abi::{Arch, TileVariant};
use serde::Serialize;

/// Predicted time of a plan by cause. Memory, tensor and latency overlap, so the largest of them counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Prediction {
    /// Reading every planned KV byte, first reads from DRAM and repeated ones from L2, and writing and reading partials.
    pub memory_us: f64,
    /// Multiplying padded tiles.
    pub tensor_us: f64,
    /// The most loaded CTA slot: tile after tile, each at its latency.
    pub latency_us: f64,
    /// Launches: forward, one more for each further tile variant, and the merge if there is one.
    pub launch_us: f64,
}

impl Prediction {
    /// All of it.
    pub fn total_us(&self) -> f64 {
        self.launch_us + self.memory_us.max(self.tensor_us).max(self.latency_us)
    }
}

/// The shape-dependent constants of the model.
#[derive(Clone, Copy, Debug)]
pub(super) struct CostModel<'a> {
    pub(super) profile: &'a DeviceProfile,
    pub(super) shape: AttentionShape,
    pub(super) page_size: u32,
    /// KV bytes of the batch's distinct pages.
    pub(super) unique_kv_bytes: f64,
}

/// A pack with its tile and its split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) variant: TileVariant,
    /// Row tiles.
    pub(super) row_tiles: u32,
    /// Pages per chunk.
    pub(super) chunk_pages: u32,
    /// Chunks.
    pub(super) chunks: u32,
}

impl CostModel<'_> {
    /// CTAs of a variant that run at a time.
    pub(super) fn slots(&self, variant: TileVariant) -> u32 {
        let kernel =
            pat_abi::manifest::find(pat_abi::Family::Forward(variant), self.shape.dtype(), self.shape.head_dim());
        self.profile.sm_count * kernel.map_or(1, |kernel| kernel.min_ctas_per_sm)
    }

    /// Time of `keys` KV tokens in one CTA: whole tiles, at the latency of a main-loop step where nothing else is the
    /// bound, or at the CTA's share of the tensor throughput.
    pub(super) fn cta_us(&self, variant: TileVariant, keys: u32) -> f64 {
        let tiles = f64::from(keys.div_ceil(variant.keys()));
        self.profile.item_latency_us + tiles * self.tile_us(variant)
    }

    fn tile_us(&self, variant: TileVariant) -> f64 {
        let flop = 4.0 * f64::from(variant.rows()) * f64::from(variant.keys()) * f64::from(self.shape.head_dim());
        let share = self.tensor_rate(variant) / f64::from(self.slots(variant));
        self.profile.tile_latency_us.max(flop / share)
    }

    fn tensor_rate(&self, variant: TileVariant) -> f64 {
        match variant.arch() {
            Arch::Sm80 => self.profile.mma_flop_per_us,
            Arch::Sm90a => self.profile.wgmma_flop_per_us,
        }
    }

    /// Predicts a whole plan.
    pub(super) fn predict(&self, packs: &[Pack], splits: &[Split], partial_rows: u64) -> Prediction {
        let kv_heads = f64::from(self.shape.kv_heads());
        let token_bytes = self.shape.kv_bytes_per_token() as f64;
        let (mut read_bytes, mut tensor_us, mut load_us, mut longest_us) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
        let mut used = [false; TileVariant::ALL.len()];
        for (pack, split) in packs.iter().zip(splits) {
            let variant = split.variant;
            used[variant.index()] = true;
            let row_tiles = f64::from(split.row_tiles);
            read_bytes += row_tiles * f64::from(pack.token_count) * token_bytes;
            let chunk_tokens = (split.chunk_pages * self.page_size).min(pack.token_count);
            let item_us = self.cta_us(variant, chunk_tokens);
            longest_us = longest_us.max(item_us);
            load_us += item_us * row_tiles * f64::from(split.chunks) * kv_heads / f64::from(self.slots(variant));
            let keys = f64::from(chunk_tokens.next_multiple_of(variant.keys())) * f64::from(split.chunks);
            let flop = 4.0 * row_tiles * f64::from(variant.rows()) * keys * f64::from(self.shape.head_dim()) * kv_heads;
            tensor_us += flop / self.tensor_rate(variant);
        }
        // Repeated reads are served by L2 as far as what is read fits there.
        let repeated = (read_bytes - self.unique_kv_bytes).max(0.0);
        let resident = (self.profile.l2_bytes as f64 / self.unique_kv_bytes.max(1.0)).min(1.0);
        let partial_bytes = 2.0 * partial_rows as f64 * (4.0 * f64::from(self.shape.head_dim()) + 4.0);
        let hbm_bytes = self.unique_kv_bytes.min(read_bytes) + repeated * (1.0 - resident);
        let l2_bytes = repeated * resident + partial_bytes;
        let launches = used.iter().filter(|&&used| used).count() as f64;
        Prediction {
            memory_us: hbm_bytes / self.profile.hbm_bytes_per_us + l2_bytes / self.profile.l2_bytes_per_us,
            tensor_us,
            latency_us: longest_us.max(load_us),
            launch_us: launches * self.profile.launch_us + if partial_rows > 0 { self.profile.merge_us } else { 0.0 },
        }
    }
}
