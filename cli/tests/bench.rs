//! `pat bench kernels` on the CPU: what is selected, measured, kept, continued and refused.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(["bench", "kernels"]).args(args).env("CUDA_VISIBLE_DEVICES", "");
    command
}

fn bench(args: &[&str]) -> Output {
    command(args).output().expect("pat starts")
}

/// Standard output of a call that must succeed.
fn stdout(args: &[&str]) -> String {
    let output = bench(args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Asserts that a call is refused with status 2 and names `parts` in its message.
fn refused(args: &[&str], parts: &[&str]) {
    let output = bench(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "{args:?}: {part:?} is not in {message:?}");
    }
}

fn file(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).expect("a writable temporary folder");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("readable")).expect("JSON")
}

/// One sequence of 1024 tokens: milliseconds.
const SMALL: [&str; 6] = ["--device", "cpu", "--suite", "unshared", "--filter", "decode_1x1024"];
/// That, and one of 8192 tokens.
const LARGER: [&str; 6] = ["--device", "cpu", "--quick", "--suite", "unshared", "--filter"];

/// A batch file of one sequence of one token.
const ONE_TOKEN: &str = r#"{"page_size":16,"num_pages":1,"lengths":[1],"block_tables":[[0]]}"#;

#[test]
fn the_cpu_executor_is_measured() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("result.json");
    let table = stdout(&[&SMALL[..], &["--output", text(&path)]].concat());
    for part in ["1/1 decode_1x1024", "CPU us", "unshared: 1 of 1 verified", "CPU ("] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let result = json(&path);
    assert_eq!(result["schema_version"], 3);
    assert!(result["device"].as_str().is_some_and(|name| name.starts_with("CPU (")), "{result}");
    assert_eq!(result["date"].as_str().map(str::len), Some(10));
    assert!(result["methods"]["pat-rs"]["note"].as_str().is_some_and(|note| note.contains("mode auto")), "{result}");
    let record = &result["records"][0];
    assert_eq!((&record["suite"], &record["tree"]), (&json!("unshared"), &json!("decode_1x1024")));
    assert_eq!((&record["sequences"], &record["block_size"]), (&json!(1), &json!(32)));
    assert_eq!(record["correctness"]["pat-rs"]["status"], "PASSED");
    assert_eq!(record["correctness"]["pat-rs"]["sample"], "all rows");
    let [first, cold, third] =
        [&record["cold_us_quartiles"][0], &record["cold_us"], &record["cold_us_quartiles"][1]].map(|us| us.as_f64());
    assert!(Some(0.0) < first && first <= cold && cold <= third, "{record}");
    for of_a_gpu in ["warm_us", "graph_us", "upload_us", "floor_us", "ceiling_us", "ceiling_fraction"] {
        assert!(record.get(of_a_gpu).is_none(), "{of_a_gpu}");
    }
    assert_eq!(record["warm_latencies"], json!({}));
}

#[test]
fn a_quick_run_on_the_cpu_takes_only_small_configurations() {
    let none = bench(&["--device", "cpu", "--quick", "--filter", "256_1024 16/8"]);
    assert!(String::from_utf8_lossy(&none.stdout).contains("--quick leaves out 1 larger ones"), "{none:?}");
    assert_eq!(none.status.code(), Some(2), "nothing was measured");
    let table = stdout(&["--device", "cpu", "--quick", "--filter", "1,256_256,32 16/8"]);
    assert!(table.contains("figure10: 1 of 1 verified"), "{table}");
}

#[test]
fn every_suite_and_ones_own_batches_are_measured() {
    let folder = TempDir::new().expect("a temporary folder");
    let spec = file(
        &folder,
        "spec.json",
        r#"{"entries": [{"name": "own", "heads": "4/2", "page_size": 16, "seed": 1,
            "nodes": [{"tokens": 40, "children": [{"count": 5, "tokens": {"uniform": [1, 60]}}]}]}]}"#,
    );
    let batch =
        file(&folder, "b.json", r#"{"page_size":16,"num_pages":3,"lengths":[17,30],"block_tables":[[0,1],[0,2]]}"#);
    let path = folder.path().join("result.json");
    let args = ["--device", "cpu", "--spec", text(&spec), "--batch", text(&batch), "--heads", "8/2"];
    let table = stdout(&[&args[..], &["--head-dim", "64", "--dtype", "bf16", "--output", text(&path)]].concat());
    assert!(table.contains("batch: 1 of 1 verified") && table.contains("spec: 1 of 1 verified"), "{table}");
    let records = json(&path)["records"].clone();
    assert_eq!((&records[0]["suite"], &records[0]["tree"]), (&json!("spec"), &json!("own")));
    assert_eq!((&records[0]["sequences"], &records[0]["nheads_q"]), (&json!(5), &json!(4)));
    assert_eq!((&records[1]["suite"], &records[1]["tree"]), (&json!("batch"), &json!(text(&batch))));
    assert_eq!(
        (&records[1]["nheads_q"], &records[1]["head_dim"], &records[1]["dtype"]),
        (&json!(8), &json!(64), &json!("bf16"))
    );
    for small in [["realistic", "single_4k"], ["sweeps", "batch_4 "]] {
        let table = stdout(&["--device", "cpu", "--suite", small[0], "--filter", small[1], "--quick"]);
        assert!(table.contains(&format!("{}: 1 of 1 verified", small[0])), "{table}");
    }
}

#[test]
fn a_trace_is_a_suite() {
    let folder = TempDir::new().expect("a temporary folder");
    let line = |i: u32| {
        format!(r#"{{"timestamp": {i}, "input_length": 530, "output_length": 9, "hash_ids": [0, {}]}}"#, i + 1)
    };
    let trace = file(&folder, "trace.jsonl", &(0..40).map(line).collect::<Vec<_>>().join("\n"));
    let list = stdout(&["--trace", text(&trace), "--list", "--filter", "b32"]);
    let row = list.lines().find(|line| line.contains("trace_b32_s128")).expect("a row");
    // 512 tokens shared by 32, 27 of each one's own.
    assert!(row.contains(&(32 * 539).to_string()), "{list}");
    let short = bench(&["--trace", text(&trace), "--list"]);
    assert!(String::from_utf8_lossy(&short.stderr).contains("has 40 requests: batches of 64, 128, 256 are left out"));
    assert!(!String::from_utf8_lossy(&short.stdout).contains("trace_b64"), "{short:?}");
    refused(&["--suite", "trace"], &["--suite trace: give a request trace", "--trace FILE.jsonl"]);
    refused(&["--trace", "no/such.jsonl", "--list"], &["trace no/such.jsonl", "No such file"]);
}

#[test]
fn suites_and_configurations_are_listed() {
    let suites = stdout(&["--list"]);
    for (name, count) in [
        ("figure10", 80),
        ("realistic", 20),
        ("unshared", 20),
        ("sweeps", 15),
        ("bf16", 20),
        ("tensor-parallel", 60),
        ("trace", 12),
    ] {
        let row = suites.lines().find(|line| line.trim_start().starts_with(name)).expect(name);
        assert_eq!(row.split_whitespace().nth(1), Some(count.to_string().as_str()), "{suites}");
    }
    let sweeps = stdout(&["--list", "--suite", "sweeps", "--filter", "fanout"]);
    assert_eq!(sweeps.matches("fanout_").count(), 5, "{sweeps}");
    let all = stdout(&["--list", "--suite", "all"]);
    assert_eq!(
        all.lines().count(),
        1 + 80 + 20 + 20 + 15 + 20 + 60,
        "a suite that needs a file is left out without one"
    );
    let twice = stdout(&["--list", "--suite", "sweeps,sweeps"]);
    assert_eq!(twice.lines().count(), 1 + 15, "each configuration once");
}

#[test]
fn a_run_goes_on_where_it_stopped_and_keeps_what_peers_added() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("result.json");
    let output = ["--output", text(&path)];
    stdout(&[&LARGER[..], &["decode_1x1024"], &output].concat());
    let mut extended = json(&path);
    extended["methods"]["peer"] = json!({"version": "1", "note": "another library"});
    extended["records"][0]["latencies"]["peer"] = json!(0.25);
    extended["records"][0]["correctness"]["peer"] = json!({"status": "FAILED", "max_diff": 1.0, "relative_l2": 1.0});
    fs::write(&path, extended.to_string()).expect("writable");

    let table = stdout(&[&LARGER[..], &["decode_1x"], &output, &["--resume"]].concat());
    assert!(table.contains("1/2 decode_1x8192") && !table.contains("decode_1x1024"), "{table}");
    let resumed = json(&path);
    assert_eq!(resumed["methods"], extended["methods"]);
    assert_eq!(resumed["records"][0], extended["records"][0]);
    assert_eq!(resumed["records"].as_array().map(Vec::len), Some(3));
    let again = stdout(&[&LARGER[..], &["decode_1x"], &output, &["--resume"]].concat());
    assert!(again.contains("unshared: 3 of 3 verified"), "{again}");
    assert_eq!(json(&path), resumed);
}

#[test]
fn a_killed_run_loses_at_most_what_was_under_way() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("result.json");
    let args = [&LARGER[..], &["x1024", "--output", text(&path)]].concat();
    let mut child = command(&args).stdout(Stdio::null()).spawn().expect("pat starts");
    let records = || match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str::<Value>(&text).expect("whole at any time")["records"].clone(),
        Err(_) => json!([]),
    };
    let begin = Instant::now();
    while records()[1].is_null() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("it can be killed, or has ended");
    child.wait().expect("it has ended");
    let kept = records();
    assert!(!kept[1].is_null(), "{kept}");
    let table = stdout(&[&args[..], &["--resume"]].concat());
    assert!(table.contains("unshared: 5 of 5 verified"), "{table}");
    let (kept, all) = (kept.as_array().expect("a list").clone(), records());
    assert_eq!(all.as_array().expect("a list")[..kept.len()], kept);
}

#[test]
fn nothing_is_overwritten_without_force() {
    let folder = TempDir::new().expect("a temporary folder");
    let small = |path: &Path, extra: &[&str]| [&SMALL[..], &["--output", text(path)], extra].concat().join(" ");
    let untouched = |path: &Path, extra: &[&str], parts: &[&str]| {
        let before = fs::read(path).expect("readable");
        refused(&small(path, extra).split(' ').collect::<Vec<_>>(), parts);
        assert_eq!(fs::read(path).expect("readable"), before, "{extra:?}");
    };
    let result = folder.path().join("result.json");
    stdout(&[&SMALL[..], &["--output", text(&result)]].concat());
    untouched(&result, &[], &["exists: --resume continues it, --force overwrites it"]);
    untouched(&result, &["--resume", "--mode", "flat"], &["holds figures of version", "mode auto", "mode flat"]);
    untouched(&result, &["--resume", "--quick"], &["median of 7 calls", "median of 3 calls"]);
    untouched(&result, &["--resume", "--force"], &["cannot be used with"]);

    let other = |change: &dyn Fn(&mut Value)| {
        let mut value = json(&result);
        change(&mut value);
        file(&folder, "other.json", &value.to_string())
    };
    let device = other(&|value| value["device"] = json!("NVIDIA H200"));
    untouched(&device, &["--resume"], &["holds figures of NVIDIA H200, this is CPU ("]);
    let commit = other(&|value| value["commit"] = json!("0000000"));
    untouched(&commit, &["--resume"], &["holds figures of commit 0000000"]);
    let newer = other(&|value| value["schema_version"] = json!(4));
    untouched(&newer, &["--resume"], &["has schema version 4, this tool reads 1 to 3"]);
    let foreign = file(&folder, "foreign.json", r#"{"name": "a package"}"#);
    untouched(&foreign, &["--resume"], &["is not a result file of this tool", "schema_version"]);
    let no_json = file(&folder, "text.json", "hello");
    untouched(&no_json, &["--resume"], &["is not a result file of this tool"]);

    stdout(&[&SMALL[..], &["--output", text(&no_json), "--force"]].concat());
    assert_eq!(json(&no_json)["records"][0]["tree"], "decode_1x1024");
    let nowhere = folder.path().join("no/such/folder/result.json");
    refused(&[&SMALL[..], &["--output", text(&nowhere)]].concat(), &["--output", "No such file"]);
    refused(&[&SMALL[..], &["--resume"]].concat(), &["--output"]);
}

#[test]
fn bad_selections_are_refused() {
    for (args, parts) in [
        (&["--suite", "figure11"][..], &["--suite: got \"figure11\", expected some of figure10, realistic"][..]),
        (&["--filter", "nothing"], &["--filter: got \"nothing\""]),
        (&["--heads", "8/8"], &["--batch"]),
        (&["--batch", "no/such.json"], &["--batch", "no/such.json", "No such file"]),
        (&["--spec", "no/such.json"], &["--spec", "no/such.json", "No such file"]),
        (&["--dtype", "f32"], &["'f32' for '--dtype <DTYPE>': expected f16 or bf16"]),
        (&["--head-dim", "80", "--device", "cpu"], &["--head-dim 80", "expected 64 or 96 or 128 or 192 or 256 or 512"]),
        (&["--device", "tpu"], &["--device: got \"tpu\""]),
        (&["--device", "cuda"], &["--device cuda", "CUDA"]),
        (&[], &["--device cuda", "CUDA"]),
    ] {
        refused(args, parts);
    }
}

#[test]
fn a_batch_that_does_not_fit_keeps_no_other_from_being_measured() {
    let folder = TempDir::new().expect("a temporary folder");
    let batch = |name: &str, pages: u32| {
        let ids: Vec<u32> = (0..pages).collect();
        let tokens = u64::from(pages) << 16;
        let text =
            format!(r#"{{"page_size":65536,"num_pages":{pages},"lengths":[{tokens}],"block_tables":[{ids:?}]}}"#);
        file(&folder, name, &text)
    };
    let (huge, small) = (batch("huge.json", 16_384), file(&folder, "small.json", ONE_TOKEN));
    let batches = format!("{},{}", text(&huge), text(&small));
    let path = folder.path().join("result.json");
    let args = ["--device", "cpu", "--batch", &batches, "--output", text(&path)];
    refused(&args, &["huge.json 32/8: not measured", "GB of memory", "1 of 2 configurations could not be measured"]);
    assert_eq!(json(&path)["records"][0]["tree"], text(&small));
}

#[test]
fn bad_specifications_are_refused_by_entry() {
    let folder = TempDir::new().expect("a temporary folder");
    let entry = r#"{"name": "a", "heads": "8/2", "page_size": 16, "seed": 1, "nodes": [{"tokens": 9}]}"#;
    for (text_of_spec, parts) in [
        ("{".to_owned(), &["EOF", "{\"entries\": [...]}"][..]),
        (entry.into(), &["{\"entries\": [...]}"]),
        (format!("{{\"entries\": [{entry}, {{}}]}}"), &["entry 1: missing field `name`"]),
        (format!("{{\"entries\": [{entry}, {entry}]}}"), &["entry 1 (\"a\"): name: got \"a\" again"]),
        ("{\"entries\": []}".into(), &["entries: got none"]),
        (entry.replace("8/2", "8"), &["entry 0 (\"a\"): heads: got \"8\", expected QUERY/KV heads"]),
        (entry.replace("8/2", "7/2"), &["entry 0 (\"a\"): heads: q_heads: got 7"]),
        (entry.replace("16", "0"), &["entry 0 (\"a\"): page_size: got 0"]),
        (entry.replace("\"tokens\": 9", "\"tokens\": 0"), &["entry 0 (\"a\"): nodes[0].tokens: got 0"]),
        (entry.replace("tokens", "token"), &["entry 0 (\"a\"): unknown field `token`"]),
        (entry.replace("\"a\"", "\" \""), &["name: got nothing"]),
    ] {
        let whole = if text_of_spec.starts_with("{\"name\"") && !parts[0].starts_with("{\"entries") {
            format!("{{\"entries\": [{text_of_spec}]}}")
        } else {
            text_of_spec
        };
        let spec = file(&folder, "spec.json", &whole);
        refused(&["--spec", text(&spec), "--list"], &[parts, &["--spec: specification", text(&spec)]].concat());
    }
}

#[test]
fn the_documented_specification_runs_and_its_error_is_what_is_shown() {
    let documentation = include_str!("../../docs/workload-spec.md");
    let (_, rest) = documentation.split_once("```json\n").expect("an example");
    let (example, _) = rest.split_once("```").expect("the example's end");
    let folder = TempDir::new().expect("a temporary folder");
    let spec = file(&folder, "my.json", example);
    let list = stdout(&["--spec", text(&spec), "--list"]);
    assert!(list.contains("support_chat") && list.lines().count() == 2, "{list}");
    let shown = documentation.lines().find_map(|line| line.strip_prefix("error: --spec: specification my.json: "));
    let broken = file(&folder, "my.json", &example.replace("[100, 2000]", "[2000, 100]"));
    refused(&["--spec", text(&broken), "--list"], &[shown.expect("an error is shown")]);
}
