//! The tool as its users meet it: arguments in; text, JSON, pictures and exit status out. Everything runs on the CPU.

mod tool;

use pat_rs::DeviceProfile;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;
use tool::{json, pat, stdout};

/// Asserts that a call is refused with status 2, prints nothing to standard output, and names `parts` in its message.
fn refused(args: &[&str], parts: &[&str]) {
    let output = tool::refused(args, parts);
    assert!(output.stdout.is_empty(), "pat {args:?} printed {}", String::from_utf8_lossy(&output.stdout));
}

/// A file in a temporary folder.
fn file(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("a writable temporary folder");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Three requests; the first two share one block of 512 tokens.
fn trace() -> String {
    let mut lines = String::new();
    for (input, ids) in [(1100, "[0, 1, 2]"), (700, "[0, 7]"), (300, "[9]")] {
        writeln!(lines, r#"{{"timestamp": 0, "input_length": {input}, "output_length": 8, "hash_ids": {ids}}}"#)
            .expect("writing to a string");
    }
    lines
}

#[test]
fn the_readmes_first_command_plans_computes_and_verifies() {
    let report = stdout(&["run", "--tree", "1,4,256_32,256,32", "--device", "cpu"]);
    assert!(report.contains("passed: 8192 rows (all rows)"), "{report}");
    assert!(report.contains("36.1 MiB unique, 320.0 MiB without sharing"), "{report}");
}

#[test]
fn a_run_reports_in_json() {
    for dtype in ["f16", "bf16"] {
        for heads in ["4/4", "8/2", "5/1"] {
            let args = ["run", "--tree", "1,6_64,20", "--page-size", "16", "--heads", heads, "--dtype", dtype];
            let report = json(&[&args[..], &["--head-dim", "64", "--device", "cpu", "--json"]].concat());
            assert_eq!(report["device"], "CPU");
            assert_eq!(report["numerics"]["passed"], true, "{report}");
            assert_eq!(report["plan"]["sequences"], 6);
            let q_heads: u64 = heads.split('/').next().expect("a number").parse().expect("a number");
            assert_eq!(report["numerics"]["rows"], 6 * q_heads);
            assert!(report["execution_us"].as_f64().is_some_and(|us| us > 0.0), "{report}");
        }
    }
}

#[test]
fn every_planning_mode_and_tile_variant_computes_the_same_attention() {
    let base = ["run", "--tree", "1,2,8_32,64,40", "--page-size", "16", "--heads", "8/2", "--device", "cpu", "--json"];
    let modes = ["auto", "flat", "per-node", "packed", "fixed-chunk=32"].map(|mode| ["--mode", mode]);
    let variants = ["mma16", "mma32", "mma64", "mma128", "wgmma64", "mma16,mma64"].map(|names| ["--variants", names]);
    for extra in modes.iter().chain(&variants) {
        let report = json(&[&base[..], extra].concat());
        assert_eq!(report["numerics"]["passed"], true, "{extra:?}: {report}");
    }
}

#[test]
fn a_seed_is_heeded_and_a_check_can_be_left_out() {
    let run = |extra: &[&str]| json(&[&["run", "--tree", "1,2_32,8", "--device", "cpu", "--json"], extra].concat());
    let error = |report: &Value| report["numerics"]["relative_l2_error"].as_f64().expect("a number");
    let (one, other) = (run(&[]), run(&["--seed", "7"]));
    assert_eq!(error(&one), error(&run(&["--seed", "1"])));
    assert_ne!(error(&one), error(&other));
    assert!(run(&["--check", "none"])["numerics"].is_null());
    assert_eq!(run(&["--check", "sample"])["numerics"]["passed"], true);
}

#[test]
fn a_plan_shows_its_forest() {
    let plan = stdout(&["plan", "--tree", "1,2,6_64,256,40", "--page-size", "16", "--mode", "per-node"]);
    // The first line names the profile, and what follows the forest depends on the cost model.
    let forest: Vec<&str> = plan.lines().skip(1).take_while(|line| line.trim_start().starts_with(['[', '3'])).collect();
    insta::assert_snapshot!(forest.join("\n"), @r"
    [64 tokens x 6 sequences] read 2 times
      [256 tokens x 3 sequences] read once
        3 private runs of 40 tokens
      [256 tokens x 3 sequences] read once
        3 private runs of 40 tokens
    ");
    let flat = stdout(&["plan", "--tree", "1,2_64,40", "--page-size", "16", "--mode", "flat"]);
    assert!(flat.contains("[64 tokens x 2 sequences] read 2 times"), "{flat}");
    let single = stdout(&["plan", "--tree", "1_100"]);
    assert!(single.contains("\n1 private run of 100 tokens\n"), "{single}");
}

#[test]
fn a_plan_gives_its_figures_in_json() {
    let args = ["plan", "--tree", "1,4_64,32", "--page-size", "32", "--heads", "8/2", "--head-dim", "64", "--json"];
    let plan = json(&[&args[..], &["--mode", "per-node"]].concat());
    // K and V of 2 heads, 64 elements of 2 bytes: 512 bytes per token.
    assert_eq!(plan["unique_kv_bytes"], (64 + 4 * 32) * 512);
    assert_eq!(plan["planned_kv_bytes"], (64 + 4 * 32) * 512);
    assert_eq!(plan["flat_kv_bytes"], 4 * (64 + 32) * 512);
    assert_eq!(plan["sharing_factor"], 2.0);
    let flat = json(&[&args[..], &["--mode", "flat"]].concat());
    assert_eq!(flat["planned_kv_bytes"], flat["flat_kv_bytes"]);
    let launch = &plan["variants"][0];
    assert_eq!(launch["predicted_us"], plan["prediction"]["busy_us"]);
    assert_eq!(launch["predicted_share"], 1.0);
    assert!(plan["imbalance"].as_f64().is_some_and(|imbalance| imbalance >= 1.0), "{plan}");
    let node = &flat["shared_nodes"][0];
    assert_eq!((&node["sequences"], &node["tokens"], &node["reads"]), (&4.into(), &64.into(), &4.into()));
    assert_eq!((&node["saved_kv_bytes"], &node["reason"]), (&0.into(), &"mode".into()));
}

#[test]
fn a_plan_is_made_for_the_named_gpu() {
    let variant = |profile: &str| {
        let plan = json(&["plan", "--tree", "1,8_64,32", "--profile", profile, "--json"]);
        plan["variants"][0]["variant"].as_str().expect("a variant").to_owned()
    };
    assert!(variant("a100-80").starts_with("mma"), "no wgmma on an A100");
    assert!(variant("h200").starts_with("wgmma"));
    assert!(stdout(&["plan", "--tree", "1,8_64,32", "--profile", "h200"]).contains("planned for NVIDIA H200"));
    refused(&["plan", "--tree", "1,8_64,32", "--profile", "v100"], &["--profile", "got v100", "h200"]);
}

#[test]
fn a_profile_from_a_file_is_planned_with() {
    let folder = TempDir::new().expect("a temporary folder");
    let mut profile = serde_json::to_value(DeviceProfile::h200()).expect("JSON");
    profile["name"] = "mine".into();
    profile["launch_us"] = 70.0.into();
    let mine = file(&folder, "mine.json", &profile.to_string());
    let plan = |profile: &str| json(&["plan", "--tree", "1,8_64,32", "--profile", profile, "--json"]);
    let (of_file, built_in) = (plan(text(&mine)), plan("h200"));
    assert_eq!((&of_file["profile"], &built_in["profile"]), (&"mine".into(), &"NVIDIA H200".into()));
    assert_eq!(of_file["prediction"]["launch_us"], 70.0);
    let args = ["run", "--tree", "1,8_64,32", "--device", "cpu", "--json", "--profile", text(&mine)];
    assert_eq!(json(&args)["plan"]["prediction"]["launch_us"], 70.0);

    for (field, value, part) in [
        ("launch_us", 0.into(), "launch_us: got 0, expected"),
        ("hbm_bytes_per_us", (-1).into(), "hbm_bytes_per_us: got -1"),
        ("l2_bytes_per_us", 4600.into(), "l2_bytes_per_us: got 4600, expected 1e4 to 1e9"),
        ("merge_us", Value::Null, "not a device profile"),
        ("sm_count", (-132).into(), "not a device profile"),
        ("compute_capability", 75.into(), "compute_capability: got 75"),
        ("warp_size", 32.into(), "unknown field `warp_size`"),
    ] {
        let mut broken = profile.clone();
        broken[field] = value;
        let broken = file(&folder, "broken.json", &broken.to_string());
        for command in ["plan", "run"] {
            refused(&[command, "--tree", "1,8_64,32", "--profile", text(&broken)], &["--profile", text(&broken), part]);
        }
    }
    profile.as_object_mut().expect("an object").remove("merge_us");
    let missing = file(&folder, "missing.json", &profile.to_string());
    refused(&["plan", "--tree", "1_32", "--profile", text(&missing)], &["--profile", "missing field `merge_us`"]);
    refused(&["plan", "--tree", "1_32", "--profile", "no/such.json"], &["--profile no/such.json", "No such file"]);
    let nan = file(&folder, "nan.json", "{\"merge_us\": NaN}");
    refused(&["plan", "--tree", "1_32", "--profile", text(&nan)], &["--profile", "not a device profile"]);
}

#[test]
fn only_a_device_is_calibrated() {
    refused(&["calibrate"], &["--device cuda", "CUDA is not usable"]);
    refused(&["calibrate", "--device", "cpu"], &["--device: got \"cpu\", expected a usable cuda or cuda:N"]);
    refused(&["calibrate", "--device", "tpu"], &["--device: got \"tpu\""]);
}

#[test]
fn a_plan_is_explained() {
    let explain = |extra: &[&str]| stdout(&[&["plan", "--explain", "--profile", "h200"], extra].concat());
    let shared = explain(&["--tree", "1,4,256_32,256,32"]);
    for part in ["this plan", "no sharing", "widest tiles", "Bound by ", "Sharing saves ", "4 x [256 tokens x 64 seq"] {
        assert!(shared.contains(part), "{part}: {shared}");
    }
    assert!(explain(&["--tree", "256_1024"]).contains("Sharing is not predicted to save time."));
    let flat = explain(&["--tree", "1,4,256_32,256,32", "--mode", "flat"]);
    assert!(flat.contains("Sharing would save ") && flat.contains("read 64 times, by each for itself"), "{flat}");
    refused(&["plan", "--tree", "1_32", "--explain", "--json"], &["--explain", "--json"]);
}

#[test]
fn a_plan_draws_its_forest() {
    let folder = TempDir::new().expect("a temporary folder");
    let picture = folder.path().join("forest.svg");
    stdout(&["plan", "--tree", "1,2,6_64,256,40", "--page-size", "16", "--mode", "per-node", "--svg", text(&picture)]);
    let svg = std::fs::read_to_string(&picture).expect("the picture is there");
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""), "{svg}");
    assert!(svg.trim_end().ends_with("</svg>"), "{svg}");
    // The background, three shared runs and their labels' grounds, six private ones.
    assert_eq!(svg.matches("<rect").count(), 1 + 3 + 3 + 6, "{svg}");
    assert_eq!(svg.matches("<rect class=\"shared").count(), 3 + 3, "three shared runs, their labels: {svg}");
    assert!(svg.contains("prefers-color-scheme: dark"), "{svg}");
    // 64 + 256 + 40 tokens of 6 sequences.
    for tick in [">0<", ">50<", ">350<", ">5<", ">tokens<", ">sequences<"] {
        assert!(svg.contains(tick), "{tick}: {svg}");
    }
}

#[test]
fn a_large_batch_is_drawn_by_node() {
    let folder = TempDir::new().expect("a temporary folder");
    let picture = folder.path().join("forest.svg");
    stdout(&["plan", "--tree", "1,8,1024_64,256,32", "--profile", "h200", "--svg", text(&picture)]);
    let svg = std::fs::read_to_string(&picture).expect("the picture is there");
    assert_eq!(svg.matches("<polygon class=\"private\"").count(), 8, "one outline for each innermost node");
    assert!(svg.matches("<rect").count() < 30 && svg.len() < 100_000, "{} bytes", svg.len());
    assert!(svg.contains(">1000<") && svg.contains("1024 sequences in "), "{svg}");
}

#[test]
fn a_saved_batch_is_planned_like_its_source() {
    let folder = TempDir::new().expect("a temporary folder");
    let saved = folder.path().join("batch.json");
    let tree = ["plan", "--tree", "2,4_48,20", "--page-size", "16", "--json"];
    let first = json(&[&tree[..], &["--save-batch", text(&saved)]].concat());
    assert_eq!(json(&["plan", "--batch", text(&saved), "--json"]), first);
    let report = json(&["run", "--batch", text(&saved), "--device", "cpu", "--json"]);
    assert_eq!(report["numerics"]["passed"], true, "{report}");
}

#[test]
fn the_documented_batch_file_runs() {
    let documentation = include_str!("../../docs/batch-format.md");
    let (_, rest) = documentation.split_once("```json\n").expect("an example");
    let (example, _) = rest.split_once("```").expect("the example's end");
    let folder = TempDir::new().expect("a temporary folder");
    let batch = file(&folder, "b.json", example);
    let report = json(&["run", "--batch", text(&batch), "--device", "cpu", "--json"]);
    assert_eq!(report["numerics"]["passed"], true, "{report}");
    assert_eq!(report["plan"]["sequences"], 4);
    // Every message that the document shows is one that the tool gives.
    let lines: Vec<&str> = documentation.lines().filter_map(|line| line.strip_prefix("error: --batch: ")).collect();
    let broken = [("[0, 1, 2]", "[0, 9, 2]"), (r#""lengths": [40"#, r#""lengths": [17"#)];
    assert_eq!(lines.len(), broken.len());
    for ((from, to), line) in broken.into_iter().zip(lines) {
        let text_of_batch = match to {
            r#""lengths": [17"# => example.replace(from, to).replace("[0, 1, 2]", "[0]"),
            _ => example.replace(from, to),
        };
        let batch = file(&folder, "b.json", &text_of_batch);
        refused(&["run", "--batch", text(&batch)], &[line.trim_start_matches("batch file b.json: ")]);
    }
}

#[test]
fn batches_without_tokens_are_legal() {
    let folder = TempDir::new().expect("a temporary folder");
    for (name, batch) in [
        ("none", r#"{"page_size": 16, "num_pages": 0, "lengths": [], "block_tables": []}"#),
        ("empty rows", r#"{"page_size": 16, "num_pages": 0, "lengths": [0, 0], "block_tables": [[], []]}"#),
    ] {
        let batch = file(&folder, "batch.json", batch);
        let report = json(&["run", "--batch", text(&batch), "--device", "cpu", "--json"]);
        assert_eq!(report["numerics"]["passed"], true, "{name}: {report}");
        stdout(&["plan", "--batch", text(&batch), "--svg", text(&folder.path().join(format!("{name}.svg")))]);
    }
}

#[test]
fn a_trace_is_cut_into_a_batch() {
    let folder = TempDir::new().expect("a temporary folder");
    let trace = file(&folder, "trace.jsonl", &trace());
    let cut = ["--trace", text(&trace), "--batch", "3", "--heads", "8/2", "--head-dim", "64"];
    let report = json(&[&["run"], &cut[..], &["--at-step", "5", "--device", "cpu", "--json"]].concat());
    assert_eq!(report["numerics"]["passed"], true, "{report}");
    // 1105 + 705 + 305 tokens, 512 bytes each; 512 tokens are in there twice.
    assert_eq!(report["plan"]["flat_kv_bytes"], (1105 + 705 + 305) * 512);
    assert_eq!(report["plan"]["unique_kv_bytes"], (1105 + 705 + 305 - 512) * 512);
    // A request of 8 output tokens stays at its end.
    let late = json(&[&["plan"], &cut[..], &["--at-step", "1000", "--json"]].concat());
    assert_eq!(late["flat_kv_bytes"], (1108 + 708 + 308) * 512);
    let second = ["plan", "--trace", text(&trace), "--batch", "1", "--first-request", "1", "--heads", "1/1"];
    assert_eq!(json(&[&second[..], &["--head-dim", "64", "--json"]].concat())["flat_kv_bytes"], 700 * 256);
}

#[test]
fn caps_sinks_windows_and_wide_heads_are_verified() {
    let tree = ["--tree", "1,4_64,40", "--heads", "4/2"];
    for extra in [
        &["--softcap", "30", "--sinks"][..],
        &["--window", "50", "--sinks", "--head-dim", "64"],
        &["--head-dim", "256", "--softcap", "5", "--window", "1", "--dtype", "bf16"],
        &["--chunk", "32"],
        &["--chunk", "50", "--sinks"],
    ] {
        let report = json(&[&["run"], &tree[..], extra, &["--device", "cpu", "--json"]].concat());
        assert_eq!(report["numerics"]["passed"], true, "{report}");
    }
    let report = json(&[&["plan"], &tree[..], &["--window", "50", "--sinks", "--json"]].concat());
    assert_eq!(report["features"], "sinks, window 50");
    // The last 50 of 104 tokens begin in the second page of 32.
    assert_eq!(report["flat_kv_bytes"], 4 * 72 * 2 * 2 * 128 * 2);
    assert!(stdout(&[&["plan"], &tree[..], &["--window", "50"]].concat()).contains("window 50"));
    let report = json(&[&["plan"], &tree[..], &["--chunk", "96", "--json"]].concat());
    assert_eq!(report["features"], "chunk 96");
    // Of 104 tokens the last 8.
    assert_eq!(report["flat_kv_bytes"], 4 * 8 * 2 * 2 * 128 * 2);
}

#[test]
fn caches_of_8_bits_are_verified() {
    let tree = ["--tree", "1,4_64,40", "--heads", "4/2"];
    for extra in [
        &["--kv-dtype", "e4m3"][..],
        &["--kv-dtype", "e5m2", "--dtype", "bf16", "--head-dim", "64", "--window", "50"],
        &["--kv-dtype", "e4m3", "--softcap", "5", "--sinks"],
    ] {
        let report = json(&[&["run"], &tree[..], extra, &["--device", "cpu", "--json"]].concat());
        assert_eq!(report["numerics"]["passed"], true, "{report}");
    }
    let bytes = |extra: &[&str]| json(&[&["plan"], &tree[..], extra, &["--json"]].concat())["flat_kv_bytes"].as_u64();
    assert_eq!(bytes(&["--kv-dtype", "e4m3"]).map(|bytes| 2 * bytes), bytes(&[]));
    assert!(stdout(&[&["plan"], &tree[..], &["--kv-dtype", "e5m2"]].concat()).contains("K and V e5m2"));
    for (extra, parts) in [
        (["--kv-dtype", "int8"], ["--kv-dtype", "e4m3 or e5m2"]),
        (["--kv-dtype=e4m3", "--head-dim=256"], ["--head-dim 256", "expected 64 or 128 with K and V of e4m3"]),
    ] {
        refused(&[&["plan"], &tree[..], &extra].concat(), &parts);
    }
}

#[test]
fn features_that_nothing_computes_are_refused() {
    let tree = ["run", "--tree", "1,2_32,8"];
    for (extra, parts) in [
        (["--softcap", "0"], &["--softcap", "--softcap: got 0, expected", "a positive number"][..]),
        (["--softcap", "-3"], &["--softcap", "got -3", "a positive number"]),
        (["--softcap", "inf"], &["--softcap", "got inf"]),
        (["--softcap", "1e-46"], &["'1e-46' for '--softcap <CAP>'", "expected a number of float32"]),
        (["--softcap", "1e39"], &["'1e39' for '--softcap <CAP>'", "expected a number of float32"]),
        (["--window", "0"], &["--window <TOKENS>", "0 is not in 1..="]),
        (["--window", "-1"], &["--window <TOKENS>", "-1 is not in 1..="]),
        (["--chunk", "0"], &["--chunk <TOKENS>", "0 is not in 1..="]),
        (["--chunk=8", "--window=8"], &["--chunk", "--window"]),
        (
            ["--head-dim=192", "--sinks"],
            &["error: --head-dim 192 without --value-head-dim: value_head_dim: got 192, expected 128"],
        ),
        (["--query-tokens", "0"], &["--query-tokens <N>", "0 is not in 1..="]),
        (["--value-head-dim", "0"], &["--value-head-dim <DIM>", "0 is not in 1..="]),
        (
            ["--variants=wgmma128", "--softcap=3"],
            &["error: --variants: got wgmma128, expected some of ", "(wgmma128: softcap: got 3, expected none)"],
        ),
    ] {
        refused(&[&tree[..], &extra].concat(), parts);
    }
}

#[test]
fn bad_model_shapes_are_refused() {
    let tree = ["run", "--tree", "1,2_32,8"];
    for (extra, parts) in [
        (["--heads", "32"], &["--heads: got \"32\", expected QUERY/KV heads"][..]),
        (["--heads", "a/b"], &["--heads: got \"a/b\""]),
        (["--heads", "-8/8"], &["--heads: got \"-8/8\""]),
        (["--heads", "0/8"], &["--heads 0/8", "q_heads: got 0, expected a positive multiple"]),
        (["--heads", "8/0"], &["--heads 8/0", "kv_heads: got 0, expected at least 1"]),
        (["--heads", "30/8"], &["--heads 30/8", "q_heads: got 30, expected a positive multiple of kv_heads (8)"]),
        (["--head-dim", "-1"], &["--head-dim <HEAD_DIM>", "-1 is not in 1..="]),
        (["--head-dim", "80"], &["--head-dim 80", "head_dim: got 80, expected 64 or 96 or 128 or 192 or 256 or 512"]),
        (["--dtype", "f32"], &["'f32' for '--dtype <DTYPE>'", "expected f16 or bf16"]),
    ] {
        refused(&[&tree[..], &extra].concat(), parts);
    }
}

#[test]
fn bad_trees_are_refused() {
    for (tree, part) in [
        ("1,4", "no '_'"),
        ("1,4_32", "2 levels of nodes but 1 levels of tokens"),
        ("1,x_32,32", "nodes of level 1: got \"x\""),
        ("0_32", "nodes of level 0: got \"0\""),
        ("1,4_0,32", "tokens of level 0: got \"0\""),
        ("2,3_32,32", "nodes of level 1: got 3, expected a multiple of the 2 nodes above"),
        ("1,2_33,32", "tokens of level 0: got 33, expected a multiple of the page size 32"),
        ("1_99999999999999999999", "tokens of level 0"),
        ("", "no '_'"),
    ] {
        refused(&["plan", "--tree", tree], &["--tree", part]);
    }
    refused(&["plan", "--tree", "1_32", "--page-size", "0"], &["--page-size <TOKENS>", "0 is not in 1..="]);
}

#[test]
fn bad_batch_files_are_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    for (batch, part) in [
        ("{", "EOF"),
        ("[]", "\"page_size\", \"num_pages\", \"lengths\", \"block_tables\""),
        (r#"{"page_size":16,"num_pages":4,"lengths":[1]}"#, "missing field `block_tables`"),
        (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[0]],"x":1}"#, "unknown field `x`"),
        (r#"{"page_size":[16,32],"num_pages":4,"lengths":[1],"block_tables":[[0]]}"#, "invalid type: sequence"),
        (r#"{"page_size":0,"num_pages":4,"lengths":[1],"block_tables":[[0]]}"#, "page_size: got 0"),
        (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[4]]}"#, "block_tables[0][0]: got 4"),
        (r#"{"page_size":16,"num_pages":4,"lengths":[1],"block_tables":[[-1]]}"#, "block_tables[0][0]: got -1"),
        (r#"{"page_size":16,"num_pages":4,"lengths":[17],"block_tables":[[0]]}"#, "at least 2 for lengths[0] = 17"),
        (r#"{"page_size":16,"num_pages":4,"lengths":[1,1],"block_tables":[[0]]}"#, "got 1 tables, expected one per"),
    ] {
        let path = file(&folder, "batch.json", batch);
        refused(&["run", "--batch", text(&path)], &["--batch", text(&path), part]);
    }
    let path = file(&folder, "batch.json", r#"{"page_size":16,"num_pages":1,"lengths":[1],"block_tables":[[0]]}"#);
    refused(
        &["plan", "--batch", text(&path), "--page-size", "32"],
        &["--page-size: got 32, expected the batch file's 16"],
    );
    refused(&["plan", "--batch", "no/such.json"], &["--batch", "no/such.json", "No such file"]);
    refused(&["plan", "--batch", "128"], &["a number of sequences goes with --trace"]);
}

#[test]
fn bad_traces_are_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    let good = file(&folder, "good.jsonl", &trace());
    let good = text(&good);
    for (lines, part) in [
        ("oops".into(), "trace line 1"),
        (trace() + "{}\n", "trace line 4: missing field"),
        (trace().replace("[0, 1, 2]", "[0]"), "trace line 1: hash_ids: got 1 ids, expected 3 for input_length = 1100"),
        (trace().replace("700", "-700"), "trace line 2"),
        (String::new(), "the trace has 0 requests"),
    ] {
        let path = file(&folder, "trace.jsonl", &lines);
        refused(&["plan", "--trace", text(&path), "--batch", "4"], &["--trace", text(&path), part]);
    }
    refused(
        &["plan", "--trace", good, "--batch", "4"],
        &["--batch", "batch_size: got 4 from request 0 on", "at most 3"],
    );
    refused(&["plan", "--trace", good, "--batch", "0"], &["batch_size: got 0, expected at least 1"]);
    refused(&["plan", "--trace", good, "--batch", "many"], &["--batch: got \"many\""]);
    refused(&["plan", "--trace", good, "--page-size", "0"], &["--page-size <TOKENS>", "0 is not in 1..="]);
    refused(&["plan", "--trace", "no/such.jsonl"], &["--trace no/such.jsonl", "No such file"]);
}

#[test]
fn bad_options_are_refused() {
    let tree = ["run", "--tree", "1,2_32,8"];
    for (extra, parts) in [
        (["--device", "tpu"], &["--device: got \"tpu\", expected auto, cpu, cuda or cuda:N"][..]),
        (["--device", "cuda:x"], &["--device: got \"cuda:x\""]),
        (["--mode", "best"], &["--mode: got \"best\", expected auto, flat, per-node, packed or fixed-chunk=TOKENS"]),
        (["--mode", "fixed-chunk="], &["--mode: got \"fixed-chunk=\""]),
        (["--mode", "fixed-chunk=0"], &["fixed chunk: got 0"]),
        (["--mode", "fixed-chunk=33"], &["fixed chunk: got 33, expected a positive multiple of page_size = 32"]),
        (["--variants", "mma17"], &["--variants: got \"mma17\", expected some of mma16"]),
        (["--check", "some"], &["--check: got \"some\", expected auto, sample or none"]),
        (["--seed", "-1"], &["--seed"]),
        (["--at-step", "3"], &["--at-step", "--tree"]),
        (["--first-request", "3"], &["--first-request", "--tree"]),
        (["--trace", "x"], &["--tree", "--trace"]),
    ] {
        refused(&[&tree[..], &extra].concat(), parts);
    }
    refused(&["run", "--batch", "b.json", "--at-step", "3"], &["--trace"]);
    refused(&["run"], &["give --tree SPEC, --trace FILE [--batch N], or --batch FILE.json"]);
    let odd_pages = ["plan", "--tree", "1,2_40,8", "--page-size", "20", "--variants", "wgmma64"];
    refused(&odd_pages, &["(wgmma64: page_size: got 20, expected a multiple of 8 to 65536)"]);
    for option in ["--svg", "--save-batch"] {
        let args = ["plan", "--tree", "1,2_32,8", option, "no/such/folder/file"];
        let output = pat(&args);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(option), "{output:?}");
    }
}

#[test]
fn a_missing_device_is_refused_only_where_it_was_asked_for() {
    for device in ["cuda", "cuda:0", "cuda:99"] {
        refused(&["run", "--tree", "1,2_32,8", "--device", device], &["--device cuda", "CUDA"]);
    }
    let report = json(&["run", "--tree", "1,2_32,8", "--device", "auto", "--json"]);
    assert_eq!(report["device"], "CPU");
    assert!(report["device_reason"].as_str().is_some_and(|reason| reason.contains("CUDA")), "{report}");
    assert_eq!(pat(&["bench", "kernels"]).status.code(), Some(2));
}

#[test]
fn a_batch_larger_than_memory_is_refused_before_anything_is_drawn() {
    let folder = TempDir::new().expect("a temporary folder");
    let ids: Vec<u32> = (0..16_384).collect();
    let batch =
        format!(r#"{{"page_size": 65536, "num_pages": 16384, "lengths": [{}], "block_tables": [{ids:?}]}}"#, 1 << 30);
    let batch = file(&folder, "batch.json", &batch);
    refused(&["run", "--batch", text(&batch), "--device", "cpu"], &["GB of memory", "--device cuda"]);
}

#[test]
fn the_doctor_finds_a_machine_without_a_device_healthy() {
    let report = stdout(&["doctor"]);
    for line in ["ok    CPU executor", "ok    embedded PTX", "none  CUDA"] {
        assert!(report.contains(line), "{report}");
    }
    assert!(!report.contains("FAIL"), "{report}");
}

#[test]
fn result_files_are_compared() {
    let results = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/results");
    let (old, new) =
        (format!("{results}/2026-11-23-h200-aee90a9.json"), format!("{results}/2026-11-24-h200-eb98a1f.json"));
    let better =
        Command::new(env!("CARGO_BIN_EXE_pat")).args(["bench", "compare", &old, "--new", &new]).output().unwrap();
    let text = String::from_utf8(better.stdout).unwrap();
    assert!(text.contains("80 configurations, geometric mean 0.6"), "{text}");
    let worse =
        Command::new(env!("CARGO_BIN_EXE_pat")).args(["bench", "compare", &new, "--new", &old]).output().unwrap();
    assert_eq!(worse.status.code(), Some(1));
    let missing =
        Command::new(env!("CARGO_BIN_EXE_pat")).args(["bench", "compare", "none.json", "--new", &old]).output();
    let missing = missing.unwrap();
    assert_eq!(missing.status.code(), Some(2));
    assert!(String::from_utf8(missing.stderr).unwrap().contains("none.json"));
    let foreign = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let foreign = Command::new(env!("CARGO_BIN_EXE_pat")).args(["bench", "compare", foreign, "--new", &old]).output();
    assert_eq!(foreign.unwrap().status.code(), Some(2));
}
