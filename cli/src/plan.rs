//! `pat plan`: the forest and the row tiles, for people, machines and pictures.

use crate::options::{Loaded, ModelReport, Planning, Shape, Source};
use crate::output;
use anyhow::{Context, Result};
use pat_report::{Candidate, explain};
use pat_rs::plan::{PlanSummary, SharedNodes};
use pat_rs::{DeviceProfile, Engine, VisibleBatch};
use pat_workloads::whole_file::{self, Staged};
use pat_workloads::{ElementParts, Existing, ModelParts, batch_text};
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
    /// Write a picture of the forest, for light and dark pages.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the batch and the model's heads, head dim and type in the format of docs/batch-format.md.
    #[arg(long, value_name = "FILE")]
    save_batch: Option<PathBuf>,
    /// Overwrite the files of --svg and --save-batch.
    #[arg(long)]
    force: bool,
}

/// Kinds of shared nodes in the machine-readable output.
const SHARED_NODES: usize = 32;

/// The machine-readable output.
#[derive(Serialize)]
struct Report<'a> {
    /// The profile's name.
    profile: &'a str,
    #[serde(flatten)]
    model: ModelReport,
    #[serde(flatten)]
    summary: &'a PlanSummary,
    /// Largest first.
    shared_nodes: Vec<SharedNodes>,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let existing = Existing::replaced_if(args.force);
    // Before anything is printed.
    for (option, file) in [("--svg", &args.svg), ("--save-batch", &args.save_batch)] {
        file.as_ref().map_or(Ok(()), |file| whole_file::check(file, existing)).context(option)?;
    }
    let Loaded { name, batch, model } = args.source.load()?;
    let asked = args.shape.asked()?;
    let shape = asked.shape(model)?;
    let problem = asked.problem(batch.problem(shape))?;
    let sequences = batch;
    let batch = asked.rows(sequences.clone())?;
    let model = ModelReport::new(&asked, &problem, &batch);
    let profile = match args.planning.profile()? {
        Some(profile) => profile,
        None => Engine::auto().profile().unwrap_or_else(|_| DeviceProfile::h200()),
    };
    let rows = batch.rows();
    let view = batch.view(&rows)?;
    let options = args.planning.resolve()?;
    let chosen = Candidate::new(problem, &profile, options.clone(), &view)?;
    let Candidate { planner, plan, summary } = &chosen;
    // What is planned is what rows see.
    let visible = VisibleBatch::new(&view, problem.visibility().reach)?;
    let planned = planner.batch_of_runs().unwrap_or_else(|| visible.batch());
    let svg = args.svg.as_ref().map(|file| {
        let svg = pat_report::svg(planner.forest(), planner.tiles(), &planned, &name);
        whole_file::stage(file, svg.as_bytes(), existing).context("--svg")
    });
    let saved = args.save_batch.as_ref().map(|file| {
        let heads = Some((shape.q_heads(), shape.kv_heads()));
        let model = ModelParts { heads, elements: ElementParts::of(shape) };
        whole_file::stage(file, batch_text(&sequences, model).as_bytes(), existing).context("--save-batch")
    });
    let (svg, saved) = (svg.transpose()?, saved.transpose()?);
    svg.map_or(Ok(()), Staged::commit).context("--svg")?;
    saved.map_or(Ok(()), Staged::commit).context("--save-batch")?;
    if args.json {
        let shared_nodes = planner.shared_nodes(plan, SHARED_NODES)?;
        let report = Report { profile: &profile.name, model, summary, shared_nodes };
        output::print(serde_json::to_string_pretty(&report)?)?;
    } else {
        output::print(format_args!("{name}, planned for {}", planner.profile().name))?;
        let forest = pat_report::forest(planner.forest(), planner.tiles(), &planned);
        output::print(format_args!("{forest}{:<17}{}\n{:<17}{}", "model", model.model(), "pool", model.pool()))?;
        output::print(summary)?;
        if args.explain {
            output::print(explain(&chosen, &options, &view)?.trim_end())?;
        }
    }
    Ok(true)
}
