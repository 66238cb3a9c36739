//! The result file: one JSON object, rewritten after every configuration so that a killed run loses at most one.

use pat_rs::plan::PlanSummary;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of the format; a reader refuses a later one.
pub const SCHEMA_VERSION: u32 = 1;

/// A result file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResultFile {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Device the figures were measured on.
    pub device: String,
    /// One record per configuration, in the order they were run.
    pub records: Vec<Record>,
}

/// One configuration. Times are medians: `latencies` in milliseconds (PAT's field), the others in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Tree in PAT's notation, or the batch's name.
    pub tree: String,
    /// Query heads.
    pub nheads_q: u32,
    /// KV heads.
    pub nheads_kv: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Tokens per page.
    pub block_size: u32,
    /// Element type.
    pub dtype: String,
    /// Milliseconds by method, cold L2.
    pub latencies: BTreeMap<String, f64>,
    /// Whether each method's answer agreed with the oracle.
    pub correctness: BTreeMap<String, Correctness>,
    /// Cold L2.
    pub cold_us: f64,
    /// Warm.
    pub warm_us: f64,
    /// Per run of a replayed graph.
    pub graph_us: f64,
    /// Planning, host.
    pub plan_us: f64,
    /// Upload of the plan.
    pub upload_us: f64,
    /// What the cost model predicted.
    pub predicted_us: f64,
    /// Unique K and V, Q and O.
    pub bytes: u64,
    /// `4 * q_heads * head_dim * tokens`, over all sequences.
    pub flop: f64,
    /// `max(bytes / 4.8 TB/s, flop / 989 TFLOP/s)`: an H200's datasheet.
    pub floor_us: f64,
    /// `max(bytes / 4.6 TB/s, flop / 650 TFLOP/s)`: what kernels reach on an H200.
    pub ceiling_us: f64,
    /// Logical over unique KV bytes.
    pub sharing_factor: f64,
    /// KV bytes the plan reads.
    pub planned_kv_bytes: u64,
    /// Bytes of partials.
    pub partial_bytes: u64,
    /// Items by variant.
    pub items: BTreeMap<String, u32>,
}

/// PAT's `correctness` entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Correctness {
    /// `PASSED` or `FAILED`.
    pub status: String,
    /// Largest absolute error of an output element.
    pub max_diff: f64,
    /// Relative L2 error.
    pub relative_l2: f64,
}

impl Record {
    /// What tells configurations apart.
    pub fn key(&self) -> (String, u32, u32, u32, String) {
        (self.tree.clone(), self.nheads_q, self.nheads_kv, self.head_dim, self.dtype.clone())
    }

    /// Items of a summary, by variant.
    pub fn items_of(summary: &PlanSummary) -> BTreeMap<String, u32> {
        summary.variants.iter().map(|v| (v.variant.to_owned(), v.items)).collect()
    }
}

/// Why a result file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResultError {
    /// Reading or writing failed.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's message.
        source: std::io::Error,
    },
    /// Not a result file.
    #[error("{file} is not a result file of this tool: {source}")]
    Json {
        /// The file.
        file: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// From a newer version.
    #[error("{file} has schema version {found}, this tool reads up to {SCHEMA_VERSION}: update the tool")]
    Version {
        /// The file.
        file: String,
        /// Its version.
        found: u32,
    },
}

/// Reads a result file.
///
/// # Errors
/// See [`ResultError`].
pub fn read(path: &Path) -> Result<ResultFile, ResultError> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ResultError::Io { file: file.clone(), source })?;
    let result: ResultFile =
        serde_json::from_str(&text).map_err(|source| ResultError::Json { file: file.clone(), source })?;
    if result.schema_version > SCHEMA_VERSION {
        return Err(ResultError::Version { file, found: result.schema_version });
    }
    Ok(result)
}

/// Writes a result file; the old one stays whole until the new one is.
///
/// # Errors
/// The system's.
pub fn write(path: &Path, result: &ResultFile) -> Result<(), ResultError> {
    let io = |source| ResultError::Io { file: path.display().to_string(), source };
    let text = serde_json::to_string_pretty(result)
        .map_err(|source| ResultError::Json { file: path.display().to_string(), source })?;
    let aside = path.with_extension("json.new");
    std::fs::write(&aside, text + "\n").map_err(io)?;
    std::fs::rename(&aside, path).map_err(io)
}
