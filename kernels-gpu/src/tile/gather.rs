//! Gathering scattered KV rows into a swizzled shared-memory tile.

use pat_abi::ForwardParams;
use pat_abi::layout::swizzled_chunk;
use pat_abi::reader::Stream;

use crate::plan_words::WhenUsed;
use crate::ptx::cp_async::copy_16_bytes;
use crate::ptx::ldst::store_shared_u16;
use crate::ptx::shuffle;
use crate::window::mask_in_window;

/// Where one KV head of K or V lies in its pool.
#[derive(Clone, Copy)]
pub struct Pool {
    base: u64,
    page_stride: i64,
    token_stride: i64,
}

impl Pool {
    /// K of one head.
    #[inline(always)]
    pub fn keys(params: &ForwardParams, kv_head: u32) -> Self {
        let base = params.k.wrapping_add((kv_head as i64).wrapping_mul(params.k_head_stride) as u64);
        Self { base, page_stride: params.k_page_stride, token_stride: params.k_token_stride }
    }

    /// V of one head.
    #[inline(always)]
    pub fn values(params: &ForwardParams, kv_head: u32) -> Self {
        let base = params.v.wrapping_add((kv_head as i64).wrapping_mul(params.v_head_stride) as u64);
        Self { base, page_stride: params.v_page_stride, token_stride: params.v_token_stride }
    }
}

/// The token that this lane resolves for its warp.
#[derive(Clone, Copy)]
pub struct Token {
    page_id: u32,
    in_page: u32,
    /// Rows that attend to it: the first, and in bits 8..16 the end; 0 (none) where there is no token.
    rows: u32,
}

impl Token {
    /// All rows.
    const ALL_ROWS: u32 = 0xff00;

    /// Looks up token `token` of an item's stream; past its end nothing is read, and no row attends.
    /// Issued a step before the copies that need it, the load of the page id is off the critical path.
    ///
    /// # Safety
    /// The stream comes from the plan of `params`, which is valid and, where the kernel is compiled for windows, one for windows.
    #[inline(always)]
    pub unsafe fn locate(params: &ForwardParams, stream: &Stream, token: u32) -> Self {
        let (page, in_page) = params.page_size.divide_remainder(token);
        if token >= stream.token_count {
            return Self { page_id: 0, in_page, rows: 0 };
        }
        // SAFETY: the stream spans `ceil(token_count / page_size)` page ids, and as many masks where it has any.
        let words = unsafe { WhenUsed::new() };
        let page_id = stream.page_id(words, page);
        let mut rows = Self::ALL_ROWS;
        if stream.has_masks() {
            // SAFETY: the caller's contract.
            let mask = unsafe { mask_in_window(params, stream, page, in_page) };
            rows = if in_page < mask.token_end() { mask.0 & 0xffff } else { 0 };
        }
        Self { page_id, in_page, rows }
    }

    /// Writes which rows attend to the token to `ranges`, 16 bits per tile row, for [`crate::tile::fragment::mask_rows`].
    /// `row` is the tile row, below `end` for the lanes whose token the warp gathers.
    ///
    /// # Safety
    /// The lane's entry is free.
    #[inline(always)]
    pub unsafe fn store_rows(self, ranges: u32, row: u32, end: u32) {
        if row < end {
            // SAFETY: the caller's contract.
            unsafe { store_shared_u16(ranges + 2 * row, self.rows as u16) };
        }
    }
}

/// Row, of up to 32 that a warp gathers together, whose token lane `lane` locates.
///
/// `LANES` ([`pat_abi::layout::row_lanes`]) copy a row of K or V together, `32 / LANES` rows at a time. Lane i of such a
/// segment locates the row that the segment copies i-th: the shuffles then have constant indices, which cost no registers.
#[inline(always)]
pub const fn row_of_lane<const LANES: u32>(lane: u32) -> u32 {
    lane % LANES * (32 / LANES) + lane / LANES
}

/// Starts copying `ROWS` (at most 32) tokens into rows `first_row ..` (a multiple of 8) of the tile at `tile`, as rows of
/// `CHUNKS` 16-byte chunks, swizzled, a multiple of `LANES`. Every lane has located the token of row [`row_of_lane`]. Tokens
/// that no row attends to are zero-filled and not read: the pool may hold NaN there, and 0 * NaN would survive in P V.
/// Convergent.
///
/// # Safety
/// The tile is free, and the tokens have been located.
#[inline(always)]
pub unsafe fn gather<const CHUNKS: u32, const LANES: u32, const ROWS: u32>(
    tile: u32,
    first_row: u32,
    pool: Pool,
    token: Token,
    lane: u32,
) {
    const { assert!(LANES == 4 || LANES == 8 || LANES == 16 || LANES == 32) };
    let rows_per_copy = 32 / LANES;
    let (segment, chunk) = (lane / LANES, lane % LANES);
    let located = pool
        .base
        .wrapping_add((token.page_id as i64).wrapping_mul(pool.page_stride) as u64)
        .wrapping_add((token.in_page as i64).wrapping_mul(pool.token_stride) as u64);
    // Rows are 16-byte aligned: the lowest bit of the address is free to say that the row is wanted.
    let located = located | (token.rows != 0) as u64;
    let lane_tile = tile + (first_row + segment) * CHUNKS * 16;
    for i in 0..ROWS / rows_per_copy {
        let row = i * rows_per_copy + segment;
        let tagged_address = match LANES {
            4 => shuffle::from_segment_u64::<4>(located, i),
            8 => shuffle::from_segment_u64::<8>(located, i),
            16 => shuffle::from_segment_u64::<16>(located, i),
            _ => shuffle::from_segment_u64::<32>(located, i),
        };
        let destination = lane_tile + swizzled_chunk(CHUNKS, row, chunk) * 16 + i * (rows_per_copy * CHUNKS * 16);
        let wanted = tagged_address & 1;
        let row_address = tagged_address - wanted;
        // SAFETY: the caller's contract; pool addresses and strides are multiples of 16 bytes.
        unsafe { copy_16_bytes(destination, row_address.wrapping_add(chunk as u64 * 16), wanted as u32 * 16) };
        // The rest of a row that is longer than a segment, which ends where the swizzle's pattern does.
        for part in 1..const { CHUNKS / LANES } {
            let offset = part * LANES * 16;
            let source = row_address.wrapping_add((chunk * 16 + offset) as u64);
            // SAFETY: as above.
            unsafe { copy_16_bytes(destination + offset, source, wanted as u32 * 16) };
        }
    }
}
