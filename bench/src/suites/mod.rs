//! What is measured: named batches for given heads, grouped into suites.

mod spec;
mod trace;
mod trees;

pub use spec::{SpecError, realistic, spec_file};
pub use trace::trace;
pub use trees::{figure10, sweeps, unshared};

use pat_rs::{AttentionShape, Dtype};
use pat_workloads::{BatchFileError, NodeError, NodeSpec, OwnedBatch, TraceCut, TraceError, TreeError, TreeSpec};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// The suites that have a name: it, and what is in it.
pub const SUITES: [(&str, &str); 5] = [
    ("figure10", "PAT's Figure 10: 20 trees, each with 4 head configurations"),
    (
        "realistic",
        "ragged batches as services have them: few-shot, rollouts, agents, documents, nothing shared, mixtures",
    ),
    ("unshared", "one to 16 sequences of 1k to 128k tokens that share nothing"),
    ("sweeps", "one shared prefix: over the batch, over its length, over the sequences that share it"),
    ("trace", "cut from a request trace (--trace FILE): batches of 32 to 256 at several steps"),
];

/// One batch to measure, with the heads of the model. The batch is made when it is asked for.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Suite it belongs to.
    pub suite: &'static str,
    /// Name; with the heads unique within its suite.
    pub name: String,
    /// Query heads.
    pub q_heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    source: Source,
}

/// Where a batch comes from.
#[derive(Clone, Debug)]
enum Source {
    Tree(TreeSpec),
    Nodes { nodes: Vec<NodeSpec>, page_size: u32, seed: u64 },
    Trace { file: PathBuf, cut: TraceCut },
    Batch(OwnedBatch),
}

/// Why a batch cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuiteError {
    /// A tree cannot be laid out.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A specification cannot be laid out.
    #[error("{name}: {source}")]
    Nodes {
        /// The configuration.
        name: String,
        /// Which value.
        source: NodeError,
    },
    /// A trace cannot be opened.
    #[error("trace {}: {source}", file.display())]
    OpenTrace {
        /// The file.
        file: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// A trace cannot be cut.
    #[error("trace {}: {source}", file.display())]
    Trace {
        /// The file.
        file: PathBuf,
        /// Where and what.
        source: TraceError,
    },
}

impl Configuration {
    /// The batch; the same every time.
    ///
    /// # Errors
    /// See [`SuiteError`]; none for the suites that need no file.
    pub fn batch(&self) -> Result<OwnedBatch, SuiteError> {
        match &self.source {
            Source::Tree(tree) => Ok(tree.batch(trees::PAGE_SIZE, Some(1))?),
            Source::Nodes { nodes, page_size, seed } => pat_workloads::lay_out(nodes, *page_size, *seed)
                .map_err(|source| SuiteError::Nodes { name: self.name.clone(), source }),
            Source::Trace { file, cut } => {
                let reader = File::open(file).map_err(|source| SuiteError::OpenTrace { file: file.clone(), source })?;
                cut.batch(BufReader::new(reader)).map_err(|source| SuiteError::Trace { file: file.clone(), source })
            }
            Source::Batch(batch) => Ok(batch.clone()),
        }
    }

    /// The shape of its attention in a model with such heads.
    ///
    /// # Errors
    /// As [`AttentionShape::new`].
    pub fn shape(&self, head_dim: u32, dtype: Dtype) -> pat_rs::Result<AttentionShape> {
        AttentionShape::new(self.q_heads, self.kv_heads, head_dim, dtype)
    }

    /// `name Q/KV`: what filters and messages use.
    pub fn label(&self) -> String {
        format!("{} {}/{}", self.name, self.q_heads, self.kv_heads)
    }
}

/// A batch file (docs/batch-format.md) as a configuration of suite `batch`, named as the file is.
///
/// # Errors
/// See [`BatchFileError`].
pub fn batch_file(file: &Path, (q_heads, kv_heads): (u32, u32)) -> Result<Configuration, BatchFileError> {
    let source = Source::Batch(pat_workloads::read_batch(file)?);
    Ok(Configuration { suite: "batch", name: file.display().to_string(), q_heads, kv_heads, source })
}
