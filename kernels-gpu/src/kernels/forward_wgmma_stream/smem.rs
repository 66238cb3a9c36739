//! Shared memory of a CTA: addresses of tiles and barriers, and the order in which stages and query slots are used.

use super::{GROUP_ROWS, PRODUCER_WARPS, SPAN_KEYS};
use crate::ptx::wgmma::RegisterSplit;
use pat_abi::{SmemLayout, Switches, TileConfig, TileVariant};

/// Bytes of a row of a block: 64 elements, what the swizzle spans.
const BLOCK_ROW_BYTES: u32 = 128;
/// Elements of it.
const BLOCK_ELEMENTS: u32 = 64;

/// Shared-memory addresses of one CTA whose rows are those of `GROUPS` warpgroups.
#[derive(Clone, Copy)]
pub(super) struct Smem<const HEAD_DIM: u32, const GROUPS: u32> {
    pub(super) base: u32,
}

impl<const HEAD_DIM: u32, const GROUPS: u32> Smem<HEAD_DIM, GROUPS> {
    pub(super) const VARIANT: TileVariant = if GROUPS == 1 { TileVariant::Wgmma64 } else { TileVariant::Wgmma128 };
    pub(super) const CAPS_SCORES: bool = Self::VARIANT.serves(Switches { soft_cap: true, ..Switches::OFF });
    const CONFIG: TileConfig = Self::VARIANT.config(HEAD_DIM);
    const LAYOUT: SmemLayout = {
        let config = Self::CONFIG;
        assert!(config.rows == GROUPS * GROUP_ROWS && config.key_splits == 1 && config.rings == 1);
        assert!(config.stages == Self::VARIANT.config(64).stages, "rings count them at any head dimension");
        assert!(config.query_slots == 4 * GROUPS && config.producer_warps == PRODUCER_WARPS);
        config.smem(HEAD_DIM, 2)
    };
    pub(super) const STAGES: u32 = Self::CONFIG.stages;
    /// Spans of 64 keys in a main-loop step. Two CTAs share a multiprocessor where each has one consumer; else one has all of it,
    /// and room for twice the keys.
    pub(super) const SPANS: u32 = Self::CONFIG.keys / SPAN_KEYS;
    pub(super) const KEYS: u32 = Self::CONFIG.keys;
    pub(super) const CONSUMER_WARPS: u32 = Self::CONFIG.computing_warps();
    /// Consumer warpgroups that have the same rows and a part of V's columns each.
    pub(super) const COLUMN_SPLITS: u32 = Self::CONFIG.column_splits;
    /// Columns of a consumer warpgroup.
    pub(super) const COLUMNS: u32 = HEAD_DIM / Self::COLUMN_SPLITS;
    pub(super) const Q_SLOTS: u32 = Self::CONFIG.query_slots;
    /// Of 64 elements of the keys of a tile.
    pub(super) const BLOCK_BYTES: u32 = Self::KEYS * BLOCK_ROW_BYTES;
    pub(super) const TILE_BYTES: u32 = Self::LAYOUT.tile_bytes;

    pub(super) fn k(self, stage: u32) -> u32 {
        self.base + Self::LAYOUT.k + stage * Self::LAYOUT.stage_bytes
    }
    pub(super) fn v(self, stage: u32) -> u32 {
        self.base + Self::LAYOUT.v + stage * Self::LAYOUT.stage_bytes
    }
    /// The V tile's columns of a part of them.
    pub(super) fn v_columns(self, stage: u32, part: u32) -> u32 {
        self.v(stage) + part * (Self::COLUMNS / BLOCK_ELEMENTS * Self::BLOCK_BYTES)
    }
    /// The Q rows of a consumer warpgroup.
    pub(super) fn q(self, group: u32) -> u32 {
        self.base + Self::LAYOUT.q + group * (GROUP_ROWS * HEAD_DIM * 2)
    }
    pub(super) fn k_full(self, stage: u32) -> u32 {
        self.base + Self::LAYOUT.barriers + stage * 32
    }
    pub(super) fn v_full(self, stage: u32) -> u32 {
        self.k_full(stage) + 8
    }
    pub(super) fn k_empty(self, stage: u32) -> u32 {
        self.k_full(stage) + 16
    }
    pub(super) fn v_empty(self, stage: u32) -> u32 {
        self.k_full(stage) + 24
    }
    /// The [`KeyMask`]s of a stage, 16 bytes per span.
    pub(super) fn masks(self, stage: u32) -> u32 {
        self.base + Self::LAYOUT.masks + stage * Self::LAYOUT.mask_bytes
    }
    pub(super) fn q_full(self, slot: u32) -> u32 {
        self.base + Self::LAYOUT.barriers + Self::STAGES * 32 + slot * 16
    }
    pub(super) fn q_empty(self, slot: u32) -> u32 {
        self.q_full(slot) + 8
    }
}

impl<const HEAD_DIM: u32, const GROUPS: u32> RegisterSplit for Smem<HEAD_DIM, GROUPS> {
    const PRODUCERS: u32 = Self::CONFIG.producer_registers;
    const CONSUMERS: u32 = Self::CONFIG.consumer_registers;
}

/// Position in the ring of stages: the stage and the parity of its current phase.
#[derive(Clone, Copy)]
pub(super) struct Ring<const GROUPS: u32> {
    pub(super) stage: u32,
    pub(super) phase: u32,
}

impl<const GROUPS: u32> Ring<GROUPS> {
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        self.stage += 1;
        if self.stage == Smem::<64, GROUPS>::STAGES {
            self.stage = 0;
            self.phase ^= 1;
        }
    }
}

/// The Q tile is slots of 16 rows. An item of at most 16 rows takes the next slot, a larger one all: several short items
/// are on their way at a time. Producer and consumer step through the same sequence of slots.
#[derive(Clone, Copy)]
pub(super) struct QSlots<const GROUPS: u32> {
    pub(super) next: u32,
    /// Bit `s`: parity of slot `s`'s current phase.
    pub(super) phases: u32,
}

impl<const GROUPS: u32> QSlots<GROUPS> {
    pub(super) const COUNT: u32 = Smem::<64, GROUPS>::Q_SLOTS;
    pub(super) const PER_GROUP: u32 = 4;
    pub(super) const ROWS: u32 = 16;

    /// First slot and number of slots of an item.
    #[inline(always)]
    pub(super) fn take(&mut self, row_count: u32) -> (u32, u32) {
        if row_count <= Self::ROWS {
            let slot = self.next;
            self.next = (slot + 1) % Self::COUNT;
            (slot, 1)
        } else {
            self.next = 0;
            (0, Self::COUNT)
        }
    }

    /// The parity to wait for on `slot`; flips it.
    #[inline(always)]
    pub(super) fn parity(&mut self, slot: u32) -> u32 {
        let parity = (self.phases >> slot) & 1;
        self.phases ^= 1 << slot;
        parity
    }
}

/// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of `rows` rows: blocks of 64 elements, 128-byte swizzle.
#[inline(always)]
pub(super) fn tile_offset(rows: u32, row: u32, chunk: u32) -> u32 {
    (chunk >> 3) * rows * BLOCK_ROW_BYTES + row * BLOCK_ROW_BYTES + (((chunk ^ row) & 7) << 4)
}
