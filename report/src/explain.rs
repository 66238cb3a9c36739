//! Why a batch is planned as it is.

use comfy_table::{CellAlignment, Table, presets};
use pat_rs::plan::cost::Prediction;
use pat_rs::plan::{PlanMode, PlanSummary, ReadReason, SharedNodes};
use pat_rs::{DecodeBatch, DeviceProfile, Plan, PlanOptions, Planner, Problem, Result};

/// Kinds of nodes that get a line: those that save most.
const LINES: usize = 5;

/// How far the forward pass may be above its traffic and its multiplications and still be called bound by them.
const BOUND: f64 = 1.15;

/// A plan of the batch and how it is cut.
#[derive(Debug)]
pub struct Candidate {
    /// It made the plan, and no other since.
    pub planner: Planner,
    /// The plan.
    pub plan: Plan,
    /// The plan in numbers.
    pub summary: PlanSummary,
}

impl Candidate {
    /// Plans the batch.
    ///
    /// # Errors
    /// Those of planning.
    pub fn new(
        problem: Problem,
        profile: &DeviceProfile,
        options: PlanOptions,
        batch: &DecodeBatch<'_>,
    ) -> Result<Self> {
        let mut planner = Planner::new(problem, profile.clone(), options)?;
        let plan = planner.plan(batch)?;
        Ok(Self { planner, summary: plan.summary(), plan })
    }

    /// Most sequences of a row tile.
    fn widest(&self) -> u32 {
        self.planner.tiles().iter().map(|tile| tile.sequence_count()).max().unwrap_or(0)
    }
}

/// `chosen`, the plan that `options` give, beside the two ends of what the planner chooses from: no sharing, and tiles as
/// wide as they can be.
///
/// # Errors
/// Those of planning with the options in the modes of the two ends.
pub fn explain(chosen: &Candidate, options: &PlanOptions, batch: &DecodeBatch<'_>) -> Result<String> {
    let shape = chosen.plan.shape();
    let problem = chosen.planner.problem();
    let candidate = |mode| Candidate::new(problem, chosen.planner.profile(), options.clone().with_mode(mode), batch);
    let (flat, packed) = (candidate(PlanMode::Flat)?, candidate(PlanMode::Packed)?);

    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "us predicted for",
        "row tiles",
        "sequences",
        "CTAs",
        "KV MiB",
        "memory",
        "tensor",
        "forward",
        "launch",
        "merge",
        "all",
    ]);
    for (name, candidate) in [("this plan", chosen), ("no sharing", &flat), ("widest tiles", &packed)] {
        let summary = &candidate.summary;
        let Prediction { memory_us, tensor_us, busy_us, launch_us, merge_us } = summary.prediction;
        let ctas: u64 = summary.variants.iter().map(|v| u64::from(v.items) * u64::from(shape.kv_heads())).sum();
        let mut row = vec![
            name.to_owned(),
            candidate.planner.tiles().len().to_string(),
            format!("<= {}", candidate.widest()),
            ctas.to_string(),
            format!("{:.1}", summary.planned_kv_bytes as f64 / f64::from(1 << 20)),
        ];
        row.extend(
            [memory_us, tensor_us, busy_us, launch_us, merge_us, summary.predicted_us].map(|us| format!("{us:.1}")),
        );
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{table}\n{}\n", bound(chosen.summary.prediction));
    let (own_us, flat_us) = (chosen.summary.predicted_us, flat.summary.predicted_us);
    text += &if own_us < flat_us {
        format!("Sharing saves {:.1} of {flat_us:.1} us.\n", flat_us - own_us)
    } else if packed.summary.predicted_us < own_us {
        let saved = own_us - packed.summary.predicted_us;
        format!("Sharing would save {saved:.1} of {own_us:.1} us (--mode auto).\n")
    } else {
        "Sharing is not predicted to save time.\n".into()
    };
    text.push_str(&nodes(chosen)?);
    Ok(text)
}

/// What the forward pass is predicted to be bound by.
fn bound(prediction: Prediction) -> String {
    let Prediction { memory_us, tensor_us, busy_us, .. } = prediction;
    let (what, us) = if memory_us >= tensor_us { ("memory", memory_us) } else { ("the tensor cores", tensor_us) };
    if busy_us <= BOUND * us {
        format!("Bound by {what}.")
    } else {
        format!("Bound by latency and by the balance of the items: {what} alone would take {us:.1} us.")
    }
}

/// A line for each of the kinds of nodes that save most.
fn nodes(chosen: &Candidate) -> Result<String> {
    let mut text = String::new();
    for node in chosen.planner.shared_nodes(&chosen.plan, LINES)? {
        let SharedNodes { nodes, sequences, tokens, reads, fewest_reads, saved_kv_bytes, reason } = node;
        let kind = if nodes > 1 { format!("{nodes} x ") } else { String::new() };
        let how_often = match reason {
            ReadReason::OneTile => "read once".to_owned(),
            ReadReason::TileRows => format!("read {reads} times; in the widest tiles no fewer"),
            ReadReason::NarrowTiles => {
                format!("read {reads} times, in narrower tiles that make more CTAs; in the widest {fewest_reads} times")
            }
            ReadReason::LongPrivateRuns => format!(
                "read {reads} times: tiles end where a sequence would add more than it shares; in the widest \
                 {fewest_reads} times"
            ),
            ReadReason::PartsOfChunks => {
                format!("read {reads} times in the mean: parts of fixed chunks by each sequence for itself")
            }
            ReadReason::SharingCosts | ReadReason::Mode => {
                let why = if reason == ReadReason::Mode {
                    ", as the mode asks"
                } else {
                    ": sharing is predicted to be slower"
                };
                format!("read {reads} times, by each for itself{why}; in the widest tiles {fewest_reads} times")
            }
        };
        let saved_mib = (u64::from(nodes) * saved_kv_bytes) as f64 / f64::from(1 << 20);
        text += &format!("{kind}[{tokens} tokens x {sequences} sequences] {how_often}; saves {saved_mib:.1} MiB\n");
    }
    Ok(text)
}
