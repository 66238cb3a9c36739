//! Specification files: batches by rule, with their heads. `docs/workload-spec.md` describes the format.

use super::{Configuration, Source};
use pat_rs::{AttentionShape, Dtype};
use pat_workloads::{ElementParts, NodeSpec, parse_heads};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The suite `realistic`, as committed.
const REALISTIC: &str = include_str!("../../workloads/realistic.json");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecFile {
    /// Read one by one, so that an error names the entry.
    entries: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(rename = "about", default)]
    _about: String,
    /// `Q/KV`.
    heads: String,
    page_size: u32,
    seed: u64,
    nodes: Vec<NodeSpec>,
}

/// Why a specification file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// It cannot be read.
    ///
    /// Fix: check the path and its permissions.
    #[error("specification {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's message.
        source: std::io::Error,
    },
    /// It is not JSON, or not an object with a list of entries.
    ///
    /// Fix: write one object with a list of entries, as docs/workload-spec.md shows it.
    #[error("specification {}: {source} (expected {{\"entries\": [...]}})", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// It has nothing to measure.
    ///
    /// Fix: add an entry.
    #[error("specification {}: entries: got none, expected at least one", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// An entry lacks a field, or has one too many, or one of another type.
    ///
    /// Fix: correct the field that the message names (docs/workload-spec.md).
    #[error("specification {}: entry {entry}: {source}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Its number from 0, and its name if it has one.
        entry: String,
        /// What.
        source: serde_json::Error,
    },
    /// An entry's value is not accepted.
    ///
    /// Fix: correct the value that the message names (docs/workload-spec.md).
    #[error("specification {}: entry {entry}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Its number from 0 and its name.
        entry: String,
        /// Which value, and what is accepted.
        problem: String,
    },
}

/// Ragged batches as services have them.
pub fn realistic() -> Vec<Configuration> {
    parse("realistic", REALISTIC, Path::new("realistic.json")).expect("the committed file is valid")
}

/// Reads a specification file as suite `spec`.
///
/// # Errors
/// See [`SpecError`].
pub fn spec_file(path: &Path) -> Result<Vec<Configuration>, SpecError> {
    let text = std::fs::read_to_string(path).map_err(|source| SpecError::Io { path: path.into(), source })?;
    parse("spec", &text, path)
}

fn parse(suite: &'static str, text: &str, path: &Path) -> Result<Vec<Configuration>, SpecError> {
    let SpecFile { entries } =
        serde_json::from_str(text).map_err(|source| SpecError::Format { path: path.into(), source })?;
    if entries.is_empty() {
        return Err(SpecError::Empty { path: path.into() });
    }
    let mut configurations: Vec<Configuration> = Vec::with_capacity(entries.len());
    for (index, value) in entries.into_iter().enumerate() {
        let entry = match value.get("name") {
            Some(name) => format!("{index} ({name})"),
            None => index.to_string(),
        };
        let configuration = Entry::deserialize(value)
            .map_err(|source| SpecError::Entry { path: path.into(), entry: entry.clone(), source })
            .and_then(|fields| {
                configuration(suite, fields, &configurations).map_err(|problem| SpecError::Value {
                    path: path.into(),
                    entry,
                    problem,
                })
            })?;
        configurations.push(configuration);
    }
    Ok(configurations)
}

/// Checks an entry, by making its batch once.
fn configuration(suite: &'static str, entry: Entry, before: &[Configuration]) -> Result<Configuration, String> {
    let Entry { name, heads, page_size, seed, nodes, .. } = entry;
    let (q_heads, kv_heads) =
        parse_heads(&heads).ok_or_else(|| format!("heads: got {heads:?}, expected QUERY/KV heads such as \"32/8\""))?;
    AttentionShape::new(q_heads, kv_heads, 128, Dtype::F16).map_err(|error| format!("heads: {error}"))?;
    if name.trim().is_empty() {
        return Err("name: got nothing, expected a name".into());
    }
    pat_workloads::lay_out(&nodes, page_size, seed).map_err(|error| error.to_string())?;
    let source = Source::Nodes { nodes, page_size, seed };
    let elements = ElementParts::default();
    let configuration = Configuration { suite, name, q_heads, kv_heads, elements, source };
    if before.iter().any(|other| other.label() == configuration.label()) {
        return Err(format!("name: got {:?} again, expected one entry for these heads", configuration.name));
    }
    Ok(configuration)
}
