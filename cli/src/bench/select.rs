//! Which configurations to measure.

use crate::options::{Asked, TraceBlock, checked, option_of};
use crate::output::note;
use anyhow::{Context, Result, bail};
use pat_bench::suites::{self, BATCH_SIZES, Configuration, SUITES};
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
    /// A request trace in Mooncake's format, JSON lines (docs/trace-format.md), for the suite trace.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    block: TraceBlock,
    /// Batch files of one's own (docs/batch-format.md).
    #[arg(long, value_delimiter = ',', value_name = "FILE,...")]
    batch: Vec<PathBuf>,
    /// Query heads / KV heads of --batch [default: the batch file's, else 32/8].
    #[arg(long, value_name = "Q/KV", requires = "batch", allow_hyphen_values = true)]
    heads: Option<String>,
    /// Only configurations whose `name Q/KV` contains this text.
    #[arg(long, default_value = "")]
    filter: String,
}

/// The shape of a configuration's attention.
pub(super) fn shape(configuration: &Configuration, asked: &Asked) -> Result<AttentionShape> {
    let elements = asked.elements();
    checked(configuration.shape(elements)).map_err(|error| {
        let error = anyhow::Error::new(error);
        let option = match (option_of(&error), asked.model(), elements.head_dim) {
            (Some(option @ ("--dtype" | "--kv-dtype")), ..) => format!("{option}: "),
            (_, Some(model), _) => format!("{model}: "),
            (Some("--head-dim"), None, Some(head_dim)) => format!("--head-dim {head_dim}: "),
            _ => String::new(),
        };
        error.context(format!("{option}{}", configuration.label()))
    })
}

fn suite_names() -> String {
    SUITES.map(|(name, _)| name).join(", ")
}

impl Selection {
    /// `--heads`.
    pub(crate) fn heads(&self) -> Option<&str> {
        self.heads.as_deref()
    }

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

    /// In the order they are measured, each once. With a model, suites have its heads instead of theirs.
    pub(crate) fn configurations(&self, asked: &Asked) -> Result<Vec<Configuration>> {
        let mut suites = self.suites();
        if suites.is_empty() && self.spec.is_none() && self.batch.is_empty() {
            suites.push("figure10");
        }
        let heads = asked.heads();
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
                    bail!(
                        "--suite trace: give a request trace in Mooncake's format (docs/trace-format.md) by --trace FILE.jsonl"
                    )
                }
                suite => configurations.extend(self.suite(suite)?),
            }
        }
        if let Some(file) = &self.spec {
            configurations.extend(suites::spec_file(file).context("--spec")?);
        }
        if let (Some((heads, _)), Some(_)) = (heads, asked.model()) {
            configurations.iter_mut().for_each(|own: &mut Configuration| (own.q_heads, own.kv_heads) = heads);
        }
        for file in &self.batch {
            configurations.push(suites::batch_file(file, heads.map(|(heads, _)| heads)).map_err(|error| {
                let option = match (&error, heads) {
                    (suites::OwnBatchError::Heads { .. }, Some((_, option))) => option,
                    _ => "--batch",
                };
                anyhow::Error::new(error).context(option.to_owned())
            })?);
        }
        configurations.retain(|configuration| configuration.label().contains(&self.filter));
        if configurations.is_empty() {
            bail!("--filter: got {:?}, which no configuration's `name Q/KV` contains (--list shows them)", self.filter);
        }
        let mut seen = BTreeSet::new();
        configurations.retain(|configuration| seen.insert((configuration.suite, configuration.label())));
        Ok(configurations)
    }

    /// One suite. Without a file, that of traces has the configurations of a long one.
    pub(crate) fn suite(&self, name: &str) -> Result<Vec<Configuration>> {
        match name {
            "figure10" => Ok(suites::figure10()),
            "realistic" => Ok(suites::realistic()),
            "unshared" => Ok(suites::unshared()),
            "sweeps" => Ok(suites::sweeps()),
            "bf16" => Ok(suites::bf16()),
            "tensor-parallel" => Ok(suites::tensor_parallel()),
            "trace" => self.of_trace(),
            _ => bail!("--suite: got {name:?}, expected some of {}, or all", suite_names()),
        }
    }

    fn of_trace(&self) -> Result<Vec<Configuration>> {
        let block_tokens = self.block.tokens();
        let Some(file) = &self.trace else {
            return Ok(suites::trace(Path::new(""), block_tokens, usize::MAX));
        };
        let requests = suites::trace_requests(file).context("--trace")?;
        let configurations = suites::trace(file, block_tokens, requests);
        if configurations.is_empty() {
            bail!("--trace: {} has no requests", file.display());
        }
        let left_out: Vec<_> = BATCH_SIZES.iter().filter(|&&size| size > requests).map(ToString::to_string).collect();
        if !left_out.is_empty() {
            let file = file.display();
            note(format!("{file} has {requests} requests: batches of {} are left out", left_out.join(", ")));
        }
        Ok(configurations)
    }
}
