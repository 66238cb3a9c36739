//! The shape of a model's attention tensors.

use crate::{Dtype, Error, Result};

/// Head counts, head dimensions and element types; constant over a model's layers. Whether there are kernels for it is
/// [`crate::supports`]'s to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    v_head_dim: u32,
    dtype: Dtype,
    kv_dtype: Dtype,
    out_dtype: Dtype,
}

impl AttentionShape {
    /// Most heads and most elements per head.
    pub const MAX_EXTENT: u32 = 65_535;

    /// All of Q, K, V and O have `head_dim` elements of `dtype` per head; [`Self::with_v_head_dim`] and its neighbours say
    /// otherwise.
    ///
    /// # Errors
    /// `kv_heads` is 0, `q_heads` is not a positive multiple of `kv_heads`, `head_dim` is 0, or `q_heads` or `head_dim`
    /// exceeds [`Self::MAX_EXTENT`].
    pub fn new(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: Dtype) -> Result<Self> {
        if kv_heads == 0 {
            return Err(Error::invalid("kv_heads", kv_heads, "at least 1"));
        }
        if q_heads == 0 || !q_heads.is_multiple_of(kv_heads) || q_heads > Self::MAX_EXTENT {
            return Err(Error::invalid(
                "q_heads",
                q_heads,
                format!("a positive multiple of kv_heads ({kv_heads}), at most {}", Self::MAX_EXTENT),
            ));
        }
        check_head_dim("head_dim", head_dim)?;
        let [kv_dtype, out_dtype] = [dtype; 2];
        Ok(Self { q_heads, kv_heads, head_dim, v_head_dim: head_dim, dtype, kv_dtype, out_dtype })
    }

    /// With other elements per head in V and O than in Q and K.
    ///
    /// # Errors
    /// `v_head_dim` is 0 or exceeds [`Self::MAX_EXTENT`].
    pub fn with_v_head_dim(self, v_head_dim: u32) -> Result<Self> {
        check_head_dim("v_head_dim", v_head_dim)?;
        Ok(Self { v_head_dim, ..self })
    }

    /// With K and V of another type than Q.
    pub fn with_kv_dtype(self, kv_dtype: Dtype) -> Self {
        Self { kv_dtype, ..self }
    }

    /// With O of another type than Q.
    pub fn with_out_dtype(self, out_dtype: Dtype) -> Self {
        Self { out_dtype, ..self }
    }

    /// Query heads.
    pub fn q_heads(self) -> u32 {
        self.q_heads
    }

    /// KV heads.
    pub fn kv_heads(self) -> u32 {
        self.kv_heads
    }

    /// Elements per head of Q and K.
    pub fn head_dim(self) -> u32 {
        self.head_dim
    }

    /// Elements per head of V and O.
    pub fn v_head_dim(self) -> u32 {
        self.v_head_dim
    }

    /// Element type of Q.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Element type of K and V.
    pub fn kv_dtype(self) -> Dtype {
        self.kv_dtype
    }

    /// Element type of O.
    pub fn out_dtype(self) -> Dtype {
        self.out_dtype
    }

    /// Query heads per KV head.
    pub fn group(self) -> u32 {
        self.q_heads / self.kv_heads
    }

    /// Bytes of one KV token, K and V, over all KV heads.
    pub fn kv_bytes_per_token(self) -> u64 {
        let elements = u64::from(self.head_dim) + u64::from(self.v_head_dim);
        u64::from(self.kv_dtype.bytes()) * u64::from(self.kv_heads) * elements
    }

    /// Bytes of one sequence's partials of one chunk: an f32 output and a log-sum-exp for each query head.
    pub fn partial_bytes(self) -> u64 {
        u64::from(self.q_heads) * (u64::from(self.v_head_dim) + 1) * 4
    }
}

fn check_head_dim(argument: &str, head_dim: u32) -> Result<()> {
    if (1..=AttentionShape::MAX_EXTENT).contains(&head_dim) {
        return Ok(());
    }
    Err(Error::invalid(argument, head_dim, format!("1 to {}", AttentionShape::MAX_EXTENT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_types_may_differ_from_those_of_q() {
        let plain = AttentionShape::new(32, 8, 192, Dtype::Bf16).unwrap();
        assert_eq!((plain.v_head_dim(), plain.kv_dtype(), plain.out_dtype()), (192, Dtype::Bf16, Dtype::Bf16));
        assert_eq!((plain.kv_bytes_per_token(), plain.partial_bytes()), (2 * 8 * 384, 32 * 193 * 4));
        let other = plain.with_v_head_dim(128).unwrap().with_kv_dtype(Dtype::E4m3).with_out_dtype(Dtype::F16);
        assert_eq!((other.head_dim(), other.v_head_dim(), other.group()), (192, 128, 4));
        assert_eq!((other.dtype(), other.kv_dtype(), other.out_dtype()), (Dtype::Bf16, Dtype::E4m3, Dtype::F16));
        assert_eq!((other.kv_bytes_per_token(), other.partial_bytes()), (8 * 320, 32 * 129 * 4));
        for v_head_dim in [0, 65_536] {
            let error = plain.with_v_head_dim(v_head_dim).unwrap_err().to_string();
            assert!(error.contains(&format!("v_head_dim: got {v_head_dim}")), "{error}");
        }
    }
}
