//! What the pictures of the serving benchmark show: records by model, workload and series.

use super::super::PlotError;
use super::super::theme::MAX_SERIES;
use crate::serve::{self, Limit, Record, Status, StepTime};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Everything that is drawn.
#[derive(Clone, Debug)]
pub struct ServeFigures {
    /// Where they are from, for a line below each title.
    pub source: String,
    /// Backends with their settings, in the order of legends.
    pub series: Vec<String>,
    /// Models and workloads.
    pub panels: Vec<Panel>,
}

/// A workload on a model.
#[derive(Clone, Debug)]
pub struct Panel {
    /// `model, workload`, and the device where records of several are shown.
    pub title: String,
    /// By series: its runs, the rates ascending.
    pub runs: Vec<Vec<Run>>,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Arrivals per second.
    pub rate: f64,
    /// Whether every measured request ended well.
    pub good: bool,
    /// Means and P99; none where a run has no figures.
    pub mean_ttft_ms: Option<f64>,
    /// See above.
    pub mean_tpot_ms: Option<f64>,
    /// See above.
    pub p99_tpot_ms: Option<f64>,
    /// A decode step by its parts.
    pub step_time: Option<StepTime>,
    /// A step with a prompt in it by its parts.
    pub mixed_step_time: Option<StepTime>,
}

/// The rate up to which a series is within a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// Reached between two rates, or just below the first one with failures.
    Reached(f64),
    /// Not reached at the highest rate.
    AtLeast(f64),
    /// Exceeded at the lowest rate already.
    Below(f64),
}

impl ServeFigures {
    /// Reads files of records: ours, and PAT's `e2e_perf.jsonl`. Of several records of one run the last counts.
    ///
    /// # Errors
    /// A file cannot be used, or there are more series than colours.
    pub fn read(files: &[PathBuf]) -> Result<Self, PlotError> {
        let mut records = Vec::new();
        for file in files {
            records.extend(serve::read(file)?);
        }
        let forms: BTreeSet<&str> = records.iter().map(|record| record.config("form")).collect();
        let usual = usual_mode(&records);
        let label = |record: &Record| series(record, &usual, forms.len() > 1);
        let mut names: Vec<String> = records.iter().map(label).collect::<BTreeSet<_>>().into_iter().collect();
        // What is pat-rs's comes first, then PAT, then the others by name.
        names.sort_by_key(|name| if name.starts_with(OURS) { 0 } else { 1 + u8::from(!name.starts_with(PAT)) });
        if names.len() > MAX_SERIES {
            return Err(PlotError::TooMany { count: names.len(), what: "series" });
        }
        let several_devices = records.iter().filter_map(device).collect::<BTreeSet<_>>().len() > 1;
        let title = |record: &Record| title(record, several_devices);
        let titles: BTreeSet<String> = records.iter().map(title).collect();
        let panel = |title_of_panel: String| {
            let mut runs = vec![Vec::new(); names.len()];
            for record in records.iter().filter(|record| title(record) == title_of_panel) {
                let Ok(rate) = record.config("request_rate").parse::<f64>() else { continue };
                let place =
                    names.iter().position(|name| *name == label(record)).expect("the names are those of the records");
                let of_series: &mut Vec<Run> = &mut runs[place];
                of_series.retain(|run| run.rate != rate);
                of_series.push(Run::of(record, rate));
            }
            for of_series in &mut runs {
                of_series.sort_by(|a, b| a.rate.total_cmp(&b.rate));
            }
            Panel { title: title_of_panel, runs }
        };
        let panels: Vec<Panel> = titles.into_iter().map(panel).collect();
        let stems = files.iter().map(|file| file.file_stem().unwrap_or(file.as_os_str()).to_string_lossy());
        Ok(Self { source: source(&records, &stems.collect::<Vec<_>>().join(" and ")), series: names, panels })
    }

    /// Runs that have failures, and that lines leave out.
    pub(super) fn with_failures(&self) -> usize {
        self.panels.iter().flat_map(|panel| panel.runs.iter().flatten()).filter(|run| !run.good).count()
    }
}

const OURS: &str = "pat-rs";
const PAT: &str = "PAT";

/// The mode of most records, which needs no name.
fn usual_mode(records: &[Record]) -> String {
    let mut counts = BTreeMap::<&str, usize>::new();
    for record in records.iter().filter(|record| !record.config("mode").is_empty()) {
        *counts.entry(record.config("mode")).or_default() += 1;
    }
    // Of two with as many records it is the last by name: graphs before eager and compiled.
    counts.into_iter().max_by_key(|(_, count)| *count).map_or_else(String::new, |(mode, _)| mode.to_owned())
}

/// Backend and what is not usual about the run.
fn series(record: &Record, usual_mode: &str, with_form: bool) -> String {
    let mut name = match record.config("ATTENTION_BACKEND") {
        // The name under which vLLM knows this project's backend, and PAT's of its own.
        "CUSTOM" => OURS.to_owned(),
        "PREFIX_ATTN" => PAT.to_owned(),
        other => other.to_owned(),
    };
    let (mode, admission) = (record.config("mode"), record.config("admission"));
    for (value, usual) in [(mode, ["", usual_mode]), (admission, ["", "fcfs"])] {
        if !usual.contains(&value) {
            name = format!("{name}, {value}");
        }
    }
    match record.config("form") {
        form if with_form && !form.is_empty() => format!("{name}, {form}"),
        _ => name,
    }
}

/// Runs of two devices share no line.
fn title(record: &Record, with_device: bool) -> String {
    let model = record.config("model");
    let model = model.rsplit('/').next().unwrap_or(model);
    let trace = match record.config("trace") {
        // PAT's scripts call it by the source of its lengths, its figure by what it is.
        "burst" => "conversation",
        trace => trace,
    };
    match device(record) {
        Some(device) if with_device => format!("{model}, {trace}, {device}"),
        _ => format!("{model}, {trace}"),
    }
}

fn device(record: &Record) -> Option<&str> {
    record.machine.as_ref()?.get("device")?.as_str()
}

/// Devices and files.
fn source(records: &[Record], files: &str) -> String {
    let devices: BTreeSet<&str> = records.iter().filter_map(device).collect();
    devices.into_iter().chain([files]).collect::<Vec<_>>().join("; ")
}

impl Run {
    fn of(record: &Record, rate: f64) -> Self {
        Self {
            rate,
            good: record.status == Status::Success,
            mean_ttft_ms: record.metric("mean_ttft_ms"),
            mean_tpot_ms: record.metric("mean_tpot_ms"),
            p99_tpot_ms: record.metric("p99_tpot_ms"),
            step_time: record.step_time.clone(),
            mixed_step_time: record.mixed_step_time.clone(),
        }
    }

    pub(super) fn within(&self, limit: Limit) -> bool {
        let met = |value: Option<f64>, most: f64| value.is_some_and(|value| value <= most);
        self.good && met(self.mean_ttft_ms, limit.ttft_ms) && met(self.mean_tpot_ms, limit.tpot_ms)
    }
}

/// The capacity of runs in the order of their rates; none without runs.
pub fn capacity(runs: &[Run], limit: Limit) -> Option<Capacity> {
    let Some(beyond) = runs.iter().position(|run| !run.within(limit)) else {
        return runs.last().map(|run| Capacity::AtLeast(run.rate));
    };
    let over = &runs[beyond];
    let Some(last) = beyond.checked_sub(1).map(|index| &runs[index]) else { return Some(Capacity::Below(over.rate)) };
    // Where the line of each mean, drawn on a logarithmic axis, reaches its limit; a run with failures has no mean to draw a line to.
    let crossing = |below: Option<f64>, above: Option<f64>, most: f64| match (below, above) {
        (Some(below), Some(above)) if over.good && above > most => {
            last.rate + (over.rate - last.rate) * (most / below).ln() / (above / below).ln()
        }
        _ => f64::INFINITY,
    };
    let reached = crossing(last.mean_ttft_ms, over.mean_ttft_ms, limit.ttft_ms).min(crossing(
        last.mean_tpot_ms,
        over.mean_tpot_ms,
        limit.tpot_ms,
    ));
    Some(Capacity::Reached(if reached.is_finite() { reached } else { last.rate }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(rate: f64, ttft: f64, tpot: f64) -> Run {
        let (mean_ttft_ms, mean_tpot_ms) = (Some(ttft), Some(tpot));
        Run { rate, good: true, mean_ttft_ms, mean_tpot_ms, p99_tpot_ms: None, step_time: None, mixed_step_time: None }
    }

    const LIMIT: Limit = Limit { ttft_ms: 1_000.0, tpot_ms: 50.0 };

    #[test]
    fn capacity_is_where_a_mean_reaches_its_limit() {
        let runs = [run(4.0, 100.0, 20.0), run(6.0, 200.0, 40.0), run(8.0, 600.0, 80.0), run(9.0, 5_000.0, 90.0)];
        let reached = |limit| match capacity(&runs, limit) {
            Some(Capacity::Reached(rate)) => rate,
            other => panic!("{other:?}"),
        };
        let expected = 6.0 + 2.0 * 1.25f64.log2();
        assert!((reached(LIMIT) - expected).abs() < 1e-12, "40 to 80 ms, 50 is log2(1.25) of the way");
        let expected = 8.0 + (1.0f64 / 0.6).ln() / (5.0f64 / 0.6).ln();
        let roomy = Limit { tpot_ms: 89.0, ..LIMIT };
        assert!((reached(roomy) - expected).abs() < 1e-12, "the time to the first token comes first");
        assert_eq!(capacity(&runs[..2], LIMIT), Some(Capacity::AtLeast(6.0)));
        assert_eq!(capacity(&runs[2..], LIMIT), Some(Capacity::Below(8.0)));
        assert_eq!(capacity(&[], LIMIT), None);
        let failed = Run { good: false, ..run(8.0, 300.0, 45.0) };
        assert_eq!(capacity(&[run(6.0, 200.0, 40.0), failed], LIMIT), Some(Capacity::Reached(6.0)));
    }
}
