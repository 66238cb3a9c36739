//! Batch files: a decode step's block tables, dumped from an engine. `docs/batch-format.md` describes them.
//!
//! ```json
//! {"page_size": 16, "num_pages": 4, "lengths": [33, 17], "block_tables": [[0, 1, 2], [0, 3, -1]], "heads": "32/8"}
//! ```
//!
//! `page_size`: tokens per page. `num_pages`: pages in the pool; every id that is needed is below it. `lengths[b]`: tokens of
//! sequence `b`, the one being decoded included. `block_tables[b]`: its page ids in order, at least
//! `ceil(lengths[b] / page_size)` of them; what follows those is ignored, as [`pat_rs::DecodeBatch::from_padded`] ignores it.
//! Sequences share a prefix where their tables start with the same ids. `heads`, `head_dim`, `value_head_dim`, `dtype` and
//! `kv_dtype` may be absent.

use crate::OwnedBatch;
use crate::model::{ElementParts, ModelParts, kv_dtype_names, parse_dtype, parse_heads, parse_kv_dtype};
use pat_rs::{DecodeBatch, Dtype, Error};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Why a batch file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchFileError {
    /// The file cannot be read.
    ///
    /// Fix: check the path and its permissions.
    #[error("batch file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// It is not JSON, or not an object with the fields of a batch.
    ///
    /// Fix: write the file as docs/batch-format.md shows it; line and column say where it differs.
    #[error("batch file {}: {source} (expected {{\"page_size\", \"num_pages\", \"lengths\", \"block_tables\"}})", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// A value is not accepted, or the values contradict each other.
    ///
    /// Fix: correct the value that the message names; a padded table may have anything after the ids that `lengths`
    /// needs.
    #[error("batch file {}: {source}", path.display())]
    Values {
        /// The file.
        path: PathBuf,
        /// Which value, and what is accepted.
        source: Error,
    },
}

/// The file as JSON has it. Numbers are wider than what is accepted, so that errors can show them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with the fields of a batch")]
struct Fields {
    page_size: u32,
    num_pages: u32,
    lengths: Vec<i64>,
    block_tables: Vec<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    heads: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    head_dim: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_head_dim: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    kv_dtype: Option<String>,
}

/// Reads and validates a batch file. Of each row only the ids that its length needs are kept.
///
/// # Errors
/// See [`BatchFileError`].
pub fn read_batch(path: &Path) -> Result<(OwnedBatch, ModelParts), BatchFileError> {
    let text = std::fs::read_to_string(path).map_err(|source| BatchFileError::Io { path: path.into(), source })?;
    let fields: Fields =
        serde_json::from_str(&text).map_err(|source| BatchFileError::Format { path: path.into(), source })?;
    checked(fields).map_err(|source| BatchFileError::Values { path: path.into(), source })
}

/// The text of a batch file.
pub fn batch_text(batch: &OwnedBatch, model: ModelParts) -> String {
    let wide = |row: &Vec<u32>| row.iter().map(|&id| i64::from(id)).collect();
    let ElementParts { head_dim, value_head_dim, dtype, kv_dtype } = model.elements;
    let name = |dtype: Dtype| dtype.name().to_owned();
    let fields = Fields {
        page_size: batch.page_size,
        num_pages: batch.num_pages,
        lengths: batch.lengths.iter().map(|&length| i64::from(length)).collect(),
        block_tables: batch.block_tables.iter().map(wide).collect(),
        heads: model.heads.map(|(q, kv)| format!("{q}/{kv}")),
        head_dim,
        value_head_dim,
        dtype: dtype.map(name),
        kv_dtype: kv_dtype.map(name),
    };
    serde_json::to_string(&fields).expect("texts, numbers and lists become JSON")
}

fn checked(fields: Fields) -> pat_rs::Result<(OwnedBatch, ModelParts)> {
    let Fields { page_size, num_pages, lengths, block_tables, heads, head_dim, value_head_dim, dtype, kv_dtype } =
        fields;
    let length = |(index, &length): (usize, &i64)| {
        let most = DecodeBatch::MAX_TOKENS;
        let accepted = u32::try_from(length).ok().filter(|length| *length <= most);
        accepted.ok_or_else(|| Error::invalid(format!("lengths[{index}]"), length, format!("0 to {most}")))
    };
    let lengths = lengths.iter().enumerate().map(length).collect::<pat_rs::Result<Vec<u32>>>()?;
    let needed_ids = |(row, table): (usize, &Vec<i64>)| {
        // A page size of 0 is refused below.
        let needed = lengths.get(row).map_or(0, |length| length.div_ceil(page_size.max(1)) as usize);
        let id = |(column, &id): (usize, &i64)| {
            u32::try_from(id).map_err(|_| {
                let place = format!("block_tables[{row}][{column}]");
                Error::invalid(place, id, format!("a page id below num_pages = {num_pages}"))
            })
        };
        table.iter().take(needed).enumerate().map(id).collect::<pat_rs::Result<Vec<u32>>>()
    };
    let block_tables = block_tables.iter().enumerate().map(needed_ids).collect::<pat_rs::Result<Vec<_>>>()?;
    let heads = heads
        .map(|text| parse_heads(&text).ok_or_else(|| Error::invalid("heads", text, "QUERY/KV heads such as \"32/8\"")))
        .transpose()?;
    let dtype = dtype
        .map(|text| parse_dtype(&text).ok_or_else(|| Error::invalid("dtype", text, "\"f16\" or \"bf16\"")))
        .transpose()?;
    let kv_dtype = kv_dtype
        .map(|text| {
            let expected = || kv_dtype_names(|name| format!("{name:?}"));
            parse_kv_dtype(&text).ok_or_else(|| Error::invalid("kv_dtype", text, expected()))
        })
        .transpose()?;
    let elements = ElementParts { head_dim, value_head_dim, dtype, kv_dtype };
    let batch = OwnedBatch { page_size, num_pages, lengths, block_tables };
    batch.view(&batch.rows())?;
    Ok((batch, ModelParts { heads, elements }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(OwnedBatch, ModelParts), BatchFileError> {
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
        let plain = ElementParts { head_dim: Some(64), dtype: Some(Dtype::Bf16), ..ElementParts::default() };
        let all = ElementParts {
            head_dim: Some(192),
            value_head_dim: Some(128),
            dtype: Some(Dtype::F16),
            kv_dtype: Some(Dtype::E5m2),
        };
        let models = [plain, all].map(|elements| ModelParts { heads: Some((16, 2)), elements });
        for model in [ModelParts::default()].into_iter().chain(models) {
            assert_eq!(read(&batch_text(&batch, model)).expect("read"), (batch.clone(), model));
        }
        assert!(!batch_text(&batch, ModelParts::default()).contains("heads"), "what is not known is not written");
    }

    #[test]
    fn what_follows_the_needed_ids_is_ignored() {
        let text = r#"{"page_size": 16, "num_pages": 12, "lengths": [39, 18, 0, 16],
            "block_tables": [[4, 5, 6, -1], [4, 9, -1, 5000000000], [-1, -1, -1, -1], [3]]}"#;
        let (batch, model) = read(text).expect("a padded batch");
        assert_eq!(batch.block_tables, [vec![4, 5, 6], vec![4, 9], vec![], vec![3]]);
        assert_eq!(model, ModelParts::default());
        let empty = r#"{"page_size": 16, "num_pages": 4, "lengths": [0, 0], "block_tables": [[-1], []]}"#;
        assert_eq!(read(empty).expect("rows that are all empty").0.block_tables, [[0; 0]; 2]);
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (text, part) in [
            ("[1]", "expected an object with the fields of a batch"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1]}"#, "missing field `block_tables`"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[0]],"pages":1}"#, "unknown field `pages`"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[9]]}"#, "block_tables[0][0]: got 9"),
            (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[-1]]}"#, "block_tables[0][0]: got -1,"),
            (
                r#"{"page_size":16,"num_pages":4,"lengths":[17],"block_tables":[[0,3000000000]]}"#,
                "block_tables[0][1]: got 3000000000, expected a page id below num_pages = 4",
            ),
            (
                r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[5000000000]]}"#,
                "block_tables[0][0]: got 5000000000",
            ),
            (r#"{"page_size":16,"num_pages":4,"lengths":[17],"block_tables":[[0]]}"#, "lengths[0] = 17"),
            (r#"{"page_size":0,"num_pages":4,"lengths":[1],"block_tables":[[0]]}"#, "page_size: got 0"),
            (
                r#"{"page_size":1,"num_pages":4,"lengths":[-1],"block_tables":[[0]]}"#,
                "lengths[0]: got -1, expected 0 to 2147483647",
            ),
            (r#"{"page_size":1,"num_pages":4,"lengths":[1,1],"block_tables":[[0]]}"#, "got 1 tables"),
            (
                r#"{"page_size":1,"num_pages":1,"lengths":[1],"block_tables":[[0]],"heads":"8"}"#,
                "heads: got 8, expected QUERY/KV",
            ),
            (
                r#"{"page_size":1,"num_pages":1,"lengths":[1],"block_tables":[[0]],"dtype":"f32"}"#,
                "dtype: got f32, expected \"f16\" or \"bf16\"",
            ),
            (
                r#"{"page_size":1,"num_pages":1,"lengths":[1],"block_tables":[[0]],"kv_dtype":"bf16"}"#,
                "kv_dtype: got bf16, expected \"e4m3\" or \"e5m2\"",
            ),
        ] {
            let message = read(text).expect_err(text).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
