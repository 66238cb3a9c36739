//! `pat models`, and the options that say what a model's attention is: the table as people and programs read it, runs of its
//! models, several query tokens, and options that contradict each other.

mod tool;

use serde_json::{Value, json};
use std::path::Path;
use tool::stdout;

/// Asserts that a call ends with status 2 and this message, and prints nothing else.
fn refused(args: &[&str], message: &str) {
    let output = tool::refused(args, &[]);
    assert!(output.stdout.is_empty(), "pat {args:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("error: {message}\n"), "pat {args:?}");
}

fn report(args: &[&str]) -> Value {
    tool::json(&[args, &["--json"]].concat())
}

#[test]
fn layers_are_listed_with_what_the_validator_says() {
    let rows = report(&["models"]);
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
    assert_eq!(row("mimo-v2-flash/full")["eligible"], true);
    let refused = row("deepseek-v3");
    assert_eq!(refused["eligible"], false);
    assert_eq!(refused["reason"], "head_dim: got 576, expected 64 or 96 or 128 or 192 or 256 or 512");
}

#[test]
fn the_table_has_a_line_for_each_kind_of_layers() {
    let table = stdout(&["models"]);
    let line = |model: &str| table.lines().find(|line| line.trim_start().starts_with(model)).expect(model).to_owned();
    for (model, parts) in [
        ("gpt-oss-20b/full", &["1 of 2", "64/8", "all", "sinks", "yes", "openai/gpt-oss-20b"][..]),
        ("gpt-oss-20b/window", &["last 128", "sinks"]),
        ("llama-4-scout/chunk", &["36 of 48", "chunks of 8192"]),
        ("mimo-v2-flash/full", &["192 (V 128)", "yes"]),
        ("deepseek-v3", &["576 (V 512)", "head_dim: got 576, expected 64 or 96 or 128 or 192 or 256 or 512"]),
        ("gemma-2-2b/full", &["cap 50"]),
    ] {
        for part in parts {
            assert!(line(model).contains(part), "{part:?} is not in {:?}", line(model));
        }
    }
}

#[test]
fn a_models_attention_is_run_and_verified() {
    let run = |args: &[&str]| {
        let report = report(&[&["run", "--tree", "1,2,6_32,96,40", "--device", "cpu"], args].concat());
        assert_eq!(report["numerics"]["passed"], true, "{args:?}: {report}");
        report
    };
    let full = run(&["--model", "gpt-oss-20b"]);
    assert_eq!((&full["model"], &full["features"]), (&json!("gpt-oss-20b"), &json!("sinks")));
    assert_eq!([&full["q_heads"], &full["kv_heads"], &full["head_dim"]], [&json!(64), &json!(8), &json!(64)]);
    let window = run(&["--model", "gpt-oss-20b/window", "--tensor-parallel", "4", "--dtype", "bf16"]);
    assert_eq!((&window["q_heads"], &window["features"]), (&json!(16), &json!("sinks, window 128")));
    let capped = run(&["--model", "gemma-2-2b/full", "--softcap", "50", "--heads", "8/4", "--head-dim", "256"]);
    assert_eq!(capped["features"], "softcap 50");
    // Of 168 tokens each, the last chunk has as many: nothing is left out.
    assert_eq!(run(&["--model", "llama-4-scout/chunk"])["q_heads"], 40);
    let chunked = report(&["plan", "--tree", "1,2_8192,64", "--model", "llama-4-scout/chunk"]);
    assert_eq!((&chunked["features"], &chunked["q_heads"]), (&json!("chunk 8192"), &json!(40)));
    // Of each sequence's 8,256 tokens, the 64 behind the chunk's end.
    assert_eq!(chunked["flat_kv_bytes"], 2 * 64 * 2 * 8 * 128 * 2);
    assert!(
        stdout(&["plan", "--tree", "1_32", "--model", "qwen3-8b"]).contains("qwen3-8b: 32/8 heads, head dim 128, f16")
    );
}

#[test]
fn query_tokens_are_rows_that_are_verified() {
    for model in
        [&["--model", "qwen3-8b"][..], &["--model", "gpt-oss-20b/window"], &["--heads", "7/1", "--softcap", "9"]]
    {
        let args = ["run", "--tree", "1,2,6_32,96,40", "--device", "cpu", "--query-tokens", "4"];
        let report = report(&[&args[..], model].concat());
        assert_eq!(report["numerics"]["passed"], true, "{report}");
        assert_eq!(report["plan"]["sequences"], 24);
        assert!(report["features"].as_str().expect("text").ends_with("4 query tokens"), "{report}");
    }
    let tree = ["plan", "--tree", "1,3_32,8", "--query-tokens"];
    let message = "--query-tokens: got 41, expected at most lengths[0] = 40";
    refused(&[&tree[..], &["41"]].concat(), message);
}

#[test]
fn options_that_contradict_the_model_are_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("batch.json");
    let text = r#"{"page_size":16,"num_pages":1,"lengths":[9],"block_tables":[[0]],"heads":"64/8","head_dim":64}"#;
    std::fs::write(&file, text).expect("a writable folder");
    let (file, tree) = (file.to_str().expect("UTF-8"), ["run", "--tree", "1,2_32,8", "--model"]);
    for (extra, message) in [
        (
            &["qwen3-8b", "--heads", "64/8"][..],
            "--heads: got 64/8, expected 32/8 or nothing, as --model qwen3-8b has it",
        ),
        (&["qwen3-8b", "--head-dim", "64"], "--head-dim: got 64, expected 128 or nothing, as --model qwen3-8b has it"),
        (&["qwen3-8b", "--window", "9"], "--window: got 9, expected none, as --model qwen3-8b has it"),
        (&["qwen3-8b", "--sinks"], "--sinks: got yes, expected none, as --model qwen3-8b has it"),
        (
            &["gpt-oss-20b/window", "--window", "9"],
            "--window: got 9, expected 128 or nothing, as --model gpt-oss-20b/window has it",
        ),
        (&["gemma-2-2b", "--softcap", "30"], "--softcap: got 30, expected 50 or nothing, as --model gemma-2-2b has it"),
        (
            &["mimo-v2-flash", "--value-head-dim", "192"],
            "--value-head-dim: got 192, expected 128 or nothing, as --model mimo-v2-flash has it",
        ),
        (&["kimi-k2"], "--model kimi-k2: head_dim: got 576, expected 64 or 96 or 128 or 192 or 256 or 512"),
        (&["qwen3-8b/window"], "--model: got \"qwen3-8b/window\", expected qwen3-8b/full"),
        (
            &["gpt-5"],
            "--model: got \"gpt-5\", expected a name that `pat models` lists, such as gpt-oss-20b, \
             gpt-oss-120b",
        ),
        (
            &["qwen2.5-7b", "--tensor-parallel", "8"],
            "--tensor-parallel 8: tensor_parallel: got 8, expected a divisor of the 28 query heads that divides the 4 KV heads or \
             is a multiple of them",
        ),
    ] {
        refused(&[&tree[..], extra].concat(), message);
    }
    let message = "--model qwen3-8b: got 32/8, expected the batch file's 64/8 or nothing";
    refused(&["plan", "--batch", file, "--model", "qwen3-8b"], message);
    refused(&["plan", "--tree", "1_32", "--value-head-dim", "64"], "--value-head-dim: got 64, expected 128");
}

#[test]
fn benchmarks_take_a_models_attention_and_query_tokens() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let result = folder.path().join("result.json");
    let args = ["bench", "kernels", "--device", "cpu", "--suite", "realistic", "--filter", "single_4k"];
    let asked = ["--model", "gpt-oss-20b/window", "--tensor-parallel", "8", "--query-tokens", "2"];
    let output = ["--output", result.to_str().expect("UTF-8")];
    let table = stdout(&[&args[..], &asked, &output].concat());
    assert!(table.contains("realistic: 1 of 1 verified"), "{table}");
    let records = |file: &Path| -> Value {
        serde_json::from_str::<Value>(&std::fs::read_to_string(file).expect("a result")).expect("JSON")["records"]
            .take()
    };
    let record = &records(&result)[0];
    assert_eq!((&record["nheads_q"], &record["nheads_kv"], &record["head_dim"]), (&json!(8), &json!(1), &json!(64)));
    assert_eq!((&record["features"], &record["sequences"]), (&json!("sinks, window 128, 2 query tokens"), &json!(2)));
    // Another attention of the same batch is another record; the first is not measured again.
    stdout(&[&args[..], &["--model", "qwen3-next-80b"], &output, &["--resume"]].concat());
    stdout(&[&args[..], &asked, &output, &["--resume"]].concat());
    assert_eq!(records(&result).as_array().expect("a list").len(), 2);
    // Figure 10 has its 20 trees once, with the model's heads.
    let list = stdout(&["bench", "kernels", "--list", "--suite", "figure10", "--model", "qwen3-14b"]);
    assert_eq!((list.lines().count(), list.matches(" 40/8 ").count()), (21, 20));
}
