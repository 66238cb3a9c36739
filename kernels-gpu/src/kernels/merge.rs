//! Merge kernel: combines the partials of a (sequence, query head) row by their log-sum-exps.
//!
//! What it waits for is on its way together: log-sum-exps with the first partials. How rows are dealt depends on how many
//! there are:
//!
//! - no more rows than CTAs: a CTA takes a row, its four warps eight partials each of every 32;
//! - no more rows than warps: a warp takes a row, eight partials at a time;
//! - more rows: a warp takes four at a time, if they have up to eight partials, as nearly all have, eight lanes to the
//!   log-sum-exps of each; else one after the other.
//!
//! Whichever way a row goes, its sums are made in the same order: partial `i` goes to sum `i / 8 % 4` of four, in the order of
//! the slots, and these are added. Results depend neither on timing nor on how many other rows or CTAs there are.

use pat_abi::manifest::MERGE_WARPS as WARPS;
use pat_abi::reader::MergeView;
use pat_abi::{MergeParams, MergeRow};

use crate::element::Element;
use crate::finish::{Finish, Terms, natural, terms_of_head};
use crate::item::strided;
use crate::plan_words::{AtOnce, WhenUsed};
use crate::ptx::barrier::sync_cta;
use crate::ptx::ldst::{
    load_global_l2_f32, load_global_l2_f32x2, load_global_l2_f32x4, load_shared_f32x2, store_global_f32,
    store_global_u32, store_global_u32x2, store_shared_f32x2,
};
use crate::ptx::{math, shuffle, special};
use crate::softmax::subtrahend;

/// Partials that are asked for together, and the sums a row is made of: partial `i` goes to sum `i / 8 % 4`.
const BLOCK_SLOTS: u32 = 8;
const BLOCKS: usize = WARPS as usize;

/// Rows a warp takes at a time, and lanes for the log-sum-exps of each.
const ROWS: usize = 4;
const ROW_LANES: u32 = 32 / ROWS as u32;

/// A row to merge.
#[derive(Clone, Copy)]
struct Row {
    sequence: u32,
    head: u32,
    slot_begin: u32,
    slot_count: u32,
    /// Which of `PARTS` parts of its columns.
    part: u32,
}

impl Row {
    /// What lane `lane` holds, in all lanes.
    #[inline(always)]
    fn broadcast<const PARTS: u32>(self, lane: u32) -> Self {
        let of_lane = |value| shuffle::from_lane_u32(value, lane);
        Self {
            sequence: of_lane(self.sequence),
            head: of_lane(self.head),
            slot_begin: of_lane(self.slot_begin),
            slot_count: of_lane(self.slot_count),
            part: if PARTS == 1 { 0 } else { of_lane(self.part) },
        }
    }

    /// Index of its partial `slot`, which need not exist.
    #[inline(always)]
    fn partial(self, params: &MergeParams, slot: u32) -> u64 {
        (self.slot_begin + slot) as u64 * params.q_heads.divisor as u64 + self.head as u64
    }

    /// What joins its denominator.
    #[inline(always)]
    fn terms(self, params: &MergeParams) -> Terms {
        terms_of_head(params.denominators, self.head)
    }

    /// Address of a lane's columns of that partial.
    #[inline(always)]
    fn columns<const COLUMNS: usize, const LANES: u32, const PARTS: u32>(
        self,
        params: &MergeParams,
        slot: u32,
        lane: u32,
    ) -> u64 {
        let part = self.partial(params, slot) * PARTS as u64 + self.part as u64;
        params.partial_out + (part * (LANES as u64 * COLUMNS as u64) + lane as u64 * COLUMNS as u64) * 4
    }
}

/// A row's `COLUMNS * LANES * PARTS` columns are merged in `PARTS` parts, as if each were a row; each of the first `LANES`
/// lanes has `COLUMNS` of one.
///
/// # Safety
/// `params` describes live buffers and a plan made for them; the launch is as the manifest says.
#[inline(always)]
pub(crate) unsafe fn merge<E: Element, const COLUMNS: usize, const LANES: u32, const PARTS: u32>(
    params: &MergeParams,
    wait_for_partials: impl Fn(),
) {
    let thread = special::thread_index();
    let lane = thread % 32;
    let ctas = special::cta_count();
    // SAFETY: the header and, below, rows that there are.
    let (at_once, when_used) = unsafe { (AtOnce::new(), WhenUsed::new()) };
    let merges = MergeView::load(at_once, params.plan);
    let row_count = merges.count * params.q_heads.divisor * PARTS;
    let together = row_count <= ctas;
    let (warp, warps) = if together {
        (special::cta_index(), ctas)
    } else {
        (special::cta_index() * WARPS + thread / 32, ctas * WARPS)
    };
    let mut first = warp;
    let mut waited = false;
    while first < row_count {
        // Lanes `8 r` to `8 r + 7` hold row `first + r * warps`.
        let row_index = first + lane / ROW_LANES * warps;
        let exists = row_index < row_count;
        let row_index = if exists { row_index } else { first };
        let (index, head) = params.q_heads.divide_remainder(row_index / PARTS);
        let MergeRow { sequence, slot_begin, slot_count, reserved: _ } = merges.row(when_used, index);
        let row = Row {
            sequence,
            head,
            slot_begin,
            slot_count: if exists { slot_count } else { 0 },
            part: row_index % PARTS,
        };
        if !waited {
            wait_for_partials();
            waited = true;
        }
        // SAFETY: the rows exist as far as `exists` says; all lanes of a warp, and all warps of the CTA where `together`.
        unsafe {
            if together {
                merge_row::<E, COLUMNS, LANES, PARTS, true>(params, row.broadcast::<PARTS>(0), thread / 32, lane);
            } else if row_count <= warps || shuffle::any(row.slot_count > ROW_LANES) {
                let (mut r, mut index) = (0, first);
                while r < ROWS as u32 && index < row_count {
                    merge_row::<E, COLUMNS, LANES, PARTS, false>(
                        params,
                        row.broadcast::<PARTS>(r * ROW_LANES),
                        0,
                        lane,
                    );
                    r += 1;
                    index += warps;
                }
            } else {
                merge_short::<E, COLUMNS, LANES, PARTS>(params, row, exists, lane);
            }
        }
        first += ROWS as u32 * warps;
    }
    if !waited {
        wait_for_partials();
    }
}

/// Merges four rows of at most eight partials each; lane `l` holds row `l / 8`.
///
/// # Safety
/// All lanes; the rows that exist are rows of the plan.
#[inline(always)]
unsafe fn merge_short<E: Element, const COLUMNS: usize, const LANES: u32, const PARTS: u32>(
    params: &MergeParams,
    row: Row,
    exists: bool,
    lane: u32,
) {
    const SLOTS_AT_A_TIME: u32 = BLOCK_SLOTS / ROWS as u32;
    let slot = lane % ROW_LANES;
    let mut lse = f32::NEG_INFINITY;
    if slot < row.slot_count {
        // SAFETY: a slot of this row.
        lse = unsafe { load_global_l2_f32(params.partial_lse + row.partial(params, slot) * 4) };
    }
    let mut most_slots = row.slot_count;
    for lane_bit in [8, 16] {
        let other = shuffle::xor_u32(most_slots, lane_bit);
        most_slots = if other > most_slots { other } else { most_slots };
    }
    let rows = [0, 1, 2, 3].map(|r| row.broadcast::<PARTS>(r * ROW_LANES));
    let mut output = [[0.0; COLUMNS]; ROWS];
    let (mut max, mut sum, mut weight) = (f32::NEG_INFINITY, 0.0, 0.0);
    let mut slot_begin = 0;
    while slot_begin < most_slots {
        let mut loaded = [[0.0; COLUMNS]; BLOCK_SLOTS as usize];
        for r in 0..ROWS {
            for i in 0..SLOTS_AT_A_TIME {
                if slot_begin + i < rows[r].slot_count {
                    let address = rows[r].columns::<COLUMNS, LANES, PARTS>(params, slot_begin + i, lane);
                    // SAFETY: columns of a slot of this row.
                    unsafe {
                        load_columns::<COLUMNS, LANES>(
                            address,
                            &mut loaded[r * SLOTS_AT_A_TIME as usize + i as usize],
                            lane,
                        )
                    };
                }
            }
        }
        if slot_begin == 0 {
            // While the first partials are on their way.
            max = lse;
            for step in 0..3 {
                max = math::max(max, shuffle::xor_f32(max, 4 >> step));
            }
            weight = math::exp2(lse - subtrahend(max));
            sum = weight;
            for step in 0..3 {
                sum += shuffle::xor_f32(sum, 4 >> step);
            }
        }
        for r in 0..ROWS {
            for i in 0..SLOTS_AT_A_TIME {
                // An empty partial may hold anything, hence the test.
                let w = shuffle::from_lane_f32(weight, r as u32 * ROW_LANES + slot_begin + i);
                for column in 0..COLUMNS {
                    let value = loaded[r * SLOTS_AT_A_TIME as usize + i as usize][column];
                    let term = if w > 0.0 { value } else { 0.0 };
                    output[r][column] = math::fma(term, w, output[r][column]);
                }
            }
        }
        slot_begin += SLOTS_AT_A_TIME;
    }
    for r in 0..ROWS {
        let from = r as u32 * ROW_LANES;
        let (sum, max) = (shuffle::from_lane_f32(sum, from), shuffle::from_lane_f32(max, from));
        // SAFETY: the row's head is one of the plan's.
        let Finish { scale, lse_log2 } = unsafe { Finish::new(max, sum, rows[r].terms(params)) };
        for column in 0..COLUMNS {
            output[r][column] *= scale;
        }
        if shuffle::from_lane_u32(exists as u32, from) != 0 {
            // SAFETY: the row exists and this warp owns it.
            unsafe { store_row::<E, COLUMNS, LANES>(params, rows[r], lane, &output[r], lse_log2) };
        }
    }
}

/// Merges a row of any number of partials, by one warp or (`TOGETHER`) by all of the CTA: warp `w` then takes block `w` of
/// every 32 partials.
///
/// # Safety
/// All lanes of warp `warp`, and of all warps where `TOGETHER`: once per CTA, since it does not wait for its shared memory to be
/// free; the row is one of the plan's.
#[inline(always)]
unsafe fn merge_row<E: Element, const COLUMNS: usize, const LANES: u32, const PARTS: u32, const TOGETHER: bool>(
    params: &MergeParams,
    row: Row,
    warp: u32,
    lane: u32,
) {
    let slot_count = row.slot_count;
    let mut max = f32::NEG_INFINITY;
    let mut sum = 0.0;
    // Of each block; this warp's own alone where `TOGETHER`.
    let mut outputs = [[0.0; COLUMNS]; BLOCKS];
    let mut first = 0;
    while first < slot_count {
        let mut lse = f32::NEG_INFINITY;
        if first + lane < slot_count {
            // SAFETY: a slot of this row.
            lse = unsafe { load_global_l2_f32(params.partial_lse + row.partial(params, first + lane) * 4) };
        }
        let mut weight = 0.0;
        for block in 0..BLOCKS {
            let begin = BLOCK_SLOTS * if TOGETHER { warp } else { block as u32 };
            if block > 0 && (TOGETHER || first + begin >= slot_count) {
                break;
            }
            let mut loaded = [[0.0; COLUMNS]; BLOCK_SLOTS as usize];
            for i in 0..BLOCK_SLOTS {
                // Most rows have two or three partials: reading more, even again, would be most of the traffic.
                if first + begin + i < slot_count {
                    let address = row.columns::<COLUMNS, LANES, PARTS>(params, first + begin + i, lane);
                    // SAFETY: columns of a slot of this row.
                    unsafe { load_columns::<COLUMNS, LANES>(address, &mut loaded[i as usize], lane) };
                }
            }
            if block == 0 {
                // While the first partials are on their way.
                let mut batch_max = lse;
                for step in 0..5 {
                    batch_max = math::max(batch_max, shuffle::xor_f32(batch_max, 16 >> step));
                }
                let new_max = math::max(max, batch_max);
                let reference = subtrahend(new_max);
                weight = math::exp2(lse - reference);
                let factor = math::exp2(max - reference);
                max = new_max;
                let mut batch_sum = weight;
                for step in 0..5 {
                    batch_sum += shuffle::xor_f32(batch_sum, 16 >> step);
                }
                sum = math::fma(sum, factor, batch_sum);
                for output in &mut outputs {
                    for column in output {
                        *column *= factor;
                    }
                }
            }
            for i in 0..BLOCK_SLOTS {
                // Lanes without a slot hold weight 0; an empty partial may hold anything, hence the test.
                let w = shuffle::from_lane_f32(weight, begin + i);
                for column in 0..COLUMNS {
                    let term = if w > 0.0 { loaded[i as usize][column] } else { 0.0 };
                    outputs[block][column] = math::fma(term, w, outputs[block][column]);
                }
            }
        }
        first += BLOCK_SLOTS * BLOCKS as u32;
    }
    // SAFETY: the row's head is one of the plan's.
    let Finish { scale, lse_log2 } = unsafe { Finish::new(max, sum, row.terms(params)) };
    for output in &mut outputs {
        for column in output {
            *column *= scale;
        }
    }
    let shared = special::dynamic_smem() + lane * COLUMNS as u32 * 4;
    let of_warp = 128 * COLUMNS as u32;
    if TOGETHER {
        for pair in 0..COLUMNS / 2 {
            // SAFETY: this lane's own place; read behind the barrier.
            unsafe {
                let values = [outputs[0][2 * pair], outputs[0][2 * pair + 1]];
                store_shared_f32x2(shared + warp * of_warp + pair as u32 * 8, values);
            }
        }
        sync_cta();
        if warp != 0 {
            return;
        }
    }
    let mut output = outputs[0];
    for block in 1..BLOCKS {
        if BLOCK_SLOTS * (block as u32) < slot_count {
            for pair in 0..COLUMNS / 2 {
                let values = if TOGETHER {
                    // SAFETY: written ahead of the barrier.
                    unsafe { load_shared_f32x2(shared + block as u32 * of_warp + pair as u32 * 8) }
                } else {
                    [outputs[block][2 * pair], outputs[block][2 * pair + 1]]
                };
                output[2 * pair] += values[0];
                output[2 * pair + 1] += values[1];
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { store_row::<E, COLUMNS, LANES>(params, row, lane, &output, lse_log2) };
}

/// Writes a lane's columns of a row, and the log-sum-exp (given base 2) where one is wanted.
///
/// # Safety
/// The output buffers are as [`MergeParams`] says, and one warp owns the row.
#[inline(always)]
unsafe fn store_row<E: Element, const COLUMNS: usize, const LANES: u32>(
    params: &MergeParams,
    row: Row,
    lane: u32,
    columns: &[f32; COLUMNS],
    lse_log2: f32,
) {
    let Row { sequence, head, part, .. } = row;
    // One zero: how many weights of 0 were added to a sum that has underflowed would be its sign.
    let columns = columns.map(|column| column + 0.0);
    let address = strided(params.out, sequence, params.out_sequence_stride, head, params.out_head_stride);
    // SAFETY: the caller's contract.
    unsafe {
        let columns_address = address + (part * LANES + lane) as u64 * COLUMNS as u64 * 2;
        store_columns::<E, COLUMNS, LANES>(columns_address, &columns, lane);
        if params.lse != 0 && lane == 0 && part == 0 {
            let lse = strided(params.lse, sequence, params.lse_sequence_stride, head, params.lse_head_stride);
            store_global_f32(lse, natural(lse_log2));
        }
    }
}

/// Does nothing in lanes from `LANES` on.
///
/// # Safety
/// `COLUMNS` (2 or 4) f32 lie at `address`, aligned to their size.
#[inline(always)]
unsafe fn load_columns<const COLUMNS: usize, const LANES: u32>(address: u64, columns: &mut [f32; COLUMNS], lane: u32) {
    const { assert!(COLUMNS == 2 || COLUMNS == 4) };
    if const { LANES < 32 } && lane >= LANES {
        return;
    }
    // SAFETY: the caller's contract.
    unsafe {
        if COLUMNS == 4 {
            columns.copy_from_slice(&load_global_l2_f32x4(address)[..COLUMNS]);
        } else {
            columns.copy_from_slice(&load_global_l2_f32x2(address)[..COLUMNS]);
        }
    }
}

/// Does nothing in lanes from `LANES` on.
///
/// # Safety
/// `COLUMNS` (2 or 4) 16-bit elements may be written at `address`, aligned to their size.
#[inline(always)]
unsafe fn store_columns<E: Element, const COLUMNS: usize, const LANES: u32>(
    address: u64,
    columns: &[f32; COLUMNS],
    lane: u32,
) {
    if const { LANES < 32 } && lane >= LANES {
        return;
    }
    // SAFETY: the caller's contract.
    unsafe {
        if COLUMNS == 4 {
            store_global_u32x2(address, [E::pack(columns[0], columns[1]), E::pack(columns[2], columns[3])]);
        } else {
            store_global_u32(address, E::pack(columns[0], columns[1]));
        }
    }
}

/// Not where `tests/tests/kernel_lockstep` compiles this file for the host.
#[cfg(target_arch = "nvptx64")]
mod entries {
    use super::*;
    use crate::element::{Bf16, F16};
    use pat_abi::manifest::MergeShape;

    macro_rules! entries {
        ($prefix:literal, $wait:expr, $([$_head_dim:literal $v_head_dim:literal $element:ident $name:literal])*) => {
            $(const _: () = {
                const SHAPE: MergeShape = MergeShape::of($v_head_dim);
                /// See the module.
                ///
                /// # Safety
                /// `params` describes live buffers and a plan made for them; launched as the manifest says.
                #[unsafe(export_name = concat!($prefix, "_", $name))]
                unsafe extern "ptx-kernel" fn entry(params: MergeParams) {
                    // SAFETY: the caller's contract.
                    unsafe {
                        merge::<$element, { SHAPE.columns as usize }, { SHAPE.lanes }, { SHAPE.parts }>(&params, $wait);
                    }
                }
            };)*
        };
    }

    // Launched behind the forward kernels, in stream order.
    #[cfg(not(pat_sm90a))]
    pat_abi::merge_kernel_shapes!(entries! { "pat_merge", || {}, });
    // Launched with programmatic stream serialisation: starts, and reads the plan, while the forward kernel still runs.
    #[cfg(pat_sm90a)]
    pat_abi::wgmma_kernel_shapes!(entries! { "pat_merge_pdl", crate::ptx::pdl::wait_for_prerequisite_grids, });
}
