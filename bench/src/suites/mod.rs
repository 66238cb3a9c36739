//! What is measured: named batches for given heads, grouped into suites.

mod spec;
mod trace;
mod trees;

pub use spec::{SpecError, realistic, spec_file};
pub use trace::{BATCH_SIZES, trace, trace_requests};
pub use trees::{bf16, figure10, sweeps, tensor_parallel, unshared};

use pat_rs::AttentionShape;
use pat_workloads::{
    BatchFileError, ElementParts, ModelParts, NodeError, NodeSpec, OwnedBatch, TraceCut, TraceError, TreeError,
    TreeSpec,
};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// The suites that have a name: it, and what is in it.
pub const SUITES: [(&str, &str); 7] = [
    ("figure10", "PAT's Figure 10: 20 trees, each with 4 head configurations"),
    (
        "realistic",
        "ragged batches as services have them: few-shot, rollouts, agents, documents, nothing shared, mixtures",
    ),
    ("unshared", "one to 16 sequences of 1k to 128k tokens that share nothing"),
    ("sweeps", "one shared prefix: over the batch, over its length, over the sequences that share it"),
    ("bf16", "Figure 10's trees in bf16, with 32/8 heads"),
    ("tensor-parallel", "Figure 10's trees with the heads that one rank of a tensor-parallel model has: 8/1, 4/1, 8/2"),
    ("trace", "cut from a request trace (--trace FILE): batches of 32 to 256, as far as it goes, at several steps"),
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
    /// Elements of its heads, where the configuration is of one kind only.
    pub elements: ElementParts,
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
    ///
    /// Fix: correct the entry of the specification (docs/workload-spec.md).
    #[error("{name}: {source}")]
    Nodes {
        /// The configuration.
        name: String,
        /// Which value.
        source: NodeError,
    },
    /// A trace cannot be opened.
    ///
    /// Fix: check the path given to `--trace`.
    #[error("trace {}: {source}", file.display())]
    OpenTrace {
        /// The file.
        file: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// A trace cannot be cut.
    ///
    /// Fix: read the cause behind the file's name: it is one of `TraceError`.
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

    /// The shape of its attention. Where neither the caller nor the configuration says, it is head dimension 128 and f16.
    ///
    /// # Errors
    /// The caller's value is another than the configuration's; else as [`AttentionShape::new`].
    pub fn shape(&self, asked: ElementParts) -> pat_rs::Result<AttentionShape> {
        let own = format!("{}: {}", self.suite, self.name);
        asked.agreed(self.elements, &own)?.shape((self.q_heads, self.kv_heads))
    }

    /// `name Q/KV`: what filters and messages use.
    pub fn label(&self) -> String {
        format!("{} {}/{}", self.name, self.q_heads, self.kv_heads)
    }
}

/// A batch file (docs/batch-format.md) as a configuration of suite `batch`, named as the file is. `heads` are those asked for;
/// where neither they nor the file say, it is 32/8.
///
/// # Errors
/// See [`OwnBatchError`].
pub fn batch_file(file: &Path, heads: Option<(u32, u32)>) -> Result<Configuration, OwnBatchError> {
    let (batch, ModelParts { heads: own, elements }) = pat_workloads::read_batch(file)?;
    let (q_heads, kv_heads) = match (heads, own) {
        (Some(asked), Some(own)) if asked != own => {
            return Err(OwnBatchError::Heads { file: file.into(), asked, own });
        }
        _ => heads.or(own).unwrap_or((32, 8)),
    };
    let name = file.display().to_string();
    Ok(Configuration { suite: "batch", name, q_heads, kv_heads, elements, source: Source::Batch(batch) })
}

/// Why a batch file cannot be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OwnBatchError {
    /// It cannot be used at all.
    #[error(transparent)]
    File(#[from] BatchFileError),
    /// It is of a model with other heads.
    ///
    /// Fix: leave `--heads` out, or give those of the file.
    #[error("heads: got {}/{}, expected {}/{} or nothing for batch file {}", asked.0, asked.1, own.0, own.1, file.display())]
    Heads {
        /// The file.
        file: PathBuf,
        /// Heads asked for.
        asked: (u32, u32),
        /// Heads the file names.
        own: (u32, u32),
    },
}
