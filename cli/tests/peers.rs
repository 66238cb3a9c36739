//! `pat bench peers`: tables of committed results.

use std::process::{Command, Output};

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/results");

fn peers(args: &[&str]) -> Output {
    let ours = format!("{RESULTS}/2026-11-24-h200-eb98a1f.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(["bench", "peers", &ours]).args(args).output().expect("pat starts")
}

#[test]
fn pat_rs_is_set_against_each_method_and_the_best() {
    let with = format!("{RESULTS}/peers-h200-recorded.json");
    let output = peers(&["--with", &with, "--filter", "figure10: 256_1024 32/8", "--all"]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let cells: Vec<Vec<&str>> =
        text.lines().map(|line| line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect()).collect();
    for method in ["pat", "flashinfer_fa2", "flashinfer_cascade", "best peer of each configuration"] {
        assert!(cells.iter().any(|row| row.first() == Some(&method) && row.get(1) == Some(&"1")), "{method}: {text}");
    }
    let row = cells.iter().find(|row| row.first() == Some(&"`256_1024`")).expect("the configuration");
    assert_eq!(row[1..4], ["32/8", "**245.3**", "272.2"], "the fastest is bold");
    assert_eq!(row.last(), Some(&"-"), "FastTree was not measured");
}

#[test]
fn without_peers_or_configurations_it_says_so() {
    let with = format!("{RESULTS}/peers-h200-recorded.json");
    for (args, part) in [
        (&[][..], "has no method beside pat-rs"),
        (&["--with", "none.json"], "none.json"),
        (&["--with", &with, "--filter", "9/9"], "--filter: got \"9/9\""),
    ] {
        let output = peers(args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(part), "{message}");
    }
}
