//! Exchange between the lanes of a warp (sm_30). All convergent, so all LLVM intrinsics.

unsafe extern "C" {
    #[link_name = "llvm.nvvm.shfl.sync.bfly.f32"]
    fn llvm_shfl_bfly_f32(mask: u32, value: f32, lane_mask: u32, clamp: u32) -> f32;
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn llvm_shfl_bfly_i32(mask: u32, value: u32, lane_mask: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn llvm_shfl_idx_i32(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    #[link_name = "llvm.nvvm.vote.any.sync"]
    fn llvm_vote_any(mask: u32, predicate: bool) -> bool;
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    fn llvm_vote_ballot(mask: u32, predicate: bool) -> u32;
    #[link_name = "llvm.nvvm.redux.sync.or"]
    fn llvm_redux_or(value: u32, mask: u32) -> u32;
}

const ALL_LANES: u32 = u32::MAX;
const WHOLE_WARP: u32 = 31;

/// `shfl.sync.bfly.b32` (sm_30): the value of the lane whose index differs by `lane_mask` (exclusive or). Convergent.
#[inline(always)]
pub fn xor_f32(value: f32, lane_mask: u32) -> f32 {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_shfl_bfly_f32(ALL_LANES, value, lane_mask, WHOLE_WARP) }
}

/// `shfl.sync.bfly.b32` (sm_30): as [`xor_f32`]. Convergent.
#[inline(always)]
pub fn xor_u32(value: u32, lane_mask: u32) -> u32 {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_shfl_bfly_i32(ALL_LANES, value, lane_mask, WHOLE_WARP) }
}

/// `shfl.sync.idx.b32` (sm_30): the value of lane `lane % 32`. Convergent.
#[inline(always)]
pub fn from_lane_u32(value: u32, lane: u32) -> u32 {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_shfl_idx_i32(ALL_LANES, value, lane, WHOLE_WARP) }
}

/// Two `shfl.sync.idx.b32` (sm_30): the 64-bit value of lane `lane` of the caller's segment of `WIDTH` lanes (a power of
/// two). Convergent.
#[inline(always)]
pub fn from_segment_u64<const WIDTH: u32>(value: u64, lane: u32) -> u64 {
    let clamp = (32 - WIDTH) << 8 | WHOLE_WARP;
    // SAFETY: all lanes take part; the callers are warp-uniform.
    let (low, high) = unsafe {
        (
            llvm_shfl_idx_i32(ALL_LANES, value as u32, lane, clamp),
            llvm_shfl_idx_i32(ALL_LANES, (value >> 32) as u32, lane, clamp),
        )
    };
    (high as u64) << 32 | low as u64
}

/// `shfl.sync.idx.b32` (sm_30): the value of lane `lane % 32`. Convergent.
#[inline(always)]
pub fn from_lane_f32(value: f32, lane: u32) -> f32 {
    f32::from_bits(from_lane_u32(value.to_bits(), lane))
}

/// `vote.sync.any.pred` (sm_30): whether the predicate holds in any lane. Convergent.
#[inline(always)]
pub fn any(predicate: bool) -> bool {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_vote_any(ALL_LANES, predicate) }
}

/// `vote.sync.ballot.b32` (sm_30): bit `l` says whether the predicate holds in lane `l`. Convergent.
#[inline(always)]
pub fn ballot(predicate: bool) -> u32 {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_vote_ballot(ALL_LANES, predicate) }
}

/// `redux.sync.or.b32` (sm_80) of a value that all lanes have alike: ptxas then knows that they do, and computes with it in uniform
/// registers. Convergent.
#[inline(always)]
pub fn uniform(value: u32) -> u32 {
    // SAFETY: all lanes take part; the callers are warp-uniform.
    unsafe { llvm_redux_or(value, ALL_LANES) }
}
