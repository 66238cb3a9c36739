//! What attention has beyond the plain one: what rows see, what becomes of scores, what joins denominators.
//!
//! A feature's value, what is refused of it, what its kernels are compiled with and take, and what it is on the CPU stand here alone;
//! validator, executors and tool ask. What kernels make of it, and which of them can, is in `pat-abi` and `pat-kernels`.

use crate::eligibility::Accepted;
use crate::{Error, Problem, QueryTokens, Result};
use pat_abi::Switches;
use pat_abi::params::Denominators;
use std::f32::consts::LOG2_E;
use std::fmt;

/// What of a problem (or of where it is to run) a kernel may refuse, in the order in which it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Part {
    /// The device's compute capability.
    ComputeCapability,
    /// The device's shared memory.
    SharedMemory,
    /// Element type of Q.
    QDtype,
    /// Element type of K and V.
    KvDtype,
    /// Element type of O.
    OutDtype,
    /// Elements per head of Q and K.
    HeadDim,
    /// Elements per head of V and O.
    VHeadDim,
    /// Query tokens per sequence.
    QueryTokens,
    /// A tree of query tokens.
    QueryTree,
    /// A sliding window.
    Window,
    /// Chunked attention.
    Chunk,
    /// A soft cap of the scores.
    SoftCap,
    /// ALiBi.
    Alibi,
    /// The factor of the scores.
    Scale,
    /// Query heads per KV head.
    Group,
    /// Tokens per page.
    PageSize,
    /// A stride.
    Stride {
        /// `q`, `k`, `v` or `out`.
        tensor: &'static str,
        /// `page`, `token`, `sequence` or `head`.
        dimension: &'static str,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ComputeCapability => "compute_capability",
            Self::SharedMemory => "shared memory of a CTA",
            Self::QDtype => "dtype",
            Self::KvDtype => "kv_dtype",
            Self::OutDtype => "out_dtype",
            Self::HeadDim => "head_dim",
            Self::VHeadDim => "v_head_dim",
            Self::QueryTokens => "query_tokens",
            Self::QueryTree => "query tree",
            Self::Window => "window",
            Self::Chunk => "chunk",
            Self::SoftCap => "soft_cap",
            Self::Alibi => "alibi",
            Self::Scale => "softmax_scale",
            Self::Group => "q_heads / kv_heads",
            Self::PageSize => "page_size",
            Self::Stride { tensor, dimension } => return write!(f, "{tensor}_strides.{dimension}"),
        })
    }
}

/// How far back a row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Everything up to itself.
    Full,
    /// The last so many tokens, itself included.
    Window(u32),
    /// The tokens since the last multiple of so many (Llama 4).
    Chunk(u32),
}

impl Reach {
    /// `full`, `window` or `chunk`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window(_) => "window",
            Self::Chunk(_) => "chunk",
        }
    }

    /// Tokens that a row sees at most.
    pub fn tokens(self) -> Option<u32> {
        match self {
            Self::Full => None,
            Self::Window(tokens) | Self::Chunk(tokens) => Some(tokens),
        }
    }

    /// The first token that the one at `position` (from 0 on) sees. A reach of 0 tokens, which nothing supports, is one of 1.
    ///
    /// ```
    /// use pat_rs::Reach;
    ///
    /// assert_eq!([Reach::Full, Reach::Window(8), Reach::Chunk(8)].map(|reach| reach.first_token(20)), [0, 13, 16]);
    /// ```
    pub fn first_token(self, position: u32) -> u32 {
        match self {
            Self::Full => 0,
            Self::Window(tokens) => position.saturating_sub(tokens.saturating_sub(1)),
            Self::Chunk(tokens) => position - position % tokens.max(1),
        }
    }

    /// Whether a row may see the later tokens only of a page of `page_size` tokens.
    fn divides_pages(self, page_size: u32) -> bool {
        match self {
            Self::Full => false,
            Self::Window(_) => true,
            Self::Chunk(tokens) => !tokens.is_multiple_of(page_size),
        }
    }
}

/// Which tokens of its sequence a row attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Visibility {
    /// How far back.
    pub reach: Reach,
    /// Most query tokens per sequence: its last tokens, each of which sees the tokens up to itself. They are rows of the batch
    /// ([`crate::QueryTokens`]), so plans do not depend on it.
    pub query_tokens: u32,
    /// Whether the query tokens may form trees ([`crate::QueryTokens::tree`], speculative decoding) instead of chains.
    pub is_tree: bool,
}

/// What becomes of a product Q·K before the softmax.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Score {
    /// Its factor.
    pub scale: f32,
    /// Capped behind the scale: `cap * tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Whether a bias that is linear in the distance is added (ALiBi).
    pub has_alibi: bool,
}

/// Bytes of an attention sink.
pub(crate) const SINK_BYTES: u32 = 4;

/// All of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Features {
    visibility: Visibility,
    score: Score,
    has_sinks: bool,
}

impl Features {
    /// None, and scores that are multiplied by `scale`.
    pub(crate) fn plain(scale: f32) -> Self {
        Self {
            visibility: Visibility { reach: Reach::Full, query_tokens: 1, is_tree: false },
            score: Score { scale, soft_cap: None, has_alibi: false },
            has_sinks: false,
        }
    }
}

/// What the validator must know of a feature.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Demand {
    pub(crate) part: Part,
    /// Whether there is such attention.
    pub(crate) is_valid: bool,
    /// What its kernels are compiled with.
    pub(crate) switches: Switches,
}

impl Problem {
    /// With another factor of the scores.
    pub fn with_scale(mut self, scale: f32) -> Self {
        self.features.score.scale = scale;
        self
    }

    /// With scores capped by `soft_cap * tanh(score / soft_cap)`; positive.
    pub fn with_soft_cap(mut self, soft_cap: f32) -> Self {
        self.features.score.soft_cap = Some(soft_cap);
        self
    }

    /// With a bias that is linear in the distance (ALiBi).
    pub fn with_alibi(mut self) -> Self {
        self.features.score.has_alibi = true;
        self
    }

    /// Attending to the last `tokens` tokens only.
    pub fn with_window(self, tokens: u32) -> Self {
        self.with_reach(Reach::Window(tokens))
    }

    /// Attending to the tokens since the last multiple of `tokens` only: chunked attention (Llama 4).
    pub fn with_chunk(self, tokens: u32) -> Self {
        self.with_reach(Reach::Chunk(tokens))
    }

    /// Attending to what is within `reach` only.
    pub fn with_reach(mut self, reach: Reach) -> Self {
        self.features.visibility.reach = reach;
        self
    }

    /// With at most `tokens` query tokens per sequence under a causal mask; at least 1.
    pub fn with_query_tokens(mut self, tokens: u32) -> Self {
        self.features.visibility.query_tokens = tokens;
        self
    }

    /// With at most `tokens` query tokens per sequence that may form a tree ([`crate::QueryTokens::tree`]).
    pub fn with_query_tree(mut self, tokens: u32) -> Self {
        self.features.visibility.is_tree = true;
        self.with_query_tokens(tokens)
    }

    /// With attention sinks: per query head one more score, beside the scaled (and capped) ones, that adds to the softmax's
    /// denominator and has no value. Log-sum-exps contain it; a sequence without tokens has output 0 and its sink.
    pub fn with_sinks(mut self) -> Self {
        self.features.has_sinks = true;
        self
    }

    /// What a row sees.
    pub fn visibility(&self) -> Visibility {
        self.features.visibility
    }

    /// What happens to a score.
    pub fn score(&self) -> Score {
        self.features.score
    }

    /// Whether there are attention sinks.
    pub fn has_sinks(&self) -> bool {
        self.features.has_sinks
    }

    /// What there is beyond plain decode attention, in words: `K and V e4m3, softcap 30, sinks, window 128, 4 query tokens`.
    pub fn features(&self) -> String {
        let (shape, Features { visibility, score, has_sinks }) = (self.shape(), self.features);
        let values = (shape.v_head_dim() != shape.head_dim()).then(|| format!("V head dim {}", shape.v_head_dim()));
        let stored = (shape.kv_dtype() != shape.dtype()).then(|| format!("K and V {}", shape.kv_dtype().name()));
        let soft_cap = score.soft_cap.map(|cap| format!("softcap {cap}"));
        let sinks = has_sinks.then(|| "sinks".to_owned());
        let reach = visibility.reach.tokens().map(|tokens| format!("{} {tokens}", visibility.reach.name()));
        let queries = (visibility.query_tokens > 1).then(|| format!("{} query tokens", visibility.query_tokens));
        [values, stored, soft_cap, sinks, reach, queries].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What kernels must serve of each feature, in the order of the parts.
    pub(crate) fn demands(&self) -> [Demand; 7] {
        let Features { visibility: Visibility { reach, query_tokens, is_tree }, score, .. } = self.features;
        let [scale_log2, map_scale] = self.score_params();
        let is_factor = |factor: f32| factor.is_finite() && factor > 0.0;
        let windows = |has_windows| Switches { window: has_windows, ..Switches::OFF };
        let capped = Switches { soft_cap: score.soft_cap.is_some(), ..Switches::OFF };
        let of = |part, is_valid, switches| Demand { part, is_valid, switches };
        let divides_pages = reach.divides_pages(self.page_size());
        [
            of(
                Part::QueryTokens,
                (1..=self.most_query_tokens().unwrap_or(u32::MAX)).contains(&query_tokens),
                Switches::OFF,
            ),
            of(Part::QueryTree, true, windows(is_tree)),
            of(Part::Window, reach != Reach::Window(0), windows(divides_pages && matches!(reach, Reach::Window(_)))),
            of(Part::Chunk, reach != Reach::Chunk(0), windows(divides_pages && matches!(reach, Reach::Chunk(_)))),
            of(Part::SoftCap, score.soft_cap.is_none() || is_factor(scale_log2) && is_factor(map_scale), capped),
            of(Part::Alibi, !score.has_alibi, Switches::OFF),
            // The kernels scale the running maximum, which only a positive factor keeps a maximum.
            of(Part::Scale, is_factor(scale_log2) && is_factor(score.scale), Switches::OFF),
        ]
    }

    /// What is compiled into its kernels.
    pub(crate) fn switches(&self) -> Switches {
        self.demands().into_iter().fold(Switches::OFF, |all, demand| all.and(demand.switches))
    }

    /// The value of a feature, for messages; nothing of what is none.
    pub(crate) fn feature_value(&self, part: Part) -> String {
        let Features { visibility, score, .. } = self.features;
        match part {
            Part::QueryTokens => visibility.query_tokens.to_string(),
            Part::QueryTree | Part::Alibi => "yes".into(),
            Part::Window | Part::Chunk => visibility.reach.tokens().unwrap_or_default().to_string(),
            Part::SoftCap => score.soft_cap.unwrap_or_default().to_string(),
            Part::Scale => score.scale.to_string(),
            _ => String::new(),
        }
    }

    /// What is accepted of a feature by kernels that are compiled with its switches (`is_served`), and by others.
    pub(crate) fn accepted_feature(&self, part: Part, is_served: bool) -> Accepted {
        let one = |value: &str| Accepted::Listed(vec![value.into()]);
        match part {
            Part::QueryTokens => Accepted::Range(1, self.most_query_tokens()),
            Part::Window | Part::Chunk if is_served => Accepted::Range(1, None),
            Part::Chunk => one(&format!("none or a multiple of page_size = {}", self.page_size())),
            Part::SoftCap if is_served => one("a positive number, finite also beside the scale"),
            Part::Scale => one("a positive number, finite also where log2(e) multiplies it"),
            _ => one("none"),
        }
    }

    /// Query tokens that a sequence may have at most, where that is bounded.
    fn most_query_tokens(&self) -> Option<u32> {
        self.visibility().is_tree.then_some(QueryTokens::MAX_OF_TREE as u32)
    }

    /// What kernels turn products Q·K into exponents of 2 with. The first is the scale times log2(e); where scores are mapped, it is
    /// what the map's values are multiplied with, and the second is the map's own.
    pub(crate) fn score_params(&self) -> [f32; 2] {
        let Score { scale, soft_cap, .. } = self.score();
        match soft_cap {
            None => [scale * LOG2_E, 0.0],
            // `cap * tanh(scale * x / cap)`, of which the kernels compute 2^(2 log2(e) scale x / cap).
            Some(cap) => [cap * LOG2_E, 2.0 * LOG2_E * (scale / cap)],
        }
    }

    /// What becomes of scaled scores, on the CPU.
    pub(crate) fn map_scores(&self, scores: &mut [f32]) {
        if let Some(cap) = self.score().soft_cap {
            scores.iter_mut().for_each(|score| *score = cap * (*score / cap).tanh());
        }
    }

    /// The log-sum-exp of a row with all that joins its denominator, and the part of it that is the row's own, on the CPU. `sink` is
    /// that of the row's head.
    pub(crate) fn join_denominator(&self, row_lse: f32, sink: Option<f32>) -> (f32, f32) {
        // A sink of -inf has no weight.
        match sink {
            None | Some(f32::NEG_INFINITY) => (row_lse, 1.0),
            Some(sink) => {
                let maximum = row_lse.max(sink);
                let joint = maximum + ((row_lse - maximum).exp() + (sink - maximum).exp()).ln();
                (joint, (row_lse - joint).exp())
            }
        }
    }

    /// What kernels take of it; `sinks` is the address of one for each query head, or 0.
    pub(crate) fn denominators(&self, sinks: u64) -> Denominators {
        Denominators { sinks }
    }

    /// # Errors
    /// So many sinks are too few, or there are to be none.
    pub(crate) fn check_sinks(&self, count: Option<u64>) -> Result<()> {
        let q_heads = u64::from(self.shape().q_heads());
        if count.is_some() == self.has_sinks() && count.is_none_or(|count| count >= q_heads) {
            return Ok(());
        }
        let got = count.map_or("none".into(), |count| format!("{count} elements"));
        let expected = if self.has_sinks() { format!("at least {q_heads} elements") } else { "none".into() };
        Err(Error::invalid("sinks", got, expected + ", as the problem says"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, Dtype};

    #[test]
    fn sinks_are_given_where_the_problem_has_some() {
        let problem = Problem::new(AttentionShape::new(4, 2, 64, Dtype::F16).expect("a valid shape"), 16);
        let refusal = |problem: Problem, count| problem.check_sinks(count).map_err(|error| error.to_string()).err();
        let with_sinks = problem.with_sinks();
        let expected = |got| Some(format!("sinks: got {got}, expected at least 4 elements, as the problem says"));
        assert_eq!(refusal(with_sinks, None), expected("none"));
        assert_eq!(refusal(with_sinks, Some(3)), expected("3 elements"));
        let none = Some("sinks: got 4 elements, expected none, as the problem says".to_owned());
        assert_eq!(refusal(problem, Some(4)), none);
        assert_eq!(
            [refusal(with_sinks, Some(4)), refusal(with_sinks, Some(5)), refusal(problem, None)],
            [None, None, None]
        );
    }

    #[test]
    fn kernels_multiply_by_the_scale_and_the_cap() {
        let shape = AttentionShape::new(4, 2, 64, Dtype::F16).expect("a valid shape");
        let plain = Problem::new(shape, 16).with_scale(0.5);
        assert_eq!(plain.score_params(), [0.5 * LOG2_E, 0.0]);
        let capped = plain.with_soft_cap(20.0);
        assert_eq!(capped.score_params(), [20.0 * LOG2_E, 0.05 * LOG2_E]);
        let reaches = [Reach::Full, Reach::Window(7), Reach::Chunk(8)];
        assert_eq!(reaches.map(Reach::name), ["full", "window", "chunk"]);
        assert_eq!(reaches.map(Reach::tokens), [None, Some(7), Some(8)]);
    }
}
