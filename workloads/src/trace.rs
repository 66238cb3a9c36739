//! Decode batches cut from a request trace in Mooncake's format (FAST'25, "Mooncake: A KVCache-centric Disaggregated
//! Architecture for LLM Serving"): one JSON object per line with `timestamp` (ms), `input_length`, `output_length`
//! (tokens) and `hash_ids`, the prefix-chained hashes of the prompt's blocks of 512 tokens. Equal ids mean an equal prefix
//! up to there.
//!
//! A batch is `batch_size` consecutive requests, each having generated `step` tokens (at most its `output_length`). Each
//! hash id of a whole 512-token block is 512/page_size shared pages; the rest of the prompt and the generated tokens live
//! in pages of the sequence's own.

use crate::OwnedBatch;
use serde::Deserialize;
use std::collections::HashMap;
use std::io::BufRead;

/// Tokens per hash id.
pub const BLOCK_TOKENS: u32 = 512;

/// Which requests of a trace, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceCut {
    /// Requests to skip.
    pub first_request: usize,
    /// Requests that decode together.
    pub batch_size: usize,
    /// Tokens each request has generated; a request whose output is shorter has generated all of it.
    pub step: u32,
    /// Tokens per page, a divisor of 512.
    pub page_size: u32,
}

/// Why a trace cannot be cut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// Reading failed.
    #[error("trace line {line}: {source}")]
    Io {
        /// Line, from 1.
        line: usize,
        /// The system's message.
        source: std::io::Error,
    },
    /// A line is not a request.
    #[error(
        "trace line {line}: {source} (expected {{\"timestamp\", \"input_length\", \"output_length\", \"hash_ids\"}})"
    )]
    Line {
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A request contradicts itself.
    #[error("trace line {line}: {problem}")]
    Request {
        /// Line, from 1.
        line: usize,
        /// What and what is accepted.
        problem: String,
    },
    /// The cut cannot be made.
    #[error("{argument}: got {got}, expected {expected}")]
    Cut {
        /// Which field of [`TraceCut`].
        argument: &'static str,
        /// Its value.
        got: String,
        /// What is accepted.
        expected: String,
    },
}

#[derive(Deserialize)]
struct Request {
    #[serde(rename = "timestamp")]
    _timestamp_ms: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

impl TraceCut {
    /// Reads the trace as far as the cut needs it, line by line.
    ///
    /// # Errors
    /// See [`TraceError`].
    pub fn batch(&self, trace: impl BufRead) -> Result<OwnedBatch, TraceError> {
        if self.page_size == 0 || !BLOCK_TOKENS.is_multiple_of(self.page_size) {
            return Err(TraceError::Cut {
                argument: "page_size",
                got: self.page_size.to_string(),
                expected: format!("a divisor of the trace's block of {BLOCK_TOKENS} tokens"),
            });
        }
        if self.batch_size == 0 {
            return Err(TraceError::Cut { argument: "batch_size", got: "0".into(), expected: "at least 1".into() });
        }
        let mut pool = Pool { page_size: self.page_size, next_page: 0, blocks: HashMap::new() };
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
        Err(TraceError::Cut {
            argument: "batch_size",
            got: format!("{} from request {} on", self.batch_size, self.first_request),
            expected: format!(
                "at most {} (the trace has {requests} requests)",
                requests.saturating_sub(self.first_request)
            ),
        })
    }
}

/// Hands out pages; remembers the first page of each block.
struct Pool {
    page_size: u32,
    next_page: u32,
    blocks: HashMap<u64, u32>,
}

impl Pool {
    fn place(&mut self, request: &Request, step: u32) -> Result<(u32, Vec<u32>), String> {
        let blocks = request.input_length.div_ceil(BLOCK_TOKENS) as usize;
        if request.hash_ids.len() != blocks {
            return Err(format!(
                "hash_ids: got {} ids, expected {blocks} for input_length = {}",
                request.hash_ids.len(),
                request.input_length
            ));
        }
        let generated = step.min(request.output_length);
        let length = request
            .input_length
            .checked_add(generated)
            .filter(|&length| length < 1 << 30)
            .ok_or_else(|| format!("input_length: got {}, expected less than 2^30", request.input_length))?;
        let pages_per_block = BLOCK_TOKENS / self.page_size;
        let mut table = Vec::with_capacity(length.div_ceil(self.page_size) as usize);
        for &hash in &request.hash_ids[..(request.input_length / BLOCK_TOKENS) as usize] {
            let first = match self.blocks.get(&hash) {
                Some(&first) => first,
                None => {
                    let first = self.allocate(pages_per_block)?;
                    self.blocks.insert(hash, first);
                    first
                }
            };
            table.extend(first..first + pages_per_block);
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

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3, "input_length": 1024, "output_length": 500, "hash_ids": [0, 7]}

{"timestamp": 9, "input_length": 10, "output_length": 20, "hash_ids": [9]}
"#;

    fn cut(batch_size: usize, step: u32) -> TraceCut {
        TraceCut { first_request: 0, batch_size, step, page_size: 128 }
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
    fn errors_name_line_or_argument() {
        let short = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0]}"#;
        for (trace, cut, part) in [
            (format!("{TRACE}oops"), cut(4, 0), "trace line 5"),
            (short.into(), cut(1, 0), "trace line 1: hash_ids: got 1 ids, expected 3"),
            (TRACE.into(), cut(4, 0), "the trace has 3 requests"),
            (TRACE.into(), cut(0, 0), "batch_size: got 0"),
            (TRACE.into(), TraceCut { page_size: 48, ..cut(1, 0) }, "page_size: got 48"),
            (r#"{"timestamp": 0, "input_length": 1}"#.into(), cut(1, 0), "missing field"),
        ] {
            let message = cut.batch(trace.as_bytes()).expect_err(part).to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
