//! Planning: a pure function of (batch, shape, device profile, options) to a [`Plan`].

mod buffer;

use crate::{AttentionShape, DecodeBatch, DeviceProfile, Result};
pub use buffer::{Plan, PlanParts};
use pat_abi::{DIRECT_SLOT, MergeRow, PackQuery, TileVariant, WorkItem};

/// How to plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanOptions {
    /// Which packing to use.
    pub mode: PlanMode,
    /// Only these tile variants (all that the device and page size allow where `None`).
    pub variants: Option<Vec<TileVariant>>,
}

/// Which packing to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
}

impl Planner {
    /// # Errors
    /// The options name a variant the device cannot run.
    pub fn new(shape: AttentionShape, profile: DeviceProfile, options: PlanOptions) -> Result<Self> {
        Ok(Self { shape, profile, options })
    }

    /// Plans a batch from scratch.
    ///
    /// # Errors
    /// The plan would exceed what its records can express (2^31 rows, items or slots).
    pub fn plan(&mut self, batch: &DecodeBatch<'_>) -> Result<Plan> {
        // First version: no sharing, no split. Replaced by the real planner.
        let mut parts = PlanParts::default();
        let variant = self
            .options
            .variants
            .as_ref()
            .and_then(|v| v.first().copied())
            .unwrap_or_else(|| self.profile.variants(batch.page_size())[0]);
        for sequence in 0..batch.sequence_count() {
            let length = batch.length(sequence);
            if length == 0 {
                parts.merges.push(MergeRow { sequence: sequence as u32, slot_begin: 0, slot_count: 0, reserved: 0 });
                continue;
            }
            let page_begin = parts.pages.len() as u32;
            parts.pages.extend_from_slice(batch.pages(sequence));
            let query_begin = parts.queries.len() as u32;
            parts.queries.push(PackQuery { sequence: sequence as u32, slot: DIRECT_SLOT });
            let mut row_begin = 0;
            while row_begin < self.shape.group() {
                let row_count = (self.shape.group() - row_begin).min(variant.rows());
                parts.items[variant.index()].push(WorkItem {
                    page_begin,
                    token_count: length,
                    query_begin,
                    row_begin,
                    row_count,
                    slot_offset: 0,
                    pack: query_begin,
                    reserved: 0,
                });
                row_begin += row_count;
            }
        }
        Plan::assemble(self.shape, batch, &parts)
    }
}
