//! A decode batch as the caller holds it: borrowed block tables and lengths, validated once.

use crate::tree::{Entries, Trees};
use crate::{Error, Problem, Result};

/// The block tables of a decode step, borrowed from the caller, checked on construction.
///
/// Row `b` has `lengths[b]` tokens (the token being decoded included); only its first `ceil(length / page_size)` table
/// entries are ever read: what stands behind them may be anything. Legal: rows of length 0, equal rows, a page id twice
/// in a row, rows that name the same partial last page with different lengths.
#[derive(Clone, Copy, Debug)]
pub struct DecodeBatch<'a> {
    tables: Tables<'a>,
    lengths: Lengths<'a>,
    page_size: u32,
    num_pages: u32,
    rows: Rows<'a>,
}

/// What rows are.
#[derive(Clone, Copy, Debug)]
enum Rows<'a> {
    /// Sequences, or query tokens of sequences.
    Sequences,
    /// Query tokens that form trees.
    Trees(Trees<'a>),
    /// What is left of query trees: page ids may stand for parts of pages.
    Entries,
}

#[derive(Clone, Copy, Debug)]
enum Tables<'a> {
    Rows(&'a [&'a [u32]]),
    Padded { ids: Integers<'a>, row_stride: usize },
    Csr { indptr: Integers<'a>, ids: Integers<'a> },
    Placed { rows: &'a [PlacedRow], ids: &'a [u32] },
}

/// Where the ids of a row lie among those of all.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PlacedRow {
    pub(crate) begin: usize,
    pub(crate) ids: u32,
}

#[derive(Clone, Copy, Debug)]
enum Lengths<'a> {
    Tokens(Integers<'a>),
    LastPage { indptr: Integers<'a>, last_page_len: Integers<'a> },
}

/// Lengths, ids or offsets as the caller holds them. Of signed ones, a negative becomes 2^31 or more, which nothing may be.
#[derive(Clone, Copy, Debug)]
struct Integers<'a> {
    values: &'a [u32],
    are_signed: bool,
}

impl<'a> Integers<'a> {
    fn of<I: Int32>(integers: &'a [I]) -> Self {
        Self { values: bytemuck::cast_slice(integers), are_signed: I::IS_SIGNED }
    }

    /// The value as the caller has it.
    fn given(self, value: u32) -> i64 {
        if self.are_signed { i64::from(value as i32) } else { i64::from(value) }
    }
}

/// A 32-bit integer: `u32`, or `i32` as torch and most engines hold lengths and page ids.
pub trait Int32: bytemuck::Pod + sealed::Sealed {
    /// Whether it can be negative.
    const IS_SIGNED: bool;
}

impl Int32 for u32 {
    const IS_SIGNED: bool = false;
}

impl Int32 for i32 {
    const IS_SIGNED: bool = true;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u32 {}
    impl Sealed for i32 {}
}

impl<'a> DecodeBatch<'a> {
    /// Largest number of tokens of one sequence and of pages in a pool: offsets stay below 2^31.
    pub const MAX_TOKENS: u32 = (1 << 31) - 1;

    /// One slice of page ids per sequence.
    ///
    /// # Errors
    /// Numbers of tables and lengths differ; a length is negative or above [`Self::MAX_TOKENS`]; a table is shorter than its
    /// length needs; a page id that is needed is not below `num_pages`; `page_size` or `num_pages` is out of range.
    pub fn from_block_tables<L: Int32>(
        tables: &'a [&'a [u32]],
        lengths: &'a [L],
        page_size: u32,
        num_pages: u32,
    ) -> Result<Self> {
        if tables.len() != lengths.len() {
            return Err(Error::invalid(
                "block_tables",
                format!("{} tables", tables.len()),
                format!("one per length ({})", lengths.len()),
            ));
        }
        let lengths = Lengths::Tokens(Integers::of(lengths));
        Self::new(Tables::Rows(tables), lengths, page_size, num_pages).validated()
    }

    fn new(tables: Tables<'a>, lengths: Lengths<'a>, page_size: u32, num_pages: u32) -> Self {
        Self { tables, lengths, page_size, num_pages, rows: Rows::Sequences }
    }

    /// Rows of a batch that has been checked.
    pub(crate) fn of_rows(tables: &'a [&'a [u32]], lengths: &'a [u32], page_size: u32, num_pages: u32) -> Self {
        let lengths = Lengths::Tokens(Integers::of(lengths));
        Self::new(Tables::Rows(tables), lengths, page_size, num_pages)
    }

    /// Rows whose ids lie anywhere in `ids`, all of them checked.
    pub(crate) fn of_placed(
        (rows, ids): (&'a [PlacedRow], &'a [u32]),
        lengths: &'a [u32],
        page_size: u32,
        num_pages: u32,
    ) -> Self {
        Self::new(Tables::Placed { rows, ids }, Lengths::Tokens(Integers::of(lengths)), page_size, num_pages)
    }

    /// Rows of entries: each has as many tokens as entries have pages.
    pub(crate) fn of_entries(entries: &'a Entries, lengths: &'a [u32], page_size: u32, num_pages: u32) -> Self {
        let tables = Tables::Csr { indptr: Integers::of(&entries.indptr), ids: Integers::of(&entries.ids) };
        let lengths = Lengths::Tokens(Integers::of(lengths));
        Self { rows: Rows::Entries, ..Self::new(tables, lengths, page_size, num_pages) }
    }

    /// With rows that are query tokens of these trees.
    pub(crate) fn with_trees(self, trees: Option<Trees<'a>>) -> Self {
        trees.map_or(self, |trees| Self { rows: Rows::Trees(trees), ..self })
    }

    /// The trees that the rows form, if they are query tokens of trees.
    pub(crate) fn trees(&self) -> Option<Trees<'a>> {
        if let Rows::Trees(trees) = self.rows { Some(trees) } else { None }
    }

    /// Whether this is what is left of query trees ([`crate::VisibleBatch::batch`]): to be looked at, not to be planned again.
    pub(crate) fn is_of_entries(&self) -> bool {
        matches!(self.rows, Rows::Entries)
    }

    /// Whether rows are sequences, not query tokens of trees nor what is left of these.
    pub(crate) fn is_of_sequences(&self) -> bool {
        matches!(self.rows, Rows::Sequences)
    }

    /// A row-major padded matrix, `[rows, row_stride]`, as engines keep it (vLLM, transformers), padded with
    /// anything. `rows` is `lengths.len()`.
    ///
    /// # Errors
    /// As [`Self::from_block_tables`]; also when `ids` holds fewer than `rows * row_stride` entries.
    pub fn from_padded<I: Int32, L: Int32>(
        ids: &'a [I],
        row_stride: usize,
        lengths: &'a [L],
        page_size: u32,
        num_pages: u32,
    ) -> Result<Self> {
        let needed = lengths.len().saturating_mul(row_stride);
        if ids.len() < needed {
            return Err(Error::invalid(
                "block_table",
                format!("{} entries", ids.len()),
                format!("at least rows*row_stride = {needed}"),
            ));
        }
        let tables = Tables::Padded { ids: Integers::of(ids), row_stride };
        let lengths = Lengths::Tokens(Integers::of(lengths));
        Self::new(tables, lengths, page_size, num_pages).validated()
    }

    /// FlashInfer's form: sequence `b` owns `indices[indptr[b]..indptr[b+1]]`; its last page holds `last_page_len[b]`
    /// tokens (1 to `page_size`; ignored where the sequence has no page).
    ///
    /// # Errors
    /// As [`Self::from_block_tables`]; also when `indptr` does not ascend from 0 within `indices`, or has not one entry
    /// more than `last_page_len`.
    pub fn from_csr<I: Int32>(
        indptr: &'a [I],
        indices: &'a [I],
        last_page_len: &'a [I],
        page_size: u32,
        num_pages: u32,
    ) -> Result<Self> {
        let (indptr, ids, last_page_len) = (Integers::of(indptr), Integers::of(indices), Integers::of(last_page_len));
        if indptr.values.len() != last_page_len.values.len() + 1 {
            return Err(Error::invalid(
                "indptr",
                format!("{} entries", indptr.values.len()),
                format!("one more than last_page_len ({})", last_page_len.values.len()),
            ));
        }
        if indptr.values[0] != 0 {
            return Err(Error::invalid("indptr[0]", indptr.given(indptr.values[0]), "0"));
        }
        for (b, pair) in indptr.values.windows(2).enumerate() {
            if pair[1] < pair[0] || pair[1] as usize > indices.len() {
                return Err(Error::invalid(
                    format!("indptr[{}]", b + 1),
                    indptr.given(pair[1]),
                    format!("between {} and indices.len() = {}", pair[0], indices.len()),
                ));
            }
            let last = last_page_len.values[b];
            if pair[1] > pair[0] && !(1..=page_size).contains(&last) {
                return Err(Error::invalid(
                    format!("last_page_len[{b}]"),
                    last_page_len.given(last),
                    format!("1 to page_size = {page_size}"),
                ));
            }
            let tokens = u64::from(pair[1] - pair[0]) * u64::from(page_size);
            if tokens > u64::from(Self::MAX_TOKENS) {
                return Err(Error::invalid(
                    format!("indptr[{}]", b + 1),
                    format!("{tokens} tokens"),
                    format!("at most {} tokens", Self::MAX_TOKENS),
                ));
            }
        }
        let lengths = Lengths::LastPage { indptr, last_page_len };
        Self::new(Tables::Csr { indptr, ids }, lengths, page_size, num_pages).validated()
    }

    /// Number of rows, empty ones included.
    pub fn sequence_count(&self) -> usize {
        match self.lengths {
            Lengths::Tokens(lengths) => lengths.values.len(),
            Lengths::LastPage { last_page_len, .. } => last_page_len.values.len(),
        }
    }

    /// Tokens of sequence `sequence`.
    ///
    /// # Panics
    /// When `sequence` is not below [`Self::sequence_count`].
    pub fn length(&self, sequence: usize) -> u32 {
        match self.lengths {
            Lengths::Tokens(lengths) => lengths.values[sequence],
            Lengths::LastPage { indptr, last_page_len } => {
                match indptr.values[sequence + 1] - indptr.values[sequence] {
                    0 => 0,
                    pages => (pages - 1) * self.page_size + last_page_len.values[sequence],
                }
            }
        }
    }

    /// Page ids of sequence `sequence`: exactly `ceil(length / page_size)` of them, each below [`Self::num_pages`].
    ///
    /// # Panics
    /// When `sequence` is not below [`Self::sequence_count`].
    pub fn pages(&self, sequence: usize) -> &'a [u32] {
        let needed = self.length(sequence).div_ceil(self.page_size) as usize;
        &self.row(sequence)[..needed]
    }

    /// The first `pages` page ids of sequence `sequence`, of which there must be as many: spares the division of
    /// [`Self::pages`].
    pub(crate) fn first_pages(&self, sequence: usize, pages: usize) -> &'a [u32] {
        &self.row(sequence)[..pages]
    }

    /// Tokens per page.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// Pages in the pool.
    pub fn num_pages(&self) -> u32 {
        self.num_pages
    }

    fn row(&self, sequence: usize) -> &'a [u32] {
        match self.tables {
            Tables::Rows(rows) => rows[sequence],
            Tables::Placed { rows, ids } => &ids[rows[sequence].begin..][..rows[sequence].ids as usize],
            Tables::Padded { ids, row_stride } => &ids.values[sequence * row_stride..][..row_stride],
            Tables::Csr { indptr, ids } => {
                &ids.values[indptr.values[sequence] as usize..indptr.values[sequence + 1] as usize]
            }
        }
    }

    fn validated(self) -> Result<Self> {
        if !(1..=Problem::MAX_PAGE_SIZE).contains(&self.page_size) {
            let expected = format!("1 to {} tokens", Problem::MAX_PAGE_SIZE);
            return Err(Error::invalid("page_size", self.page_size, expected));
        }
        if self.num_pages > Self::MAX_TOKENS {
            return Err(Error::invalid("num_pages", self.num_pages, format!("at most {}", Self::MAX_TOKENS)));
        }
        for sequence in 0..self.sequence_count() {
            let length = self.length(sequence);
            if length > Self::MAX_TOKENS {
                let given = match self.lengths {
                    Lengths::Tokens(lengths) => lengths.given(length),
                    Lengths::LastPage { .. } => i64::from(length),
                };
                return Err(Error::invalid(
                    format!("lengths[{sequence}]"),
                    given,
                    format!("0 to {}", Self::MAX_TOKENS),
                ));
            }
            let needed = length.div_ceil(self.page_size) as usize;
            let row = self.row(sequence);
            if row.len() < needed {
                return Err(Error::invalid(
                    format!("block_tables[{sequence}]"),
                    format!("{} pages of {} tokens", row.len(), self.page_size),
                    format!("at least {needed} for lengths[{sequence}] = {length}"),
                ));
            }
            // The maximum first: one vectorised pass, and the offender is looked up only when there is one.
            let largest = row[..needed].iter().copied().max().unwrap_or(0);
            if needed > 0 && largest >= self.num_pages {
                let position = row[..needed].iter().position(|&id| id >= self.num_pages).unwrap_or(0);
                let id = match self.tables {
                    Tables::Padded { ids, .. } | Tables::Csr { ids, .. } => ids.given(row[position]),
                    Tables::Rows(_) | Tables::Placed { .. } => i64::from(row[position]),
                };
                return Err(Error::invalid(
                    format!("block_tables[{sequence}][{position}]"),
                    id,
                    format!("a page id below num_pages = {}", self.num_pages),
                ));
            }
        }
        Ok(self)
    }
}
