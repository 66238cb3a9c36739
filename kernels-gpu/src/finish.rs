//! The last step of a row's softmax: the denominator, sinks, the base of log-sum-exps. Forward kernels and merge share it.

use core::f32::consts::{LN_2, LOG2_E};

use crate::ptx::ldst::load_global_l2_f32;
use crate::ptx::math;
use crate::softmax::{normaliser, subtrahend};

/// What the output of a row is multiplied with, and its log-sum-exp, base 2.
#[derive(Clone, Copy)]
pub(crate) struct Finish {
    /// 1 over the denominator, relative to the row's reference; 0 where there is none.
    pub(crate) scale: f32,
    /// Logarithm of the denominator.
    pub(crate) lse_log2: f32,
}

impl Finish {
    /// As [`Self::new`], of a head without a sink.
    #[inline(always)]
    pub(crate) fn without_sink(max: f32, sum: f32) -> Self {
        Self { scale: normaliser(sum), lse_log2: max + math::log2(sum) }
    }

    /// Of a row whose weights, relative to `2^max`, add up to `sum`. `sink` is the address of its head's sink where that joins the
    /// denominator now, 0 where it does not: a row's last step has it, not its parts.
    ///
    /// # Safety
    /// A f32 lies at `sink` if it is not 0.
    #[inline(always)]
    pub(crate) unsafe fn new(max: f32, sum: f32, sink: u64) -> Self {
        if sink == 0 {
            return Self::without_sink(max, sum);
        }
        // SAFETY: the caller's contract.
        let sink = unsafe { load_global_l2_f32(sink) } * LOG2_E;
        let joint = math::max(max, sink);
        let reference = subtrahend(joint);
        let share = math::exp2(max - reference);
        let total = math::fma(sum, share, math::exp2(sink - reference));
        Self { scale: share * normaliser(total), lse_log2: joint + math::log2(total) }
    }
}

/// Address of the sink of `head`; 0 if there are none. `sinks` is [`pat_abi::ForwardParams::sinks`].
#[inline(always)]
pub(crate) fn sink_of(sinks: u64, head: u32) -> u64 {
    if sinks == 0 { 0 } else { sinks + head as u64 * 4 }
}

/// What a caller gets for a log-sum-exp: ours are base 2, theirs natural.
#[inline(always)]
pub(crate) fn natural(lse_log2: f32) -> f32 {
    lse_log2 * LN_2
}
