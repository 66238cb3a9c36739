//! Tiles that few rows of an item attend to: a consumer warp whose rows do computes the tile by itself, with mma.sync, while the
//! other warps are at theirs.
//!
//! A warpgroup's products take as long for the keys of one sequence as for those of all: private ends of 32 tokens behind a
//! shared node are multiplied by 64 rows, of which 8 count. Here each warp goes along the tiles at its own pace. It computes the
//! 32 keys of a [`UNIT`] if any of its rows attends to them, and releases other tiles as soon as they have arrived. With
//! three stages, warps compute three tiles side by side.

use super::consume::{consumer_rows, own_rows, release};
use super::format::Format;
use super::masks::KeyMask;
use super::smem::{Ring, Smem};
use crate::element::Element;
use crate::ptx::ldst::{load_shared_u32, load_shared_u32x2};
use crate::ptx::mbarrier;
use crate::ptx::mma::{ldmatrix_x4, ldmatrix_x4_transposed};
use crate::ptx::shuffle::ballot;
use crate::ptx::special::{keep_loop, thread_index_here};
use crate::ptx::switches::below_in_window;
use crate::softmax::{OnlineSoftmax, cap_scores, rescale, value_of_row};
use pat_abi::ForwardParams;
use pat_abi::layout::{key_matrix_row, key_matrix_step, value_matrix_chunk, value_matrix_row};

/// Keys that a warp takes at a time.
const UNIT: u32 = 2 * KeyMask::KEYS;
/// Bytes of a row of a block.
const ROW_BYTES: u32 = 128;

/// Tiles from `token` to `end` of an item of `row_count` rows, for the rows of this warp, which `softmax` and the output `o` are of.
///
/// # Safety
/// A whole consumer warp, which has released all tiles in front; the producers go on to `end`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the state of a consumer warp, by parts")]
pub(super) unsafe fn lone_tiles<
    E: Element,
    M: Element,
    F: Format,
    const HEAD_DIM: u32,
    const GROUPS: u32,
    const BYTES: u32,
    const Q_REGS: usize,
    const O_REGS: usize,
>(
    p: &ForwardParams,
    smem: Smem<HEAD_DIM, GROUPS, BYTES>,
    ring: &mut Ring,
    mut token: u32,
    end: u32,
    row_count: u32,
    q: &[u32; Q_REGS],
    factors: [f32; 2],
    softmax: &mut OnlineSoftmax,
    o: &mut [f32; O_REGS],
    part: u32,
) {
    let block_bytes = Smem::<HEAD_DIM, GROUPS, BYTES>::BLOCK_BYTES;
    let thread = thread_index_here();
    let (lane, rows) = consumer_rows::<HEAD_DIM, GROUPS, BYTES>(thread, row_count);
    let own_rows = own_rows::<HEAD_DIM, GROUPS, BYTES>(thread, row_count);
    let (o, _) = o.as_chunks_mut::<4>();
    let (q, _) = q.as_chunks::<4>();
    // SAFETY: over the whole function, tiles are used in the order of the barriers, and addresses are inside them.
    unsafe {
        while token < end {
            keep_loop();
            mbarrier::wait(smem.k_full(ring.stage), ring.phase);
            // Bit `i`: whether a row of the warp attends to some of the `i`-th 16 keys.
            let word = lane & (4 * Smem::<HEAD_DIM, GROUPS, BYTES>::SPANS - 1);
            let mask = KeyMask::of_full_tile(load_shared_u32(smem.masks(ring.stage) + 4 * word));
            // Known to ptxas to be the same in all lanes: where it is not sure, it does without uniform registers in the whole kernel.
            let mut steps = ballot(mask.has_row_of(own_rows) && lane == word);
            if steps == 0 {
                release(smem.k_empty(ring.stage), lane);
            }
            while steps != 0 {
                keep_loop();
                let unit = steps.trailing_zeros() / 2;
                let of_unit = steps >> (2 * unit) & 3;
                steps &= !(3 << (2 * unit));
                let masks = load_shared_u32x2(smem.masks(ring.stage) + 8 * unit).map(KeyMask::of_full_tile);
                let first_row = unit * UNIT;

                // Two sums for every score, of which each is a chain of half as many products.
                let (mut s, mut t) = ([[0f32; 16]], [0f32; 16]);
                let row = first_row + key_matrix_row(lane);
                let keys = smem.k(ring.stage) + row * ROW_BYTES + ((key_matrix_step(lane) ^ (row & 7)) << 4);
                for (k, q) in q.iter().enumerate() {
                    let address = (keys ^ (k as u32 % 4 * 32)) + k as u32 / 4 * block_bytes;
                    let (sums, _) = if k % 2 == 0 { s[0].as_chunks_mut::<4>() } else { t.as_chunks_mut::<4>() };
                    for step in 0..2 {
                        let b = ldmatrix_x4(address + step as u32 * (KeyMask::KEYS * ROW_BYTES));
                        M::multiply(&mut sums[2 * step], q, [b[0], b[1]]);
                        M::multiply(&mut sums[2 * step + 1], q, [b[2], b[3]]);
                    }
                }
                if steps == 0 {
                    release(smem.k_empty(ring.stage), lane);
                }
                for i in 0..16 {
                    s[0][i] += t[i];
                }
                F::scale::<E>(&mut s[0], factors);
                if Smem::<HEAD_DIM, GROUPS, BYTES>::CAPS_SCORES {
                    cap_scores(p, &mut s[0]);
                }
                for step in 0..2 {
                    let mask = masks[step];
                    for half in 0..2 {
                        let limit = mask.limit(rows[half]);
                        for i in 0..4 {
                            let key = (i as u32 >> 1) * 8 + (lane & 3) * 2 + (i as u32 & 1);
                            let is_in_front =
                                Smem::<HEAD_DIM, GROUPS, BYTES>::HAS_WINDOWS && below_in_window(key, mask.first());
                            if key >= limit || is_in_front {
                                s[0][8 * step + value_of_row(half, i)] = f32::NEG_INFINITY;
                            }
                        }
                    }
                }
                if let Some(correction) = softmax.update::<true, _>(&mut s, p.scale_log2) {
                    rescale(o.as_flattened_mut(), correction);
                }
                mbarrier::wait(smem.v_full(ring.stage), ring.phase);
                for step in 0..2 {
                    let mask = masks[step];
                    // Values that no row of the warp attends to are not multiplied: they may be anything.
                    if of_unit >> step & 1 != 0 {
                        let weights = [0, 1, 2, 3].map(|i| M::pack(s[0][8 * step + 2 * i], s[0][8 * step + 2 * i + 1]));
                        // Behind the last token of a page the pool may hold NaN, and 0 x NaN is NaN: the last one's values
                        // stand for these.
                        let (row, last) = (value_matrix_row(lane), mask.values_end() - 1);
                        let row = first_row + step as u32 * KeyMask::KEYS + if row < last { row } else { last };
                        let values = smem.v_columns(ring.stage, part)
                            + row * ROW_BYTES
                            + ((value_matrix_chunk(lane) ^ (row & 7)) << 4);
                        for (i, [even, odd]) in o.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                            let address = (values ^ (i as u32 % 4 * 32)) + i as u32 / 4 * block_bytes;
                            let b = ldmatrix_x4_transposed(address);
                            M::multiply(even, &weights, [b[0], b[1]]);
                            M::multiply(odd, &weights, [b[2], b[3]]);
                        }
                    }
                }
            }
            // Not before the values have arrived: until then the stage may still be another tile's.
            mbarrier::wait(smem.v_full(ring.stage), ring.phase);
            release(smem.v_empty(ring.stage), lane);
            ring.advance(Smem::<HEAD_DIM, GROUPS, BYTES>::STAGES);
            token += Smem::<HEAD_DIM, GROUPS, BYTES>::KEYS;
        }
    }
}
