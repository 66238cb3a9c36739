//! Register tiles of one warp: 16 rows by 16-column steps.

use pat_abi::ForwardParams;
use pat_abi::layout::{
    key_matrix_row, key_matrix_step, row_lanes, swizzle_period, swizzled_chunk, value_matrix_chunk, value_matrix_row,
};

use crate::cache::Cache;
use crate::element::Element;
use crate::item::Item;
use crate::ptx::cp_async::copy_16_bytes;
use crate::ptx::ldst::{load_global_u32, load_shared_u32};
use crate::ptx::mma::{ldmatrix_x4, ldmatrix_x4_transposed};

/// f32 tile of 16 rows and `16 * STEPS` columns: `[step][half][e]` of lane l is row `l/4 + 8*(e/2)`, column
/// `16*step + 8*half + 2*(l%4) + e%2`.
pub type Accumulator<const STEPS: usize> = [[[f32; 4]; 2]; STEPS];

/// 16-bit A operand of 16 rows and `16 * STEPS` columns, as `mma.m16n8k16` takes it.
pub type Operand<const STEPS: usize> = [[u32; 4]; STEPS];

/// The queries of a warp's 16 rows. `STEPS = head_dim / 16`.
pub struct Queries<const STEPS: usize> {
    /// Where registers suffice for them.
    registers: Operand<STEPS>,
    /// Else the shared-memory address of their tile, 16 rows of `32 * STEPS` bytes, swizzled as keys are.
    tile: u32,
    /// Of rows `lane / 4` and `lane / 4 + 8`, what scores are multiplied with ([`Cache::arrange`]).
    pub scales: [f32; 2],
}

impl<const STEPS: usize> Queries<STEPS> {
    /// Whether they stay in shared memory: at head dimension 256 the outputs take half of the registers there are.
    pub const IN_SMEM: bool = STEPS > 8;

    /// Those of rows `first_row .. first_row + 16` of the item. Where they stay in shared memory [`Self::request`] has been
    /// called for all of them; others are loaded here. Convergent.
    ///
    /// # Safety
    /// `params` describes the tensors the plan was made for.
    #[inline(always)]
    pub unsafe fn new<E: Element, C: Cache>(
        params: &ForwardParams,
        item: &Item,
        tile: u32,
        first_row: u32,
        lane: u32,
    ) -> Self {
        if Self::IN_SMEM {
            return Self { registers: [[0; 4]; STEPS], tile, scales: [1.0; 2] };
        }
        // SAFETY: the caller's contract.
        let mut registers = unsafe { load_queries::<C, STEPS>(params, item, first_row, lane) };
        let scales = C::arrange::<E, STEPS>(&mut registers);
        Self { registers, tile, scales }
    }

    /// Starts copying the queries of `COUNT` rows from row `first_row` of the item on to row `tile_row` of `tile`, zeros past
    /// the item's last row. Convergent.
    ///
    /// # Safety
    /// As [`Self::new`]; the rows of the tile are free.
    #[inline(always)]
    pub unsafe fn request<const COUNT: u32>(
        params: &ForwardParams,
        item: &Item,
        tile: u32,
        tile_row: u32,
        first_row: u32,
        lane: u32,
    ) {
        let chunks = 2 * STEPS as u32;
        let lanes = const { row_lanes(2 * STEPS as u32) };
        let rows_per_copy = 32 / lanes;
        for i in 0..COUNT / rows_per_copy {
            let row = i * rows_per_copy + lane / lanes;
            let exists = first_row + row < item.row_count;
            // SAFETY: the item has at least one row; a query row is `32 * STEPS` bytes, 16-byte aligned.
            unsafe {
                let source = item.row(params, if exists { first_row + row } else { 0 }).query_address(params);
                let chunk = lane % lanes;
                let target = tile + (tile_row + row) * chunks * 16 + swizzled_chunk(chunks, tile_row + row, chunk) * 16;
                copy_16_bytes(target, source + chunk as u64 * 16, exists as u32 * 16);
                // The rest of a row that is longer than so many lanes copy at once.
                for part in 1..chunks / lanes {
                    let offset = part * lanes * 16;
                    copy_16_bytes(target + offset, source + (chunk * 16 + offset) as u64, exists as u32 * 16);
                }
            }
        }
    }

    /// A operand of step `step`. Convergent.
    ///
    /// # Safety
    /// Queries that stay in shared memory have arrived and are ordered before.
    #[inline(always)]
    pub unsafe fn step(&self, step: usize, lane: u32) -> [u32; 4] {
        if !Self::IN_SMEM {
            return self.registers[step];
        }
        let row = lane % 16;
        let chunk = step_chunk::<STEPS>(row, step, lane / 16);
        // SAFETY: inside the tile.
        unsafe { ldmatrix_x4(self.tile + row * 32 * STEPS as u32 + chunk * 16) }
    }
}

/// Loads the queries of rows `first_row .. first_row + 16` of the item, zeros past its last row. `STEPS = head_dim / 16`.
///
/// # Safety
/// `params` describes the tensors the plan was made for.
#[inline(always)]
unsafe fn load_queries<C: Cache, const STEPS: usize>(
    params: &ForwardParams,
    item: &Item,
    first_row: u32,
    lane: u32,
) -> Operand<STEPS> {
    let mut q = [[0; 4]; STEPS];
    for r in 0..2 {
        let row = first_row + lane / 4 + 8 * r as u32;
        if row < item.row_count {
            // SAFETY: the row exists; a query row is `32 * STEPS` bytes, 16-byte aligned.
            unsafe {
                let address = item.row(params, row).query_address(params) + (lane % 4) as u64 * C::QUERY_LANE_BYTES;
                for step in 0..STEPS {
                    q[step][r] = load_global_u32(address + step as u64 * 32);
                    q[step][r + 2] = load_global_u32(address + step as u64 * 32 + C::QUERY_HALF_BYTES);
                }
            }
        }
    }
    q
}

/// Q K^T of 16 rows and `16 * KEY_STEPS` keys, which lie at `keys` in shared memory as rows of `32 * HEAD_STEPS` bytes,
/// swizzled. Convergent.
///
/// # Safety
/// The keys, and queries that stay in shared memory, are there and ordered before.
#[inline(always)]
pub unsafe fn scores<E: Element, const HEAD_STEPS: usize, const KEY_STEPS: usize>(
    q: &Queries<HEAD_STEPS>,
    keys: u32,
    lane: u32,
) -> Accumulator<KEY_STEPS> {
    let row_bytes = 32 * HEAD_STEPS as u32;
    let row = key_matrix_row(lane);
    let mut s = [[[0.0; 4]; 2]; KEY_STEPS];
    for step in 0..HEAD_STEPS {
        let chunk = step_chunk::<HEAD_STEPS>(row, step, key_matrix_step(lane));
        // SAFETY: the caller's contract.
        let q = unsafe { q.step(step, lane) };
        for block in 0..KEY_STEPS {
            // SAFETY: inside the tile: `row < 16` and `chunk < 2 * HEAD_STEPS`.
            let b = unsafe { ldmatrix_x4(keys + row * row_bytes + chunk * 16 + block as u32 * 16 * row_bytes) };
            E::multiply(&mut s[block][0], &q, [b[0], b[1]]);
            E::multiply(&mut s[block][1], &q, [b[2], b[3]]);
        }
    }
    s
}

/// Position of chunk `2 * step + half` of a row of `2 * STEPS`. The swizzle leaves the upper bits of a chunk's number alone:
/// taken out as a constant, they become an immediate offset, and at most four addresses stay in registers.
#[inline(always)]
const fn step_chunk<const STEPS: usize>(row: u32, step: usize, half: u32) -> u32 {
    let period = const { swizzle_period(2 * STEPS as u32) };
    let steps = period / 2;
    swizzled_chunk(period, row, 2 * (step as u32 % steps) + half) + step as u32 / steps * period
}

/// Sets the scores of keys `valid ..` to −inf.
#[inline(always)]
pub fn mask<const KEY_STEPS: usize>(s: &mut Accumulator<KEY_STEPS>, valid: u32, lane: u32) {
    for step in 0..KEY_STEPS {
        for half in 0..2 {
            for e in 0..4 {
                let key = (16 * step + 8 * half + e % 2) as u32 + 2 * (lane % 4);
                if key >= valid {
                    s[step][half][e] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Sets the scores of keys that a row does not attend to to −inf. `ranges` is the shared-memory address of the first key's
/// row range, 16 bits per key ([`crate::tile::gather::Token::store_rows`]); the tile's first row is `first_row`.
///
/// # Safety
/// The ranges of `16 * KEY_STEPS` keys are there and ordered before.
#[inline(always)]
pub unsafe fn mask_rows<const KEY_STEPS: usize>(
    s: &mut Accumulator<KEY_STEPS>,
    ranges: u32,
    first_row: u32,
    lane: u32,
) {
    for step in 0..KEY_STEPS {
        for half in 0..2 {
            let key = (16 * step + 8 * half) as u32 + 2 * (lane % 4);
            // SAFETY: the caller's contract; `key` is even.
            let pair = unsafe { load_shared_u32(ranges + 2 * key) };
            for e in 0..4 {
                let range = pair >> (16 * (e as u32 % 2)) & 0xffff;
                let (begin, end) = (range & 0xff, range >> 8);
                let row = first_row + lane / 4 + 8 * (e as u32 / 2);
                if row < begin || row >= end {
                    s[step][half][e] = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Probabilities rounded to the 16-bit type: an accumulator's layout is that of an A operand.
#[inline(always)]
pub fn to_operand<E: Element, const STEPS: usize>(p: &Accumulator<STEPS>) -> Operand<STEPS> {
    let mut operand = [[0; 4]; STEPS];
    for step in 0..STEPS {
        for half in 0..2 {
            operand[step][2 * half] = E::pack(p[step][half][0], p[step][half][1]);
            operand[step][2 * half + 1] = E::pack(p[step][half][2], p[step][half][3]);
        }
    }
    operand
}

/// accumulator += P V, with V at `values` in shared memory laid out as the keys of [`scores`], as rows of `32 * ROW_STEPS` bytes.
/// `values` is the address of the first of the accumulator's columns in the first row, a multiple of 128 bytes from its begin.
/// Convergent.
///
/// # Safety
/// As [`scores`].
#[inline(always)]
pub unsafe fn accumulate<E: Element, const STEPS: usize, const ROW_STEPS: usize, const KEY_STEPS: usize>(
    accumulator: &mut Accumulator<STEPS>,
    p: &Operand<KEY_STEPS>,
    values: u32,
    lane: u32,
) {
    let row_bytes = 32 * ROW_STEPS as u32;
    let row = value_matrix_row(lane);
    for block in 0..KEY_STEPS {
        for step in 0..STEPS {
            let chunk = step_chunk::<ROW_STEPS>(row, step, value_matrix_chunk(lane));
            let address = values + row * row_bytes + chunk * 16 + block as u32 * 16 * row_bytes;
            // SAFETY: inside the tile: `row < 16` and `chunk < 2 * STEPS`.
            let b = unsafe { ldmatrix_x4_transposed(address) };
            E::multiply(&mut accumulator[step][0], &p[block], [b[0], b[1]]);
            E::multiply(&mut accumulator[step][1], &p[block], [b[2], b[3]]);
        }
    }
}
