//! Pictures of committed results.

use pat_bench::plot::{self, CEILING, Figures, Format, Options, Picture, PlotError, Theme};
use roxmltree::Document;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn results(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("results").join(name)
}

fn ours() -> PathBuf {
    results("2026-11-24-h200-eb98a1f.json")
}

fn with_peers() -> Figures {
    Figures::read(&ours(), &[results("peers-h200-recorded.json")]).expect("committed results")
}

fn options(theme: Theme, format: Format) -> Options {
    Options { theme, format, baseline: None }
}

fn svg(picture: Picture, figures: &Figures, options: &Options) -> String {
    String::from_utf8(plot::draw(picture, figures, options).expect("drawn")).expect("UTF-8")
}

/// The texts of a picture; everything with coordinates lies inside of it.
fn texts(svg: &str) -> Vec<String> {
    let document = Document::parse(svg).expect("valid XML");
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    let size = |name: &str| root.attribute(name).and_then(|value| value.parse::<f64>().ok()).expect("a size");
    let mut shapes = 0;
    for node in root.descendants() {
        for (axis, most) in [("x", size("width")), ("y", size("height")), ("cx", size("width")), ("cy", size("height"))]
        {
            let Some(value) = node.attribute(axis) else { continue };
            let value: f64 = value.parse().expect("a number");
            assert!((0.0..=most).contains(&value), "{axis} = {value} of {:?}", node.tag_name());
        }
        shapes += usize::from(["rect", "circle", "polygon", "polyline"].contains(&node.tag_name().name()));
    }
    assert!(shapes > 80, "{shapes} shapes");
    let texts = root.descendants().filter(|node| node.tag_name().name() == "text");
    texts.filter_map(|node| node.text()).map(|text| text.trim().to_owned()).collect()
}

#[test]
fn every_method_is_in_the_pictures() {
    let figures = with_peers();
    assert_eq!(
        figures.methods,
        ["pat-rs", "pat", "flashinfer_fa2", "flashinfer_cudacore", "flashinfer_cascade", "fasttree"]
    );
    for theme in [Theme::Light, Theme::Dark] {
        let bars = texts(&svg(Picture::Bars, &figures, &options(theme, Format::Svg)));
        let ceiling = texts(&svg(Picture::Ceiling, &figures, &options(theme, Format::Svg)));
        for method in &figures.methods {
            assert!(ceiling.contains(method), "{method}");
            assert!(bars.iter().any(|text| text.starts_with(method.as_str())), "{method}");
        }
        assert!(bars.contains(&"fasttree (30 of 80)".to_owned()), "what is absent is said");
        assert!(bars.contains(&"PAT's Figure 10: time relative to pat, lower is faster".to_owned()), "{bars:?}");
        assert_eq!(bars.iter().filter(|text| text.contains("query/KV heads")).count(), 4);
        assert!(bars.contains(&"20: 256_4096".to_owned()));
        let planning = texts(&svg(Picture::Planning, &figures, &options(theme, Format::Svg)));
        assert!(planning.contains(&"flashinfer_cascade".to_owned()) && !planning.contains(&"fasttree".to_owned()));
        let sharing = texts(&svg(Picture::Sharing, &figures, &options(theme, Format::Svg)));
        assert!(sharing.contains(&"64/8 heads".to_owned()));
        for texts in [bars, ceiling, planning, sharing] {
            assert!(texts.iter().any(|text| text.contains("NVIDIA H200") && text.contains("eb98a1f")), "{texts:?}");
        }
    }
}

#[test]
fn themes_differ_in_colours_alone() {
    let figures = with_peers();
    for picture in Picture::ALL {
        let light = svg(picture, &figures, &options(Theme::Light, Format::Svg));
        let dark = svg(picture, &figures, &options(Theme::Dark, Format::Svg));
        assert!(light.contains("#FFFFFF") && dark.contains("#0D1117"));
        assert_eq!(texts(&light), texts(&dark));
    }
}

#[test]
fn pat_rs_alone_is_drawn_against_the_ceiling() {
    let figures = Figures::read(&ours(), &[]).expect("a committed result");
    assert_eq!(plot::default_baseline(&figures), CEILING);
    let bars = texts(&svg(Picture::Bars, &figures, &options(Theme::Light, Format::Svg)));
    assert!(bars.iter().any(|text| text.contains("relative to the reachable time")), "{bars:?}");
    let sharing = texts(&svg(Picture::Sharing, &figures, &options(Theme::Light, Format::Svg)));
    assert!(sharing.contains(&"Speed-up over reading every sequence by itself".to_owned()), "{sharing:?}");
    svg(Picture::Ceiling, &figures, &options(Theme::Dark, Format::Svg));
    svg(Picture::Planning, &figures, &options(Theme::Dark, Format::Svg));
}

#[test]
fn old_files_say_how_many_sequences_there_are_by_their_bytes() {
    let figures = Figures::read(&ours(), &[]).expect("a committed result");
    for point in &figures.points {
        let (nodes, _) = point.name.split_once('_').expect("a tree");
        let sequences = nodes.rsplit(',').next().and_then(|count| count.parse().ok());
        assert_eq!(Some(point.sequences), sequences, "{}", point.name);
        let [unshared, shared] = [point.unshared_ceiling_us, point.ceiling_us].map(|us| us.expect("known of an H200"));
        assert!(unshared >= shared * 0.999, "{}", point.name);
    }
}

#[test]
fn pixels_are_written_too() {
    let figures = with_peers();
    for picture in Picture::ALL {
        let bytes = plot::draw(picture, &figures, &options(Theme::Dark, Format::Png)).expect("drawn");
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 10_000, "{} bytes", bytes.len());
    }
}

#[test]
fn what_cannot_be_drawn_says_why() {
    let figures = with_peers();
    let draw = |figures: &Figures, picture, baseline: Option<&str>| {
        let options = Options { baseline: baseline.map(str::to_owned), ..options(Theme::Light, Format::Svg) };
        plot::draw(picture, figures, &options).expect_err("refused").to_string()
    };
    let message = draw(&figures, Picture::Bars, Some("vllm"));
    assert!(message.contains("got \"vllm\"") && message.contains("flashinfer_fa2"), "{message}");
    let mut other_suite = figures.clone();
    other_suite.points.iter_mut().for_each(|point| point.suite = "sweeps".into());
    assert!(draw(&other_suite, Picture::Bars, None).contains("figure10"));
    let mut many = figures.clone();
    many.methods = (0..9).map(|index| format!("method{index}")).collect();
    assert!(draw(&many, Picture::Ceiling, None).contains("9 methods, expected at most 8"));
    let empty = Figures { points: Vec::new(), ..figures.clone() };
    for picture in Picture::ALL {
        let options = options(Theme::Light, Format::Svg);
        let error = plot::draw(picture, &empty, &options).expect_err("refused");
        assert!(matches!(error, PlotError::Empty(_)), "{error}");
    }
}

#[test]
fn methods_are_chosen_by_name() {
    let mut figures = with_peers();
    assert!(figures.clone().keep_methods(&["vllm".into()]).is_err());
    figures.keep_methods(&["pat-rs".into(), "flashinfer_fa2".into()]).expect("both are there");
    assert_eq!(figures.methods, ["pat-rs", "flashinfer_fa2"]);
    assert_eq!(plot::default_baseline(&figures), "flashinfer_fa2");
    let bars = svg(Picture::Bars, &figures, &options(Theme::Light, Format::Svg));
    assert!(!texts(&bars).iter().any(|text| text.contains("cascade")));
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("writable");
        path
    };
    let peers = std::fs::read_to_string(results("peers-h200-recorded.json")).expect("a committed result");
    for (other, part) in [
        (folder.path().join("none.json"), "none.json"),
        (file("broken.json", "{"), "is not a result file"),
        (file("foreign.json", r#"{"name": "pat"}"#), "is not a result file"),
        (file("newer.json", r#"{"schema_version": 99}"#), "schema version 99"),
        (file("device.json", &peers.replace("NVIDIA H200", "NVIDIA A100")), "measured on NVIDIA A100"),
    ] {
        let message = Figures::read(&ours(), &[other]).expect_err(part).to_string();
        assert!(message.contains(part), "{message}");
    }
    // What the first file has itself is kept.
    let slower = peers.replace("\"pat\":", "\"pat-rs\":");
    let slower = Figures::read(&ours(), &[file("slower.json", &slower)]).expect("readable");
    let alone = Figures::read(&ours(), &[]).expect("readable");
    assert_eq!(slower.points[0].cold_us["pat-rs"], alone.points[0].cold_us["pat-rs"]);
}

/// The committed figures, changed.
fn changed(change: impl Fn(&mut serde_json::Value)) -> Figures {
    let text = std::fs::read_to_string(ours()).expect("a committed result");
    let mut value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    change(&mut value);
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("changed.json");
    std::fs::write(&file, value.to_string()).expect("writable");
    Figures::read(&file, &[]).expect("a result file")
}

#[test]
fn a_batch_without_tokens_is_left_out_of_logarithmic_axes() {
    let empty = |record: &mut serde_json::Value| {
        for field in ["flop", "sharing_factor", "predicted_us", "ceiling_us", "floor_us"] {
            record[field] = 0.0.into();
        }
        record["bytes"] = 0.into();
    };
    let one = changed(|value| empty(&mut value["records"][0]));
    let all = changed(|value| value["records"].as_array_mut().expect("records").iter_mut().for_each(empty));
    for picture in Picture::ALL {
        let drawn = texts(&svg(picture, &one, &options(Theme::Light, Format::Svg)));
        assert!(!drawn.iter().any(|text| text.contains("NaN") || text.contains("inf")), "{drawn:?}");
        if picture != Picture::Planning && picture != Picture::Bars {
            let refused = plot::draw(picture, &all, &options(Theme::Light, Format::Svg)).expect_err("nothing to draw");
            assert!(matches!(refused, PlotError::Empty(_)), "{refused}");
        }
    }
}

#[test]
fn the_reachable_time_is_that_of_the_results_device() {
    let label = |device: &str| {
        let figures = changed(|value| value["device"] = device.into());
        texts(&svg(Picture::Ceiling, &figures, &options(Theme::Light, Format::Svg))).join("\n")
    };
    assert!(label("NVIDIA H200").contains("max(bytes / 4.6 TB/s, FLOP / 650 TFLOP/s)"));
    assert!(label("NVIDIA H100 80GB HBM3").contains("max(bytes / 3.12 TB/s, FLOP / 650 TFLOP/s)"));
    let cpu = changed(|value| value["device"] = "CPU (a model)".into());
    for picture in [Picture::Bars, Picture::Ceiling, Picture::Sharing] {
        let refused = plot::draw(picture, &cpu, &options(Theme::Light, Format::Svg)).expect_err("nothing is known");
        assert!(refused.to_string().contains("nobody has measured what can be reached"), "{refused}");
    }
    svg(Picture::Planning, &cpu, &options(Theme::Light, Format::Svg));
}
