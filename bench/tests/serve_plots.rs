//! Pictures of serving records.

use pat_bench::plot::serve::{ServeFigures, ServePicture, draw};
use pat_bench::plot::{Format, PlotError, Theme};
use roxmltree::Document;
use serde_json::{Value, json};
use std::path::PathBuf;
use tempfile::TempDir;

fn record(backend: &str, trace: &str, rate: f64, [ttft_ms, tpot_ms]: [f64; 2]) -> Value {
    json!({
        "schema_version": 1,
        "config": {"model": "qwen3-8b", "ATTENTION_BACKEND": backend, "request_rate": rate.to_string(), "trace": trace,
            "mode": "graphs", "admission": "fcfs", "form": "in-process"},
        "status": "success",
        "metrics": {"mean_ttft_ms": ttft_ms, "mean_tpot_ms": tpot_ms, "p99_tpot_ms": 1.5 * tpot_ms},
        "step_time": {"requests": 100.0 + rate, "steps": 10,
            "ms": {"attention": tpot_ms / 2.0, "matrix products": 7.5, "other kernels": 1.25, "no kernel": 0.5}},
        "mixed_step_time": {"requests": 100.0 + rate, "tokens": 800.0 + rate, "steps": 10,
            "ms": {"attention": tpot_ms, "matrix products": 27.5}},
        "machine": {"device": "a GPU"},
    })
}

/// Two backends that saturate at different rates, on two workloads.
fn records() -> Vec<Value> {
    let mut records = Vec::new();
    for (backend, knee) in [("FLASH_ATTN", 10.0), ("CUSTOM", 16.0)] {
        for trace in ["conversation", "toolagent"] {
            for rate in [4.0, 8.0, 12.0, 16.0] {
                let load: f64 = rate / knee;
                records.push(record(backend, trace, rate, [80.0 * (3.0 * load).exp(), 10.0 * (2.0 * load).exp()]));
            }
        }
    }
    records
}

fn file(folder: &TempDir, records: &[Value]) -> PathBuf {
    let path = folder.path().join("serve.jsonl");
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).expect("writable");
    path
}

fn figures(records: &[Value]) -> ServeFigures {
    let folder = TempDir::new().expect("a temporary folder");
    ServeFigures::read(&[file(&folder, records)]).expect("readable")
}

/// The texts of a picture; everything with coordinates lies inside of it.
fn texts(picture: ServePicture, figures: &ServeFigures, theme: Theme) -> Vec<String> {
    let svg = draw(picture, figures, theme, Format::Svg).expect("drawn");
    let svg = String::from_utf8(svg).expect("UTF-8");
    let document = Document::parse(&svg).expect("valid XML");
    let root = document.root_element();
    let size = |name: &str| root.attribute(name).and_then(|value| value.parse::<f64>().ok()).expect("a size");
    for node in root.descendants() {
        for (axis, most) in [("x", size("width")), ("y", size("height")), ("cx", size("width")), ("cy", size("height"))]
        {
            let Some(value) = node.attribute(axis) else { continue };
            let value: f64 = value.parse().expect("a number");
            assert!((0.0..=most).contains(&value), "{picture:?}: {axis} = {value} of {:?}", node.tag_name());
        }
    }
    let texts = root.descendants().filter(|node| node.tag_name().name() == "text");
    texts.filter_map(|node| node.text()).map(|text| text.trim().to_owned()).collect()
}

#[test]
fn pictures_name_backends_workloads_and_sources() {
    let figures = figures(&records());
    assert_eq!(figures.series, ["pat-rs", "FLASH_ATTN"]);
    for theme in Theme::ALL {
        for picture in ServePicture::ALL {
            let texts = texts(picture, &figures, theme);
            let said = |part: &str| texts.iter().any(|text| text.contains(part));
            for part in ["qwen3-8b, conversation", "qwen3-8b, toolagent", "pat-rs", "FLASH_ATTN", "a GPU; serve"] {
                assert!(said(part), "{picture:?}: {part}: {texts:?}");
            }
        }
    }
    let latency = texts(ServePicture::Latency, &figures, Theme::Light);
    for label in ["mean TTFT, s", "mean TPOT, ms", "P99 TPOT, ms", "requests per second"] {
        assert!(latency.contains(&label.to_owned()), "{latency:?}");
    }
    let capacity = texts(ServePicture::Capacity, &figures, Theme::Light);
    assert!(capacity.contains(&"TTFT 1 s, TPOT 50 ms".to_owned()), "{capacity:?}");
    let steps = texts(ServePicture::Steps, &figures, Theme::Light);
    for part in [
        "attention",
        "matrix products",
        "other kernels",
        "no kernel",
        "pat-rs, 8/s: 108 requests",
        "with a prompt: 808 tokens",
    ] {
        assert!(steps.contains(&part.to_owned()), "{steps:?}");
    }
}

#[test]
fn figures_above_neighbouring_bars_do_not_overlap() {
    let backends = ["CUSTOM", "A", "B", "C", "D", "E", "F"];
    let mut records: Vec<Value> =
        backends.iter().map(|backend| record(backend, "conversation", 17.5, [200.0, 40.0])).collect();
    records.push(record("F", "toolagent", 13.5, [200.0, 40.0]));
    let svg = draw(ServePicture::Capacity, &figures(&records), Theme::Light, Format::Svg).expect("drawn");
    let svg = String::from_utf8(svg).expect("UTF-8");
    let document = Document::parse(&svg).expect("valid XML");
    let places = |label: &str| {
        let texts = document.descendants().filter(|node| node.tag_name().name() == "text");
        let texts = texts.filter(|node| node.text().is_some_and(|text| text.trim() == label));
        texts.map(|node| node.attribute("x").expect("a place").parse().expect("a number")).collect::<Vec<i32>>()
    };
    let bars = places("> 17.5");
    assert_eq!(bars.len(), 2 * backends.len(), "of two limits");
    // Six characters of 16 pixels, of which digits take about half.
    assert!(bars.windows(2).all(|pair| pair[1] - pair[0] >= 40), "{bars:?}");
    // A workload that one backend alone has been run with has its bar in the middle.
    let (bar, middle) = (places("> 13.5"), places("qwen3-8b, toolagent"));
    assert_eq!(bar.len(), 2);
    assert!(bar.iter().zip(&middle).all(|(bar, middle)| bar.abs_diff(*middle) <= 2), "{bar:?} {middle:?}");
}

#[test]
fn rates_close_to_each_other_have_short_labels() {
    let records =
        [record("FLASH_ATTN", "unshared", 8.0, [200.0, 40.0]), record("FLASH_ATTN", "unshared", 8.6, [300.0, 90.0])];
    let texts = texts(ServePicture::Latency, &figures(&records), Theme::Light);
    assert!(texts.contains(&"8.2".to_owned()), "{texts:?}");
    let numbers = texts.iter().filter(|text| text.parse::<f64>().is_ok());
    assert!(numbers.clone().all(|text| text.len() <= 5), "{:?}", numbers.collect::<Vec<_>>());
}

#[test]
fn runs_with_failures_are_left_out_and_counted() {
    let mut records = records();
    for record in &mut records[..2] {
        record["status"] = "failed".into();
    }
    records.push(json!({"config": {"ATTENTION_BACKEND": "CUSTOM", "request_rate": "4", "trace": "conversation", "model": "qwen3-8b"},
        "status": "error", "error_log": "no server"}));
    let latency = texts(ServePicture::Latency, &figures(&records), Theme::Dark);
    assert!(latency.iter().any(|text| text.contains("3 runs with failures are left out")), "{latency:?}");
    let latency = texts(ServePicture::Latency, &figures(&records[1..records.len() - 1]), Theme::Dark);
    assert!(latency.iter().any(|text| text.contains("1 run with failures is left out")), "{latency:?}");
}

#[test]
fn modes_forms_and_admission_are_series_of_their_own() {
    let mut records = records();
    let mut eager = records[0].clone();
    eager["config"]["mode"] = "eager".into();
    let mut grouped = records[0].clone();
    grouped["config"]["admission"] = "prefix-grouped:64".into();
    records.extend([eager, grouped]);
    let expected = ["pat-rs", "FLASH_ATTN", "FLASH_ATTN, eager", "FLASH_ATTN, prefix-grouped:64"];
    assert_eq!(figures(&records).series, expected);
    // The mode of most runs needs no name, whatever it is.
    for record in &mut records {
        let mode = if record["config"]["mode"] == "graphs" { "compiled" } else { "graphs" };
        record["config"]["mode"] = mode.into();
    }
    assert_eq!(figures(&records).series, expected.map(|name| name.replace("eager", "graphs")));
    records[1]["config"]["form"] = "http".into();
    assert!(figures(&records).series.contains(&"FLASH_ATTN, http".to_owned()));
}

#[test]
fn runs_of_two_devices_share_no_line() {
    let mut records = records();
    let mut other = records[0].clone();
    other["machine"]["device"] = "another GPU".into();
    records.push(other);
    let titles: Vec<String> = figures(&records).panels.into_iter().map(|panel| panel.title).collect();
    let expected = ["conversation, a GPU", "conversation, another GPU", "toolagent, a GPU"];
    assert_eq!(titles, expected.map(|title| format!("qwen3-8b, {title}")));
}

#[test]
fn pats_records_are_drawn_too() {
    let pat = |backend: &str, rate: &str, tpot: f64| {
        json!({"config": {"model": "Qwen/Qwen3-8B", "max_model_len": "32768", "port": "9000", "gpu_id": "0", "ATTENTION_BACKEND": backend,
            "request_rate": rate, "trace": "burst", "block_size": "16", "num_prompts": "5000", "output_file": "e2e_perf.jsonl"},
            "status": "success", "metrics": {"mean_ttft_ms": 250.0, "mean_tpot_ms": tpot, "p99_tpot_ms": 80.0, "mean_itl_ms": null}})
    };
    let records = [pat("FLASH_ATTN", "7.0", 60.0), pat("PREFIX_ATTN", "7.0", 30.0), pat("PREFIX_ATTN", "9.0", 40.0)];
    let figures = figures(&records);
    assert_eq!(figures.series, ["PAT", "FLASH_ATTN"]);
    assert!(texts(ServePicture::Latency, &figures, Theme::Light).contains(&"Qwen3-8B, conversation".to_owned()));
    let error = draw(ServePicture::Steps, &figures, Theme::Light, Format::Svg).expect_err("no breakdown");
    assert!(matches!(error, PlotError::Empty(_)), "{error}");
}

#[test]
fn pixels_are_written_too() {
    let figures = figures(&records());
    for picture in ServePicture::ALL {
        let bytes = draw(picture, &figures, Theme::Dark, Format::Png).expect("drawn");
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 8_000, "{} bytes", bytes.len());
    }
}

#[test]
fn what_cannot_be_drawn_says_why() {
    let folder = TempDir::new().expect("a temporary folder");
    let read = |records: &[Value]| ServeFigures::read(&[file(&folder, records)]);
    let message = read(&[json!({"a": 1})]).expect_err("no record").to_string();
    assert!(message.contains("serve.jsonl line 1"), "{message}");
    let many: Vec<Value> = (0..9).map(|index| record(&format!("B{index}"), "t", 4.0, [1.0, 1.0])).collect();
    let message = read(&many).expect_err("too many").to_string();
    assert!(message.contains("9 series, expected at most 8"), "{message}");
    let empty = read(&[]).expect("an empty file");
    for picture in ServePicture::ALL {
        let error = draw(picture, &empty, Theme::Light, Format::Svg).expect_err("empty");
        assert!(matches!(error, PlotError::Empty(_)), "{error}");
    }
}
