//! PAT's "conversation": chats behind four variants of one system prompt.

use super::lengths::{LengthError, Lengths};
use super::{Header, Ids, PAT_OUTPUT_TOKENS, Request, Segment, Workload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of the system prompt's parts. Its variants differ in a location near the beginning and in a language further down, so
/// that they form a tree: a root, a child for each of three locations, a grandchild for each of four pairs of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// Before the location.
    pub root: u32,
    /// From the location to the language.
    pub location: u32,
    /// From the language to the end.
    pub language: u32,
}

impl PromptTokens {
    /// With Qwen3's tokenizer.
    pub const QWEN3: Self = Self { root: 45, location: 351, language: 2_126 };
    /// With Llama 3's tokenizer.
    pub const LLAMA3: Self = Self { root: 46, location: 348, language: 2_123 };

    /// Of a whole prompt.
    pub fn total(self) -> u32 {
        self.root + self.location + self.language
    }
}

/// Which location goes with each variant: (United States, English), (United States, Spanish), (Canada, English), (China, Chinese).
const LOCATION_OF_VARIANT: [usize; 4] = [0, 0, 1, 2];

/// The rule of the workload.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// The system prompt.
    pub prompt: PromptTokens,
    /// The user's text.
    pub private: Lengths,
}

impl Conversation {
    /// Draws `requests` requests.
    ///
    /// # Errors
    /// [`LengthError::Empty`] where a list of lengths is empty; a list that is shorter than `requests` gives fewer.
    pub fn workload(&self, requests: usize, seed: u32) -> Result<Workload, LengthError> {
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(seed));
        let mut ids = Ids::default();
        let root = ids.fresh(self.prompt.root);
        let locations = [(); 3].map(|()| ids.fresh(self.prompt.location));
        let variants = LOCATION_OF_VARIANT.map(|location| [root, locations[location], ids.fresh(self.prompt.language)]);
        let mut drawn = Vec::new();
        for index in 0..requests {
            let variant: &[Segment; 3] = &variants[rng.random_range(0..variants.len())];
            let Some(private) = self.private.draw(index, &mut rng) else { break };
            let prompt = variant.iter().copied().chain([ids.fresh(private)]).collect();
            drawn.push(Request::single(index, prompt, PAT_OUTPUT_TOKENS));
        }
        if drawn.is_empty() {
            return Err(LengthError::Empty);
        }
        let about = format!(
            "PAT's conversation: 4 variants of a system prompt of {} tokens ({} -> 3 x {} -> 4 x {}); {}",
            self.prompt.total(),
            self.prompt.root,
            self.prompt.location,
            self.prompt.language,
            self.private.about()
        );
        Ok(Workload { header: Header::new("conversation", about, seed), requests: drawn })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Summary;
    use super::*;

    #[test]
    fn requests_share_a_tree_of_four_variants() {
        let rule = Conversation { prompt: PromptTokens::QWEN3, private: Lengths::of_mean(740.0) };
        let workload = rule.workload(2_000, 0).expect("drawn");
        let summary = Summary::of(&workload);
        assert_eq!(summary.requests, 2_000);
        let private = summary.prompt_tokens.mean - 2_522.0;
        assert!((private - 740.0).abs() < 30.0, "{private}");
        // 64 requests read 64 x 2,522 prefix tokens where 9,602 are distinct.
        let variants: std::collections::BTreeSet<_> =
            workload.requests[..64].iter().map(|r| r.prompt[..3].to_vec()).collect();
        let distinct: std::collections::BTreeSet<_> = variants.iter().flatten().map(|s| (s.id, s.tokens)).collect();
        assert_eq!(distinct.iter().map(|(_, tokens)| tokens).sum::<u32>(), 9_602);
        assert_eq!(rule.workload(2_000, 0).expect("drawn"), workload, "the seed decides");
        assert_ne!(rule.workload(2_000, 1).expect("drawn").requests, workload.requests);
    }

    #[test]
    fn a_list_of_lengths_is_used_in_order_and_ends() {
        let rule = Conversation { prompt: PromptTokens::LLAMA3, private: Lengths::Listed(vec![17, 1_840]) };
        let workload = rule.workload(5_000, 0).expect("drawn");
        let lengths: Vec<u32> = workload.requests.iter().map(Request::prompt_tokens).collect();
        assert_eq!(lengths, [2_517 + 17, 2_517 + 1_840]);
        assert!(Conversation { private: Lengths::Listed(Vec::new()), ..rule }.workload(5, 0).is_err());
    }
}
