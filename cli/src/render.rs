//! Text for people.

use crate::run::Report;
use comfy_table::{Table, presets};

/// A run as a table.
pub(crate) fn report(report: &Report) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let plan = &report.plan;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut row = |name: &str, value: String| {
        table.add_row([name, &value]);
    };
    row("batch", report.batch.clone());
    row("model", report.model.model());
    row("pool", report.model.pool());
    row("device", format!("{} ({})", report.device, report.device_reason));
    row(
        "sequences",
        format!("{} ({} merged, at most {} partials each)", plan.sequences, plan.merge_rows, plan.max_splits),
    );
    row("sharing factor", format!("{:.2}", plan.sharing_factor));
    row(
        "KV bytes",
        format!(
            "{} planned, {} unique, {} without sharing",
            mib(plan.planned_kv_bytes),
            mib(plan.unique_kv_bytes),
            mib(plan.flat_kv_bytes)
        ),
    );
    for variant in &plan.variants {
        row(&format!("items {}", variant.variant), variant.items.to_string());
    }
    row("plan", format!("{:.0} us, {} bytes to upload", report.plan_us, plan.upload_bytes));
    row("execution", format!("{:.1} us, {:.1} GB/s of unique bytes", report.execution_us, report.bandwidth_gb_s));
    match &report.numerics {
        None => row("verification", "none (--check none)".into()),
        Some(n) => {
            let verdict = if n.passed { "passed" } else { "FAILED" };
            row("verification", format!("{verdict}: {} rows ({})", n.rows, n.sample));
            row(
                "error",
                format!(
                    "relative L2 {:.2e} (plain f32 implementation: {:.2e}), largest {:.2e} ({:.2e})",
                    n.relative_l2_error, n.plain_relative_l2_error, n.max_abs_error, n.plain_max_abs_error
                ),
            );
            if let Some(failure) = &n.first_failure {
                row("first failure", failure.clone());
            }
        }
    }
    table.to_string()
}
