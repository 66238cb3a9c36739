//! The end of an item, of all forward kernels: a row's output is normalised and goes to the final tensors or to a partial.

use pat_abi::reader::{PlanWords, QueryAddress};
use pat_abi::{DIRECT_SLOT, ForwardParams};

use crate::element::Element;
use crate::finish::{Finish, natural, sink_of};
use crate::isolation::RowSoftmax;
use crate::item::strided;
use crate::ptx::ldst::{store_global_f32, store_global_f32x2, store_global_u32, store_global_u32x4};
use crate::ptx::shuffle::{any, xor_u32};
use crate::softmax::{OnlineSoftmax, value_of_row};

/// Where one row comes from and where its result goes.
#[derive(Clone, Copy)]
pub struct Row {
    /// Row of Q, O and LSE.
    pub query_token: u32,
    /// Query head.
    pub head: u32,
    /// Index of the row's partial in the partial buffers, counted in (slot, head) pairs; `None` for the final output.
    partial: Option<u64>,
}

impl Row {
    /// The row of `head` and the query at `query`.
    #[inline(always)]
    pub fn new(params: &ForwardParams, query: QueryAddress, head: u32, words: impl PlanWords) -> Self {
        Self::of_query(params, query.token_and_slot(words), head)
    }

    /// As [`Self::new`], of a query whose token and slot are there.
    #[inline(always)]
    pub fn of_query(params: &ForwardParams, [query_token, slot]: [u32; 2], head: u32) -> Self {
        let partial = if slot == DIRECT_SLOT {
            None
        } else {
            let q_heads = params.kv_heads * params.group.divisor;
            Some(slot as u64 * q_heads as u64 + head as u64)
        };
        Self { query_token, head, partial }
    }

    /// Address of the row's query.
    #[inline(always)]
    pub fn query_address(&self, params: &ForwardParams) -> u64 {
        strided(params.q, self.query_token, params.q_sequence_stride, self.head, params.q_head_stride)
    }

    /// Address of the sink that joins the row's denominator here; 0 if none does. Partials get theirs from the merge.
    #[inline(always)]
    pub fn sink(&self, params: &ForwardParams) -> u64 {
        if self.is_partial() { 0 } else { sink_of(params.sinks, self.head) }
    }

    /// Whether the row goes to a partial slot.
    #[inline(always)]
    pub fn is_partial(&self) -> bool {
        self.partial.is_some()
    }

    /// Writes columns `column` and `column + 1` of the normalised output.
    ///
    /// # Safety
    /// `column` is even and below `v_head_dim`; the output buffers are as [`ForwardParams`] says, and no other thread
    /// writes these columns.
    #[inline(always)]
    pub unsafe fn store_pair<E: Element>(&self, params: &ForwardParams, v_head_dim: u32, column: u32, pair: [f32; 2]) {
        // SAFETY: the caller's contract; base addresses and strides are multiples of 16 bytes.
        unsafe {
            if self.is_partial() {
                self.store_partial_pair(params, v_head_dim, column, pair);
            } else {
                self.store_output_pair::<E>(params, column, pair);
            }
        }
    }

    /// Writes columns `column` and `column + 1` of the final output.
    ///
    /// # Safety
    /// As [`Self::store_pair`]; the row is no partial.
    #[inline(always)]
    pub unsafe fn store_output_pair<E: Element>(&self, params: &ForwardParams, column: u32, pair: [f32; 2]) {
        // SAFETY: the caller's contract; base addresses and strides are multiples of 16 bytes.
        unsafe { store_global_u32(self.output_address(params) + column as u64 * 2, E::pack(pair[0], pair[1])) };
    }

    /// Writes columns `column` and `column + 1` of a partial.
    ///
    /// # Safety
    /// As [`Self::store_pair`]; the row is a partial.
    #[inline(always)]
    pub unsafe fn store_partial_pair(&self, params: &ForwardParams, v_head_dim: u32, column: u32, pair: [f32; 2]) {
        let index = self.partial.unwrap_or(0);
        let row = params.partial_out + index * (v_head_dim as u64 * 4);
        // SAFETY: the caller's contract.
        unsafe { store_global_f32x2(row + column as u64 * 4, pair) };
    }

    /// Writes the eight packed columns `column ..` of the final output.
    ///
    /// # Safety
    /// `column` is a multiple of 8; the rest as [`Self::store_pair`]; the row is no partial.
    #[inline(always)]
    pub unsafe fn store_octet(&self, params: &ForwardParams, column: u32, octet: [u32; 4]) {
        // SAFETY: the caller's contract; base addresses and strides are multiples of 16 bytes.
        unsafe { store_global_u32x4(self.output_address(params) + column as u64 * 2, octet) };
    }

    #[inline(always)]
    fn output_address(&self, params: &ForwardParams) -> u64 {
        strided(params.out, self.query_token, params.out_sequence_stride, self.head, params.out_head_stride)
    }

    /// Writes the log-sum-exp (given base 2), where one is wanted.
    ///
    /// # Safety
    /// The buffers are as [`ForwardParams`] says, and no other thread writes this row's log-sum-exp.
    #[inline(always)]
    pub unsafe fn store_lse(&self, params: &ForwardParams, lse_log2: f32) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.partial {
                None if params.lse == 0 => {}
                None => {
                    let (s, h) = (params.lse_sequence_stride, params.lse_head_stride);
                    store_global_f32(strided(params.lse, self.query_token, s, self.head, h), natural(lse_log2));
                }
                Some(index) => store_global_f32(params.partial_lse + index * 4, lse_log2),
            }
        }
    }
}

/// Which columns of its rows a warp has.
#[derive(Clone, Copy)]
pub struct Columns {
    /// The first.
    pub begin: u32,
    /// One behind the last.
    pub end: u32,
    /// Elements of a key.
    pub head_dim: u32,
    /// Elements of a row.
    pub v_head_dim: u32,
}

impl Columns {
    /// All of them.
    pub const fn all(head_dim: u32, v_head_dim: u32) -> Self {
        Self { begin: 0, end: v_head_dim, head_dim, v_head_dim }
    }
}

/// Two rows of a lane that have been written.
pub struct Written {
    /// Whether what this lane has written is not finite; false where the row's tokens are those of all rows.
    pub not_finite: [bool; 2],
    /// Their softmaxes, of rows that there are.
    pub softmaxes: [RowSoftmax; 2],
}

/// Normalises and writes the two rows of a lane: `output` has [`crate::softmax`]'s layout, `columns` of the quad's rows; who
/// has the first column writes the log-sum-exp. `exists` says which of the two the item has, `locate` where they go
/// (somewhere, for rows that it does not have), and `has_masks` whether rows attend to different tokens. Convergent.
///
/// # Safety
/// A whole warp, the only one that holds these columns of the rows; `softmax` is finished; the output buffers are as
/// [`ForwardParams`] says.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "two rows of a lane, by parts")]
pub unsafe fn write_rows<E: Element>(
    params: &ForwardParams,
    output: &[f32],
    columns: Columns,
    softmax: &OnlineSoftmax,
    exists: impl Fn(usize) -> bool,
    has_masks: bool,
    lane: u32,
    locate: impl Fn(usize) -> Row,
) -> Written {
    let mut not_finite = [false; 2];
    let mut softmaxes = [RowSoftmax { reference: 0.0, scale: 0.0 }; 2];
    for row in 0..2 {
        let target = locate(row);
        // SAFETY: the sink of the row's head.
        let Finish { scale, lse_log2 } =
            unsafe { Finish::new(softmax.references[row], softmax.sums[row], target.sink(params)) };
        softmaxes[row] = RowSoftmax { reference: softmax.references[row], scale };
        let pair = |i: usize| {
            let first = value_of_row(row, 2 * i);
            [output[first] * scale, output[first + 1] * scale]
        };
        let exists = exists(row);
        let packed = |i: usize| {
            let [low, high] = pair(i);
            E::pack(low, high)
        };
        // Four lanes hold a row, two columns of every eight each; after the exchange each holds eight neighbours of every 32. A
        // warp that has partials alone, as where sequences are cut, needs none of it.
        let mut octets = [[0u32; 4]; MAX_OCTETS];
        if any(exists && !target.is_partial()) {
            for i in 0..output.len() / 16 {
                octets[i] = transpose_quad([0, 1, 2, 3].map(|block| packed(4 * i + block)), lane);
            }
        }
        if !exists {
            continue;
        }
        if has_masks {
            let sum = (0..output.len() / 4).fold(0, |sum, i| E::add_zero_times(sum, packed(i)));
            not_finite[row] = sum & 0x7fff_7fff != 0;
        }
        // SAFETY: the row exists, and each lane owns its columns.
        unsafe {
            if target.is_partial() {
                for i in 0..output.len() / 4 {
                    let column = columns.begin + 8 * i as u32 + 2 * (lane & 3);
                    target.store_partial_pair(params, columns.v_head_dim, column, pair(i));
                }
            } else {
                for i in 0..output.len() / 16 {
                    target.store_octet(params, columns.begin + 32 * i as u32 + 8 * (lane & 3), octets[i]);
                }
            }
            if columns.begin == 0 && lane & 3 == 0 {
                target.store_lse(params, lse_log2);
            }
        }
    }
    Written { not_finite, softmaxes }
}

/// Octets of a lane at head dimension 256.
const MAX_OCTETS: usize = 8;

/// Transposes a 4 x 4 matrix whose row `l` lane `l` of a quad holds. All lanes of a warp.
#[inline(always)]
fn transpose_quad(row: [u32; 4], lane: u32) -> [u32; 4] {
    let [a, b, c, d] = row;
    // Exchange 2 x 2 blocks across lane bit 1, then elements across lane bit 0.
    let high = lane & 2 != 0;
    let (keep, send) = if high { ([c, d], [a, b]) } else { ([a, b], [c, d]) };
    let received = send.map(|word| xor_u32(word, 2));
    let [e, f] = keep;
    let [g, h] = received;
    // Columns `2 * (lane / 2) ..` of rows `lane` and `lane ^ 2`.
    let odd = lane & 1 != 0;
    let (kept, sent) = if odd { ([f, h], [e, g]) } else { ([e, g], [f, h]) };
    let [i, j] = sent.map(|word| xor_u32(word, 1));
    // Column `lane` of rows lane, lane ^ 2, and of lane ^ 1, lane ^ 3.
    let own = [kept[0], kept[1], i, j];
    let at = |source: u32| {
        let difference = source ^ lane & 3;
        let low = if difference & 2 == 0 { [own[0], own[2]] } else { [own[1], own[3]] };
        if difference & 1 == 0 { low[0] } else { low[1] }
    };
    [at(0), at(1), at(2), at(3)]
}
