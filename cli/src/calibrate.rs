//! `pat calibrate`: the terms of the cost model, measured on a device.

use crate::output;
use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use pat_bench::calibrate::{fit, probes};
use pat_bench::device::Repeats;
use pat_rs::DeviceProfile;
use pat_rs::cuda::bench_support::L2Flush;
use pat_workloads::{Existing, whole_file};
use serde::Serialize;
use std::path::PathBuf;

/// Calls per probe: single times of short steps scatter by a microsecond, their median must not.
const REPEATS: Repeats = Repeats { warm_ups: 5, timed: 41 };

#[derive(clap::Args)]
pub(crate) struct Args {
    /// cuda or cuda:N.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Where to write the profile, for --profile FILE.
    #[arg(long, value_name = "FILE.json")]
    output: Option<PathBuf>,
    /// Overwrite the file.
    #[arg(long)]
    force: bool,
    /// Machine-readable output: the profile and every measured time beside its prediction.
    #[arg(long)]
    json: bool,
}

/// The machine-readable output.
#[derive(Serialize)]
struct Report {
    profile: DeviceProfile,
    /// What was planned with before.
    built_in: DeviceProfile,
    probes: Vec<Timed>,
}

/// A probe's time beside what the cost model makes of it.
#[derive(Serialize)]
struct Timed {
    probe: String,
    measured_us: f64,
    /// With the measured profile.
    predicted_us: f64,
    /// With the built-in one.
    built_in_us: f64,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let existing = Existing::replaced_if(args.force);
    args.output.as_ref().map_or(Ok(()), |file| whole_file::check(file, existing)).context("--output")?;
    let engine = crate::run::engine(&args.device)?;
    let engine = engine
        .as_cuda()
        .with_context(|| format!("--device: got {:?}, expected a usable cuda or cuda:N", args.device))?;
    let built_in = engine.device().profile()?;
    let flush = L2Flush::new(engine.device())?;
    let probes = probes(&built_in)?;
    let bar = ProgressBar::new(probes.len() as u64);
    bar.set_style(ProgressStyle::with_template("{pos}/{len} {msg} {elapsed}").expect("a valid template"));
    let mut samples = Vec::new();
    for probe in &probes {
        bar.set_message(probe.name.clone());
        samples.push(probe.measure(engine, &flush, REPEATS).with_context(|| probe.name.clone())?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let profile = fit(&built_in, &samples).context("the times do not fit the cost model").inspect_err(|_| {
        samples.iter().for_each(|sample| output::note(format!("{:>10.2} us  {}", sample.measured_us, sample.name)));
    })?;
    let mut timed = Vec::new();
    for (probe, sample) in probes.iter().zip(&samples) {
        timed.push(Timed {
            probe: sample.name.clone(),
            measured_us: sample.measured_us,
            predicted_us: probe.plan(&profile)?.prediction().total_us(),
            built_in_us: probe.plan(&built_in)?.prediction().total_us(),
        });
    }
    let report = Report { profile, built_in, probes: timed };
    if let Some(file) = &args.output {
        let text = serde_json::to_string_pretty(&report.profile)? + "\n";
        whole_file::write(file, text.as_bytes(), existing).context("--output")?;
    }
    if args.json {
        output::print(serde_json::to_string_pretty(&report)?)?;
    } else {
        output::print(text(&report))?;
    }
    Ok(true)
}

fn text(report: &Report) -> String {
    let Report { profile, built_in, probes } = report;
    let mut terms = Table::new();
    terms.load_preset(presets::NOTHING).set_header([profile.name.as_str(), "measured", "built in", "unit"]);
    let tera = |per_us: f64| format!("{:.2}", per_us / 1e6);
    let us = |us: f64| format!("{us:.2}");
    for (name, value, former, unit) in [
        ("DRAM bandwidth", tera(profile.hbm_bytes_per_us), tera(built_in.hbm_bytes_per_us), "TB/s"),
        ("L2 bandwidth", tera(profile.l2_bytes_per_us), tera(built_in.l2_bytes_per_us), "TB/s"),
        ("mma.sync rate", tera(profile.mma_flop_per_us), tera(built_in.mma_flop_per_us), "TFLOP/s"),
        ("wgmma rate", tera(profile.wgmma_flop_per_us), tera(built_in.wgmma_flop_per_us), "TFLOP/s"),
        ("launch", us(profile.launch_us), us(built_in.launch_us), "us"),
        ("merge", us(profile.merge_us), us(built_in.merge_us), "us"),
        ("latency of an item", us(profile.item_latency_us), us(built_in.item_latency_us), "us"),
        ("latency of a step", us(profile.tile_latency_us), us(built_in.tile_latency_us), "us"),
    ] {
        terms.add_row([name, &value, &former, unit]);
    }
    let mut times = Table::new();
    times.load_preset(presets::NOTHING).set_header([
        "probe",
        "measured us",
        "predicted us",
        "with the built-in profile",
    ]);
    for timed in probes {
        let Timed { probe, measured_us, predicted_us, built_in_us } = timed;
        times.add_row([probe.clone(), us(*measured_us), us(*predicted_us), us(*built_in_us)]);
    }
    format!("{terms}\n\n{times}")
}
