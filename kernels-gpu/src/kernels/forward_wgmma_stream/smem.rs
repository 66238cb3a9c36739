//! Shared memory of a CTA: addresses of tiles and barriers, and the order in which stages and query slots are used.

use super::{GROUP_ROWS, PRODUCER_WARPS, SPAN_KEYS};
use crate::ptx::wgmma::RegisterSplit;
use pat_abi::{Dtype, SmemLayout, Switches, TileConfig, TileVariant};

/// Bytes of a row of a block: 64 elements, what the swizzle spans.
const BLOCK_ROW_BYTES: u32 = 128;
/// Elements of it.
const BLOCK_ELEMENTS: u32 = 64;

/// What a tile is part of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tensor {
    /// Keys, and with them the masks.
    K,
    V,
}

/// A stage of K or V: where the tile lies, and the barriers that say that it is complete, and that it has been read.
#[derive(Clone, Copy)]
pub(super) struct Stage {
    pub(super) tile: u32,
    pub(super) full: u32,
    pub(super) empty: u32,
}

/// Shared-memory addresses of one CTA whose rows are those of `GROUPS` warpgroups, and whose K and V have elements of `BYTES`
/// bytes.
#[derive(Clone, Copy)]
pub(super) struct Smem<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32> {
    pub(super) base: u32,
}

impl<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32> Smem<HEAD_DIM, GROUPS, BYTES> {
    pub(super) const VARIANT: TileVariant = if GROUPS == 1 { TileVariant::Wgmma64 } else { TileVariant::Wgmma128 };
    const KV_DTYPE: Dtype = if BYTES == 1 { Dtype::E4m3 } else { Dtype::F16 };
    pub(super) const CAPS_SCORES: bool = Self::VARIANT.serves(Switches::SCORES, Self::KV_DTYPE, HEAD_DIM);
    pub(super) const HAS_WINDOWS: bool =
        Self::VARIANT.serves(Switches { window: true, ..Switches::OFF }, Self::KV_DTYPE, HEAD_DIM);
    /// Whether warps compute tiles that few rows attend to each for itself.
    pub(super) const HAS_LONE_TILES: bool = Self::VARIANT.has_lone_tiles(Self::KV_DTYPE, HEAD_DIM);
    /// Whether the warps share out the rows of an item that has few, so that all have lone tiles to compute.
    pub(super) const HAS_OWN_ROWS: bool = Self::HAS_LONE_TILES && GROUPS == 1;
    const CONFIG: TileConfig = Self::VARIANT.config(HEAD_DIM).of_elements(BYTES);
    const LAYOUT: SmemLayout = {
        let config = Self::CONFIG;
        assert!(config.rows == GROUPS * GROUP_ROWS && config.key_splits == 1 && config.rings == 1);
        assert!(config.query_slots == 4 * GROUPS && config.producer_warps == PRODUCER_WARPS);
        config.smem(HEAD_DIM, HEAD_DIM, BYTES)
    };
    pub(super) const STAGES: u32 = Self::CONFIG.stages;
    /// Spans of 64 keys in a main-loop step.
    pub(super) const SPANS: u32 = Self::CONFIG.keys / SPAN_KEYS;
    pub(super) const KEYS: u32 = Self::CONFIG.keys;
    pub(super) const CONSUMER_WARPS: u32 = Self::CONFIG.computing_warps();
    /// Consumer warpgroups that have the same rows and a part of V's columns each.
    pub(super) const COLUMN_SPLITS: u32 = Self::CONFIG.column_splits;
    /// Columns of a consumer warpgroup.
    pub(super) const COLUMNS: u32 = HEAD_DIM / Self::COLUMN_SPLITS;
    pub(super) const Q_SLOTS: u32 = Self::CONFIG.query_slots;
    /// Whether queries are multiplied from shared memory. Each consumer warpgroup then has one slot for all of its rows.
    pub(super) const QUERIES_STAY: bool = Self::CONFIG.queries_stay;
    /// Consumer warps that read a slot of queries.
    pub(super) const Q_SLOT_WARPS: u32 = if Self::QUERIES_STAY { GROUP_ROWS / 16 } else { Self::CONSUMER_WARPS };
    /// Whether the consumer warpgroups take turns at the tensor cores: one computes weights while the other multiplies.
    pub(super) const TAKES_TURNS: bool = GROUPS > 1 && Self::QUERIES_STAY;
    /// Of 64 elements of the keys of a tile.
    pub(super) const BLOCK_BYTES: u32 = Self::KEYS * BLOCK_ROW_BYTES;
    /// Bytes of a row of what a tensor copy brings, and elements of it.
    pub(super) const BOX_ROW_BYTES: u32 =
        if HEAD_DIM * BYTES < BLOCK_ROW_BYTES { HEAD_DIM * BYTES } else { BLOCK_ROW_BYTES };
    pub(super) const BOX_ELEMENTS: u32 = Self::BOX_ROW_BYTES / BYTES;
    /// Of K or of V, as it arrives.
    pub(super) const ARRIVING_BYTES: u32 = Self::LAYOUT.k_tile_bytes * BYTES / 2;
    /// Whether tiles arrive in 8 bits, in stages of their own, and are widened.
    pub(super) const WIDENS: bool = Self::CONFIG.narrow_stages > 0;
    /// Stages in which tiles arrive.
    pub(super) const ARRIVING_STAGES: u32 = if Self::WIDENS { Self::CONFIG.narrow_stages } else { Self::CONFIG.stages };

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
    /// The stage of the 16-bit tile that is multiplied.
    pub(super) fn stage(self, tensor: Tensor, stage: u32) -> Stage {
        match tensor {
            Tensor::K => Stage { tile: self.k(stage), full: self.k_full(stage), empty: self.k_empty(stage) },
            Tensor::V => Stage { tile: self.v(stage), full: self.v_full(stage), empty: self.v_empty(stage) },
        }
    }
    /// The stage into which a tile is copied.
    pub(super) fn arriving(self, tensor: Tensor, stage: u32) -> Stage {
        if !Self::WIDENS {
            return self.stage(tensor, stage);
        }
        let tile = self.base + Self::LAYOUT.narrow + stage * (Self::LAYOUT.stage_bytes / 2);
        let full = self.q_full(Self::Q_SLOTS) + stage * 32;
        match tensor {
            Tensor::K => Stage { tile, full, empty: full + 16 },
            Tensor::V => Stage { tile: tile + Self::ARRIVING_BYTES, full: full + 8, empty: full + 24 },
        }
    }
    /// As [`Self::masks`], of a stage into which a tile is copied.
    pub(super) fn arriving_masks(self, stage: u32) -> u32 {
        self.masks(if Self::WIDENS { Self::STAGES + stage } else { stage })
    }
    pub(super) fn q_full(self, slot: u32) -> u32 {
        self.base + Self::LAYOUT.barriers + Self::STAGES * 32 + slot * 16
    }
    pub(super) fn q_empty(self, slot: u32) -> u32 {
        self.q_full(slot) + 8
    }
}

impl<const HEAD_DIM: u32, const GROUPS: u32, const BYTES: u32> RegisterSplit for Smem<HEAD_DIM, GROUPS, BYTES> {
    const PRODUCERS: u32 = Self::CONFIG.producer_registers;
    const CONSUMERS: u32 = Self::CONFIG.consumer_registers;
}

/// Position in the ring of stages: the stage and the parity of its current phase.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    pub(super) stage: u32,
    pub(super) phase: u32,
}

impl Ring {
    /// To the next of `stages`.
    #[inline(always)]
    pub(super) fn advance(&mut self, stages: u32) {
        self.stage += 1;
        if self.stage == stages {
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
    pub(super) const COUNT: u32 = Smem::<64, GROUPS, 2>::Q_SLOTS;
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
