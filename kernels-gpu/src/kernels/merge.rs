//! Merge kernel: combines the partials of a (sequence, query head) row by their log-sum-exps. One warp per row.
//!
//! Lanes share the log-sum-exps of 32 partials; then every lane sums its columns over the partials, eight loads in
//! flight. The order is the slot order, so results do not depend on timing.

use core::mem::offset_of;

use pat_abi::{MergeParams, MergeRow, PLAN_MAGIC, PlanHeader};

use crate::element::{Bf16, Element, F16};
use crate::item::{LN_2, strided};
use crate::ptx::ldst::{
    load_global_l2_f32, load_global_l2_f32x2, load_global_l2_f32x4, load_global_u32, load_global_u32x4,
    store_global_f32, store_global_u32, store_global_u32x2,
};
use crate::ptx::{math, shuffle, special};
use crate::softmax::{normaliser, subtrahend};

const WARPS: u32 = 4;
const LOADS_IN_FLIGHT: u32 = 8;

/// `COLUMNS` per lane: head_dim / 32.
///
/// # Safety
/// `params` describes live buffers and a plan made for them; the launch is as the manifest says.
#[inline(always)]
unsafe fn merge<E: Element, const COLUMNS: usize>(params: &MergeParams, wait_for_partials: impl Fn()) {
    let thread = special::thread_index();
    let lane = thread % 32;
    let (index, head) = params.q_heads.divide_remainder(special::cta_index() * WARPS + thread / 32);
    let q_heads = params.q_heads.divisor;
    // SAFETY: header fields; the row exists once its index is below the count.
    let row = unsafe {
        let magic = load_global_u32(params.plan + offset_of!(PlanHeader, magic) as u64);
        let count = load_global_u32(params.plan + offset_of!(PlanHeader, merge_count) as u64);
        let offset = load_global_u32(params.plan + offset_of!(PlanHeader, merges_offset_bytes) as u64);
        if magic != PLAN_MAGIC || index >= count {
            None
        } else {
            Some(load_global_u32x4(params.plan + offset as u64 + index as u64 * size_of::<MergeRow>() as u64))
        }
    };
    wait_for_partials();
    let Some([sequence, slot_begin, slot_count, _]) = row else { return };

    let head_dim = 32 * COLUMNS as u64;
    let partial = |slot: u32| (slot_begin + slot) as u64 * q_heads as u64 + head as u64;
    let mut max = f32::NEG_INFINITY;
    let mut sum = 0.0;
    let mut output = [0.0; COLUMNS];
    let mut first = 0;
    while first < slot_count {
        let lse = if first + lane < slot_count {
            // SAFETY: a slot of this row.
            unsafe { load_global_l2_f32(params.partial_lse + partial(first + lane) * 4) }
        } else {
            f32::NEG_INFINITY
        };
        let mut batch_max = lse;
        for step in 0..5 {
            batch_max = math::max(batch_max, shuffle::xor_f32(batch_max, 16 >> step));
        }
        let new_max = math::max(max, batch_max);
        let reference = subtrahend(new_max);
        let weight = math::exp2(lse - reference);
        let factor = math::exp2(max - reference);
        max = new_max;
        let mut batch_sum = weight;
        for step in 0..5 {
            batch_sum += shuffle::xor_f32(batch_sum, 16 >> step);
        }
        sum = math::fma(sum, factor, batch_sum);
        for column in 0..COLUMNS {
            output[column] *= factor;
        }
        let batch = if slot_count - first < 32 { slot_count - first } else { 32 };
        let mut slot = 0;
        while slot < batch {
            let mut loaded = [[0.0; COLUMNS]; LOADS_IN_FLIGHT as usize];
            for i in 0..LOADS_IN_FLIGHT {
                // Most rows have two or three partials: reading more, even again, would be most of the traffic.
                if slot + i < batch {
                    let index = partial(first + slot + i) * head_dim + lane as u64 * COLUMNS as u64;
                    // SAFETY: columns of a slot of this row.
                    unsafe { load_columns(params.partial_out + index * 4, &mut loaded[i as usize]) };
                }
            }
            for i in 0..LOADS_IN_FLIGHT {
                // Lanes from `batch` on hold weight 0; an empty partial may hold anything, hence the test.
                let w = shuffle::from_lane_f32(weight, slot + i);
                for column in 0..COLUMNS {
                    let term = if w > 0.0 { loaded[i as usize][column] } else { 0.0 };
                    output[column] = math::fma(term, w, output[column]);
                }
            }
            slot += LOADS_IN_FLIGHT;
        }
        first += 32;
    }
    let scale = normaliser(sum);
    for column in 0..COLUMNS {
        output[column] *= scale;
    }
    let row = strided(params.out, sequence, params.out_sequence_stride, head, params.out_head_stride);
    // SAFETY: the output buffers are as `MergeParams` says, and one warp owns the row.
    unsafe {
        store_columns::<E, COLUMNS>(row + lane as u64 * COLUMNS as u64 * 2, &output);
        if params.lse != 0 && lane == 0 {
            let lse = strided(params.lse, sequence, params.lse_sequence_stride, head, params.lse_head_stride);
            store_global_f32(lse, (max + math::log2(sum)) * LN_2);
        }
    }
}

/// # Safety
/// `COLUMNS` (2 or 4) f32 lie at `address`, aligned to their size.
#[inline(always)]
unsafe fn load_columns<const COLUMNS: usize>(address: u64, columns: &mut [f32; COLUMNS]) {
    const { assert!(COLUMNS == 2 || COLUMNS == 4) };
    // SAFETY: the caller's contract.
    unsafe {
        if COLUMNS == 4 {
            columns.copy_from_slice(&load_global_l2_f32x4(address)[..COLUMNS]);
        } else {
            columns.copy_from_slice(&load_global_l2_f32x2(address)[..COLUMNS]);
        }
    }
}

/// # Safety
/// `COLUMNS` (2 or 4) 16-bit elements may be written at `address`, aligned to their size.
#[inline(always)]
unsafe fn store_columns<E: Element, const COLUMNS: usize>(address: u64, columns: &[f32; COLUMNS]) {
    // SAFETY: the caller's contract.
    unsafe {
        if COLUMNS == 4 {
            store_global_u32x2(address, [E::pack(columns[0], columns[1]), E::pack(columns[2], columns[3])]);
        } else {
            store_global_u32(address, E::pack(columns[0], columns[1]));
        }
    }
}

macro_rules! entry {
    ($name:ident, $element:ty, $columns:literal, wait $wait:expr) => {
        /// See the module.
        ///
        /// # Safety
        /// `params` describes live buffers and a plan made for them; launched as the manifest says.
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name(params: MergeParams) {
            // SAFETY: the caller's contract.
            unsafe { merge::<$element, $columns>(&params, $wait) }
        }
    };
}

#[cfg(not(pat_sm90a))]
mod ordered {
    //! Launched behind the forward kernels, in stream order.
    use super::*;
    entry!(pat_merge_d128_f16, F16, 4, wait || {});
    entry!(pat_merge_d128_bf16, Bf16, 4, wait || {});
    entry!(pat_merge_d64_f16, F16, 2, wait || {});
    entry!(pat_merge_d64_bf16, Bf16, 2, wait || {});
}

#[cfg(pat_sm90a)]
mod programmatic {
    //! Launched with programmatic stream serialisation: starts, and reads the plan, while the forward kernel still runs.
    use super::*;
    use crate::ptx::pdl::wait_for_prerequisite_grids;
    entry!(pat_merge_pdl_d128_f16, F16, 4, wait wait_for_prerequisite_grids);
    entry!(pat_merge_pdl_d128_bf16, Bf16, 4, wait wait_for_prerequisite_grids);
    entry!(pat_merge_pdl_d64_f16, F16, 2, wait wait_for_prerequisite_grids);
    entry!(pat_merge_pdl_d64_bf16, Bf16, 2, wait wait_for_prerequisite_grids);
}
