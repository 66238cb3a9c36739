//! PAT's "toolagent" without the trace: what its filter keeps of Mooncake's tool-and-agent trace, by rule.

use super::{Header, Ids, PAT_OUTPUT_TOKENS, Request, Segment, Workload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The structure that a stretch of the trace was found to have: tool prompts of whole blocks of 512 tokens, each followed by private
/// text of which PAT keeps whole blocks. The shares and the ranges are those of the stretch; that the lengths are uniform within
/// their range is an assumption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolAgent {
    /// The kinds of request.
    pub tools: Vec<Tool>,
}

/// A tool prompt and what follows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Requests of this kind relative to the others'.
    pub weight: u32,
    /// Blocks of the prompt.
    pub blocks: u32,
    /// Least and largest length of the private text before it is cut.
    pub private_tokens: [u32; 2],
}

/// Tokens of a block of the trace.
const BLOCK_TOKENS: u32 = 512;

impl Default for ToolAgent {
    fn default() -> Self {
        Self {
            tools: vec![
                Tool { weight: 3, blocks: 12, private_tokens: [25, 2_036] },
                Tool { weight: 1, blocks: 5, private_tokens: [455, 912] },
            ],
        }
    }
}

impl ToolAgent {
    /// Draws `requests` requests.
    pub fn workload(&self, requests: usize, seed: u32) -> Workload {
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(seed));
        let mut ids = Ids::default();
        let prompts: Vec<(Tool, Vec<Segment>)> = self
            .tools
            .iter()
            .map(|&tool| (tool, (0..tool.blocks).map(|_| ids.fresh(BLOCK_TOKENS)).collect()))
            .collect();
        let total: u32 = self.tools.iter().map(|tool| tool.weight).sum();
        let draw = |index| {
            let mut place = rng.random_range(0..total);
            let tool = prompts.iter().find(|(tool, _)| match place.checked_sub(tool.weight) {
                Some(rest) => {
                    place = rest;
                    false
                }
                None => true,
            });
            let (tool, prompt) = tool.expect("the place is below the sum of the weights");
            let [least, largest] = tool.private_tokens;
            let private_blocks = rng.random_range(least..=largest) / BLOCK_TOKENS;
            let private = (0..private_blocks).map(|_| ids.fresh(BLOCK_TOKENS));
            Request::single(index, prompt.iter().copied().chain(private).collect(), PAT_OUTPUT_TOKENS)
        };
        let drawn = (0..requests).map(draw).collect();
        let about = "PAT's toolagent by rule: tool prompts of 12 and 5 blocks of 512 tokens, 3 to 1, followed by 0 to 3 and 0 or 1 \
                     private blocks";
        Workload { header: Header::new("toolagent", about.into(), seed), requests: drawn }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn requests_are_a_tool_prompt_and_whole_private_blocks() {
        let workload = ToolAgent::default().workload(4_000, 0);
        let mut kinds: BTreeMap<(u64, usize), u32> = BTreeMap::new();
        for request in &workload.requests {
            assert!(request.prompt.iter().all(|segment| segment.tokens == 512));
            *kinds.entry((request.prompt[0].id, request.prompt.len())).or_default() += 1;
        }
        let found: Vec<_> = kinds.keys().copied().collect();
        assert_eq!(found, [(0, 12), (0, 13), (0, 14), (0, 15), (12, 5), (12, 6)]);
        let first: u32 = kinds.iter().filter(|((id, _), _)| *id == 0).map(|(_, count)| count).sum();
        assert!((2_850..3_150).contains(&first), "three of four: {first}");
    }
}
