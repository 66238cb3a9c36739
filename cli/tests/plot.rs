//! `pat plot`: files are written where they are asked for, and nothing else is touched.

use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/results");

fn plot(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(["plot", "kernels"]).args(args).arg("--output").arg(folder).output().expect("pat starts")
}

fn ours() -> String {
    format!("{RESULTS}/2026-11-24-h200-eb98a1f.json")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a readable folder");
    let mut names: Vec<_> = entries.map(|entry| entry.expect("readable").file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn refused(output: &Output, part: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(part), "{message}");
}

#[test]
fn pictures_of_committed_results_are_written() {
    let folder = TempDir::new().expect("a temporary folder");
    let output = folder.path().join("a folder that is not there");
    let peers = format!("{RESULTS}/peers-h200-recorded.json");
    let drawn = plot(&output, &[&ours(), "--with", &peers, "--format", "svg,png", "--picture", "bars,sharing"]);
    assert!(drawn.status.success(), "{drawn:?}");
    let expected = ["bars-dark.png", "bars-dark.svg", "bars-light.png", "bars-light.svg"];
    let expected = expected.map(|name| format!("kernels-{name}"));
    assert_eq!(names(&output)[..4], expected);
    assert_eq!(names(&output).len(), 8);
    assert_eq!(String::from_utf8_lossy(&drawn.stdout).lines().count(), 8);
}

#[test]
fn nothing_is_overwritten_without_being_told() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("kernels-ceiling-dark.svg");
    std::fs::write(&file, "mine").expect("writable");
    let (ours, args) = (ours(), ["--picture", "ceiling"]);
    refused(&plot(folder.path(), &[&[ours.as_str()], &args[..]].concat()), "exists: --force overwrites it");
    assert_eq!(names(folder.path()), ["kernels-ceiling-dark.svg"], "nothing was drawn before the refusal");
    assert_eq!(std::fs::read_to_string(&file).expect("readable"), "mine");
    assert!(plot(folder.path(), &[&[ours.as_str(), "--force"], &args[..]].concat()).status.success());
    assert!(std::fs::read_to_string(&file).expect("readable").starts_with("<svg"));
}

#[test]
fn a_picture_that_the_file_does_not_allow_is_left_out_or_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    let text = std::fs::read_to_string(ours()).expect("a committed result");
    let sweeps = folder.path().join("sweeps.json");
    std::fs::write(&sweeps, text.replace("\"tree\":", "\"suite\": \"sweeps\", \"tree\":")).expect("writable");
    let sweeps = sweeps.to_str().expect("UTF-8");
    let drawn = plot(&folder.path().join("all"), &[sweeps, "--theme", "light"]);
    assert!(drawn.status.success(), "{drawn:?}");
    assert!(String::from_utf8_lossy(&drawn.stdout).contains("bars-light.svg: left out"), "{drawn:?}");
    assert_eq!(names(&folder.path().join("all")).len(), 3);
    refused(&plot(folder.path(), &[sweeps, "--picture", "bars"]), "suite figure10");
}

#[test]
fn bad_input_is_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    let (ours, foreign) = (ours(), concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    for (args, part) in [
        (&["none.json"][..], "none.json"),
        (&[foreign], "is not a result file"),
        (&[ours.as_str(), "--with", "none.json"], "none.json"),
        (
            &[ours.as_str(), "--methods", "vllm"],
            "--methods: got \"vllm\", expected one of the methods of the files: pat-rs",
        ),
        (&[ours.as_str(), "--baseline", "pat"], "got \"pat\""),
        (&[ours.as_str(), "--theme", "red"], "invalid value 'red'"),
    ] {
        refused(&plot(&folder.path().join("out"), args), part);
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("writable");
    refused(&plot(&file.join("below"), &[&ours]), "--output");
}
