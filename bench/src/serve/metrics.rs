//! The figures of a run, by the names that PAT's records have. `docs/serving.md` defines them; `bench/serve/metrics.py` has the same.

use super::client::{Failure, FailureKind};
use super::load::{Run, Sent};
use crate::statistics::quantile;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The service that goodput is counted at, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Time to the first token.
    pub ttft_ms: f64,
    /// Time per further token.
    pub tpot_ms: f64,
}

/// The limits of capacity and goodput.
pub const LIMITS: [Limit; 2] = [Limit { ttft_ms: 1_000.0, tpot_ms: 100.0 }, Limit { ttft_ms: 1_000.0, tpot_ms: 50.0 }];

/// What a run comes to.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// PAT's metrics.
    pub metrics: Map<String, Value>,
    /// Requests that met each of [`LIMITS`], per second.
    pub goodput: Vec<(Limit, f64)>,
    /// Requests sent.
    pub sent: usize,
    /// Requests measured.
    pub measured: usize,
    /// Failures of measured requests by kind: how many, and what one of them said.
    pub failures: BTreeMap<FailureKind, (usize, String)>,
    /// By how much a request was sent too late, at most, in milliseconds: what the client adds to the server's times.
    pub client_late_ms: f64,
}

/// Times of a request that ended well, in seconds.
struct Times {
    ttft: f64,
    /// Of requests with two or more tokens.
    tpot: Option<f64>,
    end_to_end: f64,
}

impl Times {
    fn of(sent: &Sent, tokens: u32) -> Option<Self> {
        let (first, last) = (*sent.chunks.first()?, *sent.chunks.last()?);
        let tpot = (tokens > 1).then(|| (last - first) / f64::from(tokens - 1));
        Some(Self { ttft: first - sent.due, tpot, end_to_end: last - sent.due })
    }

    fn meets(&self, limit: Limit) -> bool {
        1e3 * self.ttft <= limit.ttft_ms && self.tpot.is_none_or(|tpot| 1e3 * tpot <= limit.tpot_ms)
    }
}

impl Summary {
    /// Of a run. Only measured requests that ended well have times; failures are counted.
    pub fn of(run: &Run) -> Self {
        let mut failures: BTreeMap<FailureKind, (usize, String)> = BTreeMap::new();
        let (mut times, mut gaps) = (Vec::new(), Vec::new());
        let (mut measured, mut input_tokens, mut output_tokens) = (0, 0u64, 0u64);
        for sent in run.sent.iter().filter(|sent| sent.measured) {
            measured += 1;
            let outcome = sent.outcome.clone().and_then(|tokens| match Times::of(sent, tokens) {
                Some(times) => Ok((tokens, times)),
                None => Err(Failure { kind: FailureKind::NotACompletion, detail: "no chunk had a choice".into() }),
            });
            match outcome {
                Ok((tokens, of_request)) => {
                    times.push(of_request);
                    gaps.extend(sent.chunks.windows(2).map(|pair| pair[1] - pair[0]));
                    input_tokens += u64::from(sent.prompt_tokens);
                    output_tokens += u64::from(tokens);
                }
                Err(failure) => failures.entry(failure.kind).or_insert((0, failure.detail)).0 += 1,
            }
        }
        let seconds = run.window.measured;
        let (ended, ended_input, streamed) = in_window(run);
        let mut metrics = Map::new();
        let mut set = |name: &str, value: Value| metrics.insert(name.into(), value);
        set("successful_requests", json!(times.len()));
        set("benchmark_duration", json!(run.seconds));
        set("total_input_tokens", json!(input_tokens));
        set("total_generated_tokens", json!(output_tokens));
        set("request_throughput", json!(ended as f64 / seconds));
        set("output_token_throughput", json!(streamed / seconds));
        set("total_token_throughput", json!((streamed + ended_input as f64) / seconds));
        for (name, mut values) in [
            ("ttft", times.iter().map(|times| times.ttft).collect::<Vec<_>>()),
            ("tpot", times.iter().filter_map(|times| times.tpot).collect()),
            ("itl", gaps),
            ("e2el", times.iter().map(|times| times.end_to_end).collect()),
        ] {
            values.sort_by(f64::total_cmp);
            let figure = |value: f64| if values.is_empty() { Value::Null } else { json!(1e3 * value) };
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            set(&format!("mean_{name}_ms"), figure(mean));
            set(&format!("median_{name}_ms"), figure(quantile(&values, 0.5)));
            set(&format!("p99_{name}_ms"), figure(quantile(&values, 0.99)));
        }
        let met = |limit| times.iter().filter(|times| times.meets(limit)).count() as f64 / seconds;
        let late = run.sent.iter().map(|sent| 1e3 * (sent.sent - sent.due)).fold(0.0, f64::max);
        Self {
            metrics,
            goodput: LIMITS.map(|limit| (limit, met(limit))).to_vec(),
            sent: run.sent.len(),
            measured,
            failures,
            client_late_ms: late,
        }
    }

    /// Failures of measured requests.
    pub fn failed(&self) -> usize {
        self.failures.values().map(|(count, _)| count).sum()
    }
}

/// What all requests, measured or not, did in the window: how many ended well there, their prompt tokens, and the output tokens that
/// came there.
fn in_window(run: &Run) -> (u64, u64, f64) {
    let (mut ended, mut input, mut streamed) = (0, 0, 0.0);
    for sent in &run.sent {
        let inside = sent.chunks.iter().filter(|&&at| run.window.holds(at)).count() as f64;
        // A chunk may hold several tokens; without usage, of a request that has not ended, it counts as one.
        let tokens_per_chunk =
            sent.outcome.as_ref().map_or(1.0, |&tokens| f64::from(tokens) / sent.chunks.len() as f64);
        if inside > 0.0 {
            streamed += inside * tokens_per_chunk;
        }
        if sent.outcome.is_ok() && sent.ended.is_some_and(|at| run.window.holds(at)) {
            ended += 1;
            input += u64::from(sent.prompt_tokens);
        }
    }
    (ended, input, streamed)
}

#[cfg(test)]
mod tests {
    use super::super::load::Window;
    use super::*;

    fn sent(due: f64, chunks: &[f64], outcome: Result<u32, FailureKind>) -> Sent {
        Sent {
            due,
            sent: due + 0.001,
            measured: (1.0..3.0).contains(&due),
            prompt_tokens: 100,
            chunks: chunks.to_vec(),
            ended: chunks.last().copied(),
            outcome: outcome.map_err(|kind| Failure { kind, detail: "why".into() }),
        }
    }

    fn run(sent: Vec<Sent>) -> Summary {
        let window = Window { warm_up: 1.0, measured: 2.0, first_token: 9.0, limit: 9.0 };
        Summary::of(&Run { sent, window, seconds: 5.0, given_up: None, exhausted: false })
    }

    fn metric(summary: &Summary, name: &str) -> f64 {
        summary.metrics[name].as_f64().expect("a number")
    }

    #[test]
    fn figures_are_of_measured_requests_that_ended_well() {
        let summary = run(vec![
            sent(0.5, &[0.9, 1.1], Ok(2)),
            sent(1.0, &[1.5, 1.6, 1.7], Ok(3)),
            sent(2.0, &[4.5, 5.3], Ok(5)),
            sent(2.5, &[2.6], Err(FailureKind::CutOff)),
            sent(2.6, &[], Err(FailureKind::CutOff)),
        ]);
        assert_eq!((summary.sent, summary.measured, summary.failed()), (5, 4, 2));
        assert_eq!(summary.failures[&FailureKind::CutOff], (2, "why".into()));
        assert_eq!(metric(&summary, "successful_requests"), 2.0);
        assert!((metric(&summary, "mean_ttft_ms") - 1500.0).abs() < 1e-6, "0.5 s and 2.5 s");
        assert!((metric(&summary, "mean_tpot_ms") - 150.0).abs() < 1e-6, "0.2 s over 2 tokens, 0.8 s over 4");
        assert!((metric(&summary, "p99_tpot_ms") - 199.0).abs() < 1e-6);
        assert!((metric(&summary, "median_e2el_ms") - 2000.0).abs() < 1e-6);
        assert!((metric(&summary, "median_itl_ms") - 100.0).abs() < 1e-6);
        // In the window of 2 s: one token of the first request, three of the second, one of the fourth.
        assert!((metric(&summary, "output_token_throughput") - 2.5).abs() < 1e-9);
        assert_eq!(metric(&summary, "request_throughput"), 1.0);
        assert_eq!(summary.goodput.iter().map(|(_, rate)| *rate).collect::<Vec<_>>(), [0.5, 0.0]);
        assert!((summary.client_late_ms - 1.0).abs() < 1e-6);
    }

    #[test]
    fn without_a_good_request_there_are_no_times() {
        let summary = run(vec![sent(1.5, &[], Ok(1))]);
        assert!(summary.metrics["mean_ttft_ms"].is_null() && summary.metrics["p99_itl_ms"].is_null());
        assert_eq!(summary.failures[&FailureKind::NotACompletion].0, 1);
    }
}
