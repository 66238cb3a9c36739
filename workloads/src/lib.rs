//! What to run pat-rs on, and how to judge the result: batches from trees, rules, traces and files, request workloads for serving,
//! deterministic tensors, an f64 oracle, and the numerics rule.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

pub mod batch_file;
pub mod decode_loop;
pub mod model;
pub mod models;
pub mod nodes;
pub mod numerics;
pub mod oracle;
pub mod owned;
pub mod ragged;
pub mod requests;
pub mod tensors;
pub mod trace;
pub mod tree;
pub mod whole_file;

pub use batch_file::{BatchFileError, batch_text, read_batch};
pub use decode_loop::{DecodeLoop, DecodeLoopSpec};
pub use model::{ElementParts, ModelParts, kv_dtype_names, parse_dtype, parse_heads, parse_kv_dtype};
pub use models::{KnownModel, LayerKind, MODELS, ModelError};
pub use nodes::{NodeError, NodeSpec, lay_out};
pub use numerics::{NumericsReport, check};
pub use oracle::{Oracle, RowSample};
pub use owned::OwnedBatch;
pub use ragged::RaggedGroups;
pub use tensors::{PoolLayout, Tensors};
pub use trace::{MOONCAKE_BLOCK_TOKENS, TraceCut, TraceError, count_requests};
pub use tree::{FIGURE_10_HEADS, FIGURE_10_TREES, TreeError, TreeSpec};
pub use whole_file::{Existing, WriteError};
