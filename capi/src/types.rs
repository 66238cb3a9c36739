//! The structs of the header, and what they mean in terms of `pat-rs`.

use pat_rs::plan::{PlanChange, PlanMode};
use pat_rs::{AttentionShape, Dtype, Error, KvStrides, Problem, Result, RowStrides};
use std::ffi::c_void;

/// An element type: one of `PAT_DTYPE_F16` and the others.
pub type PatDtype = u32;
/// IEEE 754 binary16.
pub const PAT_DTYPE_F16: PatDtype = 1;
/// bfloat16.
pub const PAT_DTYPE_BF16: PatDtype = 2;
/// 8 bits, 4 of exponent and 3 of fraction.
pub const PAT_DTYPE_E4M3: PatDtype = 3;
/// 8 bits, 5 of exponent and 2 of fraction.
pub const PAT_DTYPE_E5M2: PatDtype = 4;

/// How a batch is tiled: one of `PAT_MODE_AUTO` and the others.
pub type PatMode = u32;
/// What the cost model predicts to be fastest.
pub const PAT_MODE_AUTO: PatMode = 0;
/// No sharing: every sequence reads its own K and V.
pub const PAT_MODE_FLAT: PatMode = 1;
/// As many sequences together as a tile has rows, no work item with pages of more than one prefix node.
pub const PAT_MODE_PER_NODE: PatMode = 2;
/// As many sequences together as a tile has rows, along their whole path.
pub const PAT_MODE_PACKED: PatMode = 3;
/// K and V cut every `fixed_chunk_tokens` tokens, and sharing of whole chunks alone: a sequence's bits do not depend on the rest of
/// the batch.
pub const PAT_MODE_FIXED_CHUNK: PatMode = 4;

/// The order of the dimensions of K and V: one of `PAT_LAYOUT_NHD` and `PAT_LAYOUT_HND`.
pub type PatLayout = u32;
/// `[pages, page_size, kv_heads, head_dim]`.
pub const PAT_LAYOUT_NHD: PatLayout = 0;
/// `[pages, kv_heads, page_size, head_dim]`.
pub const PAT_LAYOUT_HND: PatLayout = 1;

/// What is computed. In fields that have a usual value, 0 stands for it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatProblem {
    /// Query heads: a multiple of `kv_heads`.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements per head of Q and K.
    pub head_dim: u32,
    /// Elements per head of V and O; 0: `head_dim`.
    pub v_head_dim: u32,
    /// Element type of Q.
    pub dtype: PatDtype,
    /// Element type of K and V; 0: `dtype`.
    pub kv_dtype: PatDtype,
    /// Element type of O; 0: `dtype`.
    pub out_dtype: PatDtype,
    /// Tokens per page.
    pub page_size: u32,
    /// Factor of the scores; 0: 1 / sqrt(head_dim).
    pub softmax_scale: f32,
    /// Scores are capped by soft_cap * tanh(score / soft_cap); 0: not.
    pub soft_cap: f32,
    /// Only so many tokens of a sequence are attended to, its last ones; 0: all.
    pub window: u32,
}

impl PatProblem {
    pub(crate) fn problem(&self) -> Result<Problem> {
        let dtype = parse_dtype("problem.dtype", self.dtype, None)?;
        let mut shape = AttentionShape::new(self.q_heads, self.kv_heads, self.head_dim, dtype)?
            .with_kv_dtype(parse_dtype("problem.kv_dtype", self.kv_dtype, Some(dtype))?)
            .with_out_dtype(parse_dtype("problem.out_dtype", self.out_dtype, Some(dtype))?);
        if self.v_head_dim != 0 {
            shape = shape.with_v_head_dim(self.v_head_dim)?;
        }
        let mut problem = Problem::new(shape, self.page_size);
        if self.softmax_scale != 0.0 {
            problem = problem.with_scale(self.softmax_scale);
        }
        if self.soft_cap != 0.0 {
            problem = problem.with_soft_cap(self.soft_cap);
        }
        if self.window != 0 {
            problem = problem.with_window(self.window);
        }
        Ok(problem)
    }
}

/// `usual` is what 0 stands for, where it stands for something.
fn parse_dtype(argument: &str, dtype: PatDtype, usual: Option<Dtype>) -> Result<Dtype> {
    match (dtype, usual) {
        (0, Some(usual)) => Ok(usual),
        (PAT_DTYPE_F16, _) => Ok(Dtype::F16),
        (PAT_DTYPE_BF16, _) => Ok(Dtype::Bf16),
        (PAT_DTYPE_E4M3, _) => Ok(Dtype::E4m3),
        (PAT_DTYPE_E5M2, _) => Ok(Dtype::E5m2),
        _ => Err(Error::invalid(argument, dtype, "PAT_DTYPE_F16 (1) to PAT_DTYPE_E5M2 (4)")),
    }
}

/// How to plan. All 0 is the usual way.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PatPlannerOptions {
    /// How batches are tiled.
    pub mode: PatMode,
    /// Tokens of a chunk in `PAT_MODE_FIXED_CHUNK`: a positive multiple of the page size.
    pub fixed_chunk_tokens: u32,
    /// Most rows of a batch (query tokens, where sequences have several). Plans that run on a device need it; 0: no bound.
    pub max_rows: u32,
    /// Most pages of a batch, shared ones counted for each row; 0 exactly where `max_rows` is 0.
    pub max_pages: u32,
}

impl PatPlannerOptions {
    pub(crate) fn plan_mode(&self) -> Result<PlanMode> {
        match self.mode {
            PAT_MODE_AUTO => Ok(PlanMode::Auto),
            PAT_MODE_FLAT => Ok(PlanMode::Flat),
            PAT_MODE_PER_NODE => Ok(PlanMode::PerNode),
            PAT_MODE_PACKED => Ok(PlanMode::Packed),
            PAT_MODE_FIXED_CHUNK => Ok(PlanMode::FixedChunk { tokens: self.fixed_chunk_tokens }),
            mode => Err(Error::invalid("options.mode", mode, "PAT_MODE_AUTO (0) to PAT_MODE_FIXED_CHUNK (4)")),
        }
    }

    /// Most rows and pages, where there are bounds.
    pub(crate) fn bounds(&self) -> Result<Option<(u32, u32)>> {
        match (self.max_rows, self.max_pages) {
            (0, 0) => Ok(None),
            (0, pages) => Err(Error::invalid("options.max_rows", 0, format!("1 or more beside max_pages = {pages}"))),
            (rows, 0) => Err(Error::invalid("options.max_pages", 0, format!("1 or more beside max_rows = {rows}"))),
            bounds => Ok(Some(bounds)),
        }
    }
}

/// Block tables as a padded matrix. Row `b` names the pages of sequence `b` in its first `ceil(lengths[b] / page_size)`
/// entries; what stands behind them may be anything.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatPaddedTables {
    /// Page ids, `[sequence_count, row_stride]`.
    pub page_ids: *const i32,
    /// Entries of `page_ids`: at least sequence_count * row_stride.
    pub page_id_count: usize,
    /// Entries from one row to the next.
    pub row_stride: usize,
    /// Tokens of each sequence, `[sequence_count]`, the one being decoded included. Of length 0 (a padding row) the output is 0
    /// and the log-sum-exp minus infinity.
    pub lengths: *const i32,
    /// Sequences.
    pub sequence_count: usize,
    /// Query tokens of each sequence, `[sequence_count]`: its last tokens, each of which sees the tokens up to itself and has a
    /// row of Q, O and LSE; those of the first sequence come first. NULL: one each.
    pub query_tokens: *const u32,
    /// Pages in the pools of K and V.
    pub num_pages: u32,
}

/// Block tables in compressed rows: sequence `b` has the pages `page_ids[indptr[b]]` up to `page_ids[indptr[b + 1]]`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatCsrTables {
    /// Where the rows begin, `[sequence_count + 1]`: ascending from 0.
    pub indptr: *const i32,
    /// Page ids of all rows.
    pub page_ids: *const i32,
    /// Entries of `page_ids`: at least the last of `indptr`.
    pub page_id_count: usize,
    /// Tokens in each sequence's last page, `[sequence_count]`: 1 to page_size; not looked at where a sequence has no page.
    pub last_page_len: *const i32,
    /// Sequences.
    pub sequence_count: usize,
    /// As in `PatPaddedTables`.
    pub query_tokens: *const u32,
    /// Pages in the pools of K and V.
    pub num_pages: u32,
}

/// What `pat_planner_advance_padded` and its neighbour have changed, from least to most.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatPlanChange {
    /// Nothing: the plan need not be uploaded again.
    Nothing = 0,
    /// Lengths, within the last pages.
    Lengths = 1,
    /// Private pages.
    Pages = 2,
    /// Rows, or who shares what.
    Forest = 3,
}

impl From<PlanChange> for PatPlanChange {
    fn from(change: PlanChange) -> Self {
        match change {
            PlanChange::Nothing => Self::Nothing,
            PlanChange::Lengths => Self::Lengths,
            PlanChange::Pages => Self::Pages,
            PlanChange::Forest => Self::Forest,
        }
    }
}

/// A plan in numbers. KV bytes are K and V over all KV heads; predictions are for the profile that was planned with.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatPlanSummary {
    /// Rows of the batch, empty ones included.
    pub rows: u32,
    /// Rows that the merge kernel writes.
    pub merge_rows: u32,
    /// Work items; each runs once per KV head.
    pub items: u32,
    /// Largest number of partial results of a row.
    pub max_splits: u32,
    /// How often the average KV byte would be read without sharing.
    pub sharing_factor: f64,
    /// KV bytes of distinct pages.
    pub unique_kv_bytes: u64,
    /// KV bytes that the plan reads.
    pub planned_kv_bytes: u64,
    /// KV bytes that reading without sharing would take.
    pub flat_kv_bytes: u64,
    /// Bytes of partial results.
    pub partial_bytes: u64,
    /// Bytes of an upload.
    pub upload_bytes: u64,
    /// The largest load of a multiprocessor's place over the mean load; 1 is even.
    pub imbalance: f64,
    /// Predicted time of a run in microseconds.
    pub predicted_us: f64,
    /// A number that no two results of planning in this process share.
    pub generation: u64,
}

/// Strides of Q, O or LSE, in elements. Those of Q and O are 0 or positive multiples of 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatRowStrides {
    /// Elements between rows.
    pub row: i64,
    /// Elements between heads.
    pub head: i64,
}

impl From<PatRowStrides> for RowStrides {
    fn from(strides: PatRowStrides) -> Self {
        Self { sequence: strides.row, head: strides.head }
    }
}

impl From<RowStrides> for PatRowStrides {
    fn from(strides: RowStrides) -> Self {
        Self { row: strides.sequence, head: strides.head }
    }
}

/// Strides of a pool, K or V, in elements: 0 or positive multiples of 16 bytes. The elements of a head are contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatKvStrides {
    /// Elements between pages.
    pub page: i64,
    /// Elements between tokens of a page.
    pub token: i64,
    /// Elements between KV heads.
    pub head: i64,
}

impl From<PatKvStrides> for KvStrides {
    fn from(strides: PatKvStrides) -> Self {
        Self { page: strides.page, token: strides.token, head: strides.head }
    }
}

impl From<KvStrides> for PatKvStrides {
    fn from(strides: KvStrides) -> Self {
        Self { page: strides.page, token: strides.token, head: strides.head }
    }
}

/// Memory of a pool, K or V.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatPool {
    /// Its first element. V may lie inside K's rows.
    pub data: *const c_void,
    /// Bytes from there on that may be read.
    pub bytes: u64,
    /// Where elements lie.
    pub strides: PatKvStrides,
    /// What the elements are multiplied with, where they have 8 bits; 0: 1.
    pub scale: f32,
    /// Instead of `scale` a factor for each KV head, `[kv_heads]`, in host or device memory as the tensors; NULL: none.
    pub head_scales: *const f32,
}

/// Memory of Q.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatRows {
    /// Its first element.
    pub data: *const c_void,
    /// Bytes from there on that may be read.
    pub bytes: u64,
    /// Where elements lie.
    pub strides: PatRowStrides,
}

/// Memory of O or LSE. Elements between the rows keep their values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatOutRows {
    /// Its first element.
    pub data: *mut c_void,
    /// Bytes from there on that may be written.
    pub bytes: u64,
    /// Where elements lie.
    pub strides: PatRowStrides,
}

/// The tensors of a run, all in host memory or all in device memory (`(void *)` of a `CUdeviceptr`). Addresses in device memory
/// are multiples of 16 bytes (of LSE: 4), those in host memory of the element size. Outputs share no memory with anything else.
/// `pat_tensors_contiguous` fills in sizes and strides.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct PatTensors {
    /// Rows of Q, O and LSE: at least the plan's, on a device at least `max_rows`. Rows behind the plan's are left alone.
    pub rows: u32,
    /// Pages of K and V: the plan's.
    pub num_pages: u32,
    /// `[rows, q_heads, head_dim]`.
    pub q: PatRows,
    /// `[num_pages, page_size, kv_heads, head_dim]`, in any order of the dimensions but the last.
    pub k: PatPool,
    /// Likewise, of v_head_dim elements.
    pub v: PatPool,
    /// `[rows, q_heads, v_head_dim]`.
    pub out: PatOutRows,
    /// Natural log-sum-exp of the scores, 32-bit floats `[rows, q_heads]`; with `data` NULL it is not written.
    pub lse: PatOutRows,
}

impl PatTensors {
    /// Contiguous tensors without memory.
    pub(crate) fn contiguous(problem: &Problem, num_pages: u32, rows: u32, layout: PatLayout) -> Result<Self> {
        let (shape, page_size) = (problem.shape(), problem.page_size());
        let (data, strides) = (std::ptr::null_mut(), |head_dim| match layout {
            PAT_LAYOUT_NHD => Ok(KvStrides::nhd(page_size, shape.kv_heads(), head_dim)),
            PAT_LAYOUT_HND => Ok(KvStrides::hnd(page_size, shape.kv_heads(), head_dim)),
            other => Err(Error::invalid("layout", other, "PAT_LAYOUT_NHD (0) or PAT_LAYOUT_HND (1)")),
        });
        let pool = |head_dim| -> Result<PatPool> {
            let token_elements = u64::from(shape.kv_heads()) * u64::from(head_dim);
            let tokens = u64::from(num_pages) * u64::from(page_size);
            let bytes = tokens.saturating_mul(token_elements).saturating_mul(u64::from(shape.kv_dtype().bytes()));
            let head_scales = std::ptr::null();
            Ok(PatPool { data, bytes, strides: strides(head_dim)?.into(), scale: 0.0, head_scales })
        };
        let row_bytes = |per_head: u32, element_bytes: u32| {
            u64::from(rows).saturating_mul(u64::from(shape.q_heads()) * u64::from(per_head) * u64::from(element_bytes))
        };
        let (head_dim, v_head_dim) = (shape.head_dim(), shape.v_head_dim());
        Ok(Self {
            rows,
            num_pages,
            q: PatRows {
                data,
                bytes: row_bytes(head_dim, shape.dtype().bytes()),
                strides: RowStrides::contiguous(shape.q_heads(), head_dim).into(),
            },
            k: pool(head_dim)?,
            v: pool(v_head_dim)?,
            out: PatOutRows {
                data,
                bytes: row_bytes(v_head_dim, shape.out_dtype().bytes()),
                strides: RowStrides::contiguous(shape.q_heads(), v_head_dim).into(),
            },
            lse: PatOutRows { data, bytes: row_bytes(1, 4), strides: RowStrides::lse(shape.q_heads()).into() },
        })
    }
}
