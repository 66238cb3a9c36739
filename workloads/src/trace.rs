//! Decode batches cut from a request trace in Mooncake's format (`docs/trace-format.md`; FAST'25, "Mooncake: A KVCache-centric
//! Disaggregated Architecture for LLM Serving"): one JSON object per line with `input_length`, `output_length` (tokens) and
//! `hash_ids`, the prefix-chained hashes of the prompt's blocks. Equal ids mean an equal prefix up to there. Other fields are
//! passed over: a cut needs no time stamp.
//!
//! A batch is `batch_size` consecutive requests, each having generated `step` tokens (at most its `output_length`). A page that
//! lies in whole blocks is shared by all requests with the same blocks up to its end; the rest of a prompt and the generated
//! tokens live in pages of the sequence's own.

use crate::OwnedBatch;
use serde::{Deserialize, Deserializer};
use std::collections::HashMap;
use std::io::BufRead;

/// Tokens per hash id in Mooncake's own traces.
pub const MOONCAKE_BLOCK_TOKENS: u32 = 512;

/// Which requests of a trace, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceCut {
    /// Requests to skip.
    pub first_request: usize,
    /// Requests that decode together.
    pub batch_size: usize,
    /// Tokens each request has generated; a request whose output is shorter has generated all of it.
    pub step: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Tokens per hash id of the trace.
    pub block_tokens: u32,
}

/// Why a trace cannot be cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
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
    /// A line is not a request.
    ///
    /// Fix: write one JSON object per line as docs/trace-format.md shows it.
    #[error("trace line {line}: {source} (expected {{\"input_length\", \"output_length\", \"hash_ids\"}})")]
    Line {
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A request contradicts itself.
    ///
    /// Fix: give the size of the trace's blocks by `--trace-block` if it is not the one in the message; otherwise
    /// correct the line.
    #[error("trace line {line}: {problem}")]
    Request {
        /// Line, from 1.
        line: usize,
        /// What and what is accepted.
        problem: String,
    },
    /// The cut cannot be made of this trace.
    ///
    /// Fix: ask for requests that the trace has, by `--batch` and `--first-request`.
    #[error("{argument}: got {got}, expected {expected}")]
    Cut {
        /// The field of [`TraceCut`].
        argument: &'static str,
        /// What it is.
        got: String,
        /// What is accepted.
        expected: String,
    },
}

#[derive(Deserialize)]
struct Request {
    #[serde(deserialize_with = "tokens")]
    input_length: u32,
    #[serde(deserialize_with = "tokens")]
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// A number of tokens; some writers make `513.0` of it.
fn tokens<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = f64::deserialize(deserializer)?;
    if number.fract() == 0.0 && (0.0..f64::from(1u32 << 30)).contains(&number) {
        Ok(number as u32)
    } else {
        Err(serde::de::Error::custom(format!("got {number} tokens, expected a whole number from 0 to below 2^30")))
    }
}

/// Number of requests of a trace, which are not looked at.
///
/// # Errors
/// [`TraceError::Io`] and [`TraceError::Gzip`].
pub fn count_requests(mut trace: impl BufRead) -> Result<usize, TraceError> {
    refuse_gzip(&mut trace)?;
    let mut requests = 0;
    for (index, text) in trace.lines().enumerate() {
        let text = text.map_err(|source| TraceError::Io { line: index + 1, source })?;
        requests += usize::from(!text.trim().is_empty());
    }
    Ok(requests)
}

fn refuse_gzip(trace: &mut impl BufRead) -> Result<(), TraceError> {
    let begin = trace.fill_buf().map_err(|source| TraceError::Io { line: 1, source })?;
    if begin.starts_with(&[0x1f, 0x8b]) { Err(TraceError::Gzip) } else { Ok(()) }
}

impl TraceCut {
    /// Reads the trace as far as the cut needs it, line by line.
    ///
    /// # Errors
    /// See [`TraceError`].
    pub fn batch(&self, mut trace: impl BufRead) -> Result<OwnedBatch, TraceError> {
        let counts = [("page_size", self.page_size), ("block_tokens", self.block_tokens)];
        for (argument, got) in counts.map(|(name, value)| (name, u64::from(value))) {
            self.require(argument, got)?;
        }
        self.require("batch_size", self.batch_size as u64)?;
        refuse_gzip(&mut trace)?;
        let mut pool =
            Pool { page_size: self.page_size, block_tokens: self.block_tokens, next_page: 0, pages: HashMap::new() };
        let mut batch =
            OwnedBatch { page_size: self.page_size, num_pages: 0, lengths: Vec::new(), block_tables: Vec::new() };
        let mut requests = 0;
        for (index, text) in trace.lines().enumerate() {
            let line = index + 1;
            let text = text.map_err(|source| TraceError::Io { line, source })?;
            if text.trim().is_empty() {
                continue;
            }
            let request: Request = serde_json::from_str(&text).map_err(|source| TraceError::Line { line, source })?;
            requests += 1;
            if requests <= self.first_request {
                continue;
            }
            let (length, table) =
                pool.place(&request, self.step).map_err(|problem| TraceError::Request { line, problem })?;
            batch.lengths.push(length);
            batch.block_tables.push(table);
            if batch.lengths.len() == self.batch_size {
                batch.num_pages = pool.next_page;
                return Ok(batch);
            }
        }
        if self.first_request > 0 && self.first_request >= requests {
            return Err(TraceError::Cut {
                argument: "first_request",
                got: self.first_request.to_string(),
                expected: format!("less than {requests}, the number of the trace's requests"),
            });
        }
        Err(TraceError::Cut {
            argument: "batch_size",
            got: format!("{} from request {} on", self.batch_size, self.first_request),
            expected: format!(
                "at most {} (the trace has {requests} requests)",
                requests.saturating_sub(self.first_request)
            ),
        })
    }

    fn require(&self, argument: &'static str, got: u64) -> Result<(), TraceError> {
        match got {
            0 => Err(TraceError::Cut { argument, got: "0".into(), expected: "at least 1".into() }),
            _ => Ok(()),
        }
    }
}

/// Hands out pages; remembers those that lie in whole blocks.
struct Pool {
    page_size: u32,
    block_tokens: u32,
    next_page: u32,
    /// By the id of the block that a page ends in, which stands for everything before it too, and the page's index.
    pages: HashMap<(u64, u32), u32>,
}

impl Pool {
    fn place(&mut self, request: &Request, step: u32) -> Result<(u32, Vec<u32>), String> {
        let Request { input_length, output_length, ref hash_ids } = *request;
        let blocks = input_length.div_ceil(self.block_tokens) as usize;
        if hash_ids.len() != blocks {
            return Err(format!(
                "hash_ids: got {} ids, expected {blocks} for input_length = {input_length} in blocks of {} tokens{}",
                hash_ids.len(),
                self.block_tokens,
                fitting_blocks(input_length, hash_ids.len())
            ));
        }
        let length =
            input_length.checked_add(step.min(output_length)).filter(|&length| length < 1 << 30).ok_or_else(|| {
                format!("input_length: got {input_length} and what was generated, expected less than 2^30")
            })?;
        let in_whole_blocks = input_length / self.block_tokens * self.block_tokens;
        let mut table = Vec::with_capacity(length.div_ceil(self.page_size) as usize);
        for page in 0..in_whole_blocks / self.page_size {
            let last_token = (page + 1) * self.page_size - 1;
            let key = (hash_ids[(last_token / self.block_tokens) as usize], page);
            let id = match self.pages.get(&key) {
                Some(&id) => id,
                None => {
                    let id = self.allocate(1)?;
                    self.pages.insert(key, id);
                    id
                }
            };
            table.push(id);
        }
        let tail_pages = length.div_ceil(self.page_size) - table.len() as u32;
        let first = self.allocate(tail_pages)?;
        table.extend(first..first + tail_pages);
        Ok((length, table))
    }

    fn allocate(&mut self, pages: u32) -> Result<u32, String> {
        let first = self.next_page;
        self.next_page = first
            .checked_add(pages)
            .filter(|&end| end < 1 << 31)
            .ok_or("hash_ids: the pool would need 2^31 pages, expected fewer".to_owned())?;
        Ok(first)
    }
}

/// In words, the block size that would explain the number of ids, if a power of two does.
fn fitting_blocks(input_length: u32, ids: usize) -> String {
    let powers = (0..20).map(|exponent| 1u32 << exponent);
    let mut fitting = powers.filter(|&block| input_length.div_ceil(block) as usize == ids);
    fitting.next_back().map_or_else(String::new, |block| format!(" ({ids} ids would be blocks of {block})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3, "input_length": 1024, "output_length": 500, "hash_ids": [0, 7]}

{"timestamp": 9, "input_length": 10, "output_length": 20, "hash_ids": [9]}
"#;

    fn cut(batch_size: usize, step: u32) -> TraceCut {
        TraceCut { first_request: 0, batch_size, step, page_size: 128, block_tokens: MOONCAKE_BLOCK_TOKENS }
    }

    #[test]
    fn blocks_are_shared_and_tails_are_private() {
        let batch = cut(3, 30).batch(TRACE.as_bytes()).expect("a batch");
        assert_eq!(batch.lengths, [1105, 1054, 30]);
        assert_eq!(batch.block_tables[0], [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(batch.block_tables[1], [0, 1, 2, 3, 9, 10, 11, 12, 13]);
        assert_eq!(batch.block_tables[2], [14]);
        assert_eq!(batch.num_pages, 15);
        batch.view(&batch.rows()).expect("valid");
        let later = TraceCut { first_request: 1, ..cut(1, 0) }.batch(TRACE.as_bytes()).expect("a batch");
        assert_eq!(later.lengths, [1024]);
    }

    #[test]
    fn pages_are_shared_whatever_their_size_and_that_of_blocks() {
        // 40 equal tokens in blocks of 16: two whole blocks are equal, the third ends in both prompts before it is full.
        let line = |tail: u32| {
            format!(
                r#"{{"input_length": 40.0, "output_length": 9, "hash_ids": [7, 99999999999, {tail}], "delay": 850.0}}"#
            )
        };
        let trace = [line(5), line(6)].join("\n");
        for (page_size, shared) in [(1, 32), (5, 6), (16, 2), (24, 1), (32, 1), (33, 0), (64, 0)] {
            let cut = TraceCut { page_size, block_tokens: 16, ..cut(2, 3) };
            let batch = cut.batch(trace.as_bytes()).expect("a batch");
            assert_eq!(batch.lengths, [43, 43]);
            batch.view(&batch.rows()).expect("valid");
            let tables = &batch.block_tables;
            let common = tables[0].iter().zip(&tables[1]).take_while(|(a, b)| a == b).count();
            assert_eq!(common, shared, "pages of {page_size}");
            assert_eq!(batch.unique_pages(), batch.num_pages as usize);
        }
    }

    #[test]
    fn requests_without_tokens_are_rows_of_length_0() {
        let trace = r#"{"timestamp": 0, "input_length": 0, "output_length": 0, "hash_ids": []}"#;
        let batch = cut(1, 5).batch(trace.as_bytes()).expect("a batch");
        assert_eq!((batch.lengths, batch.block_tables), (vec![0], vec![vec![]]));
        assert_eq!(count_requests(TRACE.as_bytes()).expect("readable"), 3);
    }

    #[test]
    fn errors_name_line_or_argument() {
        let short = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0]}"#;
        for (trace, cut, part) in [
            (format!("{TRACE}oops"), cut(4, 0), "trace line 5"),
            (
                short.into(),
                cut(1, 0),
                "trace line 1: hash_ids: got 1 ids, expected 3 for input_length = 1100 in blocks of 512 tokens \
                 (1 ids would be blocks of",
            ),
            (TRACE.into(), cut(4, 0), "the trace has 3 requests"),
            (TRACE.into(), cut(0, 0), "batch_size: got 0"),
            (TRACE.into(), TraceCut { page_size: 0, ..cut(1, 0) }, "page_size: got 0"),
            (TRACE.into(), TraceCut { block_tokens: 0, ..cut(1, 0) }, "block_tokens: got 0"),
            (TRACE.into(), TraceCut { first_request: 3, ..cut(1, 0) }, "first_request: got 3, expected less than 3"),
            (TRACE.replace("1100", "1100.5"), cut(1, 0), "got 1100.5 tokens, expected a whole number"),
            (TRACE.replace("1100", "-1"), cut(1, 0), "got -1 tokens"),
            (r#"{"timestamp": 0, "input_length": 1}"#.into(), cut(1, 0), "missing field"),
        ] {
            let message = cut.batch(trace.as_bytes()).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
