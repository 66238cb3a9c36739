//! The exchange: a folder with the batches that `pat bench kernels` measures, for programs that measure other libraries on
//! them (`bench/peers/`). `manifest.json` has the configurations; the batches are batch files (`docs/batch-format.md`), one
//! for each distinct batch. Tensors are not in it: they come from the generator of `pat_abi::generator`.

use crate::device::{SEED, softmax_scale};
use crate::sample::sample;
use crate::suites::{Configuration, SuiteError};
use pat_rs::AttentionShape;
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
    /// The folder or a file in it cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// The folder or file.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// A batch cannot be made.
    #[error(transparent)]
    Batch(#[from] SuiteError),
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

/// Writes configurations into a folder, which is made if it is not there; the manifest last, so that a folder with one is
/// complete.
///
/// # Errors
/// See [`ExchangeError`].
pub fn write<'a>(
    folder: &Path,
    configurations: impl IntoIterator<Item = (&'a Configuration, AttentionShape)>,
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
    for (configuration, shape) in configurations {
        let batch = configuration.batch()?;
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
    put("manifest.json", &json(serde_json::to_vec_pretty(&manifest))?)?;
    Ok(Written { bytes, ..written })
}
