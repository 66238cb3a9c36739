//! Options that several commands share: where the batch comes from, the model's shape, how to plan.

use anyhow::{Context, Result, bail};
use pat_rs::plan::PlanMode;
use pat_rs::{AttentionShape, DeviceProfile, Dtype, PlanOptions, Problem, TileVariant, supports};
use pat_workloads::{OwnedBatch, TraceCut, TreeSpec, read_batch};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the batch comes from.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Source {
    /// A regular prefix tree in PAT's notation: nodes per level _ tokens per level.
    #[arg(long, value_name = "SPEC", conflicts_with = "trace")]
    tree: Option<String>,
    /// A request trace in Mooncake's format (JSON lines).
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// With --trace, the number of sequences that decode together; alone, a batch file (docs/batch-format.md).
    #[arg(long, value_name = "N or FILE", conflicts_with = "tree", allow_negative_numbers = true)]
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
    /// Tokens per page of --tree and --trace (32 unless told); a batch file brings its own.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    page_size: Option<u32>,
}

/// Page size of trees and traces where none is given.
const DEFAULT_PAGE_SIZE: u32 = 32;

impl Source {
    /// Reads or makes the batch; the name is for reports.
    pub(crate) fn load(&self) -> Result<(String, OwnedBatch)> {
        let page_size = self.page_size.unwrap_or(DEFAULT_PAGE_SIZE);
        match (&self.tree, &self.trace, &self.batch) {
            (Some(tree), None, None) => {
                let spec = TreeSpec::from_str(tree).context("--tree")?;
                Ok((tree.clone(), spec.batch(page_size, Some(1)).context("--tree")?))
            }
            (None, Some(file), batch) => {
                let batch_size = match batch {
                    None => 64,
                    Some(text) => text.parse().with_context(|| {
                        format!("--batch: got {text:?}, expected the number of sequences (with --trace)")
                    })?,
                };
                let cut = TraceCut { first_request: self.first_request, batch_size, step: self.at_step, page_size };
                let reader = std::fs::File::open(file).with_context(|| format!("--trace {}", file.display()))?;
                let batch = cut.batch(BufReader::new(reader)).with_context(|| format!("--trace {}", file.display()))?;
                Ok((format!("{} batch {batch_size} step {}", file.display(), self.at_step), batch))
            }
            (None, None, Some(file)) => {
                let batch = read_batch(file.as_ref()).map_err(|error| {
                    let context = match file.parse::<u64>() {
                        Ok(_) => "--batch (a number of sequences goes with --trace)",
                        Err(_) => "--batch",
                    };
                    anyhow::Error::new(error).context(context)
                })?;
                if let Some(asked) = self.page_size.filter(|&asked| asked != batch.page_size) {
                    bail!("--page-size: got {asked}, expected the batch file's {} or nothing", batch.page_size);
                }
                Ok((file.clone(), batch))
            }
            _ => bail!("no batch: give --tree SPEC, --trace FILE [--batch N], or --batch FILE.json"),
        }
    }
}

/// What heads alone do not say of a model.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Model {
    /// Elements per head: 64 or 128.
    #[arg(long, default_value_t = 128, allow_negative_numbers = true)]
    pub(crate) head_dim: u32,
    /// Element type: f16 or bf16.
    #[arg(long, default_value = "f16", value_parser = parse_dtype)]
    pub(crate) dtype: Dtype,
}

fn parse_dtype(name: &str) -> std::result::Result<Dtype, &'static str> {
    match name {
        "f16" | "fp16" | "half" => Ok(Dtype::F16),
        "bf16" => Ok(Dtype::Bf16),
        _ => Err("expected f16 or bf16"),
    }
}

/// The model's shape.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Shape {
    /// Query heads / KV heads.
    #[arg(long, default_value = "32/8", value_name = "Q/KV", allow_hyphen_values = true)]
    heads: String,
    #[command(flatten)]
    model: Model,
}

impl Shape {
    pub(crate) fn resolve(&self) -> Result<AttentionShape> {
        let (q, kv) = parse_heads(&self.heads)?;
        let Model { head_dim, dtype } = self.model;
        AttentionShape::new(q, kv, head_dim, dtype)
            .and_then(supported)
            .with_context(|| format!("--heads {} --head-dim {head_dim}", self.heads))
    }
}

/// Refuses a shape that no kernel can compute, whatever the pages.
pub(crate) fn supported(shape: AttentionShape) -> pat_rs::Result<AttentionShape> {
    supports(&Problem::new(shape, 1), None, None)?;
    Ok(shape)
}

/// `Q/KV`.
pub(crate) fn parse_heads(heads: &str) -> Result<(u32, u32)> {
    heads
        .split_once('/')
        .and_then(|(q, kv)| Some((q.parse().ok()?, kv.parse().ok()?)))
        .with_context(|| format!("--heads: got {heads:?}, expected QUERY/KV heads such as 32/8"))
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
