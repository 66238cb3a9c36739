//! `pat`: plan, run, verify and explain prefix-aware decode attention.
//!
//! Exit status: 0 when all went well, 1 when a result failed verification, 2 on bad input or a missing device.

mod bench;
mod calibrate;
mod doctor;
mod explain;
mod options;
mod plan;
mod plot;
mod render;
mod run;
mod workload;

use clap::{Parser, Subcommand};
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
  pat run --batch batch.json --device cuda")]
    Run(run::Args),
    /// Show the prefix forest of a batch, how often each part of it is read, and the predicted time.
    Plan(plan::Args),
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
    Calibrate(calibrate::Args),
    /// Say what this machine can run, and what repairs what it cannot.
    Doctor,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Workload(command) => workload::run(&command),
        Command::Plot(command) => plot::run(&command),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Doctor => doctor::run(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::from(2)
        }
    }
}

/// An error and its causes on one line; a cause that is already part of what stands before it is not repeated.
fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.to_owned(),
        text => format!("{text}: {cause}"),
    })
}
