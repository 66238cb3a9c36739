//! What a measurement prints.

use pat_bench::result::Record;
use pat_bench::statistics::geometric_mean;
use std::time::Duration;

/// Which columns there are.
#[derive(Clone, Copy)]
pub(crate) enum Columns {
    Cuda,
    Cpu,
}

impl Columns {
    pub(crate) fn header(self) -> String {
        match self {
            Self::Cuda => format!(
                "{:>7} {:48} {:>6} {:>8} {:>8} {:>8} {:>8} {:>7} {:>5} {:>7} {:>7} {:>8}  check",
                "",
                "tree",
                "heads",
                "cold us",
                "warm us",
                "graph us",
                "ceil us",
                "cold/c",
                "of c",
                "plan us",
                "TFLOP/s",
                "items"
            ),
            Self::Cpu => format!(
                "{:>7} {:48} {:>6} {:>10} {:>9} {:>7} {:>8}  check",
                "", "tree", "heads", "CPU us", "plan us", "GFLOP/s", "items"
            ),
        }
    }

    /// `number` of `total` configurations.
    pub(crate) fn row(self, (number, total): (usize, usize), record: &Record) -> String {
        let progress = format!("{number}/{total}");
        let heads = format!("{}/{}", record.nheads_q, record.nheads_kv);
        let items: u32 = record.items.values().sum();
        let check = if record.is_verified() { "ok" } else { "FAILED" };
        match self {
            Self::Cuda => {
                let time = |us: Option<f64>| us.map_or("-".into(), |us| format!("{us:.1}"));
                let multiple = record.multiple_of_ceiling();
                format!(
                    "{progress:>7} {:48} {heads:>6} {:>8.1} {:>8} {:>8} {:>8} {:>7} {:>5} {:>7.0} {:>7.1} {items:>8}  {check}",
                    record.tree,
                    record.cold_us,
                    time(record.warm_us),
                    time(record.graph_us),
                    time(record.ceiling_us),
                    multiple.map_or("-".into(), |multiple| format!("{multiple:.2}")),
                    multiple.map_or("-".into(), |multiple| format!("{:.0}%", 100.0 / multiple)),
                    record.plan_us,
                    record.flop / record.cold_us / 1e6,
                )
            }
            Self::Cpu => format!(
                "{progress:>7} {:48} {heads:>6} {:>10.1} {:>9.1} {:>7.1} {items:>8}  {check}",
                record.tree,
                record.cold_us,
                record.plan_us,
                record.flop / record.cold_us / 1e3,
            ),
        }
    }

    /// What the records of one suite come to.
    pub(crate) fn summary(self, suite: &str, records: &[&Record]) -> String {
        let verified = records.iter().filter(|record| record.is_verified()).count();
        let mut line = format!("{suite}: {verified} of {} verified", records.len());
        let ratios: Vec<f64> = records.iter().filter_map(|record| record.multiple_of_ceiling()).collect();
        if !ratios.is_empty() {
            line += &format!(", geometric mean of cold/ceiling {:.3}", geometric_mean(ratios));
            if let Some((factor, extra_us)) = aim(suite) {
                let within = records
                    .iter()
                    .filter(|record| record.ceiling_us.is_some_and(|us| record.cold_us <= factor * us + extra_us))
                    .count();
                line += &format!(", {within} within {factor} x ceiling + {extra_us} us");
            }
        }
        line
    }
}

/// Time that a suite's configurations are to stay within: factor of the ceiling, and microseconds on top of it.
fn aim(suite: &str) -> Option<(f64, f64)> {
    match suite {
        "figure10" => Some((1.02, 6.0)),
        "realistic" => Some((1.4, 8.0)),
        _ => None,
    }
}

/// `1m20s`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 { format!("{seconds}s") } else { format!("{}m{:02}s", seconds / 60, seconds % 60) }
}
