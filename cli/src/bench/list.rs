//! `pat bench kernels --list`.

use super::select::{Selection, shape};
use crate::options::Asked;
use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use pat_bench::memory::pool_bytes;
use pat_bench::suites::SUITES;
use pat_workloads::tensors::owned_tokens;

/// The suites with their counts, or the configurations selected.
pub(super) fn list(selection: &Selection, asked: &Asked) -> Result<Table> {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    if !selection.is_explicit() {
        table.set_header(["suite", "configurations", ""]);
        for (name, about) in SUITES {
            let count = selection.suite(name)?.len();
            table.add_row([name, &count.to_string(), about]);
        }
        return Ok(table);
    }
    table.set_header(["suite", "tree", "heads", "page size", "sequences", "tokens", "pool MB", "sharing"]);
    for configuration in selection.configurations(asked)? {
        let batch = asked.rows(configuration.batch()?).with_context(|| configuration.label())?;
        let tokens: u64 = batch.lengths.iter().map(|&length| u64::from(length)).sum();
        let unique: u64 = owned_tokens(&batch).into_iter().map(u64::from).sum();
        table.add_row([
            configuration.suite.into(),
            configuration.name.clone(),
            format!("{}/{}", configuration.q_heads, configuration.kv_heads),
            batch.page_size.to_string(),
            batch.lengths.len().to_string(),
            tokens.to_string(),
            format!("{:.0}", pool_bytes(&batch, shape(&configuration, asked)?) as f64 / 1e6),
            format!("{:.2}", tokens as f64 / unique.max(1) as f64),
        ]);
    }
    Ok(table)
}
