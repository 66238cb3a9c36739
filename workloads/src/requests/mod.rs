//! Request workloads: what a serving benchmark sends. A workload is a list of arrivals; an arrival is one request, or several
//! that belong together: samples of one prompt, turns of one session. `docs/request-workloads.md` describes the file.
//!
//! A prompt is a list of segments, runs of tokens with an id; equal ids are equal text. So prompts share exactly what their
//! leading segments have in common, a file stays small, and [`token`] gives every program the same token ids.

mod conversation;
mod file;
mod lengths;
mod mooncake;
mod patterns;
mod summary;
mod toolagent;

pub use conversation::{Conversation, PromptTokens};
pub use file::{RequestFileError, read, write};
pub use lengths::{LengthError, Lengths};
pub use mooncake::{BlockTrace, ReadTraceError};
pub use patterns::{Agents, Recommendation, Rollouts, Unshared};
pub use summary::{Spread, Summary};
pub use toolagent::{Tool, ToolAgent};

use pat_abi::generator::mix;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Output tokens of every request of PAT's experiment.
pub const PAT_OUTPUT_TOKENS: u32 = 256;

/// Prompt and output tokens that a request may have together in PAT's experiment; longer ones are left out.
pub const PAT_MAX_TOKENS: u32 = 7_800;

/// Token ids from here to [`MAX_TOKEN`] are drawn where a workload does not say otherwise: no special token of a known model is
/// below it.
pub const FIRST_TOKEN: u32 = 1_000;

/// End (exclusive) of the drawn token ids, below the vocabularies of Llama 3 (128,256) and Qwen3 (151,936).
pub const MAX_TOKEN: u32 = 101_000;

/// A run of `tokens` tokens; equal ids are equal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u64, u32)", into = "(u64, u32)")]
pub struct Segment {
    /// What the text is drawn from.
    pub id: u64,
    /// Its length, at least 1.
    pub tokens: u32,
}

impl From<(u64, u32)> for Segment {
    fn from((id, tokens): (u64, u32)) -> Self {
        Self { id, tokens }
    }
}

impl From<Segment> for (u64, u32) {
    fn from(segment: Segment) -> Self {
        (segment.id, segment.tokens)
    }
}

/// A completion to ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Which arrival the request belongs to; from 0, ascending by one.
    pub arrival: u32,
    /// Requests of turn 0 are sent when the arrival comes, those of a later turn when the last of the turn before has ended.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub turn: u32,
    /// Milliseconds between the end of the turn before and the sending.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub think_ms: u32,
    /// The prompt.
    pub prompt: Vec<Segment>,
    /// Tokens to generate, exactly.
    pub output_tokens: u32,
}

// The signature is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Request {
    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt.iter().map(|segment| segment.tokens).sum()
    }

    /// The request of a workload whose arrivals are single requests.
    fn single(arrival: usize, prompt: Vec<Segment>, output_tokens: u32) -> Self {
        Self { arrival: arrival as u32, turn: 0, think_ms: 0, prompt, output_tokens }
    }
}

/// A workload: what its file's first line says, and its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The first line.
    pub header: Header,
    /// By arrival, then turn.
    pub requests: Vec<Request>,
}

/// What a workload says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Name in tables and records.
    pub name: String,
    /// What it is, for readers: rule and sources.
    pub about: String,
    /// Of everything drawn, the text included.
    pub seed: u32,
    /// Range (end exclusive) of the token ids.
    pub token_ids: [u32; 2],
    /// How many rows of a source were left out, by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub left_out: BTreeMap<String, u64>,
}

/// `format` of a file's first line.
pub const FORMAT: &str = "pat-request-workload";

/// `version` of the files that this crate writes and reads.
pub const VERSION: u32 = 1;

impl Header {
    pub(crate) fn new(name: &str, about: String, seed: u32) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            name: name.into(),
            about,
            seed,
            token_ids: [FIRST_TOKEN, MAX_TOKEN],
            left_out: BTreeMap::new(),
        }
    }

    /// The token ids of a prompt.
    pub fn token_ids(&self, prompt: &[Segment]) -> Vec<u32> {
        let length = prompt.iter().map(|segment| segment.tokens as usize).sum();
        let mut ids = Vec::with_capacity(length);
        for segment in prompt {
            let key = segment_key(self.seed, segment.id);
            ids.extend((0..segment.tokens).map(|offset| token(key, offset, self.token_ids)));
        }
        ids
    }
}

impl Workload {
    /// Number of arrivals.
    pub fn arrivals(&self) -> usize {
        self.requests.last().map_or(0, |request| request.arrival as usize + 1)
    }

    /// Replaces the output length of every request.
    pub fn set_output_tokens(&mut self, tokens: u32) {
        self.requests.iter_mut().for_each(|request| request.output_tokens = tokens);
    }

    /// Leaves out the arrivals of which some request does not fit `max_tokens` tokens of prompt and output, and counts their
    /// requests in the header.
    pub fn leave_out_longer(&mut self, max_tokens: u32) {
        let too_long = |request: &Request| {
            u64::from(request.prompt_tokens()) + u64::from(request.output_tokens) > u64::from(max_tokens)
        };
        let mut dropped: Vec<u32> = self.requests.iter().filter(|r| too_long(r)).map(|r| r.arrival).collect();
        dropped.dedup();
        if dropped.is_empty() {
            return;
        }
        let before = self.requests.len();
        self.requests.retain(|request| dropped.binary_search(&request.arrival).is_err());
        for request in &mut self.requests {
            request.arrival -= dropped.partition_point(|&arrival| arrival < request.arrival) as u32;
        }
        let reason = format!("prompt and output above {max_tokens} tokens");
        *self.header.left_out.entry(reason).or_default() += (before - self.requests.len()) as u64;
    }
}

/// What the tokens of a segment are drawn with: `mix(mix(mix(seed) + low 32 bits of id) + high 32 bits of id)`.
fn segment_key(seed: u32, id: u64) -> u32 {
    mix(mix(mix(seed).wrapping_add(id as u32)).wrapping_add((id >> 32) as u32))
}

/// The token at `offset` of a segment: `first + mix(key + offset) % (end - first)`.
fn token(key: u32, offset: u32, [first, end]: [u32; 2]) -> u32 {
    first + mix(key.wrapping_add(offset)) % (end - first)
}

/// Seconds from the beginning of a run to the arrivals `0, 1, 2, ...` of a Poisson process of `rate` arrivals per second. Gap `i`
/// is `-ln((mix(mix(seed) + i) + 0.5) / 2^32) / rate`: the same pattern at every rate, stretched.
pub fn arrival_times(rate: f64, seed: u32) -> impl Iterator<Item = f64> {
    let key = mix(seed);
    (0u32..).scan(0.0, move |seconds, index| {
        let uniform = (f64::from(mix(key.wrapping_add(index))) + 0.5) / 4_294_967_296.0;
        *seconds -= uniform.ln() / rate;
        Some(*seconds)
    })
}

/// Hands out segment ids.
#[derive(Default)]
struct Ids(u64);

impl Ids {
    /// Text that nothing had before.
    fn fresh(&mut self, tokens: u32) -> Segment {
        self.0 += 1;
        Segment { id: self.0 - 1, tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ids_are_equal_text_and_others_are_not() {
        let header = Header::new("x", String::new(), 7);
        let (a, b) = (Segment { id: 1, tokens: 40 }, Segment { id: 1 << 32, tokens: 40 });
        let ids = header.token_ids(&[a, b, a]);
        assert_eq!(ids[..40], ids[80..]);
        assert_ne!(ids[..40], ids[40..80]);
        assert!(ids.iter().all(|id| (FIRST_TOKEN..MAX_TOKEN).contains(id)));
        let other = Header { seed: 8, ..header.clone() };
        assert_ne!(other.token_ids(&[a]), ids[..40]);
        // Programs in other languages draw the same.
        assert_eq!(header.token_ids(&[Segment { id: (3 << 32) + 5, tokens: 3 }]), GOLDEN);
    }

    #[test]
    fn arrivals_are_poisson() {
        let times: Vec<f64> = arrival_times(10.0, 0).take(20_000).collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.1).abs() < 0.003, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "an exponential's deviation is its mean");
        assert!(gaps.iter().all(|&gap| gap > 0.0));
        let slower: Vec<f64> = arrival_times(5.0, 0).take(3).collect();
        assert!((slower[2] - 2.0 * times[2]).abs() < 1e-12);
        assert_ne!(arrival_times(10.0, 1).next(), Some(times[0]));
    }

    #[test]
    fn what_does_not_fit_is_left_out_by_arrival() {
        let request = |arrival, tokens| Request::single(arrival, vec![Segment { id: 0, tokens }], 10);
        let requests = vec![request(0, 5), request(1, 5), request(1, 91), request(2, 90), request(3, 200)];
        let mut workload = Workload { header: Header::new("x", String::new(), 0), requests };
        workload.leave_out_longer(100);
        let kept: Vec<_> = workload.requests.iter().map(|r| (r.arrival, r.prompt_tokens())).collect();
        assert_eq!(kept, [(0, 5), (1, 90)]);
        assert_eq!(workload.header.left_out["prompt and output above 100 tokens"], 3);
        assert_eq!(workload.arrivals(), 2);
    }

    const GOLDEN: [u32; 3] = [75_554, 27_624, 9_959];
}
