//! Batches cut from a request trace.

use super::{Configuration, Source};
use pat_workloads::TraceCut;
use std::path::Path;

/// `trace_bN_sS`: the trace's first N requests, each having generated S tokens (at most as many as its answer has). The file
/// is read when a batch is asked for.
pub fn trace(file: &Path) -> Vec<Configuration> {
    let mut configurations = Vec::new();
    for batch_size in [32, 64, 128, 256] {
        for step in [0, 128, 512] {
            let cut = TraceCut { first_request: 0, batch_size, step, page_size: 16 };
            configurations.push(Configuration {
                suite: "trace",
                name: format!("trace_b{batch_size}_s{step}"),
                q_heads: 32,
                kv_heads: 8,
                source: Source::Trace { file: file.into(), cut },
            });
        }
    }
    configurations
}
