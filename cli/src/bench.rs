//! `pat bench`: measurements, and their comparison.

mod compare;
mod export;
mod kernels;
mod list;
mod output;
mod peers;
mod select;
mod serve;
mod table;

use anyhow::Result;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Measure suites of batches; every answer is verified before it is timed.
    Kernels(Box<kernels::Args>),
    /// Compare result files; status 1 where a configuration has become slower by more than the noise.
    Compare(compare::Args),
    /// Write the batches that `kernels` measures, for bench/peers and other programs.
    Export(export::Args),
    /// Set pat-rs against the other methods of a result file.
    Peers(peers::Args),
    /// Send a workload to an OpenAI-compatible server at a rate, and measure what its users would see.
    Serve(Box<serve::Args>),
}

pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Kernels(args) => kernels::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Export(args) => export::run(args),
        Command::Peers(args) => peers::run(args),
        Command::Serve(args) => serve::run(args),
    }
}
