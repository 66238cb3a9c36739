//! The end of an item, of all forward kernels: a row's output is normalised and goes to the final tensors or to a partial.

use pat_abi::reader::{PlanWords, QueryAddress};
use pat_abi::{DIRECT_SLOT, ForwardParams};

use crate::element::Element;
use crate::finish::{Finish, NO_TERMS, Terms, joins_nothing, natural, terms_of_head};
use crate::isolation::RowSoftmax;
use crate::item::strided;
use crate::ptx::ldst::{store_global_f32, store_global_f32x2, store_global_u32, store_global_u32x2};
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

    /// What joins the row's denominator here. Partials get it from the merge.
    #[inline(always)]
    pub(crate) fn terms(&self, params: &ForwardParams) -> Terms {
        if self.is_partial() { NO_TERMS } else { terms_of_head(params.denominators, self.head) }
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

    /// Writes packed columns of the final output: four from `column` on, and as many of every 16 behind them.
    ///
    /// # Safety
    /// `column` is a multiple of 4; the rest as [`Self::store_pair`]; the row is no partial.
    #[inline(always)]
    pub unsafe fn store_fours(&self, params: &ForwardParams, column: u32, fours: &[[u32; 2]]) {
        let address = self.output_address(params) + column as u64 * 2;
        for (i, &four) in fours.iter().enumerate() {
            // SAFETY: the caller's contract; base addresses and strides are multiples of 16 bytes.
            unsafe { store_global_u32x2(address + i as u64 * 32, four) };
        }
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

/// What is known of the two rows of a lane before their outputs are: where they go, and how they are normalised.
#[derive(Clone, Copy)]
pub struct Ends {
    rows: [Row; 2],
    /// Whether the item has them.
    exist: [bool; 2],
    /// Whether a row of the warp goes to the final output.
    any_final: bool,
    references: [f32; 2],
    finishes: [Finish; 2],
}

impl Ends {
    /// Of `rows`, of which the item has those that `exist` (somewhere, for others). Convergent.
    ///
    /// # Safety
    /// A whole warp; `softmax` is finished; the rows' heads are of the launch of `params`.
    #[inline(always)]
    pub unsafe fn new(params: &ForwardParams, rows: [Row; 2], exist: [bool; 2], softmax: &OnlineSoftmax) -> Self {
        let any_final = any(exist[0] && !rows[0].is_partial() || exist[1] && !rows[1].is_partial());
        let OnlineSoftmax { references, sums } = *softmax;
        // One branch, the same in all threads, says that nothing joins.
        let finishes = if joins_nothing(params.denominators) {
            [0, 1].map(|row| Finish::alone(references[row], sums[row]))
        } else {
            // SAFETY: what joins the rows' heads.
            [0, 1].map(|row| unsafe { Finish::new(references[row], sums[row], rows[row].terms(params)) })
        };
        Self { rows, exist, any_final, references, finishes }
    }
}

/// Normalises and writes the two rows of a lane: `output` has [`crate::softmax`]'s layout, `columns` of the quad's rows; who
/// has the first column writes the log-sum-exp. `has_masks` says whether rows attend to different tokens. Convergent.
///
/// # Safety
/// A whole warp, the only one that holds these columns of the rows; the output buffers are as [`ForwardParams`] says.
#[inline(always)]
pub unsafe fn write_rows<E: Element>(
    params: &ForwardParams,
    output: &[f32],
    columns: Columns,
    ends: &Ends,
    has_masks: bool,
    lane: u32,
) -> Written {
    let Ends { rows, exist, any_final, references, finishes } = *ends;
    let pair = |row: usize, i: usize| {
        let first = value_of_row(row, 2 * i);
        [output[first] * finishes[row].scale, output[first + 1] * finishes[row].scale]
    };
    let words = output.len() / 4;
    let mut packed = [[0u32; MAX_WORDS]; 2];
    for row in 0..2 {
        for i in 0..words {
            let [low, high] = pair(row, i);
            packed[row][i] = E::pack(low, high);
        }
    }
    let mut not_finite = [false; 2];
    if has_masks {
        // Four sums at a time: one would be a chain of all words.
        not_finite = packed.map(|packed| {
            let mut sums = [0; 4];
            for i in 0..words {
                sums[i % 4] = E::add_zero_times(sums[i % 4], packed[i]);
            }
            let sum = [1, 2, 3].into_iter().fold(sums[0], |sum, i| E::add_zero_times(sum, sums[i]));
            sum & 0x7fff_7fff != 0
        });
    }
    // Four lanes hold a row, two columns of every eight each; after the exchange each holds four neighbours of every 16. A warp
    // that has partials alone, as where sequences are cut, needs none of it.
    if any_final {
        for row in 0..2 {
            for i in 0..words / 2 {
                let [first, second] = exchange_pairs([packed[row][2 * i], packed[row][2 * i + 1]], lane);
                (packed[row][2 * i], packed[row][2 * i + 1]) = (first, second);
            }
        }
    }
    for row in 0..2 {
        if !exist[row] {
            continue;
        }
        let target = rows[row];
        // SAFETY: the row exists, and each lane owns its columns.
        unsafe {
            if target.is_partial() {
                for i in 0..words {
                    let column = columns.begin + 8 * i as u32 + 2 * (lane & 3);
                    target.store_partial_pair(params, columns.v_head_dim, column, pair(row, i));
                }
            } else {
                let column = columns.begin + 8 * (lane & 1) + 2 * (lane & 2);
                target.store_fours(params, column, &packed[row].as_chunks().0[..words / 2]);
            }
            if columns.begin == 0 && lane & 3 == 0 {
                target.store_lse(params, finishes[row].lse_log2);
            }
        }
    }
    let softmaxes = [0, 1].map(|row| RowSoftmax { reference: references[row], scale: finishes[row].scale });
    Written { not_finite: [0, 1].map(|row| exist[row] && not_finite[row]), softmaxes }
}

/// Words of a lane's row at head dimension 256.
const MAX_WORDS: usize = 32;

/// Two words of lanes `l` and `l ^ 1`: the first ones to the lane whose `l` is even, the others to its neighbour. All lanes of a warp.
#[inline(always)]
fn exchange_pairs([first, second]: [u32; 2], lane: u32) -> [u32; 2] {
    let is_odd = lane & 1 != 0;
    let received = xor_u32(if is_odd { first } else { second }, 1);
    if is_odd { [received, second] } else { [first, received] }
}
