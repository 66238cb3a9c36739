//! Parameters of the kernels around attention: writing new rows into a cache, and merging attention states. Addresses are `u64`
//! device addresses, strides are in bytes. The host checks that the addresses of 16-bit tensors and their strides are multiples
//! of 16.

use crate::params::FastDivisor;
use bytemuck::{Pod, Zeroable};

/// Parameter of the append kernel: 16-byte chunks of `[rows, heads, chunks]` of K and V, dealt to threads. Any grid of 256-thread
/// CTAs. A thread takes a chunk of each; where heads of one have fewer elements, of the other alone.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct AppendParams {
    /// New rows of K, 16-bit.
    pub k_new: u64,
    /// New rows of V.
    pub v_new: u64,
    /// K cache.
    pub k_cache: u64,
    /// V cache; may lie inside the K cache's rows.
    pub v_cache: u64,
    /// `i64` for each row: page * page_size + token in the page. One that is negative, or not below `slots_end`, is skipped.
    pub slots: u64,
    /// Bytes between rows of new K.
    pub k_new_row_stride: i64,
    /// Bytes between heads of new K.
    pub k_new_head_stride: i64,
    /// Bytes between rows of new V.
    pub v_new_row_stride: i64,
    /// Bytes between heads of new V.
    pub v_new_head_stride: i64,
    /// Bytes between pages of the K cache.
    pub k_page_stride: i64,
    /// Bytes between its tokens.
    pub k_token_stride: i64,
    /// Bytes between its heads.
    pub k_head_stride: i64,
    /// Bytes between pages of the V cache.
    pub v_page_stride: i64,
    /// Bytes between its tokens.
    pub v_token_stride: i64,
    /// Bytes between its heads.
    pub v_head_stride: i64,
    /// Tokens per page.
    pub page_size: FastDivisor,
    /// KV heads.
    pub heads: FastDivisor,
    /// 16-byte chunks of a head of K or of V, whichever has more. `rows * heads * chunks` is below 2^31.
    pub chunks: FastDivisor,
    /// 16-byte chunks of a head of K.
    pub k_chunks: u32,
    /// 16-byte chunks of a head of V.
    pub v_chunks: u32,
    /// Rows.
    pub rows: u32,
    /// Pages times tokens per page, below 2^31.
    pub slots_end: u32,
}

/// Parameter of the append kernels that round 16-bit rows to an 8-bit cache. What the other takes comes first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct ScaledAppendParams {
    /// As of the other; a chunk has 8 bytes in the caches.
    pub append: AppendParams,
    /// What elements of K are divided by, beside [`Self::k_scales`].
    pub k_scale: f32,
    /// What elements of V are divided by, beside [`Self::v_scales`].
    pub v_scale: f32,
    /// What K's heads are divided by, or 0: f32 `[heads]`.
    pub k_scales: u64,
    /// What V's heads are divided by, or 0: f32 `[heads]`.
    pub v_scales: u64,
}

/// One attention state of [`MergeStatesParams`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct StateParams {
    /// Outputs, 16-bit `[rows, heads, head_dim]`.
    pub out: u64,
    /// Log-sum-exps, f32 `[rows, heads]`, natural logarithm; -inf where there are no tokens.
    pub lse: u64,
    /// Bytes between rows of the outputs.
    pub out_row_stride: i64,
    /// Bytes between their heads.
    pub out_head_stride: i64,
    /// Bytes between rows of the log-sum-exps.
    pub lse_row_stride: i64,
    /// Bytes between their heads.
    pub lse_head_stride: i64,
}

/// Parameter of the kernels that merge two attention states: one warp per (row, head). Any grid of 256-thread CTAs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct MergeStatesParams {
    /// The first state.
    pub a: StateParams,
    /// The second one.
    pub b: StateParams,
    /// The result; may be one of the two, and overlaps them no other way.
    pub merged: StateParams,
    /// Heads.
    pub heads: FastDivisor,
    /// Rows; `rows * heads` is below 2^31.
    pub rows: u32,
    /// 16-byte chunks of a head.
    pub chunks: u32,
}

const _: () = {
    assert!(size_of::<AppendParams>() == 184);
    assert!(size_of::<ScaledAppendParams>() == 208);
    assert!(size_of::<MergeStatesParams>() == 168);
};
