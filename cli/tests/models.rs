//! `pat models`: the table of models as people and programs read it.

use serde_json::Value;
use std::process::Command;

fn stdout(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_pat")).args(args).output().expect("pat starts");
    assert_eq!(output.status.code(), Some(0), "pat {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[test]
fn layers_are_listed_with_what_the_validator_says() {
    let rows: Value = serde_json::from_str(&stdout(&["models", "--json"])).expect("JSON");
    let rows = rows.as_array().expect("a list");
    assert!(rows.len() > 40);
    let row = |model: &str| rows.iter().find(|row| row["model"] == model).expect(model);
    let shape = |model: &str| {
        let row = row(model);
        ["q_heads", "kv_heads", "head_dim", "v_head_dim"].map(|field| row[field].as_u64().expect(field))
    };
    assert_eq!(shape("qwen3-14b"), [40, 8, 128, 128]);
    assert_eq!(shape("mimo-v2-flash/window"), [64, 8, 192, 128]);
    let window = row("gpt-oss-20b/window");
    assert_eq!((&window["window"], &window["sinks"], &window["layers"]), (&128.into(), &true.into(), &1.into()));
    assert_eq!(
        (&row("gemma-2-2b/full")["soft_cap"], &row("llama-4-scout/chunk")["chunk"]),
        (&50.0.into(), &8192.into())
    );
    assert_eq!((&row("qwen3-8b")["eligible"], &row("qwen3-8b")["reason"]), (&true.into(), &Value::Null));
    let refused = row("phi-3-mini");
    assert_eq!(refused["eligible"], false);
    assert_eq!(refused["reason"], "head_dim: got 96, expected 64 or 128 or 256");
}

#[test]
fn the_table_has_a_line_for_each_kind_of_layers() {
    let table = stdout(&["models"]);
    let line = |model: &str| table.lines().find(|line| line.trim_start().starts_with(model)).expect(model).to_owned();
    for (model, parts) in [
        ("gpt-oss-20b/full", &["1 of 2", "64/8", "all", "sinks", "yes", "openai/gpt-oss-20b"][..]),
        ("gpt-oss-20b/window", &["last 128", "sinks"]),
        ("llama-4-scout/chunk", &["36 of 48", "chunks of 8192"]),
        ("mimo-v2-flash/full", &["192 (V 128)", "head_dim: got 192, expected 64 or 128 or 256"]),
        ("gemma-2-2b/full", &["cap 50"]),
    ] {
        for part in parts {
            assert!(line(model).contains(part), "{part:?} is not in {:?}", line(model));
        }
    }
}
