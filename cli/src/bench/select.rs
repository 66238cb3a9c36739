//! Which configurations to measure.

use crate::options::{Model, parse_heads, supported};
use anyhow::{Context, Result, bail};
use pat_bench::suites::{self, Configuration, SUITES};
use pat_rs::AttentionShape;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Selection {
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", help = format!("{}, or all [default: figure10]", suite_names()))]
    suite: Vec<String>,
    /// A workload specification of one's own (docs/workload-spec.md).
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// A request trace in Mooncake's format (JSON lines), for the suite trace.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Batch files of one's own (docs/batch-format.md).
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    batch: Vec<PathBuf>,
    /// Query heads / KV heads of --batch.
    #[arg(long, default_value = "32/8", value_name = "Q/KV", requires = "batch", allow_hyphen_values = true)]
    heads: String,
    /// Only configurations whose `name Q/KV` contains this text.
    #[arg(long, default_value = "")]
    filter: String,
}

/// The shape of a configuration's attention.
pub(super) fn shape(configuration: &Configuration, model: Model) -> Result<AttentionShape> {
    let Model { head_dim, dtype } = model;
    configuration
        .shape(head_dim, dtype)
        .and_then(supported)
        .with_context(|| format!("{} with --head-dim {head_dim}", configuration.label()))
}

fn suite_names() -> String {
    SUITES.map(|(name, _)| name).join(", ")
}

impl Selection {
    /// Whether anything but the default was asked for.
    pub(crate) fn is_explicit(&self) -> bool {
        !self.suites().is_empty() || self.spec.is_some() || !self.batch.is_empty() || !self.filter.is_empty()
    }

    /// The suites asked for; a trace without a suite means that of traces.
    fn suites(&self) -> Vec<&str> {
        match &self.trace {
            Some(_) if self.suite.is_empty() => vec!["trace"],
            _ => self.suite.iter().map(String::as_str).collect(),
        }
    }

    /// In the order they are measured, each once.
    pub(crate) fn configurations(&self) -> Result<Vec<Configuration>> {
        let mut suites = self.suites();
        if suites.is_empty() && self.spec.is_none() && self.batch.is_empty() {
            suites.push("figure10");
        }
        let mut configurations = Vec::new();
        for name in suites {
            match name {
                "all" => {
                    let named = SUITES.iter().filter(|(suite, _)| *suite != "trace" || self.trace.is_some());
                    for (suite, _) in named {
                        configurations.extend(self.suite(suite)?);
                    }
                }
                "trace" if self.trace.is_none() => {
                    bail!("--suite trace: give a request trace in Mooncake's format (JSON lines) by --trace FILE.jsonl")
                }
                suite => configurations.extend(self.suite(suite)?),
            }
        }
        if let Some(file) = &self.spec {
            configurations.extend(suites::spec_file(file).context("--spec")?);
        }
        for file in &self.batch {
            configurations.push(suites::batch_file(file, parse_heads(&self.heads)?).context("--batch")?);
        }
        configurations.retain(|configuration| configuration.label().contains(&self.filter));
        if configurations.is_empty() {
            bail!("--filter: got {:?}, which no configuration's `name Q/KV` contains (--list shows them)", self.filter);
        }
        let mut seen = BTreeSet::new();
        configurations.retain(|configuration| seen.insert((configuration.suite, configuration.label())));
        Ok(configurations)
    }

    /// One suite. That of traces has the same configurations whatever the file: it is read when a batch is made.
    pub(crate) fn suite(&self, name: &str) -> Result<Vec<Configuration>> {
        match name {
            "figure10" => Ok(suites::figure10()),
            "realistic" => Ok(suites::realistic()),
            "unshared" => Ok(suites::unshared()),
            "sweeps" => Ok(suites::sweeps()),
            "trace" => Ok(suites::trace(self.trace.as_deref().unwrap_or(Path::new("")))),
            _ => bail!("--suite: got {name:?}, expected some of {}, or all", suite_names()),
        }
    }
}
