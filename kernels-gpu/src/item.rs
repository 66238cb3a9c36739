//! Plan decoding, shared by all forward kernels: which item a CTA serves, where its rows read Q and write their result.

use core::mem::offset_of;

use pat_abi::{DIRECT_SLOT, ForwardParams, NO_MASKS, PLAN_MAGIC, PackQuery, PlanHeader, TileVariant, WorkItem};

use crate::element::Element;
use crate::ptx::ldst::{
    load_global_u32, load_global_u32x2, load_global_u32x4, store_global_f32, store_global_f32x2, store_global_u32,
    store_global_u32x4,
};

/// Natural logarithm of 2: internal log-sum-exps are base 2, public ones natural.
pub const LN_2: f32 = core::f32::consts::LN_2;

/// The KV tokens of an item.
#[derive(Clone, Copy)]
pub struct Stream {
    /// Address of the page id of the first token.
    pub page_ids: u64,
    /// Address of the first page's mask; 0 where all rows attend to all tokens.
    pub masks: u64,
    /// Number of tokens, at least 1.
    pub token_count: u32,
}

/// The work of one CTA: one item for one KV head.
#[derive(Clone, Copy)]
pub struct Item {
    /// The KV tokens.
    pub stream: Stream,
    /// Rows, at least 1.
    pub row_count: u32,
    /// KV head.
    pub kv_head: u32,
    queries: u64,
}

/// Where one row comes from and where its result goes.
#[derive(Clone, Copy)]
pub struct Row {
    /// Row of the batch.
    pub sequence: u32,
    /// Query head.
    pub head: u32,
    /// Index of the row's partial in the partial buffers, counted in (slot, head) pairs; `None` for the final output.
    partial: Option<u64>,
}

impl Item {
    /// The item of CTA `cta`, or `None` where the launch is larger than the plan or the buffer is no plan.
    ///
    /// Two dependent round trips: the header words together, then the item.
    ///
    /// # Safety
    /// `params.plan` is a plan buffer, or at least one readable header.
    #[inline(always)]
    pub unsafe fn load(params: &ForwardParams, variant: TileVariant, cta: u32) -> Option<Self> {
        let (index, kv_head) = params.kv_heads_divisor.divide_remainder(cta);
        let lane_word = 4 * variant.index() as u64;
        // SAFETY: fields of the header, which the caller promises; the item's index is below the item count.
        unsafe {
            let magic = load_global_u32(params.plan + offset_of!(PlanHeader, magic) as u64);
            let begin = load_global_u32(params.plan + offset_of!(PlanHeader, variant_begin) as u64 + lane_word);
            let count = load_global_u32(params.plan + offset_of!(PlanHeader, variant_count) as u64 + lane_word);
            let queries = load_global_u32(params.plan + offset_of!(PlanHeader, queries_offset_bytes) as u64);
            let pages = load_global_u32(params.plan + offset_of!(PlanHeader, pages_offset_bytes) as u64);
            let masks = load_global_u32(params.plan + offset_of!(PlanHeader, masks_offset_bytes) as u64);
            if magic != PLAN_MAGIC || index >= count {
                return None;
            }
            let address = params.plan
                + PlanHeader::ITEMS_OFFSET_BYTES as u64
                + (begin + index) as u64 * size_of::<WorkItem>() as u64;
            let [page_begin, token_count, query_begin, row_count] = load_global_u32x4(address);
            let mask_begin = load_global_u32(address + 16);
            Some(Self {
                stream: Stream {
                    page_ids: params.plan + pages as u64 + page_begin as u64 * 4,
                    masks: if mask_begin == NO_MASKS { 0 } else { params.plan + masks as u64 + mask_begin as u64 * 4 },
                    token_count,
                },
                row_count,
                kv_head,
                queries: params.plan + queries as u64 + query_begin as u64 * size_of::<PackQuery>() as u64,
            })
        }
    }

    /// Locates row `row` of the item.
    ///
    /// # Safety
    /// `row < row_count`.
    #[inline(always)]
    pub unsafe fn row(&self, params: &ForwardParams, row: u32) -> Row {
        let (query, in_group) = params.group.divide_remainder(row);
        let head = self.kv_head * params.group.divisor + in_group;
        // SAFETY: the plan holds a query record for every row.
        let [sequence, slot] = unsafe { load_global_u32x2(self.queries + query as u64 * 8) };
        Row::new(params, sequence, head, slot)
    }
}

impl Row {
    /// The row of `head` and `sequence`, written to `slot` (a [`pat_abi::PackQuery::slot`]).
    #[inline(always)]
    pub fn new(params: &ForwardParams, sequence: u32, head: u32, slot: u32) -> Self {
        let partial = if slot == DIRECT_SLOT {
            None
        } else {
            let q_heads = params.kv_heads * params.group.divisor;
            Some(slot as u64 * q_heads as u64 + head as u64)
        };
        Self { sequence, head, partial }
    }

    /// Address of the row's query.
    #[inline(always)]
    pub fn query_address(&self, params: &ForwardParams) -> u64 {
        strided(params.q, self.sequence, params.q_sequence_stride, self.head, params.q_head_stride)
    }

    /// Address of the sink that joins the row's denominator here; 0 if none does. Partials get theirs from the merge.
    #[inline(always)]
    pub fn sink(&self, params: &ForwardParams) -> u64 {
        if params.sinks == 0 || self.is_partial() { 0 } else { params.sinks + self.head as u64 * 4 }
    }

    /// Whether the row goes to a partial slot.
    #[inline(always)]
    pub fn is_partial(&self) -> bool {
        self.partial.is_some()
    }

    /// Writes columns `column` and `column + 1` of the normalised output.
    ///
    /// # Safety
    /// `column` is even and below `head_dim`; the output buffers are as [`ForwardParams`] says, and no other thread
    /// writes these columns.
    #[inline(always)]
    pub unsafe fn store_pair<E: Element>(&self, params: &ForwardParams, head_dim: u32, column: u32, pair: [f32; 2]) {
        // SAFETY: the caller's contract; base addresses and strides are multiples of 16 bytes.
        unsafe {
            if self.is_partial() {
                self.store_partial_pair(params, head_dim, column, pair);
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
    pub unsafe fn store_partial_pair(&self, params: &ForwardParams, head_dim: u32, column: u32, pair: [f32; 2]) {
        let index = self.partial.unwrap_or(0);
        let row = params.partial_out + index * (head_dim as u64 * 4);
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
        strided(params.out, self.sequence, params.out_sequence_stride, self.head, params.out_head_stride)
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
                    store_global_f32(strided(params.lse, self.sequence, s, self.head, h), lse_log2 * LN_2);
                }
                Some(index) => store_global_f32(params.partial_lse + index * 4, lse_log2),
            }
        }
    }
}

/// `base + i*i_stride + j*j_stride`, in bytes; strides may be negative.
#[inline(always)]
pub fn strided(base: u64, i: u32, i_stride: i64, j: u32, j_stride: i64) -> u64 {
    base.wrapping_add((i as i64).wrapping_mul(i_stride) as u64).wrapping_add((j as i64).wrapping_mul(j_stride) as u64)
}
