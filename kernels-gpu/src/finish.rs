//! The last step of a row's softmax: the denominator, what joins it (sinks), the base of log-sum-exps. Forward kernels and merge share it.

use core::f32::consts::{LN_2, LOG2_E};

use pat_abi::params::Denominators;

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
    /// As [`Self::new`], where nothing joins.
    #[inline(always)]
    pub(crate) fn alone(max: f32, sum: f32) -> Self {
        Self { scale: normaliser(sum), lse_log2: max + math::log2(sum) }
    }

    /// Of a row whose weights, relative to `2^max`, add up to `sum`.
    ///
    /// # Safety
    /// `terms` are those of [`terms_of_head`], of a head that there is, or none.
    #[inline(always)]
    pub(crate) unsafe fn new(max: f32, sum: f32, terms: Terms) -> Self {
        if terms == NO_TERMS {
            return Self::alone(max, sum);
        }
        // SAFETY: the caller's contract.
        let sink = unsafe { load_global_l2_f32(terms) } * LOG2_E;
        let joint = math::max(max, sink);
        let reference = subtrahend(joint);
        let share = math::exp2(max - reference);
        let total = math::fma(sum, share, math::exp2(sink - reference));
        Self { scale: share * normaliser(total), lse_log2: joint + math::log2(total) }
    }
}

/// What joins a row's denominator now, beside the weights of its keys: a row's last step has it, not its parts. It is the address of
/// its head's sink, or 0. (A type of its own would change the code of kernels.)
pub(crate) type Terms = u64;

/// Nothing.
pub(crate) const NO_TERMS: Terms = 0;

/// What joins the denominators of a head's rows.
#[inline(always)]
pub(crate) fn terms_of_head(all: Denominators, head: u32) -> Terms {
    if joins_nothing(all) { NO_TERMS } else { all.sinks + head as u64 * 4 }
}

/// Whether nothing joins any row's.
#[inline(always)]
pub(crate) fn joins_nothing(all: Denominators) -> bool {
    all.sinks == 0
}

/// What a caller gets for a log-sum-exp: ours are base 2, theirs natural.
#[inline(always)]
pub(crate) fn natural(lse_log2: f32) -> f32 {
    lse_log2 * LN_2
}
