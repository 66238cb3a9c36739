//! Batch files: a decode step's block tables, dumped from an engine.
//!
//! One JSON object with exactly these fields:
//!
//! ```json
//! {"page_size": 16, "num_pages": 4, "lengths": [33, 17], "block_tables": [[0, 1, 2], [0, 3]]}
//! ```
//!
//! `page_size`: tokens per page. `num_pages`: pages in the pool; every id is below it. `lengths[b]`: tokens of sequence
//! `b`, the one being decoded included. `block_tables[b]`: its page ids in order, at least `ceil(lengths[b] / page_size)`
//! of them; what stands behind those is ignored. Sequences share a prefix where their tables start with the same ids.

use crate::OwnedBatch;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Why a batch file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchFileError {
    /// The file cannot be read or written.
    #[error("batch file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// It is not JSON, or not an object with the four fields.
    #[error("batch file {}: {source} (expected {{\"page_size\", \"num_pages\", \"lengths\", \"block_tables\"}})", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// The values contradict each other.
    #[error("batch file {}: {source}", path.display())]
    Values {
        /// The file.
        path: PathBuf,
        /// Which value, and what is accepted.
        source: pat_rs::Error,
    },
}

/// Reads and validates a batch file.
///
/// # Errors
/// See [`BatchFileError`].
pub fn read_batch(path: &Path) -> Result<OwnedBatch, BatchFileError> {
    let io = |source| BatchFileError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let batch: OwnedBatch = serde_json::from_reader(BufReader::new(file)).map_err(|source| {
        if source.is_io() { io(source.into()) } else { BatchFileError::Format { path: path.into(), source } }
    })?;
    batch.view(&batch.rows()).map_err(|source| BatchFileError::Values { path: path.into(), source })?;
    Ok(batch)
}

/// Writes a batch file.
///
/// # Errors
/// [`BatchFileError::Io`].
pub fn write_batch(path: &Path, batch: &OwnedBatch) -> Result<(), BatchFileError> {
    let io = |source| BatchFileError::Io { path: path.into(), source };
    let mut writer = BufWriter::new(File::create(path).map_err(io)?);
    serde_json::to_writer(&mut writer, batch).map_err(|source| io(source.into()))?;
    writer.flush().map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<OwnedBatch, BatchFileError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("writable");
        read_batch(file.path())
    }

    #[test]
    fn a_written_batch_reads_back() {
        let batch = OwnedBatch {
            page_size: 16,
            num_pages: 4,
            lengths: vec![33, 17, 0],
            block_tables: vec![vec![0, 1, 2], vec![0, 3], vec![]],
        };
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        write_batch(file.path(), &batch).expect("written");
        assert_eq!(read_batch(file.path()).expect("read"), batch);
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, part) in [
            ("[1]", "page_size"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1]}"#, "missing field `block_tables`"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[0]],"pages":1}"#, "unknown field `pages`"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[9]]}"#, "block_tables[0][0]: got 9"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[17],"block_tables":[[0]]}"#, "lengths[0] = 17"),
            (r#"{"page_size":0,"num_pages":4,"lengths":[1],"block_tables":[[0]]}"#, "page_size: got 0"),
            (r#"{"page_size":1,"num_pages":4,"lengths":[-1],"block_tables":[[0]]}"#, "line 1"),
        ] {
            let message = read(text).expect_err(text).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
