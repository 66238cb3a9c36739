//! Two measurements of the same configurations, side by side: what has become slower by more than the noise?

use crate::result::{Record, RecordKey, ResultFile};
use crate::statistics::{geometric_mean, median};
use std::collections::BTreeMap;

/// Spread between repeated runs that is assumed where there is only one: what two machines of one kind differ by.
const ASSUMED_NOISE: f64 = 0.02;

/// A configuration in both measurements. Times are cold-L2 medians over the runs, in microseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// `tree Q/KV`; before it the suite where that is not Figure 10, behind it element type and head dimension where they are
    /// not f16 and 128.
    pub name: String,
    /// Before.
    pub old_us: f64,
    /// After.
    pub new_us: f64,
    /// Relative spread of repeated runs: the larger of both sides'.
    pub noise: f64,
}

impl Change {
    /// New over old: above 1 is slower.
    pub fn ratio(&self) -> f64 {
        self.new_us / self.old_us
    }

    /// Slower by more than the noise.
    pub fn is_regression(&self) -> bool {
        self.ratio() > 1.0 + self.noise
    }
}

/// A comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Configurations in both, in the order of the first old file.
    pub changes: Vec<Change>,
    /// Configurations in only one of them.
    pub unmatched: usize,
    /// The devices of all files, each once: with several, ratios compare devices as well.
    pub devices: Vec<String>,
}

impl Comparison {
    /// Geometric mean of the ratios; 1 without any.
    pub fn geometric_mean(&self) -> f64 {
        geometric_mean(self.changes.iter().map(Change::ratio))
    }
}

/// Compares repeated runs of two states of the code. Noise is what repeated runs of a side differ by, and 2% where neither
/// side was repeated.
pub fn compare(old: &[ResultFile], new: &[ResultFile]) -> Comparison {
    let (mut old_runs, mut new_runs) = (by_configuration(old), by_configuration(new));
    let order = old.first().map_or(&[][..], |file| &file.records);
    let changes: Vec<Change> = order
        .iter()
        .filter_map(|record| {
            let (old, new) = (old_runs.get_mut(&record.key())?, new_runs.get_mut(&record.key())?);
            let noise = if old.len() + new.len() > 2 { spread(old).max(spread(new)) } else { ASSUMED_NOISE };
            Some(Change { name: name(record), old_us: median(old), new_us: median(new), noise })
        })
        .collect();
    let unmatched = old_runs.len() + new_runs.len() - 2 * changes.len();
    let mut devices: Vec<String> = Vec::new();
    for file in old.iter().chain(new) {
        if !devices.contains(&file.device) {
            devices.push(file.device.clone());
        }
    }
    Comparison { changes, unmatched, devices }
}

type Runs = BTreeMap<RecordKey, Vec<f64>>;

fn by_configuration(files: &[ResultFile]) -> Runs {
    let mut runs = Runs::new();
    for record in files.iter().flat_map(|file| &file.records) {
        runs.entry(record.key()).or_default().push(record.cold_us);
    }
    runs
}

fn name(record: &Record) -> String {
    let mut name = format!("{} {}/{}", record.tree, record.nheads_q, record.nheads_kv);
    if record.suite != "figure10" {
        name = format!("{}: {name}", record.suite);
    }
    if record.dtype != "f16" {
        name += &format!(" {}", record.dtype);
    }
    if record.head_dim != 128 {
        name += &format!(" d{}", record.head_dim);
    }
    if !record.features.is_empty() {
        name += &format!(", {}", record.features);
    }
    name
}

/// Largest over smallest, less 1.
fn spread(times: &[f64]) -> f64 {
    let (least, most) = times.iter().fold((f64::INFINITY, 0f64), |(least, most), &us| (least.min(us), most.max(us)));
    most / least - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::{SCHEMA_VERSION, test_record};

    fn file(times: &[(&str, f64)]) -> ResultFile {
        ResultFile {
            schema_version: SCHEMA_VERSION,
            device: "test".into(),
            date: None,
            commit: None,
            methods: BTreeMap::new(),
            records: times.iter().map(|&(tree, cold_us)| test_record(tree, cold_us)).collect(),
        }
    }

    #[test]
    fn only_what_exceeds_the_noise_is_a_regression() {
        let old = [file(&[("a", 100.0), ("b", 100.0), ("gone", 1.0)])];
        let new = [file(&[("a", 101.9), ("b", 102.1), ("come", 1.0)])];
        let comparison = compare(&old, &new);
        assert_eq!(comparison.changes.iter().map(Change::is_regression).collect::<Vec<_>>(), [false, true]);
        assert_eq!(comparison.unmatched, 2);
        assert_eq!(comparison.devices, ["test"]);
        let elsewhere = ResultFile { device: "another".into(), ..file(&[("a", 100.0)]) };
        assert_eq!(compare(&old, &[elsewhere]).devices, ["test", "another"]);
        assert!((comparison.geometric_mean() - (1.019f64 * 1.021).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn suites_are_told_apart() {
        let old = [file(&[("a", 100.0)])];
        let mut new = file(&[("a", 200.0), ("a", 100.0)]);
        new.records[0].suite = "sweeps".into();
        let comparison = compare(&[new], &old);
        assert_eq!((comparison.changes.len(), comparison.changes[0].ratio(), comparison.unmatched), (1, 1.0, 1));
    }

    #[test]
    fn noise_is_what_repeated_runs_differ_by() {
        let old = [file(&[("a", 100.0)]), file(&[("a", 110.0)])];
        let change = &compare(&old, &[file(&[("a", 112.0)])]).changes[0];
        assert_eq!((change.old_us, change.new_us), (105.0, 112.0));
        assert!((change.noise - 0.1).abs() < 1e-12);
        assert!(!change.is_regression());
        let steady = [file(&[("a", 100.0)]), file(&[("a", 100.5)])];
        assert!(compare(&steady, &[file(&[("a", 102.0)])]).changes[0].is_regression());
    }
}
