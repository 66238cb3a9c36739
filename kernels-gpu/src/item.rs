//! The item that a CTA of the mma.sync kernels serves.

use pat_abi::reader::{Exceptions, PlanView, Stream, Work};
use pat_abi::{ForwardParams, TileVariant};

use crate::epilogue::Row;
use crate::plan_words::WhenUsed;
use crate::ptx::switches;

/// The work of one CTA: one item for one KV head.
#[derive(Clone, Copy)]
pub struct Item {
    plan: PlanView,
    work: Work,
    /// The KV tokens.
    pub stream: Stream,
    /// Rows, at least 1.
    pub row_count: u32,
    /// KV head.
    pub kv_head: u32,
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
        // SAFETY: the header, which the caller promises, and the records of a piece of work that there is.
        let words = unsafe { WhenUsed::new() };
        let plan = PlanView::load(words, params.plan, variant, params.kv_heads);
        if cta >= plan.work_count {
            return None;
        }
        let work = plan.work(words, cta, params.kv_heads_divisor);
        let (row_count, kv_head) = (work.row_count, work.kv_head);
        let mut stream = plan.stream(&work);
        if switches::window() {
            stream =
                stream.with_first_tokens(Exceptions::load(words, params.plan, &plan, cta, params.kv_heads_divisor));
        }
        Some(Self { plan, work, stream, row_count, kv_head })
    }

    /// Locates row `row` of the item.
    ///
    /// # Safety
    /// `row < row_count`.
    #[inline(always)]
    pub unsafe fn row(&self, params: &ForwardParams, row: u32) -> Row {
        let (query, head) = self.plan.row(&self.work, row, params.group);
        // SAFETY: the plan holds a query record for every row.
        Row::new(params, query, head, unsafe { WhenUsed::new() })
    }
}

/// Whether token `in_page` of the page of entry `entry` stands in front of the window of the rows that read the entry. The stream has
/// masks and, where the kernel is compiled for windows, first tokens.
#[inline(always)]
pub fn is_hidden(stream: &Stream, entry: u32, in_page: u32) -> bool {
    // SAFETY: an item that has first tokens has one for each of its entries.
    switches::window() && in_page < stream.first_token(unsafe { WhenUsed::new() }, entry)
}

/// `base + i*i_stride + j*j_stride`, in bytes; strides may be negative.
#[inline(always)]
pub fn strided(base: u64, i: u32, i_stride: i64, j: u32, j_stride: i64) -> u64 {
    base.wrapping_add((i as i64).wrapping_mul(i_stride) as u64).wrapping_add((j as i64).wrapping_mul(j_stride) as u64)
}
