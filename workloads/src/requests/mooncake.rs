//! Workloads of block-hash traces: Mooncake's and their like.

use super::{Header, Ids, PAT_MAX_TOKENS, PAT_OUTPUT_TOKENS, Request, Segment, Workload};
use serde::Deserialize;
use std::collections::HashMap;
use std::io::BufRead;

/// How a trace becomes a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockTrace {
    /// Name of the workload.
    pub name: String,
    /// Tokens of a hash id.
    pub block_tokens: u32,
    /// Whether rows are chosen and cut as PAT does: whole blocks that together with the row's output have at most 7,800 tokens,
    /// without the rows whose first id is 0, 256 output tokens each. Else rows are taken as they are.
    pub pat_filter: bool,
    /// Requests to take.
    pub requests: usize,
}

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadTraceError {
    /// Reading failed.
    ///
    /// Fix: check the file; a trace is UTF-8 text.
    #[error("trace line {line}: {source}")]
    Io {
        /// Line, from 1.
        line: usize,
        /// The system's message.
        source: std::io::Error,
    },
    /// The file is compressed.
    ///
    /// Fix: unpack the file with `gunzip` first.
    #[error("the trace is compressed by gzip, expected JSON lines: gunzip it first")]
    Gzip,
    /// A line is no row of a trace.
    ///
    /// Fix: correct the line; if the number of ids is wrong, give the size of the trace's blocks by `--trace-block`.
    #[error("trace line {line}: {problem}")]
    Row {
        /// Line, from 1.
        line: usize,
        /// What and what is accepted.
        problem: String,
    },
    /// No row is left.
    ///
    /// Fix: use a trace whose rows the workload takes; the message counts why rows were left out.
    #[error("the trace has no row that is taken ({0}), expected at least 1")]
    Empty(String),
}

#[derive(Deserialize)]
struct Row {
    // Some writers have 513.0 for 513.
    input_length: f64,
    output_length: f64,
    hash_ids: Vec<u64>,
}

impl BlockTrace {
    /// Reads the trace as far as needed. The text behind the last hash id, and what a row's ids do not cover, is its own.
    ///
    /// # Errors
    /// See [`ReadTraceError`].
    pub fn workload(&self, mut trace: impl BufRead, seed: u32) -> Result<Workload, ReadTraceError> {
        let begin = trace.fill_buf().map_err(|source| ReadTraceError::Io { line: 1, source })?;
        if begin.starts_with(&[0x1f, 0x8b]) {
            return Err(ReadTraceError::Gzip);
        }
        let about = if self.pat_filter {
            format!(
                "block-hash trace, rows filtered and cut to whole blocks as PAT does, {PAT_OUTPUT_TOKENS} output tokens each"
            )
        } else {
            "block-hash trace, lengths as in the file".into()
        };
        let mut header = Header::new(&self.name, about, seed);
        let (mut ids, mut blocks) = (Ids::default(), HashMap::new());
        let mut requests = Vec::new();
        for (index, text) in trace.lines().enumerate() {
            if requests.len() == self.requests {
                break;
            }
            let line = index + 1;
            let text = text.map_err(|source| ReadTraceError::Io { line, source })?;
            if text.trim().is_empty() {
                continue;
            }
            let refuse = |problem| ReadTraceError::Row { line, problem };
            let row: Row = serde_json::from_str(&text).map_err(|error| {
                refuse(format!("{error} (expected {{\"input_length\", \"output_length\", \"hash_ids\"}})"))
            })?;
            let [input, output] = [("input_length", row.input_length), ("output_length", row.output_length)].map(whole);
            let (input, output) = (input.map_err(refuse)?, output.map_err(refuse)?);
            let covered = row.hash_ids.len() as u64 * u64::from(self.block_tokens);
            if covered >= u64::from(input) + u64::from(self.block_tokens) {
                return Err(refuse(format!(
                    "hash_ids: got {} ids of {} tokens, expected at most {} for input_length = {input}",
                    row.hash_ids.len(),
                    self.block_tokens,
                    input.div_ceil(self.block_tokens)
                )));
            }
            if let Some(reason) = self.reason_to_leave_out(input, output, &row.hash_ids) {
                *header.left_out.entry(reason).or_default() += 1;
                continue;
            }
            let whole_blocks = row.hash_ids.len().min((input / self.block_tokens) as usize);
            let mut prompt: Vec<Segment> = row.hash_ids[..whole_blocks]
                .iter()
                .map(|&hash| *blocks.entry(hash).or_insert_with(|| ids.fresh(self.block_tokens)))
                .collect();
            let rest = input - whole_blocks as u32 * self.block_tokens;
            if rest > 0 && !self.pat_filter {
                prompt.push(ids.fresh(rest));
            }
            let output = if self.pat_filter { PAT_OUTPUT_TOKENS } else { output };
            requests.push(Request::single(requests.len(), prompt, output));
        }
        if requests.is_empty() {
            let reasons: Vec<_> =
                header.left_out.iter().map(|(reason, count)| format!("{count} left out: {reason}")).collect();
            return Err(ReadTraceError::Empty(if reasons.is_empty() {
                "it is empty".into()
            } else {
                reasons.join("; ")
            }));
        }
        Ok(Workload { header, requests })
    }

    fn reason_to_leave_out(&self, input: u32, output: u32, hash_ids: &[u64]) -> Option<String> {
        if input == 0 || output == 0 {
            return Some("0 tokens of input or output".into());
        }
        if !self.pat_filter {
            return None;
        }
        let cut = input / self.block_tokens * self.block_tokens;
        if hash_ids.first() == Some(&0) {
            return Some("first hash id 0".into());
        }
        if cut == 0 || hash_ids.is_empty() {
            return Some("no whole block".into());
        }
        let tokens = u64::from(cut) + u64::from(output);
        (tokens > u64::from(PAT_MAX_TOKENS)).then(|| format!("whole blocks and output above {PAT_MAX_TOKENS} tokens"))
    }
}

/// A number of tokens.
fn whole((field, value): (&str, f64)) -> Result<u32, String> {
    let fits = value.fract() == 0.0 && (0.0..f64::from(1 << 24)).contains(&value);
    fits.then_some(value as u32).ok_or_else(|| format!("{field}: got {value}, expected a whole number below 2^24"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(pat_filter: bool) -> BlockTrace {
        BlockTrace { name: "x".into(), block_tokens: 512, pat_filter, requests: 5_000 }
    }

    const ROWS: &str = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [18446744073709551615, 4, 5]}
{"input_length": 1024.0, "output_length": 500, "hash_ids": [18446744073709551615, 7]}

{"input_length": 0, "output_length": 2, "hash_ids": []}
{"input_length": 900, "output_length": 2, "hash_ids": [0, 8]}
{"input_length": 7700, "output_length": 300, "hash_ids": [3, 8]}
{"input_length": 100, "output_length": 3, "hash_ids": [11]}
"#;

    #[test]
    fn blocks_are_shared_and_rests_are_private() {
        let workload = trace(false).workload(ROWS.as_bytes(), 0).expect("readable");
        let lengths: Vec<Vec<u32>> =
            workload.requests.iter().map(|r| r.prompt.iter().map(|segment| segment.tokens).collect()).collect();
        assert_eq!(lengths, [vec![512, 512, 76], vec![512, 512], vec![512, 388], vec![512, 512, 6676], vec![100]]);
        let prompts: Vec<_> = workload.requests.iter().map(|request| &request.prompt).collect();
        assert_eq!(prompts[0][0], prompts[1][0]);
        assert_ne!(prompts[0][1], prompts[1][1]);
        assert_eq!(workload.requests[1].output_tokens, 500);
        assert_eq!(workload.header.left_out["0 tokens of input or output"], 1);
        let one = BlockTrace { requests: 1, ..trace(false) }.workload(ROWS.as_bytes(), 0).expect("readable");
        assert_eq!(one.requests.len(), 1);
    }

    #[test]
    fn rows_are_chosen_and_cut_as_pat_does() {
        let workload = trace(true).workload(ROWS.as_bytes(), 0).expect("readable");
        let tokens: Vec<_> = workload.requests.iter().map(|r| (r.prompt_tokens(), r.output_tokens)).collect();
        assert_eq!(tokens, [(1024, 256), (1024, 256)]);
        let left_out: Vec<_> = workload.header.left_out.values().copied().collect();
        assert_eq!(left_out, [1, 1, 1, 1], "{:?}", workload.header.left_out);
    }

    #[test]
    fn errors_name_line_and_field() {
        for (text, part) in [
            ("", "it is empty"),
            ("\u{1f}\u{8b}", "trace line 1"),
            ("{}", "trace line 1: missing field `input_length`"),
            (r#"{"input_length": 5.5, "output_length": 1, "hash_ids": [1]}"#, "input_length: got 5.5"),
            (r#"{"input_length": 512, "output_length": -1, "hash_ids": [1]}"#, "output_length: got -1"),
            (
                r#"{"input_length": 512, "output_length": 1, "hash_ids": [1, 2]}"#,
                "hash_ids: got 2 ids of 512 tokens, expected at most 1",
            ),
            (r#"{"input_length": 512, "output_length": 0, "hash_ids": [1]}"#, "1 left out: 0 tokens"),
        ] {
            let message = trace(false).workload(text.as_bytes(), 0).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
        let message = trace(false).workload(&[0x1f, 0x8b, 8][..], 0).expect_err("gzip").to_string();
        assert!(message.contains("gunzip"), "{message}");
    }
}
