//! `pat models`: the attention of public models, and whether there are kernels for it.

use crate::output;
use anyhow::Result;
use comfy_table::{Table, presets};
use pat_rs::{Dtype, Error, Reach, supports};
use pat_workloads::{KnownModel, LayerKind, MODELS};
use serde::Serialize;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

/// Pages that a layer is asked about: the kernels take all sizes.
const PAGE_SIZE: u32 = 16;

/// A kind of layers, for machines.
#[derive(Serialize)]
struct Row {
    /// As `--model` takes it.
    model: String,
    /// So many layers are of this kind.
    layers: u32,
    /// Of so many.
    of_layers: u32,
    q_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    v_head_dim: u32,
    /// Tokens of a sliding window.
    window: Option<u32>,
    /// Tokens of a chunk.
    chunk: Option<u32>,
    soft_cap: Option<f32>,
    sinks: bool,
    /// Whether there are kernels for it.
    eligible: bool,
    /// What stands in the way, and what would be accepted.
    reason: Option<String>,
    /// Whose config.json the numbers are from.
    source: &'static str,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let rows = MODELS.iter().flat_map(|model| model.layers.iter().map(move |layer| row(model, *layer)));
    let rows = rows.collect::<Result<Vec<_>>>()?;
    if args.json {
        output::print(serde_json::to_string_pretty(&rows)?)?;
    } else {
        output::print(table(&rows))?;
    }
    Ok(true)
}

fn row(model: &KnownModel, layer: LayerKind) -> Result<Row> {
    let reason = match layer.problem(Dtype::Bf16, PAGE_SIZE) {
        Ok(problem) => supports(&problem, None, None).err().map(Error::from),
        Err(error) => Some(error),
    };
    let (window, chunk) = match layer.reach {
        Reach::Full => (None, None),
        Reach::Window(tokens) => (Some(tokens), None),
        Reach::Chunk(tokens) => (None, Some(tokens)),
    };
    Ok(Row {
        model: match model.layers {
            [_] => model.name.into(),
            _ => format!("{}/{}", model.name, layer.reach.name()),
        },
        layers: layer.share.0,
        of_layers: layer.share.1,
        q_heads: layer.q_heads,
        kv_heads: layer.kv_heads,
        head_dim: layer.head_dim,
        v_head_dim: layer.v_head_dim,
        window,
        chunk,
        soft_cap: layer.soft_cap,
        sinks: layer.has_sinks,
        eligible: reason.is_none(),
        reason: reason.map(|reason| reason.to_string()),
        source: model.source,
    })
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header([
        "model",
        "layers",
        "heads",
        "head dim",
        "sees",
        "scores",
        "kernels",
        "numbers from config.json of",
    ]);
    for row in rows {
        let (few, all) = (row.layers, row.of_layers);
        let sees = match (row.window, row.chunk) {
            (Some(tokens), _) => format!("last {tokens}"),
            (_, Some(tokens)) => format!("chunks of {tokens}"),
            _ => "all".into(),
        };
        let cap = row.soft_cap.map(|cap| format!("cap {cap}"));
        let scores = cap.into_iter().chain(row.sinks.then(|| "sinks".into())).collect::<Vec<_>>().join(", ");
        table.add_row([
            row.model.clone(),
            if few == all { "all".into() } else { format!("{few} of {all}") },
            format!("{}/{}", row.q_heads, row.kv_heads),
            if row.head_dim == row.v_head_dim {
                row.head_dim.to_string()
            } else {
                format!("{} (V {})", row.head_dim, row.v_head_dim)
            },
            sees,
            scores,
            row.reason.clone().unwrap_or_else(|| "yes".into()),
            row.source.into(),
        ]);
    }
    table
}
