//! Records: one JSON line a run, a superset of PAT's `e2e_perf.jsonl`. `docs/serving.md` describes them for other programs.

use super::load::Run;
use super::metrics::{Limit, Summary};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Version of what stands in a record beside PAT's fields.
pub const SCHEMA_VERSION: u32 = 1;

/// The rates of PAT's experiment, requests per second.
pub const PAT_RATES: [f64; 15] = [4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 10.5, 11.0];

/// Those of its short form.
pub const QUICK_RATES: [f64; 2] = [7.0, 9.0];

/// What was run: PAT's fields and ours, all strings.
pub type Config = BTreeMap<String, String>;

/// How a run went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every measured request ended well.
    Success,
    /// It has figures, and failures beside them.
    Failed,
    /// It has no figures.
    Error,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA_VERSION`]; absent in PAT's records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema_version: Option<u32>,
    /// What was run.
    #[serde(deserialize_with = "strings")]
    pub config: Config,
    /// How it went.
    pub status: Status,
    /// Figures, null where there is none.
    #[serde(default)]
    pub metrics: Map<String, Value>,
    /// Requests sent, measured, failed, and failures by kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Requests>,
    /// Requests per second that met a limit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub goodput: Vec<Goodput>,
    /// What a reader of the figures should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// A decode step, by what the device did; only of runs inside the engine's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_time: Option<StepTime>,
    /// A step in which a prompt comes to the rows that decode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixed_step_time: Option<StepTime>,
    /// What the engine's steps were; only of runs inside the engine's process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<Value>,
    /// Device and versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Value>,
    /// Day, `YYYY-MM-DD`, UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// Why the status is not success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error_log: Option<String>,
}

/// Numbers of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requests {
    /// Sent.
    pub sent: usize,
    /// Measured.
    pub measured: usize,
    /// Measured and failed.
    pub failed: usize,
    /// Those by kind.
    pub failures: BTreeMap<String, usize>,
}

/// Requests per second that met both limits.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// The limits.
    #[serde(flatten)]
    pub limit: Limit,
    /// Requests per second.
    pub requests_per_s: f64,
}

/// What the device did in a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Mean number of requests.
    pub requests: f64,
    /// Mean number of tokens that go in; records of 2026-11-28 do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// Steps that were looked at.
    pub steps: u32,
    /// Mean milliseconds by part.
    pub ms: BTreeMap<String, f64>,
}

/// PAT's values are all strings; another writer's numbers are taken as their text.
fn strings<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Config, D::Error> {
    let values: BTreeMap<String, Value> = Deserialize::deserialize(from)?;
    let text = |value| match value {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    Ok(values.into_iter().map(|(name, value)| (name, text(value))).collect())
}

impl Record {
    /// Of a run that was made.
    pub fn of(config: Config, run: &Run, date: String) -> Self {
        let summary = Summary::of(run);
        let mut notes = Vec::new();
        if let Some(reason) = &run.given_up {
            notes.push(format!("given up: {reason}"));
        }
        if run.exhausted {
            notes.push("the workload's arrivals ended before the run".into());
        }
        if summary.measured == 0 {
            notes.push("no request was measured".into());
        }
        if summary.client_late_ms > 50.0 {
            notes.push(format!("the client sent a request {:.0} ms late", summary.client_late_ms));
        }
        let problems: Vec<String> = notes
            .iter()
            .cloned()
            .chain(
                summary
                    .failures
                    .iter()
                    .map(|(kind, (count, detail))| format!("{count} requests: {} ({detail})", kind.name())),
            )
            .collect();
        Self {
            schema_version: Some(SCHEMA_VERSION),
            config,
            status: if problems.is_empty() { Status::Success } else { Status::Failed },
            requests: Some(Requests {
                sent: summary.sent,
                measured: summary.measured,
                failed: summary.failed(),
                failures: summary.failures.iter().map(|(kind, (count, _))| (kind.name().into(), *count)).collect(),
            }),
            goodput: summary.goodput.iter().map(|&(limit, requests_per_s)| Goodput { limit, requests_per_s }).collect(),
            metrics: summary.metrics,
            notes,
            step_time: None,
            mixed_step_time: None,
            steps: None,
            machine: None,
            date: Some(date),
            error_log: (!problems.is_empty()).then(|| problems.join("; ")),
        }
    }

    /// Of a run that could not be made.
    pub fn error(config: Config, error_log: String, date: String) -> Self {
        Self {
            schema_version: Some(SCHEMA_VERSION),
            config,
            status: Status::Error,
            metrics: Map::new(),
            requests: None,
            goodput: Vec::new(),
            notes: Vec::new(),
            step_time: None,
            mixed_step_time: None,
            steps: None,
            machine: None,
            date: Some(date),
            error_log: Some(error_log),
        }
    }

    /// A value of the configuration, empty where there is none.
    pub fn config(&self, name: &str) -> &str {
        self.config.get(name).map_or("", String::as_str)
    }

    /// A figure.
    pub fn metric(&self, name: &str) -> Option<f64> {
        self.metrics.get(name)?.as_f64()
    }

    /// What tells runs apart.
    pub fn key(&self) -> Vec<String> {
        key(&self.config)
    }
}

/// What tells runs apart, of a configuration.
pub fn key(config: &Config) -> Vec<String> {
    const NAMES: [&str; 10] = [
        "model",
        "trace",
        "ATTENTION_BACKEND",
        "request_rate",
        "admission",
        "mode",
        "form",
        "window",
        "workload_seed",
        "arrival_seed",
    ];
    NAMES.iter().map(|name| config.get(*name).cloned().unwrap_or_default()).collect()
}

/// Why a file of records cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The system refused.
    ///
    /// Fix: look at the folder, its permissions and the free space.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// A line is no record. One that was cut off is passed over.
    ///
    /// Fix: give a file of `pat bench serve`, of `bench/serve` or PAT's `e2e_perf.jsonl`; remove the line.
    #[error("{} line {line}: {source}; expected a record of `pat bench serve` (docs/serving.md) or of PAT", file.display())]
    Line {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Reads a file of records.
///
/// # Errors
/// See [`RecordError`].
pub fn read(file: &Path) -> Result<Vec<Record>, RecordError> {
    let text = std::fs::read_to_string(file).map_err(|source| RecordError::Io { file: file.into(), source })?;
    let mut records = Vec::new();
    for (line, content) in (1..).zip(text.lines()).filter(|(_, content)| !content.trim().is_empty()) {
        match serde_json::from_str(content) {
            Ok(record) => records.push(record),
            // The run that wrote it was cut off.
            Err(error) if error.is_eof() => {}
            Err(source) => return Err(RecordError::Line { file: file.into(), line, source }),
        }
    }
    Ok(records)
}

/// Adds a record to a file; it is on the disk when this returns. A line that was cut off is ended first.
///
/// # Errors
/// The file cannot be written.
pub fn append(file: &Path, record: &Record) -> Result<(), RecordError> {
    let write = || {
        let mut to = OpenOptions::new().create(true).read(true).append(true).open(file)?;
        let mut last = *b"\n";
        if to.metadata()?.len() > 0 {
            to.seek(SeekFrom::End(-1))?;
            to.read_exact(&mut last)?;
        }
        let mut line = serde_json::to_string(record)?;
        line.push('\n');
        if last != *b"\n" {
            line.insert(0, '\n');
        }
        to.write_all(line.as_bytes())?;
        to.sync_data()
    };
    write().map_err(|source| RecordError::Io { file: file.into(), source })
}
