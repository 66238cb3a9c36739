//! `pat plan`: the forest and the row tiles, for people, machines and pictures.

use crate::explain::{Candidate, explain};
use crate::options::{Planning, Shape, Source};
use crate::render;
use anyhow::{Context, Result};
use pat_rs::plan::{PlanSummary, SharedNodes};
use pat_rs::{DeviceProfile, Engine};
use pat_workloads::write_batch;
use serde::Serialize;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    shape: Shape,
    #[command(flatten)]
    planning: Planning,
    /// Say why: the plan beside no sharing and beside the widest tiles, what bounds it, the largest shared runs.
    #[arg(long, conflicts_with = "json")]
    explain: bool,
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
    /// Write a picture of the forest.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the batch in the format of docs/batch-format.md.
    #[arg(long, value_name = "FILE")]
    save_batch: Option<PathBuf>,
}

/// Kinds of shared nodes in the machine-readable output.
const SHARED_NODES: usize = 32;

/// The machine-readable output.
#[derive(Serialize)]
struct Report<'a> {
    /// The profile's name.
    profile: &'a str,
    #[serde(flatten)]
    summary: &'a PlanSummary,
    /// Largest first.
    shared_nodes: Vec<SharedNodes>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let shape = args.shape.resolve()?;
    let (name, batch) = args.source.load()?;
    let profile = match args.planning.profile()? {
        Some(profile) => profile,
        None => Engine::auto().profile().unwrap_or_else(|_| DeviceProfile::h200()),
    };
    let rows = batch.rows();
    let view = batch.view(&rows)?;
    let options = args.planning.resolve()?;
    let chosen = Candidate::new(shape, &profile, options.clone(), &view)?;
    let Candidate { planner, plan, summary } = &chosen;
    if args.json {
        let shared_nodes = planner.shared_nodes(plan, SHARED_NODES)?;
        let report = Report { profile: &profile.name, summary, shared_nodes };
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{name}, planned for {}", planner.profile().name);
        print!("{}", render::forest(planner.forest(), planner.tiles(), &view));
        println!("{summary}");
        if args.explain {
            print!("{}", explain(&chosen, &options, &view)?);
        }
    }
    if let Some(file) = &args.svg {
        let svg = render::svg(planner.forest(), planner.tiles(), &view, &name);
        std::fs::write(file, svg).with_context(|| format!("--svg {}", file.display()))?;
    }
    if let Some(file) = &args.save_batch {
        write_batch(file, &batch).with_context(|| format!("--save-batch {}", file.display()))?;
    }
    Ok(true)
}
