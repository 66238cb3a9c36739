//! Keeping what one sequence's values hold out of another sequence's output.
//!
//! Rows of a tile share its products. The weight of a key that a row does not attend to is 0 and multiplies that key's values all
//! the same, and 0 * Inf and 0 * NaN are NaN. The products stay as they are: behind them, an item whose rows attend to different
//! pages looks at its outputs, and rows that are not finite are computed once more from their own keys alone. Log-sum-exps
//! need no such care: the scores of other keys are replaced, not multiplied.

use pat_abi::ForwardParams;
use pat_abi::reader::Stream;

use crate::cache::Rows;
use crate::element::Element;
use crate::epilogue::{Columns, Row};
use crate::item::strided;
use crate::plan_words::WhenUsed;
use crate::ptx::ldst::load_written_u32x2;
use crate::ptx::special::{keep_loop, run_time};
use crate::ptx::{barrier, math, shuffle};
use crate::softmax::cap_scores;
use crate::window::mask_in_window;

/// A row's softmax over the keys it attends to in an item.
#[derive(Clone, Copy)]
pub struct RowSoftmax {
    /// What exponents are relative to.
    pub reference: f32,
    /// What its output is multiplied with.
    pub scale: f32,
}

impl RowSoftmax {
    /// Whether the row's own scores leave it finite: otherwise its output is what its own keys make of it.
    #[inline(always)]
    pub fn is_finite(self) -> bool {
        self.scale >= 0.0 && self.scale < f32::INFINITY
    }
}

/// Columns `column` and `column + 1` of a row's normalised output over the keys of `stream` that it attends to, which have
/// `head_dim` elements; `CAPS_SCORES` as in the kernel that has computed the rest of it. Lanes resolve 32 tokens at a time,
/// then each adds up its own columns. Convergent.
///
/// # Safety
/// A whole warp; `stream` has masks and, like `row` (the tile row of `target`), belongs to an item of the plan; `column` is
/// even and below the elements of a token's values.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the place of two columns, by parts")]
pub unsafe fn attend_pair<E: Element, C: Rows, const CAPS_SCORES: bool, const HAS_WINDOWS: bool>(
    params: &ForwardParams,
    cache: C,
    stream: Stream,
    kv_head: u32,
    row: u32,
    target: Row,
    softmax: RowSoftmax,
    (head_dim, column): (u32, u32),
    lane: u32,
) -> [f32; 2] {
    let keys = strided(params.k, kv_head, params.k_head_stride, 0, 0);
    let values = strided(params.v, kv_head, params.v_head_stride, 0, 0) + column as u64 * C::BYTES as u64;
    let query = target.query_address(params);
    let (row_bytes, lanes) = (run_time(2 * head_dim), run_time(32));
    let mut pair = [0.0; 2];
    let mut first = 0;
    while first < stream.token_count {
        keep_loop();
        let (page, in_page) = params.page_size.divide_remainder(first + lane);
        let (mut weight, mut page_id, mut attends) = (0.0, 0, false);
        if first + lane < stream.token_count {
            // SAFETY: the token is one of the stream's, whose pages have an id and a mask each.
            let words = unsafe { WhenUsed::new() };
            page_id = stream.page_id(words, page);
            let mask = if HAS_WINDOWS {
                // SAFETY: the caller's contract.
                unsafe { mask_in_window(params, &stream, page, in_page) }
            } else {
                stream.mask(words, page)
            };
            attends = mask.has_row(row) && in_page < mask.token_end();
        }
        if attends {
            let key = strided(keys, page_id, params.k_page_stride, in_page, params.k_token_stride);
            let (mut score, mut offset) = (0.0, 0);
            while offset < row_bytes {
                keep_loop();
                // Loads of 16 elements are under way together.
                for at in [0, 8, 16, 24].map(|bytes| offset + bytes) {
                    // SAFETY: query and key are rows of `row_bytes / 2` elements, a multiple of 16, at multiples of 16 bytes.
                    let (q, k) = unsafe { (load_written_u32x2(query + at as u64), C::load_four(key, at)) };
                    for word in 0..2 {
                        let (q, k) = (E::unpack(q[word]), C::two_of_four::<E>(k, word));
                        score = math::fma(q[1], k[1], math::fma(q[0], k[0], score));
                    }
                }
                offset += 32;
            }
            if CAPS_SCORES {
                cap_scores(params, [&mut score]);
            }
            weight = math::exp2(math::fma(score, params.scale_log2, -softmax.reference));
        }
        let mut source = 0;
        while source < lanes {
            keep_loop();
            // The same answer in all lanes.
            if shuffle::from_lane_u32(attends as u32, source) != 0 {
                let weight = shuffle::from_lane_f32(weight, source);
                let page_id = shuffle::from_lane_u32(page_id, source);
                let in_page = shuffle::from_lane_u32(in_page, source);
                let address = strided(values, page_id, params.v_page_stride, in_page, params.v_token_stride);
                // SAFETY: the columns of a token's values.
                let value = unsafe { cache.two_of_value::<E>(address) };
                pair = [math::fma(weight, value[0], pair[0]), math::fma(weight, value[1], pair[1])];
            }
            source += 1;
        }
        first += 32;
    }
    pair.map(|value| value * softmax.scale)
}

/// Writes once more `columns` of those of a warp's 16 rows, `first_row ..`, of which a lane says that what it has written is not
/// finite. Lanes `4 r` to `4 r + 3` hold rows `r` and `r + 8`. Convergent.
///
/// # Safety
/// A whole warp, which has written the rows; the rows that are marked belong to the item of `stream`, which has masks; `locate`
/// says where a tile row's result goes.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the rows of one warp, by parts")]
pub unsafe fn restore_rows<E: Element, C: Rows, const CAPS_SCORES: bool, const HAS_WINDOWS: bool>(
    params: &ForwardParams,
    cache: C,
    stream: Stream,
    kv_head: u32,
    first_row: u32,
    not_finite: [bool; 2],
    softmaxes: [RowSoftmax; 2],
    columns: Columns,
    lane: u32,
    locate: impl Fn(u32) -> Row,
) {
    let marked = [0, 1].map(|half| not_finite[half] && softmaxes[half].is_finite());
    if !shuffle::any(marked[0] || marked[1]) {
        return;
    }
    let mut marks = marked[0] as u32 | (marked[1] as u32) << 1;
    marks |= shuffle::xor_u32(marks, 1);
    marks |= shuffle::xor_u32(marks, 2);
    // Behind the stores of all lanes.
    barrier::sync_warp();
    let (rows, end) = (run_time(16), run_time(columns.end));
    let Columns { head_dim, v_head_dim, .. } = columns;
    let mut row = 0;
    while row < rows {
        keep_loop();
        let (source, half) = (row % 8 * 4, row / 8);
        let softmax = if half == 0 { softmaxes[0] } else { softmaxes[1] };
        let softmax = RowSoftmax {
            reference: shuffle::from_lane_f32(softmax.reference, source),
            scale: shuffle::from_lane_f32(softmax.scale, source),
        };
        if shuffle::from_lane_u32(marks, source) >> half & 1 != 0 {
            let target = locate(first_row + row);
            let mut block = columns.begin;
            while block < end {
                keep_loop();
                let (of_row, own) = (first_row + row, block + 2 * lane);
                // The last block may be narrower than the warp.
                let exists = v_head_dim % 64 == 0 || own < v_head_dim;
                let column = if exists { own } else { 0 };
                // SAFETY: the caller's contract; the lanes write different columns.
                unsafe {
                    let pair = attend_pair::<E, C, CAPS_SCORES, HAS_WINDOWS>(
                        params,
                        cache,
                        stream,
                        kv_head,
                        of_row,
                        target,
                        softmax,
                        (head_dim, column),
                        lane,
                    );
                    if exists {
                        target.store_pair::<E>(params, v_head_dim, column, pair);
                    }
                }
                block += 64;
            }
        }
        row += 1;
    }
}
