//! Workloads by rule, for what no public trace shows. The lengths are assumptions; every field may be changed.

use super::{Header, Ids, Lengths, PAT_OUTPUT_TOKENS, Request, Segment, Workload};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Reinforcement-learning rollouts: an arrival is one prompt with several samples, which arrive together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rollouts {
    /// Samples of a prompt.
    pub samples: u32,
    /// Tokens of the instruction that all prompts begin with.
    pub instruction_tokens: u32,
    /// Least and largest length of what follows it, the same for all samples of a prompt.
    pub prompt_tokens: [u32; 2],
    /// Least and largest number of output tokens of a sample.
    pub output_tokens: [u32; 2],
}

impl Default for Rollouts {
    fn default() -> Self {
        Self { samples: 16, instruction_tokens: 256, prompt_tokens: [256, 2_048], output_tokens: [256, 1_024] }
    }
}

impl Rollouts {
    /// Draws whole groups of samples, at least `requests` requests.
    pub fn workload(&self, requests: usize, seed: u32) -> Workload {
        let mut draw = Draw::new(seed);
        let instruction = draw.ids.fresh(self.instruction_tokens);
        let mut drawn = Vec::new();
        for arrival in 0..requests.div_ceil(self.samples as usize) {
            let prompt = vec![instruction, draw.segment(self.prompt_tokens)];
            for _ in 0..self.samples {
                drawn.push(Request::single(arrival, prompt.clone(), draw.number(self.output_tokens)));
            }
        }
        let about = format!(
            "rollouts: prompts of {} + {} to {} tokens, {} samples each that arrive together",
            self.instruction_tokens, self.prompt_tokens[0], self.prompt_tokens[1], self.samples
        );
        Workload { header: Header::new("rollouts", about, seed), requests: drawn }
    }
}

/// Agents with turns: an arrival is a session; each turn's prompt is all that was said before and something new, and is sent some time
/// after the turn before has ended. What an agent said stands in later prompts as text of the length that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agents {
    /// Kinds of agent: each has a prompt of its own.
    pub kinds: u32,
    /// Tokens of such a prompt.
    pub prompt_tokens: u32,
    /// Least and largest number of turns.
    pub turns: [u32; 2],
    /// Least and largest length of the task, in the first turn, and of a tool's result, in each later one.
    pub new_tokens: [u32; 2],
    /// Least and largest number of output tokens of a turn.
    pub output_tokens: [u32; 2],
    /// Least and largest time that a tool takes.
    pub think_ms: [u32; 2],
}

impl Default for Agents {
    fn default() -> Self {
        Self {
            kinds: 4,
            prompt_tokens: 4_096,
            turns: [2, 8],
            new_tokens: [100, 1_000],
            output_tokens: [32, 256],
            think_ms: [200, 3_000],
        }
    }
}

impl Agents {
    /// Draws whole sessions, at least `requests` requests.
    pub fn workload(&self, requests: usize, seed: u32) -> Workload {
        let mut draw = Draw::new(seed);
        let kinds: Vec<Segment> = (0..self.kinds).map(|_| draw.ids.fresh(self.prompt_tokens)).collect();
        let mut drawn: Vec<Request> = Vec::new();
        let mut arrival = 0;
        while drawn.len() < requests {
            let mut prompt = vec![kinds[draw.number([0, self.kinds - 1]) as usize]];
            for turn in 0..draw.number(self.turns) {
                prompt.push(draw.segment(self.new_tokens));
                let output_tokens = draw.number(self.output_tokens);
                let think_ms = if turn == 0 { 0 } else { draw.number(self.think_ms) };
                drawn.push(Request { arrival, turn, think_ms, prompt: prompt.clone(), output_tokens });
                prompt.push(draw.ids.fresh(output_tokens));
            }
            arrival += 1;
        }
        let about = format!(
            "agents: sessions of {} to {} turns behind {} prompts of {} tokens",
            self.turns[0], self.turns[1], self.kinds, self.prompt_tokens
        );
        Workload { header: Header::new("agents", about, seed), requests: drawn }
    }
}

/// Generative recommendation: an arrival is a user's history with many beams of very short output, sent as that many requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recommendation {
    /// Beams of a user.
    pub beams: u32,
    /// Tokens of the instruction that all prompts begin with.
    pub instruction_tokens: u32,
    /// Least and largest length of a history.
    pub history_tokens: [u32; 2],
    /// Output tokens of each beam.
    pub output_tokens: u32,
}

impl Default for Recommendation {
    fn default() -> Self {
        Self { beams: 64, instruction_tokens: 128, history_tokens: [1_000, 4_000], output_tokens: 4 }
    }
}

impl Recommendation {
    /// Draws whole users, at least `requests` requests.
    pub fn workload(&self, requests: usize, seed: u32) -> Workload {
        let mut draw = Draw::new(seed);
        let instruction = draw.ids.fresh(self.instruction_tokens);
        let mut drawn = Vec::new();
        for arrival in 0..requests.div_ceil(self.beams as usize) {
            let prompt = vec![instruction, draw.segment(self.history_tokens)];
            drawn.extend((0..self.beams).map(|_| Request::single(arrival, prompt.clone(), self.output_tokens)));
        }
        let about = format!(
            "generative recommendation: histories of {} to {} tokens, {} beams of {} tokens each",
            self.history_tokens[0], self.history_tokens[1], self.beams, self.output_tokens
        );
        Workload { header: Header::new("recommendation", about, seed), requests: drawn }
    }
}

/// Nothing is shared: prompts as long as those of the conversation, each its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Unshared {
    /// Tokens of every prompt.
    pub prompt_tokens: u32,
    /// Tokens on top of these.
    pub more: Lengths,
}

impl Unshared {
    /// Draws `requests` requests, or as many as there are lengths.
    pub fn workload(&self, requests: usize, seed: u32) -> Workload {
        let mut draw = Draw::new(seed);
        let mut drawn = Vec::new();
        for index in 0..requests {
            let Some(more) = self.more.draw(index, &mut draw.rng) else { break };
            drawn.push(Request::single(index, vec![draw.ids.fresh(self.prompt_tokens + more)], PAT_OUTPUT_TOKENS));
        }
        let about = format!("nothing shared: prompts of {} tokens and more; {}", self.prompt_tokens, self.more.about());
        Workload { header: Header::new("unshared", about, seed), requests: drawn }
    }
}

/// What the rules draw with.
struct Draw {
    rng: ChaCha8Rng,
    ids: Ids,
}

impl Draw {
    fn new(seed: u32) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(u64::from(seed)), ids: Ids::default() }
    }

    fn number(&mut self, [least, largest]: [u32; 2]) -> u32 {
        self.rng.random_range(least..=largest)
    }

    fn segment(&mut self, range: [u32; 2]) -> Segment {
        let tokens = self.number(range);
        self.ids.fresh(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Summary;
    use super::*;

    #[test]
    fn samples_and_beams_arrive_together() {
        let rollouts = Rollouts::default().workload(100, 0);
        assert_eq!((rollouts.requests.len(), rollouts.arrivals()), (112, 7));
        let group = &rollouts.requests[..16];
        assert!(group.iter().all(|request| request.prompt == group[0].prompt && request.arrival == 0));
        assert_ne!(rollouts.requests[16].prompt, group[0].prompt);
        assert!(group.iter().any(|request| request.output_tokens != group[0].output_tokens));
        let beams = Recommendation::default().workload(128, 0);
        assert_eq!((beams.requests.len(), beams.arrivals()), (128, 2));
        assert!(Summary::of(&beams).reused > 0.98);
    }

    #[test]
    fn a_turn_repeats_what_was_said_and_adds_to_it() {
        let agents = Agents::default().workload(500, 0);
        let mut turns = 0;
        for pair in agents.requests.windows(2).filter(|pair| pair[1].turn > 0) {
            let [before, after] = pair else { unreachable!("windows of two") };
            assert_eq!(after.arrival, before.arrival);
            assert!(after.prompt.starts_with(&before.prompt));
            assert_eq!(after.prompt.len(), before.prompt.len() + 2);
            assert_eq!(after.prompt[before.prompt.len()].tokens, before.output_tokens);
            assert!((200..=3_000).contains(&after.think_ms));
            turns += 1;
        }
        assert!(turns > 300, "{turns}");
    }

    #[test]
    fn nothing_is_shared_where_that_is_asked_for() {
        let unshared = Unshared { prompt_tokens: 2_522, more: Lengths::of_mean(740.0) }.workload(300, 0);
        let summary = Summary::of(&unshared);
        assert_eq!((summary.reused, summary.together), (0.0, 1.0));
    }
}
