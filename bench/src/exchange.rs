//! The exchange: a folder with the batches that `pat bench kernels` measures, for programs that measure other libraries on
//! them (`bench/peers/`). `manifest.json` has the configurations; the batches are batch files (`docs/batch-format.md`), one
//! for each distinct batch, over a pool of just the pages that it reads. Tensors are not in it: they come from the generator
//! of `pat_abi::generator`.

use crate::device::{SEED, softmax_scale};
use crate::sample::sample;
use crate::suites::{Configuration, SuiteError};
use pat_rs::AttentionShape;
use pat_workloads::{Existing, ModelParts, WriteError, batch_text, whole_file};
use serde::Serialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Version of the format.
pub const EXCHANGE_VERSION: u32 = 1;

#[derive(Serialize)]
struct Manifest {
    exchange_version: u32,
    seed: u32,
    configurations: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    name: String,
    suite: &'static str,
    /// File in the same folder.
    batch: String,
    nheads_q: u32,
    nheads_kv: u32,
    head_dim: u32,
    dtype: &'static str,
    softmax_scale: f32,
    /// (sequence, KV head) pairs whose rows are to be checked: those that pat-rs checks.
    sample: Vec<(u32, u32)>,
}

/// Why an exchange was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The folder cannot be made or read.
    ///
    /// Fix: check that the folder can be made and read.
    #[error("{path}: {source}")]
    Io {
        /// The folder.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// A batch cannot be made.
    #[error(transparent)]
    Batch(#[from] SuiteError),
    /// The folder has something in it.
    ///
    /// Fix: give another folder, or `--force`.
    #[error("{0} is not empty: --force overwrites what has the same names")]
    NotEmpty(PathBuf),
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Configurations in the manifest.
    pub configurations: usize,
    /// Batch files.
    pub batches: usize,
    /// Size of all files.
    pub bytes: u64,
}

/// Writes configurations into a folder, which is made if it is not there: all files or none, the manifest last.
///
/// # Errors
/// See [`ExchangeError`].
pub fn write<'a>(
    folder: &Path,
    configurations: impl IntoIterator<Item = (&'a Configuration, AttentionShape)>,
    force: bool,
) -> Result<Written, ExchangeError> {
    let io = |source| ExchangeError::Io { path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    if !force && std::fs::read_dir(folder).map_err(io)?.next().is_some() {
        return Err(ExchangeError::NotEmpty(folder.to_owned()));
    }
    let (mut bytes, mut staged) = (0, Vec::new());
    let mut put = |name: &str, contents: &str| -> Result<(), WriteError> {
        bytes += contents.len() as u64;
        staged.push(whole_file::stage(&folder.join(name), contents.as_bytes(), Existing::replaced_if(force))?);
        Ok(())
    };
    let mut files: HashMap<String, String> = HashMap::new();
    let mut entries = Vec::new();
    for (configuration, shape) in configurations {
        let batch = configuration.batch()?.compacted();
        let sample = sample(&batch, shape).pairs;
        let text = batch_text(&batch, ModelParts::default());
        let file = match files.get(&text) {
            Some(file) => file.clone(),
            None => {
                let file = format!("batch-{:03}.json", files.len());
                put(&file, &text)?;
                files.insert(text, file.clone());
                file
            }
        };
        entries.push(Entry {
            name: configuration.name.clone(),
            suite: configuration.suite,
            batch: file,
            nheads_q: shape.q_heads(),
            nheads_kv: shape.kv_heads(),
            head_dim: shape.head_dim(),
            dtype: shape.dtype().name(),
            softmax_scale: softmax_scale(shape),
            sample,
        });
    }
    let written = Written { configurations: entries.len(), batches: files.len(), bytes: 0 };
    let manifest = Manifest { exchange_version: EXCHANGE_VERSION, seed: SEED, configurations: entries };
    put("manifest.json", &serde_json::to_string_pretty(&manifest).expect("names, numbers and lists become JSON"))?;
    for file in staged {
        file.commit()?;
    }
    Ok(Written { bytes, ..written })
}
