#![forbid(unsafe_code)]

use pat_rs::cuda::{BoundRun, Stream, Uploaded};

fn step(run: &BoundRun, uploaded: Uploaded<'_>, stream: &Stream) -> pat_rs::Result<()> {
    run.run_with(uploaded, 0x1000, 0x2000, stream)
}

fn main() {}
