//! Tile shapes: what the CTAs of a variant compute, with which warps, and where their tiles lie in shared memory. The device code
//! takes its constants from here, the manifest its launch bounds and sizes.

use crate::TileVariant;

/// Rows of a `mma.m16n8k16` or of a warp's part of a `wgmma`.
pub const WARP_ROWS: u32 = 16;
/// Registers of a multiprocessor, of every architecture from compute capability 8.0 on.
const REGISTERS_PER_SM: u32 = 65_536;
/// Most registers a thread can have.
const MAX_REGISTERS: u32 = 255;

/// Named barriers of the persistent kernels; 0 is the whole CTA's.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBarrier {
    /// The consumer warps, where values of a tile are zeroed.
    Consumers = 1,
    /// The producer warps, behind the requests for the first queries.
    Producers = 2,
    /// A consumer warpgroup's turn at the tensor cores: the first one's, and behind it the second one's.
    Turns = 3,
}

/// The shape of a variant's CTAs at some head dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileConfig {
    /// M: rows of a tile.
    pub rows: u32,
    /// N: KV tokens a CTA takes per step of its main loop.
    pub keys: u32,
    /// Sets of warps that split these tokens. Each set has all rows.
    pub key_splits: u32,
    /// Sets of warps that split V's columns. Each set computes all scores.
    pub column_splits: u32,
    /// Rings of K and V tiles in shared memory: one, or one for each of the warps that split the tokens.
    pub rings: u32,
    /// Tiles of K and of V in a ring.
    pub stages: u32,
    /// Tiles of 8-bit K and V that are copied before they are widened into those of the ring; 0 where none are.
    pub narrow_stages: u32,
    /// Warps that copy and do not compute; 0 where all warps do both.
    pub producer_warps: u32,
    /// Registers per thread of the producers after `setmaxnreg`, where there are producers.
    pub producer_registers: u32,
    /// Registers per thread of the other warps after `setmaxnreg`, where there are producers.
    pub consumer_registers: u32,
    /// Slots of [`WARP_ROWS`] queries in shared memory; 0 where queries go to registers at once and stay there.
    pub query_slots: u32,
    /// Whether wgmma reads queries from shared memory, where they stay until the last scores of an item. Slots of a consumer
    /// warpgroup are then one: it has the barriers of the slot of its number.
    pub queries_stay: bool,
    /// CTAs per multiprocessor that the compiler makes room for.
    pub min_ctas_per_sm: u32,
    /// CTA-wide and named barriers in the code.
    pub barriers: u32,
}

/// Where things lie in the shared memory of a CTA, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmemLayout {
    /// Size of a tile of K.
    pub k_tile_bytes: u32,
    /// Size of a tile of V.
    pub v_tile_bytes: u32,
    /// From one stage to the next.
    pub stage_bytes: u32,
    /// From one ring to the next.
    pub ring_bytes: u32,
    /// K of stage 0.
    pub k: u32,
    /// V of stage 0.
    pub v: u32,
    /// Queries.
    pub q: u32,
    /// K of the first stage of 8-bit tiles that are widened; V and the next stage stand behind it as in the ring, half as large.
    pub narrow: u32,
    /// Transaction barriers: four per stage, then two per query slot, then four per narrow stage, 8 bytes each.
    pub barriers: u32,
    /// Which rows attend to which keys: of each stage, then of each narrow stage, 2 bytes per token, or 16 per 64 tokens in the
    /// persistent kernels.
    pub masks: u32,
    /// From the masks of one stage to those of the next.
    pub mask_bytes: u32,
    /// All of it.
    pub total: u32,
}

impl TileVariant {
    /// The shape of the variant's CTAs, where keys have `head_dim` elements.
    pub const fn config(self, head_dim: u32) -> TileConfig {
        // Warps that copy and compute, one ring, queries in registers as long as these suffice.
        let is_wide = head_dim > 128;
        // Head dimension 192 (V 128) leaves room for the usual keys where no more than 32 queries lie beside them.
        let is_widest = head_dim > 192;
        let splits_columns = head_dim > 256;
        // Registers of producers and of consumers of 64 rows, and of 128.
        let (narrow_producers, narrow_consumers, producers, consumers) = if is_wide {
            (40, 232, 40, 232)
        } else if head_dim <= 64 {
            (48, 208, 64, 216)
        } else {
            (56, 200, 56, 224)
        };
        let mma = TileConfig {
            rows: 0,
            keys: if is_wide { 32 } else { 64 },
            key_splits: 1,
            column_splits: 1,
            rings: 1,
            stages: 2,
            narrow_stages: 0,
            producer_warps: 0,
            producer_registers: 0,
            consumer_registers: 0,
            query_slots: 0,
            queries_stay: false,
            min_ctas_per_sm: 2,
            barriers: 3,
        };
        // Three CTAs per multiprocessor would leave 168 registers at head dimension 128, which ptxas meets only by spilling;
        // two keep 128 KiB in flight, and an A100 has shared memory for no more.
        let three_ctas = if head_dim <= 64 { 3 } else { 2 };
        match self {
            // The outputs of a row are those of two warps: queries and two stages leave room for 16 keys, and for two CTAs on
            // an A100.
            Self::Mma16 if splits_columns => TileConfig { rows: 16, keys: 16, column_splits: 2, query_slots: 1, ..mma },
            Self::Mma32 if splits_columns => {
                TileConfig { rows: 32, keys: 32, column_splits: 2, query_slots: 2, min_ctas_per_sm: 1, ..mma }
            }
            // 12 KiB per warp or more are in flight at every head dimension.
            Self::Mma16 => TileConfig {
                rows: 16,
                keys: if is_widest { 64 } else { 128 },
                key_splits: 4,
                rings: 4,
                stages: if head_dim <= 64 { 2 } else { 1 },
                query_slots: if is_wide { 1 } else { 0 },
                min_ctas_per_sm: three_ctas,
                barriers: if is_wide { 2 } else { 1 },
                ..mma
            },
            Self::Mma32 => TileConfig {
                rows: 32,
                keys: if is_widest { 32 } else { 64 },
                key_splits: 2,
                query_slots: if is_wide { 2 } else { 0 },
                min_ctas_per_sm: three_ctas,
                barriers: 4,
                ..mma
            },
            Self::Mma64 => TileConfig { rows: 64, query_slots: if is_wide { 4 } else { 0 }, ..mma },
            Self::Mma128 => TileConfig { rows: 128, min_ctas_per_sm: 1, ..mma },
            // Of a head dimension of 256 one warpgroup has registers for queries, scores, and half of the columns.
            Self::Wgmma64 => TileConfig {
                rows: 64,
                keys: if head_dim <= 64 { 128 } else { 64 },
                column_splits: if is_wide { 2 } else { 1 },
                stages: 3,
                producer_warps: 4,
                producer_registers: narrow_producers,
                consumer_registers: narrow_consumers,
                query_slots: 4,
                min_ctas_per_sm: if is_wide { 1 } else { 2 },
                barriers: 5,
                ..mma
            },
            // Of a head dimension of 256 a stage takes 64 KiB, and the queries of 128 rows as much.
            Self::Wgmma128 => TileConfig {
                rows: 128,
                keys: if is_wide { 64 } else { 128 },
                stages: if is_wide { 2 } else { 3 },
                producer_warps: 4,
                producer_registers: producers,
                consumer_registers: consumers,
                query_slots: 8,
                queries_stay: is_wide,
                min_ctas_per_sm: 1,
                barriers: if is_wide { 10 } else { 5 },
                ..mma
            },
        }
    }
}

impl TileConfig {
    /// The shape of CTAs whose K and V have elements of so many bytes. Those that wgmma multiplies are widened to 16 bits: where
    /// 16-bit tiles have three stages, two of these and two of narrow ones take as much shared memory. Producers that widen need
    /// registers for it.
    pub const fn of_elements(self, element_bytes: u32) -> Self {
        if element_bytes > 1 {
            return self;
        }
        if self.producer_warps == 0 {
            // As many bytes on their way to each warp that has a ring of its own.
            return if self.rings > 1 { Self { stages: 2 * self.stages, ..self } } else { self };
        }
        let producer_registers = 72;
        let launched = self.threads() * register_limit(self.threads(), self.min_ctas_per_sm);
        let left = launched - 32 * self.producer_warps * producer_registers;
        let consumer_registers = left / (32 * self.computing_warps()) / 8 * 8;
        Self { keys: 64, stages: 2, narrow_stages: 2, producer_registers, consumer_registers, ..self }
    }

    /// Warps that hold different rows.
    pub const fn row_warps(&self) -> u32 {
        self.rows / WARP_ROWS
    }

    /// Warps that compute.
    pub const fn computing_warps(&self) -> u32 {
        self.row_warps() * self.key_splits * self.column_splits
    }

    /// Threads of a CTA.
    pub const fn threads(&self) -> u32 {
        32 * (self.computing_warps() + self.producer_warps)
    }

    /// KV tokens of a tile in shared memory.
    pub const fn tile_keys(&self) -> u32 {
        self.keys / self.rings
    }

    /// The shared memory of a CTA whose keys have `head_dim` elements of `element_bytes` bytes, and so have queries that stay
    /// there; values have `v_head_dim`. Persistent kernels have 16-bit ones there in any case ([`Self::of_elements`]).
    pub const fn smem(&self, head_dim: u32, v_head_dim: u32, element_bytes: u32) -> SmemLayout {
        let is_persistent = self.producer_warps > 0;
        let element_bytes = if is_persistent { 2 } else { element_bytes };
        let k_tile_bytes = self.tile_keys() * head_dim * element_bytes;
        let v_tile_bytes = self.tile_keys() * v_head_dim * element_bytes;
        let stage_bytes = k_tile_bytes + v_tile_bytes;
        // A warp that has a ring of its own leaves its state there, too.
        let warp_state_bytes = warp_state_bytes(v_head_dim).next_multiple_of(1024);
        let state_bytes = if self.rings > 1 { warp_state_bytes } else { 0 };
        let ring_bytes = max(self.stages * stage_bytes, state_bytes);
        let q = self.rings * ring_bytes;
        let queries_end = q + self.query_slots * WARP_ROWS * head_dim * element_bytes;
        // In a ring that all warps share, the states take the place of tiles and queries.
        let states_end = if self.key_splits > 1 { self.row_warps() * self.key_splits * warp_state_bytes } else { 0 };
        let narrow = max(queries_end, states_end);
        let barriers = narrow + self.narrow_stages * stage_bytes / 2;
        let barrier_count = 4 * self.stages + 2 * self.query_slots + 4 * self.narrow_stages;
        let masks = barriers + if is_persistent { 8 * barrier_count } else { 0 };
        let mask_bytes = if is_persistent { self.tile_keys() / 64 * 16 } else { 2 * self.tile_keys() };
        let total = masks + (self.rings * self.stages + self.narrow_stages) * mask_bytes;
        SmemLayout {
            k_tile_bytes,
            v_tile_bytes,
            stage_bytes,
            ring_bytes,
            k: 0,
            v: k_tile_bytes,
            q,
            narrow,
            barriers,
            masks,
            mask_bytes,
            total,
        }
    }
}

const fn max(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

/// Bytes between the rows of a warp's state in shared memory: 8 banks of padding, so that the 8 rows that a warp stores at
/// once do not collide.
pub const fn state_pitch_bytes(v_head_dim: u32) -> u32 {
    v_head_dim * 4 + 32
}

/// Shared memory that the state of one warp's rows takes: the rows (f32), then maximum and sum of each.
pub const fn warp_state_bytes(v_head_dim: u32) -> u32 {
    WARP_ROWS * (state_pitch_bytes(v_head_dim) + 8)
}

/// Registers per thread that leave room for `ctas_per_sm` CTAs of `threads` threads. They are handed out in eights.
pub const fn register_limit(threads: u32, ctas_per_sm: u32) -> u32 {
    let registers = REGISTERS_PER_SM / (threads * ctas_per_sm) / 8 * 8;
    if registers < MAX_REGISTERS { registers } else { MAX_REGISTERS }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Family;

    #[test]
    fn layouts_hold_their_parts_one_behind_the_other() {
        for kernel in crate::KERNELS {
            if let Family::Forward(variant) = kernel.family {
                let head_dim = kernel.head_dim;
                let config = variant.config(head_dim).of_elements(kernel.kv_dtype.bytes());
                let layout = config.smem(head_dim, kernel.v_head_dim, kernel.kv_dtype.bytes());
                assert_eq!(layout.v, layout.k + layout.k_tile_bytes);
                assert_eq!(layout.stage_bytes, layout.v + layout.v_tile_bytes);
                assert!(
                    layout.v < layout.q
                        && layout.q <= layout.narrow
                        && layout.narrow <= layout.barriers
                        && layout.barriers <= layout.masks
                );
                assert!(layout.masks < layout.total && layout.total <= variant.arch().max_smem_bytes(), "{variant:?}");
                // What TMA writes and wgmma reads is aligned to the swizzle's 1024 bytes.
                assert!(
                    [layout.k_tile_bytes, layout.v_tile_bytes, layout.q, layout.narrow].iter().all(|at| at % 1024 == 0),
                    "{variant:?}"
                );
                assert!(config.rows % WARP_ROWS == 0 && config.keys % config.rings == 0);
            }
        }
    }

    #[test]
    fn producers_and_consumers_have_the_registers_of_the_launch() {
        for kernel in crate::KERNELS {
            if let Family::Forward(variant) = kernel.family {
                let head_dim = kernel.head_dim;
                let config = variant.config(head_dim);
                if config.producer_warps > 0 {
                    let consumer_warps = config.computing_warps();
                    let taken = 32
                        * (config.producer_warps * config.producer_registers
                            + consumer_warps * config.consumer_registers);
                    let launched = config.threads() * register_limit(config.threads(), config.min_ctas_per_sm);
                    assert!(taken <= launched, "{variant:?} {head_dim}: {taken} of {launched}");
                }
            }
        }
    }
}
