//! The cost model: what a tiling is predicted to take. Every term has a name and a unit; the rates are the device
//! profile's.

use super::tiling::RowTile;
use crate::{AttentionShape, DeviceProfile};
use pat_abi::{Arch, TileVariant};
use serde::Serialize;

/// Predicted time of a plan by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Prediction {
    /// Reading every planned KV byte, first reads from DRAM and repeated ones from L2, and writing partials.
    pub memory_us: f64,
    /// Multiplying padded tiles.
    pub tensor_us: f64,
    /// The forward pass as waves of items over the CTA slots: at least the memory and the tensor time, and more where items
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

impl CostModel<'_> {
    /// CTAs of a variant that run at a time.
    fn slots(&self, variant: TileVariant) -> u32 {
        let kernel =
            pat_abi::manifest::find(pat_abi::Family::Forward(variant), self.shape.dtype(), self.shape.head_dim());
        self.profile.sm_count * kernel.map_or(1, |kernel| kernel.min_ctas_per_sm)
    }

    /// Padded FLOP of a main-loop step.
    fn step_flop(&self, variant: TileVariant) -> f64 {
        4.0 * f64::from(variant.rows()) * f64::from(variant.keys()) * f64::from(self.shape.head_dim())
    }

    fn tensor_rate(&self, variant: TileVariant) -> f64 {
        match variant.arch() {
            Arch::Sm80 => self.profile.mma_flop_per_us,
            Arch::Sm90a => self.profile.wgmma_flop_per_us,
        }
    }

    /// Pages each CTA slot would get if `page_count` pages (per KV head) could be dealt out evenly.
    pub(super) fn pages_per_slot(&self, page_count: u64, variant: TileVariant) -> u64 {
        (page_count * u64::from(self.shape.kv_heads())).div_ceil(u64::from(self.slots(variant)))
    }

    /// Predicts a whole plan. `work` is scratch.
    pub(super) fn predict(&self, tiles: &[RowTile], work: &mut Vec<Work>) -> Prediction {
        work.clear();
        let (mut page_count, mut partials) = (0u64, 0u64);
        for tile in tiles {
            page_count += u64::from(tile.page_count);
            partials += u64::from(tile.partials());
            let chunk_tokens = u64::from(tile.page_count.min(tile.chunk_pages)) * u64::from(self.page_size);
            let steps = chunk_tokens.div_ceil(u64::from(tile.variant.keys())) as u32;
            work.push(Work { variant: tile.variant, steps: std::cmp::Reverse(steps), items: tile.chunks });
        }
        work.sort_unstable();
        let read_bytes = page_count as f64 * f64::from(self.page_size) * self.shape.kv_bytes_per_token() as f64;
        // Repeated reads are served by L2 as far as what is read fits there; DRAM and L2 work side by side.
        let repeated = (read_bytes - self.unique_kv_bytes).max(0.0);
        let resident = (self.profile.l2_bytes as f64 / self.unique_kv_bytes.max(1.0)).min(1.0);
        let hbm_bytes = self.unique_kv_bytes.min(read_bytes) + repeated * (1.0 - resident);
        let (row_bytes, rows) =
            (4.0 * f64::from(self.shape.head_dim()) + 4.0, partials * u64::from(self.shape.q_heads()));
        let partial_bytes = rows as f64 * row_bytes;
        let hbm_us = hbm_bytes / self.profile.hbm_bytes_per_us;
        let memory_us = hbm_us.max((read_bytes + partial_bytes) / self.profile.l2_bytes_per_us);
        let all_steps: f64 = work.iter().map(|w| f64::from(w.steps.0) * f64::from(w.items)).sum();
        let memory_per_step_us = memory_us / (all_steps * f64::from(self.shape.kv_heads())).max(1.0);
        let (mut tensor_us, mut busy_us, mut launches) = (0.0, 0.0, 0u32);
        for same_variant in work.chunk_by(|a, b| a.variant == b.variant) {
            let variant = same_variant[0].variant;
            let steps: f64 = same_variant.iter().map(|w| f64::from(w.steps.0) * f64::from(w.items)).sum();
            let tensor_per_step_us = self.step_flop(variant) / self.tensor_rate(variant);
            tensor_us += steps * f64::from(self.shape.kv_heads()) * tensor_per_step_us;
            busy_us += self.waves_us(variant, same_variant, memory_per_step_us.max(tensor_per_step_us));
            launches += 1;
        }
        Prediction {
            memory_us,
            tensor_us,
            busy_us,
            launch_us: f64::from(launches) * self.profile.launch_us,
            merge_us: if partials > 0 {
                self.profile.merge_us + partial_bytes / self.profile.l2_bytes_per_us
            } else {
                0.0
            },
        }
    }

    /// Items are dealt out longest first, one per CTA slot and wave. A wave lasts as long as its longest item takes on its
    /// own, or as all of its steps take the device at `step_us` each.
    fn waves_us(&self, variant: TileVariant, work: &[Work], step_us: f64) -> f64 {
        let slots = u64::from(self.slots(variant));
        let heads = u64::from(self.shape.kv_heads());
        // What one CTA waits for while it changes items, its neighbour on the multiprocessor uses: only the first wave
        // has nothing to overlap with.
        let mut total_us = self.profile.item_latency_us;
        // Free slots of the wave under way, its longest item, its steps.
        let (mut free, mut longest, mut steps) = (slots, 0, 0u64);
        let wave_us = |longest: u32, steps: u64| {
            let alone_us = self.profile.item_latency_us + f64::from(longest) * self.profile.tile_latency_us;
            alone_us.max(steps as f64 * step_us)
        };
        for entry in work {
            let entry_steps = u64::from(entry.steps.0);
            let mut left = u64::from(entry.items) * heads;
            if free < slots || left < slots {
                let taken = left.min(free);
                longest = longest.max(entry.steps.0);
                steps += taken * entry_steps;
                (free, left) = (free - taken, left - taken);
                if free == 0 {
                    total_us += wave_us(longest, steps);
                    (free, longest, steps) = (slots, 0, 0);
                }
            }
            total_us += (left / slots) as f64 * wave_us(entry.steps.0, slots * entry_steps);
            left %= slots;
            if left > 0 {
                (free, longest, steps) = (slots - left, entry.steps.0, left * entry_steps);
            }
        }
        if free < slots {
            total_us += wave_us(longest, steps);
        }
        total_us
    }
}

/// Items of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Work {
    variant: TileVariant,
    /// Main-loop steps per item.
    steps: std::cmp::Reverse<u32>,
    /// Items (each once per KV head).
    items: u32,
}
