//! What a workload amounts to.

use super::{Request, Workload};
use std::collections::HashMap;

/// Requests that decode together, for [`Summary::together`].
const CO_RESIDENT: usize = 64;

/// Figures of a workload.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Requests.
    pub requests: usize,
    /// Arrivals.
    pub arrivals: usize,
    /// Of the prompts.
    pub prompt_tokens: Spread,
    /// Of the outputs.
    pub output_tokens: Spread,
    /// Tokens of all prompts.
    pub total_prompt_tokens: u64,
    /// Tokens of the prompts when text in common is counted once.
    pub distinct_prompt_tokens: u64,
    /// Part of the prompt tokens that some request before has too, as a prefix: what an unlimited prefix cache saves.
    pub reused: f64,
    /// Prompt tokens of 64 consecutive requests over their distinct ones, in the mean over such stretches.
    pub together: f64,
}

/// Least, mean and largest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Least.
    pub least: u32,
    /// Mean.
    pub mean: f64,
    /// Largest.
    pub largest: u32,
}

impl Spread {
    fn of(values: impl Iterator<Item = u32> + Clone) -> Self {
        let sum: u64 = values.clone().map(u64::from).sum();
        Self {
            least: values.clone().min().unwrap_or(0),
            mean: sum as f64 / values.clone().count().max(1) as f64,
            largest: values.max().unwrap_or(0),
        }
    }
}

impl Summary {
    /// Of a workload.
    pub fn of(workload: &Workload) -> Self {
        let requests = &workload.requests;
        let total: u64 = requests.iter().map(|request| u64::from(request.prompt_tokens())).sum();
        let distinct = distinct_tokens(requests);
        let stretches = requests.chunks(CO_RESIDENT.min(requests.len().max(1)));
        let (mut logical, mut unique) = (0, 0);
        for stretch in stretches {
            logical += stretch.iter().map(|request| u64::from(request.prompt_tokens())).sum::<u64>();
            unique += distinct_tokens(stretch);
        }
        Self {
            requests: requests.len(),
            arrivals: workload.arrivals(),
            prompt_tokens: Spread::of(requests.iter().map(Request::prompt_tokens)),
            output_tokens: Spread::of(requests.iter().map(|request| request.output_tokens)),
            total_prompt_tokens: total,
            distinct_prompt_tokens: distinct,
            reused: if total == 0 { 0.0 } else { 1.0 - distinct as f64 / total as f64 },
            together: if unique == 0 { 1.0 } else { logical as f64 / unique as f64 },
        }
    }
}

/// Tokens when text in common is counted once: text is in common where all before it is, too.
fn distinct_tokens(requests: &[Request]) -> u64 {
    // Nodes of the tree of prompts by their parent and segment; 0 is the root.
    let mut nodes = HashMap::new();
    let mut tokens = 0;
    for request in requests {
        let mut node = 0;
        for segment in &request.prompt {
            let next = nodes.len() + 1;
            node = *nodes.entry((node, segment.id)).or_insert_with(|| {
                tokens += u64::from(segment.tokens);
                next
            });
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::super::{Header, Segment};
    use super::*;

    #[test]
    fn text_in_common_counts_once_where_all_before_it_is_in_common() {
        let prompts: [&[(u64, u32)]; 4] =
            [&[(0, 100), (1, 10)], &[(0, 100), (2, 20)], &[(3, 5), (1, 10)], &[(0, 100), (1, 10)]];
        let requests = prompts
            .iter()
            .enumerate()
            .map(|(index, prompt)| Request::single(index, prompt.iter().copied().map(Segment::from).collect(), 7));
        let workload = Workload { header: Header::new("x", String::new(), 0), requests: requests.collect() };
        let summary = Summary::of(&workload);
        assert_eq!((summary.total_prompt_tokens, summary.distinct_prompt_tokens), (355, 145));
        assert_eq!(summary.prompt_tokens, Spread { least: 15, mean: 88.75, largest: 120 });
        assert!((summary.together - 355.0 / 145.0).abs() < 1e-12);
    }
}
