//! By-value kernel parameters. Addresses are `u64` device addresses; strides are in bytes.

use bytemuck::{Pod, Zeroable};
use core::mem::offset_of;

/// Division of a `u32` below 2^31 by a run-time constant: `(n * multiplier) >> shift` in 64 bits.
/// (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.)
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FastDivisor {
    /// The divisor itself.
    pub divisor: u32,
    /// `ceil(2^shift / divisor)`, fits 32 bits.
    pub multiplier: u32,
    /// 31 + ceil(log2(divisor)).
    pub shift: u32,
    /// Zero.
    pub reserved: u32,
}

impl FastDivisor {
    /// Prepares division by `divisor`, which must not be 0 and must be below 2^31.
    pub const fn new(divisor: u32) -> Self {
        assert!(divisor > 0 && divisor < 1 << 31);
        let log2_ceil = 32 - (divisor - 1).leading_zeros();
        let shift = 31 + log2_ceil;
        let multiplier = (1u64 << shift).div_ceil(divisor as u64);
        assert!(multiplier <= u32::MAX as u64);
        Self { divisor, multiplier: multiplier as u32, shift, reserved: 0 }
    }

    /// `n / divisor`, for `n` below 2^31.
    #[inline(always)]
    pub const fn divide(self, n: u32) -> u32 {
        ((n as u64 * self.multiplier as u64) >> self.shift) as u32
    }

    /// `(n / divisor, n % divisor)`, for `n` below 2^31.
    #[inline(always)]
    pub const fn divide_remainder(self, n: u32) -> (u32, u32) {
        let quotient = self.divide(n);
        (quotient, n.wrapping_sub(quotient.wrapping_mul(self.divisor)))
    }
}

/// What joins the denominators of rows beside the weights of their keys. The same for forward kernels and merges: a row's last
/// step has it, be it in the one or in the other.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Denominators {
    /// Attention sinks, or 0: f32 `[q_heads]`, each one more score (natural, scaled) in the denominators of its head.
    pub sinks: u64,
}

impl Denominators {
    /// Where addresses stand in it.
    pub const ADDRESSES: [usize; 1] = [offset_of!(Self, sinks)];

    /// Of the heads from this one on.
    #[must_use]
    pub const fn from_head(self, head: u32) -> Self {
        match self.sinks {
            0 => self,
            sinks => Self { sinks: sinks + 4 * head as u64 },
        }
    }
}

/// First parameter of every forward kernel.
///
/// Element (page, token, head, x) of K lies at `k + page*k_page_stride + token*k_token_stride + head*k_head_stride + 2x`
/// bytes, of V likewise; element (sequence, head, x) of Q at `q + sequence*q_sequence_stride + head*q_head_stride + 2x`.
/// The host checks that base addresses and strides of Q, K, V and O are multiples of 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct ForwardParams {
    /// Plan buffer.
    pub plan: u64,
    /// Queries, 16-bit.
    pub q: u64,
    /// Key pool, 16-bit.
    pub k: u64,
    /// Value pool, 16-bit.
    pub v: u64,
    /// Output, 16-bit.
    pub out: u64,
    /// Log-sum-exp output (f32, natural logarithm), or 0.
    pub lse: u64,
    /// Partial outputs: f32 `[slot_count, q_heads, head_dim]`, normalised; contiguous.
    pub partial_out: u64,
    /// Partial log-sum-exps, base 2: f32 `[slot_count, q_heads]`.
    pub partial_lse: u64,
    /// What else joins the denominators of rows that go to the output.
    pub denominators: Denominators,
    /// Bytes between sequences of Q.
    pub q_sequence_stride: i64,
    /// Bytes between heads of Q.
    pub q_head_stride: i64,
    /// Bytes between pages of K.
    pub k_page_stride: i64,
    /// Bytes between tokens of K.
    pub k_token_stride: i64,
    /// Bytes between heads of K.
    pub k_head_stride: i64,
    /// Bytes between pages of V.
    pub v_page_stride: i64,
    /// Bytes between tokens of V.
    pub v_token_stride: i64,
    /// Bytes between heads of V.
    pub v_head_stride: i64,
    /// Bytes between sequences of O.
    pub out_sequence_stride: i64,
    /// Bytes between heads of O.
    pub out_head_stride: i64,
    /// Bytes between sequences of LSE.
    pub lse_sequence_stride: i64,
    /// Bytes between heads of LSE.
    pub lse_head_stride: i64,
    /// What turns scores into exponents of 2: `softmax_scale * log2(e)`, or where scores are mapped what the map's values are
    /// multiplied with: of capped ones `cap * log2(e)`.
    pub scale_log2: f32,
    /// KV heads. CTA `c` of a launch serves item `c / kv_heads` of its variant, KV head `c % kv_heads`.
    pub kv_heads: u32,
    /// Query heads per KV head.
    pub group: FastDivisor,
    /// Tokens per page.
    pub page_size: FastDivisor,
    /// `kv_heads` as a divisor.
    pub kv_heads_divisor: FastDivisor,
    /// Pages in the pool; the page index that tensor maps treat as out of range.
    pub num_pages: u32,
    /// Where scores are mapped, what products Q·K are multiplied with ahead of the map: of a cap `2 * log2(e) * softmax_scale / cap`.
    pub map_scale: f32,
    /// Keys that a page takes in tiles of the wgmma kernels ([`crate::TileVariant::page_keys`]).
    pub page_keys: FastDivisor,
}

/// First parameter of the forward kernels that read 8-bit K and V. What others take comes first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct ScaledForwardParams {
    /// As of the others; element x of a row of K or V lies `x` bytes behind the row's address.
    pub forward: ForwardParams,
    /// What elements of K are multiplied with, beside [`Self::k_scales`].
    pub k_scale: f32,
    /// What elements of V are multiplied with, beside [`Self::v_scales`].
    pub v_scale: f32,
    /// Factors of K's elements, or 0: f32 `[kv_heads]`.
    pub k_scales: u64,
    /// Factors of V's elements, or 0: f32 `[kv_heads]`.
    pub v_scales: u64,
}

/// Parameter of the merge kernels: one warp per (merge row, query head).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct MergeParams {
    /// Plan buffer.
    pub plan: u64,
    /// Output, 16-bit.
    pub out: u64,
    /// Log-sum-exp output (f32, natural logarithm), or 0.
    pub lse: u64,
    /// See [`ForwardParams::partial_out`].
    pub partial_out: u64,
    /// See [`ForwardParams::partial_lse`].
    pub partial_lse: u64,
    /// See [`ForwardParams::denominators`].
    pub denominators: Denominators,
    /// Bytes between sequences of O.
    pub out_sequence_stride: i64,
    /// Bytes between heads of O.
    pub out_head_stride: i64,
    /// Bytes between sequences of LSE.
    pub lse_sequence_stride: i64,
    /// Bytes between heads of LSE.
    pub lse_head_stride: i64,
    /// Query heads.
    pub q_heads: FastDivisor,
}

/// Parameter of the fill kernels: draws a tensor `[pages, tokens, heads, dim]` from [`crate::generator`]. For Q, `pages` is
/// the number of sequences and `tokens` is 1. Any grid of 256-thread CTAs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct FillParams {
    /// The tensor, 16-bit; a multiple of 16.
    pub base: u64,
    /// Bytes between pages; a multiple of 16, like the other strides.
    pub page_stride: i64,
    /// Bytes between tokens.
    pub token_stride: i64,
    /// Bytes between heads.
    pub head_stride: i64,
    /// Tokens per page.
    pub tokens: FastDivisor,
    /// Heads. `pages * tokens * heads` must be below 2^31.
    pub heads: FastDivisor,
    /// Pages.
    pub pages: u32,
    /// Elements per head: a power of two, at least 8.
    pub dim: u32,
    /// Seed of the generator.
    pub seed: u32,
    /// Which tensor ([`crate::generator::Tensor`]).
    pub tensor: u32,
}

/// Parameter of the L2 flush kernel. Any grid of 256-thread CTAs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct FlushParams {
    /// Buffer to read, larger than the L2 cache; a multiple of 16.
    pub buffer: u64,
    /// Its size; a multiple of 16.
    pub bytes: u64,
    /// Receives one `u32` per CTA.
    pub sums: u64,
}

const _: () = {
    assert!(size_of::<FillParams>() == 80);
    assert!(size_of::<FlushParams>() == 24);
    assert!(size_of::<ForwardParams>() == 248);
    assert!(size_of::<MergeParams>() == 96);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_division_equals_division() {
        for divisor in (1..300).chain([1023, 1024, 1025, 65_535, 65_536, 1 << 30, (1 << 31) - 1]) {
            let fast = FastDivisor::new(divisor);
            let near_multiples = (1..40u64).flat_map(|k| {
                let m = k * u64::from(divisor);
                [m - 1, m, m + 1]
            });
            for n in (0..2000u64).chain(near_multiples).chain([(1 << 31) - 1, (1 << 31) - 2, 1 << 30]) {
                if n < 1 << 31 {
                    let n = n as u32;
                    assert_eq!(fast.divide_remainder(n), (n / divisor, n % divisor), "{n} / {divisor}");
                }
            }
        }
    }
}
