//! The exchange: a folder with the batches that `pat bench kernels` measures, for programs that measure other libraries on
//! them (`bench/peers/`). `manifest.json` has the configurations; the batches are batch files (`docs/batch-format.md`), one
//! for each distinct batch. Tensors are not in it: they come from the generator of `pat_abi::generator`.

use crate::device::{SEED, sample, softmax_scale};
use crate::grid::dtype_name;
use pat_rs::AttentionShape;
use pat_workloads::OwnedBatch;
use serde::Serialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Version of the format.
pub const EXCHANGE_VERSION: u32 = 1;

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Suite, as in result files.
    pub suite: String,
    /// Tree in PAT's notation, or the batch's name: the `tree` of result files.
    pub name: String,
    /// Block tables and lengths.
    pub batch: OwnedBatch,
    /// Heads, head dimension, element type.
    pub shape: AttentionShape,
}

#[derive(Serialize)]
struct Manifest {
    exchange_version: u32,
    seed: u32,
    configurations: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    name: String,
    suite: String,
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
    /// The folder or a file in it cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// The folder has something in it.
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

/// Writes the configurations into a folder, which is made if it is not there; the manifest last, so that a folder with one is
/// complete.
///
/// # Errors
/// See [`ExchangeError`].
pub fn write(
    folder: &Path,
    configurations: impl IntoIterator<Item = Configuration>,
    force: bool,
) -> Result<Written, ExchangeError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ExchangeError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    if !force && std::fs::read_dir(folder).map_err(io(folder))?.next().is_some() {
        return Err(ExchangeError::NotEmpty(folder.to_owned()));
    }
    let mut bytes = 0;
    let mut put = |name: &str, contents: &[u8]| {
        let path = folder.join(name);
        bytes += contents.len() as u64;
        std::fs::write(&path, contents).map_err(io(&path))
    };
    let json = |value: Result<Vec<u8>, serde_json::Error>| value.map_err(|error| io(folder)(error.into()));
    let mut files: HashMap<Vec<u8>, String> = HashMap::new();
    let mut entries = Vec::new();
    for Configuration { suite, name, batch, shape } in configurations {
        let sample = sample(&batch, shape).pairs;
        let text = json(serde_json::to_vec(&batch))?;
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
            name,
            suite,
            batch: file,
            nheads_q: shape.q_heads(),
            nheads_kv: shape.kv_heads(),
            head_dim: shape.head_dim(),
            dtype: dtype_name(shape.dtype()),
            softmax_scale: softmax_scale(shape),
            sample,
        });
    }
    let written = Written { configurations: entries.len(), batches: files.len(), bytes: 0 };
    let manifest = Manifest { exchange_version: EXCHANGE_VERSION, seed: SEED, configurations: entries };
    put("manifest.json", &json(serde_json::to_vec_pretty(&manifest))?)?;
    Ok(Written { bytes, ..written })
}
