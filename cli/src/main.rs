//! `pat`: plan, run, verify and explain prefix-aware decode attention.
//!
//! Exit status: 0 when all went well, 1 when a result failed verification or became slower, 2 on bad input, a missing device,
//! or when nothing could be measured.
#![forbid(unsafe_code)]
#![deny(clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::panic, clippy::unreachable))]

mod bench;
mod calibrate;
mod doctor;
mod models;
mod options;
mod output;
mod plan;
mod plot;
mod render;
mod run;
mod workload;

use clap::{Parser, Subcommand};
use output::OutputError;
use std::process::ExitCode;

/// Prefix-aware decode attention: plan it, run it, check it, explain it.
#[derive(Parser)]
#[command(name = "pat", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw a batch's tensors, compute its attention, verify it against an f64 oracle, and report.
    #[command(after_help = "Examples:
  pat run --tree 1,4,256_32,256,32 --heads 32/8
  pat run --trace conversation.jsonl --batch 128 --at-step 100
  pat run --batch batch.json --device cuda

Takes: about as long as the oracle, on the CPU: 5 GFLOP at most, a few seconds on two cores; on the CPU executor besides, what
drawing the pool and computing the batch take (the first example: about a second). --check none leaves the oracle out.")]
    Run(run::Args),
    /// Show the prefix forest of a batch, how often each part of it is read, and the predicted time.
    #[command(
        after_help = "Takes: milliseconds, and the time to read a file. No tensors are drawn and no device computes."
    )]
    Plan(plan::Args),
    /// List the attention shapes of public models, and whether there are kernels for each.
    #[command(after_help = "Takes: milliseconds; no device is asked.")]
    Models(models::Args),
    /// Measure suites of batches; compare measurements.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Make request workloads for `bench serve`.
    #[command(subcommand)]
    Workload(workload::Command),
    /// Draw pictures of measurements.
    #[command(subcommand)]
    Plot(plot::Command),
    /// Measure what the planner's cost model wants to know of a CUDA device, and write it as a profile for --profile.
    #[command(
        after_help = "Takes: one kernel compilation for each variant, then 46 short calls for each of the probes; the \
progress bar counts them."
    )]
    Calibrate(calibrate::Args),
    /// Report what this machine can run, and how to fix what it cannot.
    #[command(
        after_help = "Takes: milliseconds without a GPU; with one, as long as the driver compiles one kernel for each \
variant."
    )]
    Doctor,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and versions come this way too.
        Err(shown) => {
            return match shown.print() {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    output::note(format!("error: standard output: {error}"));
                    ExitCode::from(2)
                }
                _ => ExitCode::from(u8::try_from(shown.exit_code()).unwrap_or(2)),
            };
        }
    };
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Workload(command) => workload::run(&command),
        Command::Plot(command) => plot::run(&command),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Doctor => doctor::run(),
    };
    match result.and_then(|passed| Ok(output::flush().map(|()| passed)?)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_closed_pipe) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format!("error: {}", message(&error)));
            ExitCode::from(2)
        }
    }
}

/// An error and its causes on one line, in terms of the option that gave the argument it is about; a cause that is already
/// part of what stands before it is not repeated.
fn message(error: &anyhow::Error) -> String {
    let text = error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.to_owned(),
        text => format!("{text}: {cause}"),
    });
    options::as_typed(text, options::option_of(error))
}
