//! `pat workload`: files are written, described, and refused.

use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn workload(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pat")).arg("workload").args(args).output().expect("pat starts")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn refused(args: &[&str], part: &str) {
    let output = workload(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(part), "{message}");
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).to_str().expect("UTF-8").to_owned()
}

#[test]
fn every_workload_is_made_and_shown() {
    let folder = TempDir::new().expect("a temporary folder");
    let trace = path(folder.path(), "trace.jsonl");
    let row = r#"{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [3, 1, 2]}"#;
    std::fs::write(&trace, format!("{row}\n{row}\n")).expect("writable");
    for args in [
        &["conversation"][..],
        &["conversation", "--prompt", "llama3", "--private-mean", "300"],
        &["toolagent"],
        &["toolagent", "--trace", &trace],
        &["mooncake", "--trace", &trace],
        &["rollouts", "--samples", "8"],
        &["agents"],
        &["recommendation"],
        &["unshared"],
    ] {
        let file = path(folder.path(), "workload.jsonl");
        let made = text(&workload(&[&["make"], args, &["--requests", "200", "--force", "--output", &file]].concat()));
        assert!(made.contains("prompt tokens") && made.contains("sharing"), "{made}");
        assert_eq!(text(&workload(&["show", &file])), made);
    }
}

#[test]
fn options_reach_the_file() {
    let folder = TempDir::new().expect("a temporary folder");
    let file = path(folder.path(), "workload.jsonl");
    let options =
        ["--requests", "500", "--seed", "3", "--output-tokens", "9", "--max-tokens", "3000", "--max-token-id", "5000"];
    let made = text(&workload(&[&["make", "conversation", "--output", &file], &options[..]].concat()));
    assert!(made.contains("seed 3") && made.contains("requests: prompt and output above 3000 tokens"), "{made}");
    let written = std::fs::read_to_string(&file).expect("written");
    assert!(written.contains("\"token_ids\":[1000,5000]"), "{}", &written[..200]);
    let mut requests = written.lines().skip(1);
    assert!(requests.all(|line| line.ends_with("\"output_tokens\":9}")));
}

#[test]
fn bad_input_is_refused_and_nothing_is_written() {
    let folder = TempDir::new().expect("a temporary folder");
    let (file, broken) = (path(folder.path(), "out.jsonl"), path(folder.path(), "broken.csv"));
    std::fs::write(&broken, "a,b\n").expect("writable");
    for (args, part) in [
        (&["make", "conversation"][..], "--output is missing"),
        (&["make", "conversation", "--output", &broken], "exists: --force overwrites it"),
        (&["make", "conversation", "--output", &file, "--lengths", &broken], "--lengths: lengths line 1: got \"a,b\""),
        (&["make", "toolagent", "--output", &file, "--trace", &broken], "--trace: trace line 1"),
        (&["make", "mooncake", "--output", &file], "--trace <FILE>"),
        (&["make", "mooncake", "--output", &file, "--trace", "none"], "--trace none"),
        (&["make", "rollouts", "--output", &file, "--samples", "0"], "invalid value '0'"),
        (&["make", "unshared", "--output", &file, "--max-tokens", "100"], "--max-tokens: got 100"),
        (&["show", &broken], "workload line 1"),
        (&["show", "none"], "none"),
    ] {
        refused(args, part);
        assert!(!Path::new(&file).exists(), "{args:?}");
    }
}
