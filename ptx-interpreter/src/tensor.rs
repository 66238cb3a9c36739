//! Tensor maps, the boxes that TMA copies, and the 128-byte swizzle in which they lie in shared memory.
//!
//! PTX ISA, "Tensor Copy" and "Swizzling modes"; CUDA Driver API, `cuTensorMapEncodeTiled`.

use crate::error::Fault;
use crate::global::GlobalMemory;

/// Bytes of a row of a box under the 128-byte swizzle.
const ROW_BYTES: usize = 128;

/// Bytes of a row of a box without swizzle, the one other kind that there is.
const SHORT_ROW_BYTES: usize = 64;

/// A tensor of four dimensions in global memory, copied in boxes, zeros out of range: rows of 128 bytes under the 128-byte
/// swizzle, rows of 64 as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the first element, a multiple of 16.
    pub address: u64,
    /// Bytes of an element.
    pub element_bytes: u64,
    /// Elements, innermost dimension first.
    pub dims: [u64; 4],
    /// Strides of the dimensions 1 to 3, multiples of 16.
    pub strides_bytes: [u64; 3],
    /// Elements of a box, innermost dimension first.
    pub box_dims: [u32; 4],
}

impl TensorMap {
    /// # Errors
    /// What `cuTensorMapEncodeTiled` refuses.
    pub(crate) fn check(&self) -> Result<(), String> {
        let row_bytes = self.row_bytes();
        if ![SHORT_ROW_BYTES, ROW_BYTES].contains(&row_bytes) {
            return Err(format!(
                "a box row of {row_bytes} bytes: the interpreter knows {ROW_BYTES}, one row of the swizzle, and \
                 {SHORT_ROW_BYTES} without"
            ));
        }
        if !self.address.is_multiple_of(16) || self.strides_bytes.iter().any(|stride| !stride.is_multiple_of(16)) {
            return Err("address and strides are multiples of 16".into());
        }
        if self.box_dims.iter().any(|&elements| !(1..=256).contains(&elements)) {
            return Err("a box has 1 to 256 elements in each dimension".into());
        }
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        self.box_dims[0] as usize * self.element_bytes as usize
    }

    /// Bytes of a box.
    pub(crate) fn box_bytes(&self) -> usize {
        self.box_dims.iter().map(|&elements| elements as usize).product::<usize>() * self.element_bytes as usize
    }

    /// The box at these coordinates, as it lies in shared memory from `address` on: its rows one behind the other, the 16-byte
    /// chunks of long ones swizzled by the address.
    pub(crate) fn read_box(
        &self,
        lane: usize,
        memory: &GlobalMemory,
        coordinates: [i32; 4],
        address: u64,
    ) -> Result<Vec<u8>, Fault> {
        let mut copy = vec![0; self.box_bytes()];
        let [elements, rows, planes, cubes] = self.box_dims.map(i64::from);
        let at = coordinates.map(i64::from);
        let row_bytes = self.row_bytes();
        let mut row_begin = 0;
        for cube in at[3]..at[3] + cubes {
            for plane in at[2]..at[2] + planes {
                for row in at[1]..at[1] + rows {
                    let is_inside = |index: i64, dim: usize| (0..self.dims[dim] as i64).contains(&index);
                    if is_inside(row, 1) && is_inside(plane, 2) && is_inside(cube, 3) {
                        let begin = at[0].clamp(0, self.dims[0] as i64);
                        let end = (at[0] + elements).clamp(begin, self.dims[0] as i64);
                        let mut values = [0; ROW_BYTES];
                        let place = ((begin - at[0]) as u64 * self.element_bytes) as usize;
                        let length = ((end - begin) as u64 * self.element_bytes) as usize;
                        let [of_row, of_plane, of_cube] = self.strides_bytes;
                        let from = self.address
                            + begin as u64 * self.element_bytes
                            + row as u64 * of_row
                            + plane as u64 * of_plane
                            + cube as u64 * of_cube;
                        memory.read_into(lane, from, 16, &mut values[place..place + length])?;
                        for (chunk, bytes) in values[..row_bytes].chunks_exact(16).enumerate() {
                            let place = address + (row_begin + 16 * chunk) as u64;
                            let to = if row_bytes == ROW_BYTES { swizzled(place) } else { place } - address;
                            copy[to as usize..][..16].copy_from_slice(bytes);
                        }
                    }
                    row_begin += row_bytes;
                }
            }
        }
        Ok(copy)
    }
}

/// Where the 128-byte swizzle puts what would lie at `address`: bits 4 to 6 are combined with bits 7 to 9.
pub(crate) fn swizzled(address: u64) -> u64 {
    address ^ (address >> 3 & 0x70)
}

/// The matrix descriptor of an operand of wgmma under the 128-byte swizzle. PTX ISA, "Matrix Descriptor Format".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MatrixDescriptor {
    begin: u64,
    /// Between the 64-element blocks of a transposed operand.
    leading_bytes: u64,
    /// Between groups of eight rows of 128 bytes.
    stride_bytes: u64,
}

impl MatrixDescriptor {
    pub(crate) fn decode(bits: u64) -> Result<Self, Fault> {
        let field = |begin: u32| (bits >> begin & 0x3fff) << 4;
        if bits >> 62 != 1 || bits >> 49 & 7 != 0 {
            let what =
                format!("matrix descriptor {bits:#x}: the interpreter knows the 128-byte swizzle without base offset");
            return Err(Fault::Descriptor(what));
        }
        Ok(Self { begin: field(0), leading_bytes: field(16), stride_bytes: field(32) })
    }

    /// Address of the 16 bytes that begin with element `[n, k]` of B, 8 elements along K (or, transposed, along N).
    pub(crate) fn chunk(&self, n: usize, k: usize, transposed: bool) -> u64 {
        // Rows of 128 bytes: a column of B with 64 elements of K, or (transposed) an element of K with 64 columns.
        let (row, along) = if transposed { (k, n) } else { (n, k) };
        let (row, along) = (row as u64, along as u64);
        let block = if transposed { along / 64 * self.leading_bytes } else { 0 };
        let along = if transposed { along % 64 } else { along };
        swizzled(self.begin + block + row / 8 * self.stride_bytes + row % 8 * ROW_BYTES as u64 + 2 * along)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global::Access;

    /// `[3, 2, 20, 64]` elements of 2 bytes, numbered.
    fn tensor() -> (GlobalMemory, TensorMap) {
        let mut memory = GlobalMemory::new();
        let numbers: Vec<u8> = (0..3 * 2 * 20 * 64u16).flat_map(u16::to_le_bytes).collect();
        let address = memory.add("numbers", numbers, Access::Read);
        let map = TensorMap {
            address,
            element_bytes: 2,
            dims: [64, 20, 2, 3],
            strides_bytes: [128, 20 * 128, 2 * 20 * 128],
            box_dims: [64, 16, 1, 1],
        };
        map.check().unwrap();
        (memory, map)
    }

    fn element(copy: &[u8], row: usize, column: usize) -> u16 {
        let chunk = (column / 8) ^ (row % 8);
        let at = row * 128 + chunk * 16 + column % 8 * 2;
        u16::from_le_bytes([copy[at], copy[at + 1]])
    }

    #[test]
    fn a_box_is_swizzled_and_ends_with_the_tensor() {
        let (memory, map) = tensor();
        let copy = map.read_box(0, &memory, [0, 8, 1, 2], 0x400).unwrap();
        assert_eq!(copy.len(), 2048);
        for row in 0..16 {
            for column in 0..64 {
                let number = (((2 * 2 + 1) * 20 + 8 + row) * 64 + column) as u16;
                assert_eq!(element(&copy, row, column), if row < 12 { number } else { 0 }, "{row}, {column}");
            }
        }
        assert!(map.read_box(0, &memory, [0, 0, 0, 3], 0x400).unwrap().iter().all(|&byte| byte == 0));
    }

    #[test]
    fn short_rows_lie_one_behind_the_other() {
        let (memory, map) = tensor();
        let short = TensorMap { box_dims: [32, 16, 1, 1], ..map };
        short.check().unwrap();
        let copy = short.read_box(0, &memory, [32, 0, 0, 0], 0x400).unwrap();
        let numbers: Vec<u8> =
            (0..16u16).flat_map(|row| (64 * row + 32..64 * row + 64).flat_map(u16::to_le_bytes)).collect();
        assert_eq!(copy, numbers);
    }

    #[test]
    fn maps_that_the_driver_refuses_are_refused() {
        let (_, map) = tensor();
        assert!(TensorMap { box_dims: [16, 16, 1, 1], ..map }.check().is_err());
        assert!(TensorMap { address: map.address + 8, ..map }.check().is_err());
        assert!(TensorMap { box_dims: [64, 257, 1, 1], ..map }.check().is_err());
    }

    #[test]
    fn descriptors_name_the_chunks_of_a_box() {
        let bits = (0x800 >> 4) | (0x2000 >> 4) << 16 | (1024 >> 4) << 32 | 1 << 62;
        let descriptor = MatrixDescriptor::decode(bits).unwrap();
        // K-major: column 9, elements 8 to 15 of K: row 9, chunk 1, which comes first.
        assert_eq!(descriptor.chunk(9, 8, false), 0x800 + 9 * 128);
        // Transposed: element 3 of K, columns 64 + 16 on: the second block, row 3, chunk 2, which is second.
        assert_eq!(descriptor.chunk(80, 3, true), 0x800 + 0x2000 + 3 * 128 + 16);
        // A later start inside the swizzle's rows: elements 16 on of K.
        assert_eq!(MatrixDescriptor::decode(bits + 2).unwrap().chunk(9, 8, false), 0x800 + 9 * 128 + 2 * 16);
        assert!(MatrixDescriptor::decode(bits | 1 << 63).is_err() && MatrixDescriptor::decode(bits | 1 << 49).is_err());
    }
}
