//! The result file: one JSON object, rewritten after every configuration so that a killed run loses at most one.
//! `docs/result-format.md` describes it for other programs.

use crate::ceiling::{DeviceRates, Rates};
use pat_rs::plan::PlanSummary;
use pat_workloads::{Existing, WriteError, whole_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Version of the format; a reader refuses a later one.
pub const SCHEMA_VERSION: u32 = 3;

/// Name of this library in the maps by method.
pub const METHOD: &str = "pat-rs";

/// A result file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResultFile {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Device the figures were measured on.
    pub device: String,
    /// Day the run began, `YYYY-MM-DD`, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// Commit that was measured, `-dirty` behind it where files were changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// What was measured, by the names that the records' maps use.
    #[serde(default)]
    pub methods: BTreeMap<String, Method>,
    /// One record per configuration, in the order they were run.
    pub records: Vec<Record>,
}

/// One implementation of decode attention.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Method {
    /// Its version.
    pub version: String,
    /// Which of its kernels, options and protocol.
    pub note: String,
}

/// One configuration. Times are medians: the maps by method in milliseconds (as PAT's `latencies`), the other fields, all of
/// this library, in microseconds. Fields that only a GPU gives are absent where the CPU executor was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Suite the configuration belongs to.
    #[serde(default = "first_suite")]
    pub suite: String,
    /// Tree in PAT's notation, or the batch's name; unique within its suite.
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
    /// What the attention has beside the softmax, in words; nothing where it has none of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub features: String,
    /// Rows of the batch; 0 where the file does not say.
    #[serde(default)]
    pub sequences: u32,
    /// Milliseconds by method: cold L2 on a GPU.
    pub latencies: BTreeMap<String, f64>,
    /// Milliseconds by method: calls behind each other, L2 as the last one left it.
    #[serde(default)]
    pub warm_latencies: BTreeMap<String, f64>,
    /// Milliseconds by method: host time of planning a decode step.
    #[serde(default)]
    pub plan_latencies: BTreeMap<String, f64>,
    /// Whether each method's answer agreed with the oracle.
    pub correctness: BTreeMap<String, Correctness>,
    /// Cold L2 on a GPU, wall time on the CPU.
    pub cold_us: f64,
    /// First and third quartile of the calls that `cold_us` is the median of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_us_quartiles: Option<[f64; 2]>,
    /// Warm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_us: Option<f64>,
    /// Per run of a replayed graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graph_us: Option<f64>,
    /// Planning, host.
    pub plan_us: f64,
    /// Upload of the plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_us: Option<f64>,
    /// What the cost model predicted for the GPU; on the CPU for an H200.
    pub predicted_us: f64,
    /// Unique K and V, Q and O.
    pub bytes: u64,
    /// `2 * q_heads * (head_dim + v_head_dim) * tokens`, over all sequences.
    pub flop: f64,
    /// The time that the device's datasheet allows; absent where [`DeviceRates`] does not know the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor_us: Option<f64>,
    /// The time at the rates that kernels have reached on the device; absent as `floor_us` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling_us: Option<f64>,
    /// `ceiling_us / cold_us`: the part of the reachable speed that was reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling_fraction: Option<f64>,
    /// Logical over unique KV bytes.
    pub sharing_factor: f64,
    /// KV bytes the plan reads.
    pub planned_kv_bytes: u64,
    /// Bytes of partials.
    pub partial_bytes: u64,
    /// Items by variant.
    pub items: BTreeMap<String, u32>,
}

/// The only suite there was before records named theirs.
fn first_suite() -> String {
    "figure10".into()
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
    /// Which rows were compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample: Option<String>,
}

/// What tells configurations apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct RecordKey {
    /// Suite.
    #[serde(default = "first_suite")]
    pub suite: String,
    /// Tree, or the batch's name.
    pub tree: String,
    /// Query heads.
    pub nheads_q: u32,
    /// KV heads.
    pub nheads_kv: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: String,
    /// See [`Record::features`].
    #[serde(default)]
    pub features: String,
}

impl Record {
    /// What tells this configuration from others.
    pub fn key(&self) -> RecordKey {
        RecordKey {
            suite: self.suite.clone(),
            tree: self.tree.clone(),
            nheads_q: self.nheads_q,
            nheads_kv: self.nheads_kv,
            head_dim: self.head_dim,
            dtype: self.dtype.clone(),
            features: self.features.clone(),
        }
    }

    /// Fills in what the device's rates say of [`Self::bytes`] and [`Self::flop`].
    pub(crate) fn set_ceiling(&mut self, rates: Option<DeviceRates>) {
        let time_us = |rates: Rates| rates.time_us(self.bytes as f64, self.flop);
        self.floor_us = rates.map(|rates| time_us(rates.datasheet));
        self.ceiling_us = rates.map(|rates| time_us(rates.reached));
        self.ceiling_fraction = self.ceiling_us.map(|ceiling_us| ceiling_us / self.cold_us);
    }

    /// Time as a multiple of the ceiling, where there is one and the batch has work.
    pub fn multiple_of_ceiling(&self) -> Option<f64> {
        self.ceiling_us.filter(|&ceiling_us| ceiling_us > 0.0).map(|ceiling_us| self.cold_us / ceiling_us)
    }

    /// Whether the answer of this library agreed with the oracle.
    pub fn is_verified(&self) -> bool {
        self.correctness.get(METHOD).is_some_and(|entry| entry.status == "PASSED")
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
    /// Reading failed.
    ///
    /// Fix: check the path and its permissions.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's message.
        source: std::io::Error,
    },
    /// Writing failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Not a result file.
    ///
    /// Fix: give a file that `pat bench kernels --output` wrote.
    #[error("{file} is not a result file of this tool: {source}")]
    Json {
        /// The file.
        file: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// From a newer version, or from none there was.
    ///
    /// Fix: read the file with the version of the tool that wrote it, or a newer one.
    #[error("{file} has schema version {found}, this tool reads 1 to {SCHEMA_VERSION}: use a newer tool")]
    Version {
        /// The file.
        file: String,
        /// Its version.
        found: u32,
    },
}

/// Reads a result file of this or an earlier version; what an earlier one does not say has its default. Fields that this
/// version does not know are passed over.
///
/// # Errors
/// See [`ResultError`].
pub fn read(path: &Path) -> Result<ResultFile, ResultError> {
    let mut result: ResultFile = read_as(path)?;
    // Earlier versions have an H200's times, whatever the device.
    let rates = DeviceRates::of(&result.device);
    result.records.iter_mut().for_each(|record| record.set_ceiling(rates));
    result.schema_version = SCHEMA_VERSION;
    Ok(result)
}

/// As [`read`], those fields that `T` has.
///
/// # Errors
/// See [`ResultError`].
pub(crate) fn read_as<T: DeserializeOwned>(path: &Path) -> Result<T, ResultError> {
    /// Asked before anything else: a newer file need not have the other fields.
    #[derive(Deserialize)]
    struct Version {
        schema_version: u32,
    }
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ResultError::Io { file: file.clone(), source })?;
    let foreign = |source| ResultError::Json { file: file.clone(), source };
    let Version { schema_version } = serde_json::from_str(&text).map_err(foreign)?;
    if !(1..=SCHEMA_VERSION).contains(&schema_version) {
        return Err(ResultError::Version { file, found: schema_version });
    }
    serde_json::from_str(&text).map_err(foreign)
}

/// Writes a result file; the old one stays whole until the new one is.
///
/// # Errors
/// The system's.
pub fn write(path: &Path, result: &ResultFile) -> Result<(), ResultError> {
    let text = serde_json::to_string_pretty(result)
        .map_err(|source| ResultError::Json { file: path.display().to_string(), source })?;
    Ok(whole_file::write(path, (text + "\n").as_bytes(), Existing::Replace)?)
}

/// A record for tests of what is made of records.
#[cfg(test)]
pub(crate) fn test_record(tree: &str, cold_us: f64) -> Record {
    Record {
        suite: first_suite(),
        tree: tree.into(),
        nheads_q: 32,
        nheads_kv: 8,
        head_dim: 128,
        block_size: 32,
        dtype: "f16".into(),
        features: String::new(),
        sequences: 1,
        latencies: BTreeMap::from([(METHOD.into(), cold_us / 1e3)]),
        warm_latencies: BTreeMap::new(),
        plan_latencies: BTreeMap::new(),
        correctness: BTreeMap::new(),
        cold_us,
        cold_us_quartiles: None,
        warm_us: None,
        graph_us: None,
        plan_us: 0.0,
        upload_us: None,
        predicted_us: 0.0,
        bytes: 0,
        flop: 0.0,
        floor_us: None,
        ceiling_us: None,
        ceiling_fraction: None,
        sharing_factor: 1.0,
        planned_kv_bytes: 0,
        partial_bytes: 0,
        items: BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Writes `text` to a file and reads it as a result.
    fn read_text(text: &str) -> Result<ResultFile, ResultError> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("writable");
        read(file.path())
    }

    fn example() -> &'static str {
        let (_, rest) = include_str!("../../docs/result-format.md").split_once("```json\n").expect("an example");
        rest.split_once("```").expect("the example's end").0
    }

    #[test]
    fn the_documented_example_is_what_is_written() {
        let result = read_text(example()).expect("a result file");
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        write(file.path(), &result).expect("written");
        assert_eq!(read(file.path()).expect("read"), result);
        let written: Value = serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
        assert_eq!(written, serde_json::from_str::<Value>(example()).unwrap(), "every field is in the example");
    }

    #[test]
    fn files_of_version_1_are_read() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/results"));
        let result = read(&folder.join("2026-11-24-h200-eb98a1f.json")).expect("a result file");
        assert_eq!((result.schema_version, result.records.len(), result.date), (SCHEMA_VERSION, 80, None));
        let first = &result.records[0];
        assert_eq!((first.suite.as_str(), first.sequences, first.cold_us_quartiles), ("figure10", 0, None));
        assert!(first.warm_us.is_some_and(|us| us > 0.0) && first.is_verified());
    }

    #[test]
    fn unknown_fields_are_passed_over_and_other_methods_kept() {
        let mut value: Value = serde_json::from_str(example()).expect("JSON");
        value["host"] = json!("a field of tomorrow");
        value["methods"]["fast"] = json!({"version": "9", "note": "another library"});
        value["records"][0]["latencies"]["fast"] = json!(0.5);
        value["records"][0]["correctness"]["fast"] = json!({"status": "PASSED", "max_diff": 0.0, "relative_l2": 0.0});
        let result = read_text(&value.to_string()).expect("a result file");
        assert_eq!(result.methods["fast"].note, "another library");
        let written = serde_json::to_value(&result.records[0]).expect("JSON");
        assert_eq!(written["latencies"]["fast"], 0.5);
        assert_eq!(written["correctness"]["fast"], value["records"][0]["correctness"]["fast"]);
    }

    #[test]
    fn foreign_and_newer_files_are_refused() {
        for (text, part) in [
            ("", "is not a result file of this tool: EOF"),
            ("[1]", "is not a result file"),
            (r#"{"records": []}"#, "missing field `schema_version`"),
            (r#"{"schema_version": 2, "records": []}"#, "missing field `device`"),
            (r#"{"schema_version": 4, "runs": []}"#, "has schema version 4, this tool reads 1 to 3"),
            (r#"{"schema_version": 0}"#, "has schema version 0"),
        ] {
            let message = read_text(text).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(read(Path::new("no/such.json")).expect_err("no file").to_string().contains("no/such.json: No such"));
    }
}
