//! Strides, in elements. The innermost dimension (head_dim) is always contiguous.

/// Strides of one paged KV pool, K or V: element (page, token, head, x) is at `page*page + token*token + head*head + x`.
///
/// NHD, HND and page-first layouts, and V inside K's row, are all just strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStrides {
    /// Elements between pages.
    pub page: i64,
    /// Elements between tokens of a page.
    pub token: i64,
    /// Elements between KV heads.
    pub head: i64,
}

impl KvStrides {
    /// `[pages, page_size, kv_heads, head_dim]`, contiguous. Strides saturate at `i64::MAX`, which nothing
    /// accepts.
    pub fn nhd(page_size: u32, kv_heads: u32, head_dim: u32) -> Self {
        let (page_size, kv_heads, head_dim) = (i64::from(page_size), i64::from(kv_heads), i64::from(head_dim));
        let token = kv_heads.saturating_mul(head_dim);
        Self { page: page_size.saturating_mul(token), token, head: head_dim }
    }

    /// `[pages, kv_heads, page_size, head_dim]`, contiguous; otherwise as [`Self::nhd`].
    pub fn hnd(page_size: u32, kv_heads: u32, head_dim: u32) -> Self {
        let (page_size, kv_heads, head_dim) = (i64::from(page_size), i64::from(kv_heads), i64::from(head_dim));
        let head = page_size.saturating_mul(head_dim);
        Self { page: kv_heads.saturating_mul(head), token: head_dim, head }
    }
}

/// Strides of Q, O or LSE: element (sequence, head, x) is at `sequence*sequence + head*head + x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowStrides {
    /// Elements between sequences.
    pub sequence: i64,
    /// Elements between heads.
    pub head: i64,
}

impl RowStrides {
    /// `[sequences, q_heads, head_dim]`, contiguous (Q and O).
    pub fn contiguous(q_heads: u32, head_dim: u32) -> Self {
        Self { sequence: i64::from(q_heads) * i64::from(head_dim), head: i64::from(head_dim) }
    }

    /// `[sequences, q_heads]`, contiguous (LSE).
    pub fn lse(q_heads: u32) -> Self {
        Self { sequence: i64::from(q_heads), head: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_of_any_sizes_are_those_of_contiguous_pools() {
        assert_eq!(KvStrides::nhd(16, 8, 128), KvStrides { page: 16 * 8 * 128, token: 8 * 128, head: 128 });
        assert_eq!(KvStrides::hnd(16, 8, 128), KvStrides { page: 16 * 8 * 128, token: 128, head: 16 * 128 });
        let nhd = KvStrides::nhd(u32::MAX, u32::MAX, u32::MAX);
        assert_eq!((nhd.page, nhd.token), (i64::MAX, i64::MAX));
        let hnd = KvStrides::hnd(u32::MAX, u32::MAX, 1);
        assert_eq!((hnd.page, hnd.head), (i64::MAX, i64::from(u32::MAX)));
    }
}
