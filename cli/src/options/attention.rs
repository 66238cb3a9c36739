//! The model's attention: heads, head dimensions and element type, what it has beyond plain decode attention, and query tokens.
//! They come from options, from the name of a public model, or from the batch's file, which must not contradict each other.

use super::option_of_argument;
use anyhow::{Context, Result, bail};
use pat_rs::{AttentionShape, Dtype, Error, Problem, Reach, supports};
use pat_workloads::{
    ElementParts, LayerKind, ModelParts, OwnedBatch, kv_dtype_names, models, parse_dtype, parse_kv_dtype,
};
use serde::Serialize;

/// What the library calls the arguments that these options give.
pub(super) const OPTIONS: [(&str, &str); 11] = [
    ("q_heads", "--heads"),
    ("kv_heads", "--heads"),
    ("head_dim", "--head-dim"),
    ("v_head_dim", "--value-head-dim"),
    ("value_head_dim", "--value-head-dim"),
    ("query_tokens", "--query-tokens"),
    ("dtype", "--dtype"),
    ("kv_dtype", "--kv-dtype"),
    ("soft_cap", "--softcap"),
    ("window", "--window"),
    ("chunk", "--chunk"),
];

/// How its messages begin, and how the tool's do.
pub(super) const NAMES: [(&str, &str); 2] = [("v_head_dim: ", "value_head_dim: "), ("soft_cap: ", "softcap: ")];

/// The elements of Q and K.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(crate) struct Elements {
    /// Elements per head of Q and K [default: the batch file's, else 128].
    #[arg(long, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) head_dim: Option<u32>,
    /// Element type, f16 or bf16 [default: the batch file's, else f16].
    #[arg(long, value_parser = dtype)]
    pub(crate) dtype: Option<Dtype>,
}

impl Elements {
    /// These and nothing else.
    pub(crate) fn asked(self) -> Asked {
        let head_dim = self.head_dim.map(|value| Given { value, option: "--head-dim".into() });
        Asked {
            model: None,
            heads: None,
            head_dim,
            value_head_dim: None,
            dtype: self.dtype,
            kv_dtype: None,
            soft_cap: None,
            reach: Reach::Full,
            has_sinks: false,
            query_tokens: 1,
        }
    }
}

fn dtype(name: &str) -> std::result::Result<Dtype, &'static str> {
    parse_dtype(name).ok_or("expected f16 or bf16")
}

fn kv_dtype(name: &str) -> std::result::Result<Dtype, String> {
    parse_kv_dtype(name).ok_or_else(|| format!("expected {}", kv_dtype_names(str::to_owned)))
}

fn kv_dtype_help() -> String {
    format!("Element type of K and V, {} [default: that of Q]", kv_dtype_names(str::to_owned))
}

/// Everything but the heads, which suites of batches bring.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Attention {
    /// The attention of a public model, by a name that `pat models` lists, such as qwen3-8b or gpt-oss-20b/window; without /KIND
    /// that of its full layers, if it has some.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// With --model: the heads of one of N tensor-parallel ranks.
    #[arg(long, value_name = "N", requires = "model", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    tensor_parallel: Option<u32>,
    #[command(flatten)]
    elements: Elements,
    /// Elements per head of V and O [default: those of Q and K].
    #[arg(long, value_name = "DIM", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    value_head_dim: Option<u32>,
    #[arg(long, value_name = "DTYPE", value_parser = kv_dtype, help = kv_dtype_help())]
    kv_dtype: Option<Dtype>,
    /// Scores are capped: CAP * tanh(score / CAP).
    #[arg(long, value_name = "CAP", allow_negative_numbers = true, value_parser = single)]
    softcap: Option<f32>,
    /// With attention sinks, one for each query head, evenly spread from -4 to 4.
    #[arg(long)]
    sinks: bool,
    /// Each sequence sees its last TOKENS tokens only.
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    window: Option<u32>,
    /// Each sequence sees its tokens since the last multiple of TOKENS only (Llama 4).
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "window")]
    chunk: Option<u32>,
    /// Query tokens per sequence (drafts that are verified): its last N tokens, each of which sees those up to itself.
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    query_tokens: u32,
}

/// A number, unless 32 bits make 0 or an infinity of it.
fn single(text: &str) -> Result<f32, String> {
    let number: f64 = text.parse().map_err(|error| format!("{error}"))?;
    let single = number as f32;
    if (number == 0.0) == (single == 0.0) && number.is_finite() == single.is_finite() {
        Ok(single)
    } else {
        Err("expected a number of float32".into())
    }
}

/// The attention with its heads.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Shape {
    /// Query heads / KV heads [default: the model's or the batch file's, else 32/8].
    #[arg(long, value_name = "Q/KV", allow_hyphen_values = true)]
    heads: Option<String>,
    #[command(flatten)]
    attention: Attention,
}

impl Shape {
    /// # Errors
    /// Options contradict the model, or there is no such model.
    pub(crate) fn asked(&self) -> Result<Asked> {
        self.attention.asked(self.heads.as_deref())
    }
}

/// A value, and the option that gives it.
#[derive(Clone, Debug)]
struct Given<T> {
    value: T,
    /// `--model` and the model's name, or another option without its value.
    option: String,
}

impl<T: Copy + PartialEq> Given<T> {
    /// The value, which must be the file's where that has one.
    fn agreed(given: Option<&Self>, of_file: Option<T>, text: impl Fn(T) -> String) -> Result<Option<T>> {
        match (given, of_file) {
            (Some(given), Some(own)) if given.value != own => {
                bail!("{}: got {}, expected the batch file's {} or nothing", given.option, text(given.value), text(own))
            }
            _ => Ok(given.map(|given| given.value).or(of_file)),
        }
    }
}

/// The layers that `--model` names, as a rank has them.
#[derive(Clone, Debug)]
struct Named {
    name: String,
    /// `--model` and the name, as messages say it.
    option: String,
    layer: LayerKind,
}

/// What options and the model say, which agree.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    model: Option<Named>,
    heads: Option<Given<(u32, u32)>>,
    head_dim: Option<Given<u32>>,
    value_head_dim: Option<Given<u32>>,
    dtype: Option<Dtype>,
    kv_dtype: Option<Dtype>,
    soft_cap: Option<Given<f32>>,
    reach: Reach,
    has_sinks: bool,
    query_tokens: u32,
}

impl Attention {
    /// `heads` is the option of that name.
    ///
    /// # Errors
    /// As [`Shape::asked`].
    pub(crate) fn asked(&self, heads: Option<&str>) -> Result<Asked> {
        let heads = heads.map(parse_heads).transpose()?;
        let model = self.named()?;
        let settle = |option, asked, own: fn(LayerKind) -> Option<u32>| {
            settled(option, asked, model.as_ref(), own, u32::to_string)
        };
        let pair = |&(q, kv): &(u32, u32)| format!("{q}/{kv}");
        let window = settle("--window", self.window, |layer| match layer.reach {
            Reach::Window(tokens) => Some(tokens),
            _ => None,
        })?;
        let chunk = settle("--chunk", self.chunk, |layer| match layer.reach {
            Reach::Chunk(tokens) => Some(tokens),
            _ => None,
        })?;
        let sinks = |layer: LayerKind| layer.has_sinks.then_some("yes");
        Ok(Asked {
            heads: settled("--heads", heads, model.as_ref(), |layer| Some((layer.q_heads, layer.kv_heads)), pair)?,
            head_dim: settle("--head-dim", self.elements.head_dim, |layer| Some(layer.head_dim))?,
            value_head_dim: settle("--value-head-dim", self.value_head_dim, |layer| Some(layer.v_head_dim))?,
            dtype: self.elements.dtype,
            kv_dtype: self.kv_dtype,
            soft_cap: settled("--softcap", self.softcap, model.as_ref(), |layer| layer.soft_cap, f32::to_string)?,
            reach: match (window, chunk) {
                (Some(window), _) => Reach::Window(window.value),
                (_, Some(chunk)) => Reach::Chunk(chunk.value),
                (None, None) => Reach::Full,
            },
            has_sinks: settled("--sinks", self.sinks.then_some("yes"), model.as_ref(), sinks, |&yes| yes.into())?
                .is_some(),
            query_tokens: self.query_tokens,
            model,
        })
    }

    fn named(&self) -> Result<Option<Named>> {
        let Some(name) = &self.model else { return Ok(None) };
        let (_, layer) = models::layer(name)?;
        let mut named = Named { name: name.clone(), option: format!("--model {name}"), layer };
        if let Some(ranks) = self.tensor_parallel {
            named.layer = layer.of_rank(ranks).with_context(|| format!("--tensor-parallel {ranks}"))?;
            named.option += &format!(" --tensor-parallel {ranks}");
        }
        Ok(Some(named))
    }
}

/// What an option says, or else the model; both are the same where both are there. A model also says what it does not have.
fn settled<T: Copy + PartialEq>(
    option: &str,
    asked: Option<T>,
    model: Option<&Named>,
    of_model: impl Fn(LayerKind) -> Option<T>,
    text: impl Fn(&T) -> String,
) -> Result<Option<Given<T>>> {
    let Some(model) = model else {
        return Ok(asked.map(|value| Given { value, option: option.into() }));
    };
    let own = of_model(model.layer);
    match asked {
        Some(asked) if own != Some(asked) => {
            let own = own.as_ref().map_or_else(|| "none".into(), |own| format!("{} or nothing", text(own)));
            bail!("{option}: got {}, expected {own}, as {} has it", text(&asked), model.option)
        }
        _ => Ok(own.map(|value| Given { value, option: model.option.clone() })),
    }
}

impl Asked {
    /// `--model` and the model's name, if one was given.
    pub(crate) fn model(&self) -> Option<&str> {
        self.model.as_ref().map(|model| model.option.as_str())
    }

    /// Query heads and KV heads, and the option that gives them.
    pub(crate) fn heads(&self) -> Option<((u32, u32), &str)> {
        self.heads.as_ref().map(|given| (given.value, given.option.as_str()))
    }

    /// The elements of the heads, where options or the model say something of them.
    pub(crate) fn elements(&self) -> ElementParts {
        let number = |given: &Option<Given<u32>>| given.as_ref().map(|given| given.value);
        ElementParts {
            head_dim: number(&self.head_dim),
            value_head_dim: number(&self.value_head_dim),
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
        }
    }

    /// The shape, of which `of_file` is what the batch's file says.
    ///
    /// # Errors
    /// The file says something else, or no kernel has this shape.
    pub(crate) fn shape(&self, of_file: ModelParts) -> Result<AttentionShape> {
        let ModelParts { heads, elements: own } = of_file;
        let number = |number: u32| number.to_string();
        let of_option = |dtype: Option<Dtype>, option: &str, own| {
            let given = dtype.map(|value| Given { value, option: option.into() });
            Given::agreed(given.as_ref(), own, |dtype| dtype.name().to_owned())
        };
        let (q, kv) = Given::agreed(self.heads.as_ref(), heads, |(q, kv)| format!("{q}/{kv}"))?.unwrap_or((32, 8));
        let elements = ElementParts {
            head_dim: Given::agreed(self.head_dim.as_ref(), own.head_dim, number)?,
            value_head_dim: Given::agreed(self.value_head_dim.as_ref(), own.value_head_dim, number)?,
            dtype: of_option(self.dtype, "--dtype", own.dtype)?,
            kv_dtype: of_option(self.kv_dtype, "--kv-dtype", own.kv_dtype)?,
        };
        checked(elements.shape((q, kv))).map_err(|error| {
            let context = match (option_of_argument(&error), &self.model, elements.head_dim) {
                (_, Some(model), _) => model.option.clone(),
                (Some("--head-dim"), _, Some(head_dim)) => format!("--head-dim {head_dim}"),
                // By default values are as long as keys.
                (Some("--value-head-dim"), _, Some(head_dim)) if elements.value_head_dim.is_none() => {
                    format!("--head-dim {head_dim} without --value-head-dim")
                }
                (Some("--heads"), ..) => format!("--heads {q}/{kv}"),
                _ => return anyhow::Error::new(error),
            };
            anyhow::Error::new(error).context(context)
        })
    }

    /// Plain attention with what was asked beyond it.
    ///
    /// # Errors
    /// No kernel can compute it.
    pub(crate) fn problem(&self, plain: Problem) -> Result<Problem> {
        let mut problem = plain.with_query_tokens(self.query_tokens).with_reach(self.reach);
        if let Some(cap) = &self.soft_cap {
            problem = problem.with_soft_cap(cap.value);
        }
        if self.has_sinks {
            problem = problem.with_sinks();
        }
        supports(&problem, None, None).map_err(|reason| {
            let error = anyhow::Error::new(Error::from(reason));
            match &self.model {
                Some(model) => error.context(model.option.clone()),
                None => error,
            }
        })?;
        Ok(problem)
    }

    /// The rows to plan: one for each query token.
    ///
    /// # Errors
    /// A sequence has fewer tokens than query tokens.
    pub(crate) fn rows(&self, batch: OwnedBatch) -> Result<OwnedBatch> {
        match self.query_tokens {
            1 => Ok(batch),
            tokens => Ok(batch.query_rows(tokens)?),
        }
    }
}

/// A shape, refused where no kernel can compute it, whatever the pages.
pub(crate) fn checked(shape: pat_rs::Result<AttentionShape>) -> pat_rs::Result<AttentionShape> {
    let shape = shape?;
    supports(&Problem::new(shape, 1), None, None)?;
    Ok(shape)
}

/// `Q/KV`.
fn parse_heads(heads: &str) -> Result<(u32, u32)> {
    pat_workloads::parse_heads(heads)
        .with_context(|| format!("--heads: got {heads:?}, expected QUERY/KV heads such as 32/8"))
}

/// The model and the pool, as reports show them.
#[derive(Clone, Serialize)]
pub(crate) struct ModelReport {
    /// The name that was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
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
    pub(crate) fn new(asked: &Asked, problem: &Problem, batch: &OwnedBatch) -> Self {
        let shape = problem.shape();
        Self {
            model: asked.model.as_ref().map(|model| model.name.clone()),
            q_heads: shape.q_heads(),
            kv_heads: shape.kv_heads(),
            head_dim: shape.head_dim(),
            dtype: shape.dtype().name(),
            features: problem.features(),
            page_size: batch.page_size,
            num_pages: batch.num_pages,
            pages_read: batch.unique_pages(),
        }
    }

    /// `32/8 heads, head dim 128, f16`.
    pub(crate) fn model(&self) -> String {
        let plain = format!("{}/{} heads, head dim {}, {}", self.q_heads, self.kv_heads, self.head_dim, self.dtype);
        let features = if self.features.is_empty() { String::new() } else { format!(", {}", self.features) };
        match &self.model {
            Some(name) => format!("{name}: {plain}{features}"),
            None => plain + &features,
        }
    }

    /// `pages of 16 tokens, 5 of 8 read`.
    pub(crate) fn pool(&self) -> String {
        format!("pages of {} tokens, {} of {} read", self.page_size, self.pages_read, self.num_pages)
    }
}
