//! Options that several commands share: where the batch comes from, the model's shape, how to plan.

use anyhow::{Context, Result, bail};
use pat_bench::measure::features;
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, Error, Part, PlanOptions, Problem, Reason, TileVariant, supports};
use pat_workloads::{
    MOONCAKE_BLOCK_TOKENS, ModelParts, OwnedBatch, TraceCut, TraceError, TreeSpec, count_requests, parse_dtype,
    read_batch,
};
use serde::Serialize;
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
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    page_size: Option<u32>,
}

/// How a trace is to be read.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct TraceBlock {
    /// With --trace: tokens that one of its hash ids stands for [default: 512].
    #[arg(long, value_name = "TOKENS", requires = "trace", allow_negative_numbers = true)]
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
                let option = if page_size == 0 { "--page-size 0 with --tree" } else { "--tree" };
                Ok(Loaded { name: tree.clone(), batch: spec.batch(page_size, Some(1)).context(option)?, model })
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

/// What heads alone do not say of a model.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Model {
    /// Elements per head, 64, 128 or 256 [default: the batch file's, else 128].
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) head_dim: Option<u32>,
    /// Element type, f16 or bf16 [default: the batch file's, else f16].
    #[arg(long, value_parser = dtype)]
    pub(crate) dtype: Option<Dtype>,
}

/// What a model has beyond plain decode attention.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Features {
    /// Scores are capped: CAP * tanh(score / CAP).
    #[arg(long, value_name = "CAP", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// With attention sinks, one for each query head, evenly spread from -4 to 4.
    #[arg(long)]
    sinks: bool,
    /// Each sequence sees its last TOKENS tokens only.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    window: Option<u32>,
}

impl Features {
    /// Plain attention with these.
    pub(crate) fn of(self, plain: Problem) -> Result<Problem> {
        let mut problem = plain;
        if let Some(cap) = self.softcap {
            problem = problem.with_soft_cap(cap);
        }
        if self.sinks {
            problem = problem.with_sinks();
        }
        if let Some(tokens) = self.window {
            problem = problem.with_window(tokens);
        }
        let named = |reason: Reason| match reason.part {
            Part::SoftCap => {
                anyhow::Error::new(reason).context(format!("--softcap {}", self.softcap.unwrap_or_default()))
            }
            Part::Window => anyhow::Error::new(reason).context(format!("--window {}", self.window.unwrap_or_default())),
            _ => reason.into(),
        };
        supports(&problem, None, None).map_err(named)?;
        Ok(problem)
    }
}

fn dtype(name: &str) -> std::result::Result<Dtype, &'static str> {
    parse_dtype(name).ok_or("expected f16 or bf16")
}

/// The model's shape.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Shape {
    /// Query heads / KV heads [default: the batch file's, else 32/8].
    #[arg(long, value_name = "Q/KV", allow_hyphen_values = true)]
    heads: Option<String>,
    #[command(flatten)]
    model: Model,
}

impl Shape {
    /// `of_file` is what the batch's file says.
    pub(crate) fn resolve(&self, of_file: ModelParts) -> Result<AttentionShape> {
        let heads = self.heads.as_deref().map(parse_heads).transpose()?;
        let heads = agreed("--heads", heads, of_file.heads, |(q, kv)| format!("{q}/{kv}"))?;
        let head_dim = agreed("--head-dim", self.model.head_dim, of_file.head_dim, |head_dim| head_dim.to_string())?;
        let dtype = agreed("--dtype", self.model.dtype, of_file.dtype, |dtype| dtype.name().to_owned())?;
        let (q, kv) = heads.unwrap_or((32, 8));
        let (head_dim, dtype) = (head_dim.unwrap_or(128), dtype.unwrap_or(Dtype::F16));
        AttentionShape::new(q, kv, head_dim, dtype).and_then(supported).map_err(|error| {
            let context = match option_of_argument(&error) {
                Some("--head-dim") => format!("--head-dim {head_dim}"),
                _ => format!("--heads {q}/{kv}"),
            };
            anyhow::Error::new(error).context(context)
        })
    }
}

/// What was asked for, else what the batch file says; both must be the same where both are there.
fn agreed<T: Copy + PartialEq>(
    option: &str,
    asked: Option<T>,
    of_file: Option<T>,
    text: impl Fn(T) -> String,
) -> Result<Option<T>> {
    match (asked, of_file) {
        (Some(asked), Some(own)) if asked != own => {
            bail!("{option}: got {}, expected the batch file's {} or nothing", text(asked), text(own))
        }
        _ => Ok(asked.or(of_file)),
    }
}

/// Refuses a shape that no kernel can compute, whatever the pages.
pub(crate) fn supported(shape: AttentionShape) -> pat_rs::Result<AttentionShape> {
    supports(&Problem::new(shape, 1), None, None)?;
    Ok(shape)
}

/// `Q/KV`.
pub(crate) fn parse_heads(heads: &str) -> Result<(u32, u32)> {
    pat_workloads::parse_heads(heads)
        .with_context(|| format!("--heads: got {heads:?}, expected QUERY/KV heads such as 32/8"))
}

/// The model and the pool, as reports show them.
#[derive(Clone, Serialize)]
pub(crate) struct ModelReport {
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    dtype: &'static str,
    /// In words; nothing where there are none.
    #[serde(skip_serializing_if = "String::is_empty")]
    features: String,
    page_size: u32,
    /// Of the pool that the block tables belong to.
    num_pages: u32,
    /// Those that a sequence reads.
    pages_read: usize,
}

impl ModelReport {
    pub(crate) fn new(problem: &Problem, batch: &OwnedBatch) -> Self {
        let shape = problem.shape();
        Self {
            q_heads: shape.q_heads(),
            kv_heads: shape.kv_heads(),
            head_dim: shape.head_dim(),
            dtype: shape.dtype().name(),
            features: features(problem),
            page_size: batch.page_size,
            num_pages: batch.num_pages,
            pages_read: batch.unique_pages(),
        }
    }

    /// `32/8 heads, head dim 128, f16`.
    pub(crate) fn model(&self) -> String {
        let plain = format!("{}/{} heads, head dim {}, {}", self.q_heads, self.kv_heads, self.head_dim, self.dtype);
        if self.features.is_empty() { plain } else { format!("{plain}, {}", self.features) }
    }

    /// `pages of 16 tokens, 5 of 8 read`.
    pub(crate) fn pool(&self) -> String {
        format!("pages of {} tokens, {} of {} read", self.page_size, self.pages_read, self.num_pages)
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
        match cause.downcast_ref()? {
            TraceError::Cut { argument, .. } => option_named(argument),
            TraceError::Request { .. } => option_named("block_tokens"),
            _ => None,
        }
    })
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
    const OPTIONS: [(&str, &str); 9] = [
        ("q_heads", "--heads"),
        ("kv_heads", "--heads"),
        ("head_dim", "--head-dim"),
        ("dtype", "--dtype"),
        ("page_size", "--page-size"),
        ("block_tokens", "--trace-block"),
        ("batch_size", "--batch"),
        ("first_request", "--first-request"),
        ("fixed chunk", "--mode"),
    ];
    OPTIONS.iter().find(|(name, _)| argument.starts_with(name)).map(|(_, option)| *option)
}
