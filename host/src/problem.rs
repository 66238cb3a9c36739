//! What is computed: everything a kernel must know of a model's attention but the tensors themselves.

use crate::arguments::same;
use crate::{AttentionShape, Result};
use pat_abi::{PageMask, Switches};

/// A layer's attention: shape of the tensors, page size, what a row sees, what happens to a score.
///
/// Made for plain decode attention ([`Self::new`]) and changed from there:
///
/// ```
/// use pat_rs::{AttentionShape, Dtype, Problem};
///
/// # fn main() -> pat_rs::Result<()> {
/// let plain = Problem::new(AttentionShape::new(32, 8, 128, Dtype::Bf16)?, 16);
/// assert_eq!(plain.score().scale, 1.0 / 128f32.sqrt());
/// pat_rs::supports(&plain.with_soft_cap(50.0), None, None)?;
/// let reason = pat_rs::supports(&plain.with_alibi(), None, None).unwrap_err();
/// assert_eq!(reason.to_string(), "alibi: got yes, expected none");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    shape: AttentionShape,
    page_size: u32,
    visibility: Visibility,
    score: Score,
    has_sinks: bool,
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

impl Problem {
    /// Largest page size: what a page mask can count.
    pub const MAX_PAGE_SIZE: u32 = PageMask::MAX_TOKENS;

    /// Plain decode attention over pages of `page_size` tokens: one query token that sees its whole sequence, scores
    /// scaled by `1 / sqrt(head_dim)`.
    pub fn new(shape: AttentionShape, page_size: u32) -> Self {
        Self {
            shape,
            page_size,
            visibility: Visibility { reach: Reach::Full, query_tokens: 1, is_tree: false },
            score: Score { scale: 1.0 / (shape.head_dim() as f32).sqrt(), soft_cap: None, has_alibi: false },
            has_sinks: false,
        }
    }

    /// With pages of another size.
    pub(crate) fn with_page_size(self, page_size: u32) -> Self {
        Self { page_size, ..self }
    }

    /// With another factor of the scores.
    pub fn with_scale(mut self, scale: f32) -> Self {
        self.score.scale = scale;
        self
    }

    /// With scores capped by `soft_cap * tanh(score / soft_cap)`; positive.
    pub fn with_soft_cap(mut self, soft_cap: f32) -> Self {
        self.score.soft_cap = Some(soft_cap);
        self
    }

    /// With a bias that is linear in the distance (ALiBi).
    pub fn with_alibi(mut self) -> Self {
        self.score.has_alibi = true;
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
        self.visibility.reach = reach;
        self
    }

    /// With at most `tokens` query tokens per sequence under a causal mask; at least 1.
    pub fn with_query_tokens(mut self, tokens: u32) -> Self {
        self.visibility.query_tokens = tokens;
        self
    }

    /// With at most `tokens` query tokens per sequence that may form a tree ([`crate::QueryTokens::tree`]).
    pub fn with_query_tree(mut self, tokens: u32) -> Self {
        self.visibility.is_tree = true;
        self.with_query_tokens(tokens)
    }

    /// With attention sinks: per query head one more score, beside the scaled (and capped) ones, that adds to the softmax's
    /// denominator and has no value. Log-sum-exps contain it; a sequence without tokens has output 0 and its sink.
    pub fn with_sinks(mut self) -> Self {
        self.has_sinks = true;
        self
    }

    /// Heads, head dimensions and types.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Tokens per page.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// What a row sees.
    pub fn visibility(&self) -> Visibility {
        self.visibility
    }

    /// What happens to a score.
    pub fn score(&self) -> Score {
        self.score
    }

    /// Whether there are attention sinks.
    pub fn has_sinks(&self) -> bool {
        self.has_sinks
    }

    /// What a kernel multiplies the products Q·K with, whose weights are powers of 2: the scale times log2(e); where scores are
    /// capped, it multiplies what is left of them between -1 and 1.
    pub(crate) fn scale_log2(&self) -> f32 {
        self.score.soft_cap.unwrap_or(self.score.scale) * std::f32::consts::LOG2_E
    }

    /// `2 * log2(e) * scale / cap`, where scores are capped; else 0.
    pub(crate) fn soft_cap_scale(&self) -> f32 {
        self.score.soft_cap.map_or(0.0, |cap| 2.0 * std::f32::consts::LOG2_E * (self.score.scale / cap))
    }

    /// What is compiled into its kernels.
    pub(crate) fn switches(&self) -> Switches {
        let window = self.visibility.is_tree || self.visibility.reach.divides_pages(self.page_size);
        Switches { soft_cap: self.score.soft_cap.is_some(), window }
    }

    /// What a plan depends on: plans serve layers that differ in the rest.
    pub(crate) fn planned(&self) -> Planned {
        // Query tokens are rows: each sees what the one of an ordinary step sees.
        let visibility = Visibility { query_tokens: 1, ..self.visibility };
        Planned { shape: self.shape, page_size: self.page_size, visibility }
    }
}

/// The part of a problem that its plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) shape: AttentionShape,
    pub(crate) page_size: u32,
    pub(crate) visibility: Visibility,
}

impl Planned {
    /// # Errors
    /// A call is about something else; `what` is what `self` is of.
    pub(crate) fn check_is(&self, call: &Self, what: &str) -> Result<()> {
        // At each run: nothing is formatted where all is well.
        if self == call {
            return Ok(());
        }
        same(&format!("the shape of {what}"), self.shape, call.shape)?;
        same(&format!("the page_size of {what}"), self.page_size, call.page_size)?;
        same(&format!("the visibility of {what}"), self.visibility, call.visibility)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pat_abi::Dtype;

    #[test]
    fn kernels_multiply_by_the_scale_and_the_cap() {
        let shape = AttentionShape::new(4, 2, 64, Dtype::F16).expect("a valid shape");
        let plain = Problem::new(shape, 16).with_scale(0.5);
        assert_eq!((plain.scale_log2(), plain.soft_cap_scale()), (0.5 * std::f32::consts::LOG2_E, 0.0));
        let capped = plain.with_soft_cap(20.0);
        assert_eq!(capped.scale_log2(), 20.0 * std::f32::consts::LOG2_E);
        assert_eq!(capped.soft_cap_scale(), 0.05 * std::f32::consts::LOG2_E);
        let reaches = [Reach::Full, Reach::Window(7), Reach::Chunk(8)];
        assert_eq!(reaches.map(Reach::name), ["full", "window", "chunk"]);
        assert_eq!(reaches.map(Reach::tokens), [None, Some(7), Some(8)]);
    }

    #[test]
    fn a_plan_serves_problems_that_differ_in_scores_and_query_tokens() {
        let problem = |dtype| Problem::new(AttentionShape::new(4, 2, 64, dtype).expect("a valid shape"), 16);
        let planned = problem(Dtype::F16).planned();
        for other in [problem(Dtype::F16).with_query_tokens(3), problem(Dtype::F16).with_scale(0.5).with_soft_cap(20.0)]
        {
            assert_eq!(other.planned(), planned);
        }
        for other in [problem(Dtype::Bf16), problem(Dtype::F16).with_window(5), problem(Dtype::F16).with_query_tree(3)]
        {
            assert_ne!(other.planned(), planned);
        }
    }
}
