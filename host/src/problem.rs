//! What is computed: everything a kernel must know of a model's attention but the tensors themselves.

use crate::arguments::same;
use crate::features::Features;
pub use crate::features::{Reach, Score, Visibility};
use crate::{AttentionShape, Result};
use pat_abi::PageMask;

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
    pub(crate) features: Features,
}

impl Problem {
    /// Largest page size: what a page mask can count.
    pub const MAX_PAGE_SIZE: u32 = PageMask::MAX_TOKENS;

    /// Plain decode attention over pages of `page_size` tokens: one query token that sees its whole sequence, scores
    /// scaled by `1 / sqrt(head_dim)`.
    pub fn new(shape: AttentionShape, page_size: u32) -> Self {
        Self { shape, page_size, features: Features::plain(1.0 / (shape.head_dim() as f32).sqrt()) }
    }

    /// With pages of another size.
    pub(crate) fn with_page_size(self, page_size: u32) -> Self {
        Self { page_size, ..self }
    }

    /// Heads, head dimensions and types.
    pub fn shape(&self) -> AttentionShape {
        self.shape
    }

    /// Tokens per page.
    pub fn page_size(&self) -> u32 {
        self.page_size
    }

    /// What a plan depends on: plans serve layers that differ in the rest.
    pub(crate) fn planned(&self) -> Planned {
        // Query tokens are rows: each sees what the one of an ordinary step sees.
        let visibility = Visibility { query_tokens: 1, ..self.visibility() };
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
