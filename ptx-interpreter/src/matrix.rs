//! Matrix products of a warp, and the fragments that its lanes hold.
//!
//! PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and, for the accumulators of wgmma, "Register
//! Fragments and Shared Memory Matrix Layouts". Products of 16-bit elements are exact in f32; they are added in order, rounded
//! to nearest. A device adds them in another order and truncates: both are within the numerics rule.

use crate::instruction::MatrixType;
use crate::lanes::{Lanes, WARP};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

/// Rows of a warp's part of a product, and elements of K of one instruction.
pub(crate) const ROWS: usize = 16;
pub(crate) const DEPTH: usize = 16;

impl MatrixType {
    /// All elements of a matrix at once, which is much faster than one by one.
    pub(crate) fn to_f32<const N: usize, const ROWS: usize>(self, bits: &[[u16; N]; ROWS]) -> [[f32; N]; ROWS] {
        let mut values = [[0.0; N]; ROWS];
        match self {
            Self::F16 => bits.as_flattened().reinterpret_cast::<f16>().convert_to_f32_slice(values.as_flattened_mut()),
            Self::Bf16 => {
                bits.as_flattened().reinterpret_cast::<bf16>().convert_to_f32_slice(values.as_flattened_mut())
            }
        }
        values
    }
}

/// A 16 x 16: register `i` of lane `l` holds row `l / 4 + 8 (i % 2)`, columns `2 (l % 4) + 8 (i / 2)` and the next one.
pub(crate) fn a_matrix(of: MatrixType, registers: [&Lanes; 4]) -> [[f32; DEPTH]; ROWS] {
    let mut a = [[0; DEPTH]; ROWS];
    for (index, register) in registers.into_iter().enumerate() {
        for (lane, &bits) in register.iter().enumerate() {
            let (row, column) = (lane / 4 + 8 * (index % 2), 2 * (lane % 4) + 8 * (index / 2));
            [a[row][column], a[row][column + 1]] = [bits as u16, (bits >> 16) as u16];
        }
    }
    of.to_f32(&a)
}

/// B 16 x 8: register `i` of lane `l` holds rows `2 (l % 4) + 8 i` and the next one, column `l / 4`.
pub(crate) fn b_matrix(of: MatrixType, registers: [&Lanes; 2]) -> [[f32; 8]; DEPTH] {
    let mut b = [[0; 8]; DEPTH];
    for (index, register) in registers.into_iter().enumerate() {
        for (lane, &bits) in register.iter().enumerate() {
            let (row, column) = (2 * (lane % 4) + 8 * index, lane / 4);
            [b[row][column], b[row + 1][column]] = [bits as u16, (bits >> 16) as u16];
        }
    }
    of.to_f32(&b)
}

/// Row and column of an accumulator: register `i` of lane `l` holds row `l / 4 + 8 (i / 2 % 2)`, column
/// `8 (i / 4) + 2 (l % 4) + i % 2`.
fn accumulator(index: usize, lane: usize) -> (usize, usize) {
    (lane / 4 + 8 * (index / 2 % 2), 8 * (index / 4) + 2 * (lane % 4) + index % 2)
}

/// `a b + c`, 8 columns at `columns`, in registers `4 * columns / 8` and the next three of the accumulators.
pub(crate) fn multiply_add(a: &[[f32; DEPTH]; ROWS], b: &[[f32; 8]; DEPTH], c: [&Lanes; 4]) -> [Lanes; 4] {
    let mut sums = [[0f32; 8]; ROWS];
    for (index, register) in c.into_iter().enumerate() {
        for (lane, &bits) in register.iter().enumerate() {
            let (row, column) = accumulator(index, lane);
            sums[row][column] = f32::from_bits(bits as u32);
        }
    }
    for (sums, a) in sums.iter_mut().zip(a) {
        for (&a, b) in a.iter().zip(b) {
            sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
        }
    }
    std::array::from_fn(|index| {
        std::array::from_fn(|lane: usize| {
            let (row, column) = accumulator(index, lane);
            u64::from(sums[row][column].to_bits())
        })
    })
}

/// What `ldmatrix.x4` leaves in the registers of four 8 x 8 matrices, whose rows are given: register `m` of lane `l` holds, of
/// matrix `m`, row `l / 4` and columns `2 (l % 4)` and the next one, or of its transpose. PTX ISA, "ldmatrix".
pub(crate) fn distribute(rows: &[[u8; 16]; WARP], transposed: bool) -> [Lanes; 4] {
    let element = |matrix: usize, row: usize, column: usize| {
        let (row, column) = if transposed { (column, row) } else { (row, column) };
        let bytes = &rows[8 * matrix + row];
        u64::from(u16::from_le_bytes([bytes[2 * column], bytes[2 * column + 1]]))
    };
    std::array::from_fn(|matrix| {
        std::array::from_fn(|lane: usize| {
            let (row, column) = (lane / 4, 2 * (lane % 4));
            element(matrix, row, column) | element(matrix, row, column + 1) << 16
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f16_bits(value: usize) -> u64 {
        u64::from(f16::from_f32(value as f32).to_bits())
    }

    /// Row and column, by a lane's group of four and its place in that.
    type Place = fn(usize, usize) -> (usize, usize);

    /// Registers of a matrix by the tables of the manual, written down here a second time: `(row, column)` of the low half.
    fn registers<const N: usize>(
        value: impl Fn(usize, usize) -> usize,
        place: [Place; N],
        step: (usize, usize),
    ) -> [Lanes; N] {
        place.map(|place| {
            std::array::from_fn(|lane| {
                let (row, column) = place(lane / 4, lane % 4);
                f16_bits(value(row, column)) | f16_bits(value(row + step.0, column + step.1)) << 16
            })
        })
    }

    #[test]
    fn a_product_of_fragments_is_the_product_of_the_matrices() {
        let a_of = |row: usize, k: usize| (3 * row + 5 * k) % 7;
        let b_of = |k: usize, column: usize| (2 * k + 11 * column) % 5;
        let a = registers(
            a_of,
            [|g, t| (g, 2 * t), |g, t| (g + 8, 2 * t), |g, t| (g, 2 * t + 8), |g, t| (g + 8, 2 * t + 8)],
            (0, 1),
        );
        let b = registers(b_of, [|g, t| (2 * t, g), |g, t| (2 * t + 8, g)], (1, 0));
        let c: [Lanes; 4] = std::array::from_fn(|index| [u64::from((index as f32).to_bits()); WARP]);
        let of = MatrixType::F16;
        let d = multiply_add(&a_matrix(of, a.each_ref()), &b_matrix(of, b.each_ref()), c.each_ref());
        let places: [Place; 4] =
            [|g, t| (g, 2 * t), |g, t| (g, 2 * t + 1), |g, t| (g + 8, 2 * t), |g, t| (g + 8, 2 * t + 1)];
        for (index, (register, place)) in d.iter().zip(places).enumerate() {
            for (lane, &bits) in register.iter().enumerate() {
                let (row, column) = place(lane / 4, lane % 4);
                let sum: usize = (0..16).map(|k| a_of(row, k) * b_of(k, column)).sum();
                assert_eq!(f32::from_bits(bits as u32), (sum + index) as f32);
            }
        }
    }

    #[test]
    fn loaded_matrices_are_fragments_or_transposed_ones() {
        let rows: [[u8; 16]; WARP] = std::array::from_fn(|row| {
            std::array::from_fn(|byte| if byte % 2 == 0 { (row * 8 + byte / 2) as u8 } else { 0 })
        });
        let plain = distribute(&rows, false);
        let transposed = distribute(&rows, true);
        // Matrix 2, lane 13: row 3, columns 2 and 3.
        assert_eq!(plain[2][13], (19 * 8 + 2) | (19 * 8 + 3) << 16);
        assert_eq!(transposed[2][13], (18 * 8 + 3) | (19 * 8 + 3) << 16);
    }
}
