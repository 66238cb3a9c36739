//! Options that several commands share: where the batch comes from, the model's attention, how to plan.

mod attention;

pub(crate) use attention::{Asked, Attention, Elements, ModelReport, Shape, checked};

use anyhow::{Context, Result, bail};
use pat_rs::plan::PlanMode;
use pat_rs::{DeviceProfile, Error, PlanOptions, TileVariant};
use pat_workloads::{
    MOONCAKE_BLOCK_TOKENS, ModelError, ModelParts, OwnedBatch, TraceCut, TraceError, TreeSpec, count_requests,
    read_batch,
};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the batch comes from.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Source {
    /// A regular prefix tree in PAT's notation: nodes per level _ tokens per level.
    #[arg(long, value_name = "SPEC", conflicts_with = "trace")]
    tree: Option<String>,
    /// A request trace in Mooncake's format, JSON lines (docs/trace-format.md).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Alone, a batch file (docs/batch-format.md). With --trace, the number of sequences that decode together [default: 64, or
    /// as many as the trace has].
    #[arg(long, value_name = "FILE or N", conflicts_with = "tree", allow_negative_numbers = true)]
    batch: Option<String>,
    /// With --trace: tokens that each sequence has generated.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "STEP",
        requires = "trace",
        conflicts_with = "tree",
        allow_negative_numbers = true
    )]
    at_step: u32,
    /// With --trace: requests to skip.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "N",
        requires = "trace",
        conflicts_with = "tree",
        allow_negative_numbers = true
    )]
    first_request: usize,
    #[command(flatten)]
    block: TraceBlock,
    /// Tokens per page of --tree and --trace [default: 32]; a batch file brings its own.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    page_size: Option<u32>,
}

/// How a trace is to be read.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct TraceBlock {
    /// With --trace: tokens that one of its hash ids stands for [default: 512].
    #[arg(long, value_name = "TOKENS", requires = "trace", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    trace_block: Option<u32>,
}

impl TraceBlock {
    pub(crate) fn tokens(self) -> u32 {
        self.trace_block.unwrap_or(MOONCAKE_BLOCK_TOKENS)
    }
}

/// Page size of trees and traces where none is given.
const DEFAULT_PAGE_SIZE: u32 = 32;

/// Most sequences that are cut from a trace where no number is given.
const DEFAULT_TRACE_BATCH: usize = 64;

/// A batch to plan or run.
pub(crate) struct Loaded {
    /// For reports.
    pub(crate) name: String,
    pub(crate) batch: OwnedBatch,
    /// What its file says of the model.
    pub(crate) model: ModelParts,
}

impl Source {
    /// Reads or makes the batch.
    pub(crate) fn load(&self) -> Result<Loaded> {
        let page_size = self.page_size.unwrap_or(DEFAULT_PAGE_SIZE);
        let model = ModelParts::default();
        // Not found by the parser where --tree rules --trace out.
        if self.block.trace_block.is_some() && self.trace.is_none() {
            bail!("--trace-block: goes with --trace");
        }
        match (&self.tree, &self.trace, &self.batch) {
            (Some(tree), None, None) => {
                let spec = TreeSpec::from_str(tree).context("--tree")?;
                Ok(Loaded { name: tree.clone(), batch: spec.batch(page_size, Some(1)).context("--tree")?, model })
            }
            (None, Some(file), batch) => {
                let (batch, batch_size) = self
                    .cut(file, batch.as_deref(), page_size)
                    .with_context(|| format!("--trace {}", file.display()))?;
                Ok(Loaded {
                    name: format!("{} batch {batch_size} step {}", file.display(), self.at_step),
                    batch,
                    model,
                })
            }
            (None, None, Some(file)) => {
                let (batch, model) = read_batch(file.as_ref()).map_err(|error| {
                    let context = match file.parse::<u64>() {
                        Ok(_) => "--batch (a number of sequences goes with --trace)",
                        Err(_) => "--batch",
                    };
                    anyhow::Error::new(error).context(context)
                })?;
                if let Some(asked) = self.page_size.filter(|&asked| asked != batch.page_size) {
                    bail!("--page-size: got {asked}, expected the batch file's {} or nothing", batch.page_size);
                }
                Ok(Loaded { name: file.clone(), batch, model })
            }
            _ => bail!("no batch: give --tree SPEC, --trace FILE [--batch N], or --batch FILE.json"),
        }
    }

    /// A batch of a trace, and how many sequences it has.
    fn cut(&self, file: &Path, asked: Option<&str>, page_size: u32) -> Result<(OwnedBatch, usize)> {
        let open = || File::open(file).map(BufReader::new);
        let batch_size = match asked {
            None => {
                let left = count_requests(open()?)?.saturating_sub(self.first_request);
                // Of nothing, one is asked for: the error says how many there are.
                DEFAULT_TRACE_BATCH.min(left).max(1)
            }
            Some(text) => text
                .parse()
                .with_context(|| format!("--batch: got {text:?}, expected the number of sequences (with --trace)"))?,
        };
        let (first_request, step) = (self.first_request, self.at_step);
        let cut = TraceCut { first_request, batch_size, step, page_size, block_tokens: self.block.tokens() };
        Ok((cut.batch(open()?)?, batch_size))
    }
}

/// How to plan.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Planning {
    /// auto, flat, per-node, packed, or fixed-chunk=TOKENS.
    #[arg(long, default_value = "auto")]
    mode: String,
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", help = format!("Only these tile variants: {}", variant_names()))]
    variants: Vec<String>,
    #[arg(long, value_name = "NAME or FILE", help = format!("GPU to plan for, instead of the one that is here (h200 where there is none): {}, or a file that `pat calibrate` wrote", profile_names()))]
    profile: Option<String>,
}

/// Names of known devices, for messages.
fn profile_names() -> String {
    DeviceProfile::known_names().collect::<Vec<_>>().join(", ")
}

/// All tile variants, for messages.
fn variant_names() -> String {
    TileVariant::ALL.map(TileVariant::name).join(", ")
}

impl Planning {
    /// In words, for result files.
    pub(crate) fn label(&self) -> String {
        let mut label = format!("mode {}", self.mode);
        if !self.variants.is_empty() {
            label += &format!(", variants {}", self.variants.join(", "));
        }
        if let Some(profile) = &self.profile {
            label += &format!(", profile {profile}");
        }
        label
    }

    pub(crate) fn resolve(&self) -> Result<PlanOptions> {
        let mode = match self.mode.as_str() {
            "auto" => PlanMode::Auto,
            "flat" => PlanMode::Flat,
            "per-node" => PlanMode::PerNode,
            "packed" => PlanMode::Packed,
            other => {
                let tokens = other.strip_prefix("fixed-chunk=").and_then(|tokens| tokens.parse().ok());
                let tokens = tokens.with_context(|| {
                    format!("--mode: got {other:?}, expected auto, flat, per-node, packed or fixed-chunk=TOKENS")
                })?;
                PlanMode::FixedChunk { tokens }
            }
        };
        let mut variants = Vec::new();
        for name in &self.variants {
            let known = TileVariant::ALL.into_iter().find(|variant| variant.name() == name);
            variants.push(
                known.with_context(|| format!("--variants: got {name:?}, expected some of {}", variant_names()))?,
            );
        }
        let options = PlanOptions::from(mode);
        Ok(if variants.is_empty() { options } else { options.with_variants(variants) })
    }

    /// The profile that was asked for: a known device's, or that of a file.
    pub(crate) fn profile(&self) -> Result<Option<DeviceProfile>> {
        let Some(name) = &self.profile else { return Ok(None) };
        if let Ok(known) = DeviceProfile::by_name(name) {
            return Ok(Some(known));
        }
        let file = Path::new(name);
        if file.extension().is_none_or(|extension| extension != "json") && !file.exists() {
            bail!("--profile: got {name}, expected one of {}, or a file that `pat calibrate` wrote", profile_names());
        }
        let text = std::fs::read_to_string(file).with_context(|| format!("--profile {name}"))?;
        let profile: DeviceProfile =
            serde_json::from_str(&text).with_context(|| format!("--profile {name}: not a device profile"))?;
        profile.validate().with_context(|| format!("--profile {name}"))?;
        Ok(Some(profile))
    }
}

/// The option that gives the argument an error is about, if there is one.
pub(crate) fn option_of(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<Error>() {
            return option_of_argument(error);
        }
        if cause.is::<ModelError>() {
            return Some("--model");
        }
        match cause.downcast_ref()? {
            TraceError::Cut { argument, .. } => option_named(argument),
            TraceError::Request { .. } => option_named("block_tokens"),
            _ => None,
        }
    })
}

/// A message in the user's terms: it begins with the option that it is about, if there is one, and has no names that only the
/// library knows.
pub(crate) fn as_typed(message: String, option: Option<&str>) -> String {
    let message = attention::NAMES.iter().fold(message, |message, (name, here)| message.replace(name, here));
    let Some(option) = option else { return message };
    let name = option.trim_start_matches('-').replace('-', "_");
    match message.strip_prefix(&format!("{name}: ")) {
        Some(rest) => format!("{option}: {rest}"),
        // A model's name is the option then.
        None if message.contains(option) || message.starts_with("--model ") => message,
        None => format!("{option}: {message}"),
    }
}

fn option_of_argument(error: &Error) -> Option<&'static str> {
    match error {
        Error::InvalidArgument { argument, .. } => option_named(argument),
        Error::Unsupported(reason) => option_named(&reason.part.to_string()),
        _ => None,
    }
}

/// Library arguments and the options that give them.
fn option_named(argument: &str) -> Option<&'static str> {
    const OPTIONS: [(&str, &str); 7] = [
        ("tensor_parallel", "--tensor-parallel"),
        ("page_size", "--page-size"),
        ("block_tokens", "--trace-block"),
        ("batch_size", "--batch"),
        ("first_request", "--first-request"),
        ("fixed chunk", "--mode"),
        ("variants", "--variants"),
    ];
    let mut options = attention::OPTIONS.iter().chain(&OPTIONS);
    options.find(|(name, _)| argument.starts_with(name)).map(|(_, option)| *option)
}
