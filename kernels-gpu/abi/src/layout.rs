//! Where the bytes of a tile lie: shared-memory swizzle and the lane geometry of `ldmatrix`, as `const fn` that the
//! device uses and the CPU tests.
//!
//! A KV tile in shared memory is rows of `2 * head_dim` bytes, one token each, cut into 16-byte chunks. Chunk c of row r
//! lies at position `c ^ (r % 8)`:
//!
//! ```text
//! row 0:  0 1 2 3 4 5 6 7 | 8 9 ...
//! row 1:  1 0 3 2 5 4 7 6 | 9 8 ...
//! row 2:  2 3 0 1 6 7 4 5 | ...
//! ```
//!
//! so that the same chunk of 8 consecutive rows, which is what `ldmatrix` reads at a time, covers all 32 banks once. Rows of
//! an odd multiple of 64 bytes (head dimension 96, or 64 in 8 bits) begin in the one half of the banks and in the other by
//! turns: two of them cover all banks, and chunk c lies at position `c ^ (r / 2 % 4)`.

/// Chunks that the swizzle permutes among each other; a row has a multiple of them, and consists of so many one behind the other.
#[inline(always)]
pub const fn swizzle_period(chunks: u32) -> u32 {
    if chunks % 8 == 4 { 4 } else { 8 }
}

/// Position of 16-byte chunk `chunk` in row `row` of a tile whose rows have `chunks` of them.
#[inline(always)]
pub const fn swizzled_chunk(chunks: u32, row: u32, chunk: u32) -> u32 {
    chunk ^ if chunks % 8 == 4 { row / 2 % 4 } else { row % 8 }
}

/// Lanes of a warp that copy a row of `chunks` chunks together, once or several times: as many as 32, and the row, are
/// multiples of.
#[inline(always)]
pub const fn row_lanes(chunks: u32) -> u32 {
    let lanes = 1 << chunks.trailing_zeros();
    if lanes < 32 { lanes } else { 32 }
}

/// The same, of rows of K and of V with so many elements of `element_bytes` bytes: both are copied by the lanes that have located
/// their token.
pub const fn common_row_lanes(head_dim: u32, v_head_dim: u32, element_bytes: u32) -> u32 {
    let [of_key, of_value] = [row_lanes(head_dim * element_bytes / 16), row_lanes(v_head_dim * element_bytes / 16)];
    if of_key < of_value { of_key } else { of_value }
}

/// Key (0 to 15) whose row lane `lane` addresses in an `ldmatrix.x4` of 16 keys by 16 elements. Matrices 0 and 1 are the
/// two halves in the head dimension of keys 0 to 7, matrices 2 and 3 of keys 8 to 15: (0, 1) and (2, 3) are B operands.
#[inline(always)]
pub const fn key_matrix_row(lane: u32) -> u32 {
    lane / 16 * 8 + lane % 8
}

/// Which half of the 16 elements lane `lane` addresses there (in chunks of 8 elements).
#[inline(always)]
pub const fn key_matrix_step(lane: u32) -> u32 {
    lane / 8 % 2
}

/// Key (0 to 15) whose row lane `lane` addresses in an `ldmatrix.x4.trans` of 16 keys by 16 columns of V. Matrices 0 and
/// 1 are keys 0 to 7 and 8 to 15 of columns 0 to 7, matrices 2 and 3 of columns 8 to 15.
#[inline(always)]
pub const fn value_matrix_row(lane: u32) -> u32 {
    lane / 8 % 2 * 8 + lane % 8
}

/// Which half of the 16 columns lane `lane` addresses there (in chunks of 8 elements).
#[inline(always)]
pub const fn value_matrix_chunk(lane: u32) -> u32 {
    lane / 16
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::HashSet;

    use super::*;

    /// Rows of 64 to 1,024 bytes.
    const CHUNKS: [u32; 7] = [4, 8, 12, 16, 24, 32, 64];

    #[test]
    fn the_swizzle_permutes_every_row() {
        for chunks in CHUNKS {
            for row in 0..64 {
                let positions: HashSet<u32> = (0..chunks).map(|c| swizzled_chunk(chunks, row, c)).collect();
                assert_eq!(positions.len() as u32, chunks);
                assert!(positions.iter().all(|&p| p < chunks));
                let period = swizzle_period(chunks);
                assert!((0..chunks).all(|c| swizzled_chunk(chunks, row, c) / period == c / period));
                assert!(row_lanes(chunks).is_multiple_of(period) && chunks.is_multiple_of(row_lanes(chunks)));
            }
        }
    }

    #[test]
    fn lane_geometry_covers_a_16_by_16_tile_once() {
        let keys: HashSet<_> = (0..32).map(|l| (key_matrix_row(l), key_matrix_step(l))).collect();
        let values: HashSet<_> = (0..32).map(|l| (value_matrix_row(l), value_matrix_chunk(l))).collect();
        assert_eq!((keys.len(), values.len()), (32, 32));
    }

    /// `ldmatrix` reads one 8x8 matrix (8 lanes, 128 bytes) per wavefront: conflict-free if its chunks lie in distinct
    /// 16-byte bank groups.
    #[test]
    fn ldmatrix_is_free_of_bank_conflicts() {
        for chunks in CHUNKS {
            for step in 0..chunks / 2 {
                for matrix in 0..4 {
                    let lanes = 8 * matrix..8 * matrix + 8;
                    let bank_group = |row: u32, chunk: u32| (row * chunks + swizzled_chunk(chunks, row, chunk)) % 8;
                    let keys: HashSet<u32> =
                        lanes.clone().map(|l| bank_group(key_matrix_row(l), 2 * step + key_matrix_step(l))).collect();
                    let values: HashSet<u32> =
                        lanes.map(|l| bank_group(value_matrix_row(l), 2 * step + value_matrix_chunk(l))).collect();
                    assert_eq!((keys.len(), values.len()), (8, 8));
                }
            }
        }
    }
}
