//! What a tensor map of a KV pool says: pure arithmetic, encoded by `driver`.
//!
//! Four dimensions, innermost first: element of the head, token of the page, KV head, page. A box is 128 bytes
//! (64 elements, or 128 of 8 bits: what one swizzle row spans) of up to 64 tokens of one head of one page. Rows of 64 bytes (head
//! dimension 64 in 8 bits) are copied as they are. Page `num_pages` is out of range, so a
//! kernel that names it gets zeros. Where a page is no multiple of 16 tokens, its last box ends 8 tokens behind it, with zeros.

use crate::eligibility::{accepted_strides, is_stride};
use crate::{AttentionShape, Dtype, Error, KvStrides, Result};
use pat_abi::TileVariant;
use pat_abi::manifest::box_tokens;

/// Most bytes per box row: the 128-byte swizzle spans this much.
const BOX_ROW_BYTES: u32 = 128;

/// The arguments of `cuTensorMapEncodeTiled` that vary, and the key under which an encoded map is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TensorMapSpec {
    pub(super) address: u64,
    pub(super) dtype: Dtype,
    /// Elements, innermost first.
    pub(super) dims: [u64; 4],
    /// Strides of the dimensions 1 to 3.
    pub(super) strides_bytes: [u64; 3],
    /// Elements, innermost first.
    pub(super) box_dims: [u32; 4],
}

impl TensorMapSpec {
    /// The map of one pool (K or V), of so many pages and tokens per page. Pages may overlap.
    ///
    /// # Errors
    /// A stride is not accepted.
    pub(super) fn new(
        tensor: &str,
        address: u64,
        strides: KvStrides,
        shape: AttentionShape,
        (num_pages, page_size): (u32, u32),
    ) -> Result<Self> {
        let element_bytes = shape.kv_dtype().bytes();
        let stride_bytes = |name: &str, elements: i64| {
            if is_stride(elements, element_bytes) {
                return Ok(elements.unsigned_abs() * u64::from(element_bytes));
            }
            let got = format!("{elements} elements");
            Err(Error::invalid(format!("{tensor}_strides.{name}"), got, accepted_strides(element_bytes)))
        };
        Ok(Self {
            address,
            dtype: shape.kv_dtype(),
            dims: [
                u64::from(shape.head_dim()),
                u64::from(page_size),
                u64::from(shape.kv_heads()),
                u64::from(num_pages),
            ],
            strides_bytes: [
                stride_bytes("token", strides.token)?,
                stride_bytes("head", strides.head)?,
                stride_bytes("page", strides.page)?,
            ],
            box_dims: [
                shape.head_dim().min(BOX_ROW_BYTES / element_bytes),
                box_tokens(TileVariant::Wgmma64.page_keys(page_size)),
                1,
                1,
            ],
        })
    }
}

impl TensorMapSpec {
    /// Whether boxes lie in shared memory under the 128-byte swizzle: where their rows are so long.
    pub(super) fn is_swizzled(&self) -> bool {
        self.box_dims[0] * self.dtype.bytes() == BOX_ROW_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dims_and_strides_follow_the_convention() {
        let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
        let map = TensorMapSpec::new("k", 0x1000, KvStrides::nhd(32, 8, 128), shape, (7, 32)).unwrap();
        assert_eq!(map.dims, [128, 32, 8, 7]);
        assert_eq!(map.strides_bytes, [8 * 128 * 2, 128 * 2, 32 * 8 * 128 * 2]);
        assert_eq!(map.box_dims, [64, 32, 1, 1]);
        let map = TensorMapSpec::new("k", 0x1000, KvStrides::hnd(256, 8, 128), shape, (7, 256)).unwrap();
        assert_eq!(map.strides_bytes, [128 * 2, 256 * 128 * 2, 256 * 8 * 128 * 2]);
        assert_eq!(map.box_dims[1], 64);
        for (page_size, tokens) in
            [(8, 16), (16, 16), (24, 32), (48, 16), (96, 32), (192, 64), (784, 16), (1056, 32), (1080, 64)]
        {
            let map =
                TensorMapSpec::new("k", 0x1000, KvStrides::nhd(page_size, 8, 128), shape, (7, page_size)).unwrap();
            assert_eq!((map.dims[1], map.box_dims[1]), (u64::from(page_size), tokens));
        }
        for (head_dim, is_swizzled) in [(128, true), (64, false)] {
            let shape = AttentionShape::new(32, 8, head_dim, Dtype::F16).unwrap().with_kv_dtype(Dtype::E4m3);
            let map = TensorMapSpec::new("k", 0x1000, KvStrides::nhd(32, 8, head_dim), shape, (7, 32)).unwrap();
            assert_eq!((map.box_dims, map.is_swizzled()), ([head_dim, 32, 1, 1], is_swizzled));
        }
    }

    #[test]
    fn strides_that_tensor_maps_cannot_express_are_refused() {
        let shape = AttentionShape::new(32, 8, 128, Dtype::F16).unwrap();
        let good = KvStrides::nhd(32, 8, 128);
        for bad in [
            KvStrides { token: 1025, ..good },
            KvStrides { head: -128, ..good },
            KvStrides { page: 1 << 39, ..good },
            KvStrides { page: i64::MAX, ..good },
        ] {
            assert!(TensorMapSpec::new("k", 0x1000, bad, shape, (7, 32)).is_err(), "{bad:?}");
        }
    }
}
