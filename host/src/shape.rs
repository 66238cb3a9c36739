//! The model's attention shape.

use crate::{Dtype, Error, Result};

/// Head counts, head dimension and element type; constant over a model's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    dtype: Dtype,
}

impl AttentionShape {
    /// Head dimensions there are kernels for.
    pub const HEAD_DIMS: [u32; 2] = [64, 128];

    /// # Errors
    /// `kv_heads` is 0, `q_heads` is not a positive multiple of `kv_heads`, `q_heads` exceeds 65,535, or `head_dim` is
    /// not one of [`Self::HEAD_DIMS`].
    pub fn new(q_heads: u32, kv_heads: u32, head_dim: u32, dtype: Dtype) -> Result<Self> {
        if kv_heads == 0 {
            return Err(Error::invalid("kv_heads", kv_heads, "at least 1"));
        }
        if q_heads == 0 || !q_heads.is_multiple_of(kv_heads) || q_heads > 65_535 {
            return Err(Error::invalid(
                "q_heads",
                q_heads,
                format!("a positive multiple of kv_heads ({kv_heads}), at most 65535"),
            ));
        }
        if !Self::HEAD_DIMS.contains(&head_dim) {
            return Err(Error::invalid("head_dim", head_dim, "64 or 128"));
        }
        Ok(Self { q_heads, kv_heads, head_dim, dtype })
    }

    /// Query heads.
    pub fn q_heads(self) -> u32 {
        self.q_heads
    }

    /// KV heads.
    pub fn kv_heads(self) -> u32 {
        self.kv_heads
    }

    /// Elements per head.
    pub fn head_dim(self) -> u32 {
        self.head_dim
    }

    /// Element type of Q, K, V and O.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Query heads per KV head.
    pub fn group(self) -> u32 {
        self.q_heads / self.kv_heads
    }

    /// Bytes of one KV token, K and V, over all KV heads.
    pub fn kv_bytes_per_token(self) -> u64 {
        2 * 2 * u64::from(self.kv_heads) * u64::from(self.head_dim)
    }

    /// Bytes of one sequence's partials of one chunk: an f32 output and a log-sum-exp for each query head.
    pub fn partial_bytes(self) -> u64 {
        u64::from(self.q_heads) * (u64::from(self.head_dim) + 1) * 4
    }
}
