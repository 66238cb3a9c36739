//! `pat bench`: measurements, and their comparison.

mod compare;
mod export;
mod kernels;
mod list;
mod output;
mod peers;
mod select;
mod table;

use anyhow::Result;

#[derive(clap::Subcommand)]
pub(crate) enum Command {
    /// Measure suites of batches; every answer is verified before it is timed.
    #[command(
        after_help = "Takes: for each configuration up to a second of oracle (on two cores), and on a GPU about a \
hundred calls behind it; on the CPU executor, several calls of milliseconds to seconds. The progress bar estimates what is left, \
--quick takes a part of it, --time-limit bounds it."
    )]
    Kernels(Box<kernels::Args>),
    /// Compare result files; status 1 where a configuration has become slower by more than the noise.
    #[command(after_help = "Takes: milliseconds.")]
    Compare(compare::Args),
    /// Write the batches that `kernels` measures, for bench/peers and other programs.
    #[command(after_help = "Takes: seconds for all suites.")]
    Export(export::Args),
    /// Set pat-rs against the other methods of a result file.
    #[command(after_help = "Takes: milliseconds.")]
    Peers(peers::Args),
}

pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Kernels(args) => kernels::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Export(args) => export::run(args),
        Command::Peers(args) => peers::run(args),
    }
}
