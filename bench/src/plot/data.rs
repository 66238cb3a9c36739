//! What the pictures show: the records of a result file, with the methods of others beside them.

use super::PlotError;
use super::layout::Series;
use crate::ceiling::{DeviceRates, Rates};
use crate::result::{self, METHOD, Record, RecordKey};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The methods that have a place in every legend; others follow by name.
const KNOWN_METHODS: [&str; 13] = [
    METHOD,
    "pat",
    "flashinfer_fa2",
    "flashinfer_cudacore",
    "flashinfer_cascade",
    "fasttree",
    "torch_sdpa",
    "fa3",
    "fa3_scheduled",
    "flashinfer_xqa",
    "flashinfer_persistent",
    "flashinfer_fa3",
    "codec",
];

/// This library once more, by its Python package: `bench/peers` times it beside the others. It is no peer.
const OURS_IN_PYTHON: &str = "prefix_attn";

/// The suite that the bars are of.
pub(super) const FIGURE_10: &str = "figure10";

/// Everything that is drawn.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Device of all figures.
    pub device: String,
    /// The rates that its reachable times follow from.
    pub reached: Option<Rates>,
    /// Where they are from, for a line below each picture.
    pub source: String,
    /// Methods with a time somewhere, in the order of legends.
    pub methods: Vec<String>,
    /// One for each record.
    pub points: Vec<Point>,
}

/// One configuration. Times in microseconds.
#[derive(Clone, Debug)]
pub struct Point {
    /// Suite.
    pub suite: String,
    /// Tree, or the batch's name.
    pub name: String,
    /// Heads, and what else is not the default: the panel or series it belongs to.
    pub shape: String,
    /// Rows of the batch.
    pub sequences: f64,
    /// Logical over unique KV bytes.
    pub sharing_factor: f64,
    /// The reachable time, where the device's is known and the batch has work.
    pub ceiling_us: Option<f64>,
    /// The reachable time of an implementation that reads every sequence's KV by itself.
    pub unshared_ceiling_us: Option<f64>,
    /// Cold L2, by method.
    pub cold_us: BTreeMap<String, f64>,
    /// Planning, by method.
    pub plan_us: BTreeMap<String, f64>,
}

impl Figures {
    /// Reads a result file, and from `others` the methods that its records do not have.
    ///
    /// # Errors
    /// See [`PlotError`].
    pub fn read(file: &Path, others: &[PathBuf]) -> Result<Self, PlotError> {
        let base = result::read(file)?;
        let mut source = stem(file);
        for (name, value) in [("", &base.date), ("commit ", &base.commit)] {
            if let Some(value) = value.as_ref().filter(|value| !source.contains(value.as_str())) {
                source += &format!(", {name}{value}");
            }
        }
        let reached = DeviceRates::of(&base.device).map(|rates| rates.reached);
        let mut points: Vec<Point> = base.records.iter().map(|record| Point::of(record, reached)).collect();
        for other in others {
            let extra: Extra = result::read_as(other)?;
            if extra.device != base.device {
                return Err(PlotError::Device {
                    file: other.clone(),
                    device: extra.device,
                    expected: base.device.clone(),
                });
            }
            let records: BTreeMap<_, _> = extra.records.iter().map(|record| (&record.key, record)).collect();
            for (point, record) in points.iter_mut().zip(&base.records) {
                let Some(extra) = records.get(&record.key()) else { continue };
                for (method, ms) in &extra.latencies {
                    // What was measured beside ours is better than what was measured elsewhere, all of it.
                    if !record.latencies.contains_key(method) {
                        point.cold_us.entry(method.clone()).or_insert(ms * 1e3);
                        if let Some(ms) = extra.plan_latencies.get(method) {
                            point.plan_us.entry(method.clone()).or_insert(ms * 1e3);
                        }
                    }
                }
            }
            source += " and ";
            source += &stem(other);
        }
        for point in &mut points {
            point.cold_us.remove(OURS_IN_PYTHON);
            point.plan_us.remove(OURS_IN_PYTHON);
        }
        let found: BTreeSet<String> = points.iter().flat_map(|point| point.cold_us.keys().cloned()).collect();
        let known = KNOWN_METHODS.into_iter().filter(|method| found.contains(*method)).map(str::to_owned);
        let unknown = found.iter().filter(|method| !KNOWN_METHODS.contains(&method.as_str())).cloned();
        let methods = known.chain(unknown).collect();
        Ok(Self { device: base.device, reached, source, methods, points })
    }

    /// Drops all methods but these.
    ///
    /// # Errors
    /// One is not in the files.
    pub fn keep_methods(&mut self, names: &[String]) -> Result<(), PlotError> {
        for name in names {
            self.require_method(name)?;
        }
        self.methods.retain(|method| names.contains(method));
        for point in &mut self.points {
            point.cold_us.retain(|method, _| names.contains(method));
            point.plan_us.retain(|method, _| names.contains(method));
        }
        Ok(())
    }

    /// # Errors
    /// The files have no such method.
    pub(super) fn require_method(&self, name: &str) -> Result<(), PlotError> {
        if self.methods.iter().any(|method| method == name) {
            return Ok(());
        }
        Err(PlotError::Method { name: name.into(), known: self.methods.join(", ") })
    }

    /// What `point_of` makes of each configuration, by method; without the methods that have nothing. The axes are logarithmic:
    /// only positive numbers have a place.
    pub(super) fn series(&self, point_of: impl Fn(&Point, &str) -> Option<(f64, f64)>) -> Vec<Series> {
        let series = self.methods.iter().enumerate().map(|(index, method)| Series {
            label: method.clone(),
            index,
            points: self.points.iter().filter_map(|point| point_of(point, method)).filter(has_place).collect(),
        });
        series.filter(|series| !series.points.is_empty()).collect()
    }

    /// The methods beside ours.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &String> {
        self.methods.iter().filter(|method| *method != METHOD)
    }

    /// What is on an axis of times.
    pub(super) fn time_label(&self) -> &'static str {
        if self.device.starts_with("CPU") { "time of a call, us" } else { "time of a call with a cold L2, us" }
    }
}

impl Point {
    fn of(record: &Record, reached: Option<Rates>) -> Self {
        let q_row_elements = f64::from(record.nheads_q) * f64::from(record.head_dim);
        // Two bytes an element, K and V.
        let token_bytes = 4.0 * f64::from(record.nheads_kv) * f64::from(record.head_dim);
        let logical_kv_bytes = record.flop / (4.0 * q_row_elements) * token_bytes;
        // A batch without tokens shares nothing either.
        let unique_kv_bytes = if record.sharing_factor > 0.0 { logical_kv_bytes / record.sharing_factor } else { 0.0 };
        // Q and O.
        let rows_bytes = (record.bytes as f64 - unique_kv_bytes).max(0.0);
        let sequences = match record.sequences {
            // Version 1 does not say it.
            0 => (rows_bytes / (4.0 * q_row_elements)).round(),
            sequences => f64::from(sequences),
        };
        let mut shape = format!("{}/{}", record.nheads_q, record.nheads_kv);
        if record.dtype != "f16" {
            shape += &format!(" {}", record.dtype);
        }
        if record.head_dim != 128 {
            shape += &format!(" d{}", record.head_dim);
        }
        if !record.features.is_empty() {
            shape += &format!(", {}", record.features);
        }
        let microseconds = |map: &BTreeMap<String, f64>| -> BTreeMap<String, f64> {
            map.iter().map(|(method, ms)| (method.clone(), ms * 1e3)).collect()
        };
        let mut plan_us = microseconds(&record.plan_latencies);
        plan_us.entry(METHOD.into()).or_insert(record.plan_us);
        let positive = |us: Option<f64>| us.filter(|us| *us > 0.0);
        Self {
            suite: record.suite.clone(),
            name: record.tree.clone(),
            shape,
            sequences,
            sharing_factor: record.sharing_factor,
            ceiling_us: positive(record.ceiling_us),
            unshared_ceiling_us: positive(
                reached.map(|rates| rates.time_us(logical_kv_bytes + rows_bytes, record.flop)),
            ),
            cold_us: microseconds(&record.latencies),
            plan_us,
        }
    }

    /// The fastest of the methods beside ours.
    pub(crate) fn best_peer_us(&self) -> Option<f64> {
        self.cold_us.iter().filter(|(method, _)| *method != METHOD).map(|(_, &us)| us).min_by(f64::total_cmp)
    }
}

/// A file whose methods are added. Of its records only these fields are needed, so that it may be one of peers alone.
#[derive(Deserialize)]
struct Extra {
    device: String,
    records: Vec<ExtraRecord>,
}

#[derive(Deserialize)]
struct ExtraRecord {
    #[serde(flatten)]
    key: RecordKey,
    latencies: BTreeMap<String, f64>,
    #[serde(default)]
    plan_latencies: BTreeMap<String, f64>,
}

/// Whether a point can be drawn on logarithmic axes.
pub(super) fn has_place(&(x, y): &(f64, f64)) -> bool {
    [x, y].iter().all(|value| value.is_finite() && *value > 0.0)
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap_or(file.as_os_str()).to_string_lossy().into_owned()
}
