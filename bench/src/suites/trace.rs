//! Batches cut from a request trace.

use super::{Configuration, Source, SuiteError};
use pat_workloads::{ElementParts, TraceCut, count_requests};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// Requests that decode together.
pub const BATCH_SIZES: [usize; 4] = [32, 64, 128, 256];

/// `trace_bN_sS`: the trace's first N requests, each having generated S tokens (at most as many as its answer has). A trace
/// that is shorter than the smallest N is one batch. The file is read when a batch is asked for; `requests` is how many it has
/// ([`trace_requests`]), `block_tokens` the tokens that one of its hash ids stands for.
pub fn trace(file: &Path, block_tokens: u32, requests: usize) -> Vec<Configuration> {
    let mut sizes: Vec<usize> = BATCH_SIZES.into_iter().filter(|&size| size <= requests).collect();
    if sizes.is_empty() && requests > 0 {
        sizes.push(requests);
    }
    let mut configurations = Vec::new();
    for batch_size in sizes {
        for step in [0, 128, 512] {
            let cut = TraceCut { first_request: 0, batch_size, step, page_size: 16, block_tokens };
            configurations.push(Configuration {
                suite: "trace",
                name: format!("trace_b{batch_size}_s{step}"),
                q_heads: 32,
                kv_heads: 8,
                elements: ElementParts::default(),
                source: Source::Trace { file: file.into(), cut },
            });
        }
    }
    configurations
}

/// Number of requests of a trace.
///
/// # Errors
/// The file cannot be read.
pub fn trace_requests(file: &Path) -> Result<usize, SuiteError> {
    let reader = File::open(file).map_err(|source| SuiteError::OpenTrace { file: file.into(), source })?;
    count_requests(BufReader::new(reader)).map_err(|source| SuiteError::Trace { file: file.into(), source })
}
