//! The tool where things go wrong or are unusual: full disks, closed pipes, padded and sparse batches, traces of other kinds,
//! nothing to measure. Everything runs on the CPU.

mod tool;

use pat_rs::{AttentionShape, Dtype, Problem, supports};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tool::{command, json, pat, refused, stdout};

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/results");

fn file(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).expect("a writable temporary folder");
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a readable folder");
    let mut names: Vec<_> =
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

const TREE: [&str; 2] = ["--tree", "1,2_32,8"];
const SMALL_BENCH: [&str; 8] =
    ["bench", "kernels", "--device", "cpu", "--suite", "unshared", "--filter", "decode_1x1024"];

#[test]
fn a_padded_batch_file_is_what_the_library_takes() {
    let folder = TempDir::new().expect("a temporary folder");
    let padded = file(
        &folder,
        "padded.json",
        r#"{"page_size": 16, "num_pages": 12, "lengths": [39, 18, 0],
            "block_tables": [[4, 5, 6, -1], [4, 9, -1, -1], [-1, -1, -1, -1]]}"#,
    );
    let report = json(&["run", "--batch", text(&padded), "--device", "cpu", "--json"]);
    assert_eq!(report["numerics"]["passed"], true, "{report}");
    assert_eq!((&report["plan"]["sequences"], &report["pages_read"]), (&3.into(), &4.into()));
    // 39 + 18 tokens, of which the first page's 16 are shared.
    assert_eq!(report["plan"]["unique_kv_bytes"], (39 + 18 - 16) * 4096);
    for rows in ["[[], []]", "[[-1, -1], [-1, -1]]"] {
        let empty = format!(r#"{{"page_size": 16, "num_pages": 4, "lengths": [0, 0], "block_tables": {rows}}}"#);
        let empty = file(&folder, "empty.json", &empty);
        assert_eq!(json(&["run", "--batch", text(&empty), "--device", "cpu", "--json"])["numerics"]["passed"], true);
    }
}

#[test]
fn page_ids_are_reported_as_the_file_has_them() {
    let folder = TempDir::new().expect("a temporary folder");
    for id in ["3000000000", "-7", "9", "5000000000"] {
        let batch = format!(r#"{{"page_size": 16, "num_pages": 4, "lengths": [17], "block_tables": [[0, {id}]]}}"#);
        let batch = file(&folder, "batch.json", &batch);
        let part = format!("block_tables[0][1]: got {id}, expected a page id below num_pages = 4");
        for command in [&["plan"][..], &["run"], &["bench", "kernels", "--device", "cpu"]] {
            refused(&[command, &["--batch", text(&batch)]].concat(), &["--batch", text(&batch), &part]);
        }
    }
}

#[test]
fn only_pages_that_are_read_are_drawn() {
    let folder = TempDir::new().expect("a temporary folder");
    let sparse = file(
        &folder,
        "sparse.json",
        r#"{"page_size": 480, "num_pages": 160000, "lengths": [700, 1], "block_tables": [[12, 159998], [3]]}"#,
    );
    let sparse = text(&sparse);
    let report = json(&["run", "--batch", sparse, "--device", "cpu", "--json"]);
    assert_eq!(report["numerics"]["passed"], true, "{report}");
    assert_eq!((&report["num_pages"], &report["pages_read"]), (&160_000.into(), &3.into()));
    let table = stdout(&["bench", "kernels", "--device", "cpu", "--batch", sparse]);
    assert!(table.contains("batch: 1 of 1 verified"), "{table}");
    // 3 pages of 480 tokens of 4096 bytes.
    let list = stdout(&["bench", "kernels", "--batch", sparse, "--list"]);
    assert_eq!(list.lines().last().and_then(|row| row.split_whitespace().nth(6)), Some("6"), "{list}");
    let exchange = folder.path().join("exchange");
    stdout(&["bench", "export", "--batch", sparse, "--output", text(&exchange)]);
    let exported = fs::read_to_string(exchange.join("batch-000.json")).expect("a batch file");
    assert!(exported.contains("\"num_pages\":3,") && exported.contains("[[1,2],[0]]"), "{exported}");
    // A batch as it is kept has the engine's ids.
    let saved = folder.path().join("saved.json");
    stdout(&["plan", "--batch", sparse, "--save-batch", text(&saved)]);
    assert!(fs::read_to_string(&saved).expect("a batch file").contains("[[12,159998],[3]]"));
}

#[test]
fn a_trace_has_blocks_of_any_size() {
    let folder = TempDir::new().expect("a temporary folder");
    let trace = file(
        &folder,
        "trace.jsonl",
        r#"{"chat_id": 0, "timestamp": 0.0, "input_length": 200, "output_length": 13, "hash_ids": [100, 101, 102, 103, 104, 105, 106, 107, 200, 201, 202, 203, 204]}
{"chat_id": 1, "timestamp": 1.5, "input_length": 250, "output_length": 30, "hash_ids": [100, 101, 102, 103, 104, 105, 106, 107, 300, 301, 302, 303, 304, 305, 306, 307]}
{"chat_id": 2, "timestamp": 3.0, "input_length": 72, "output_length": 9, "hash_ids": [400, 401, 402, 403, 404]}
"#,
    );
    let trace = text(&trace);
    for command in [&["plan"][..], &["run"], &["bench", "kernels", "--device", "cpu"]] {
        let named = ["got 13 ids, expected 1", "in blocks of 512 tokens (13 ids would be blocks of 16)"];
        refused(&[command, &["--trace", trace]].concat(), &[&named[..], &["--trace-block"]].concat());
    }
    for page_size in ["16", "32", "24", "1"] {
        let args =
            ["run", "--trace", trace, "--trace-block", "16", "--page-size", page_size, "--device", "cpu", "--json"];
        let report = json(&args);
        assert_eq!(report["numerics"]["passed"], true, "{report}");
        assert_eq!(report["plan"]["sequences"], 3, "as many as the trace has");
        // Two prompts share 128 tokens, in whole pages.
        let shared = 128 / page_size.parse::<u64>().expect("a number") * page_size.parse::<u64>().expect("a number");
        assert_eq!(report["plan"]["unique_kv_bytes"], (200 + 250 + 72 - shared) * 4096);
    }
    let table = stdout(&["bench", "kernels", "--device", "cpu", "--trace", trace, "--trace-block", "16"]);
    assert!(table.contains("trace_b3_s512") && table.contains("trace: 3 of 3 verified"), "{table}");
    refused(&["plan", "--trace", trace, "--trace-block", "0"], &["--trace-block <TOKENS>", "0 is not in 1..="]);
    refused(&["plan", "--tree", "1_32", "--trace-block", "16"], &["--trace-block", "--trace"]);
    refused(&["bench", "kernels", "--trace-block", "16"], &["--trace <FILE>"]);
}

#[test]
fn a_trace_needs_no_time_stamps_and_may_be_short() {
    let folder = TempDir::new().expect("a temporary folder");
    let trace = file(
        &folder,
        "trace.jsonl",
        r#"{"session_id": "s-1", "timestamp": 0.0, "input_length": 1300, "output_length": 60, "hash_ids": [10, 11, 12]}
{"session_id": "s-1", "delay": 850.0, "input_length": 1500, "output_length": 75, "hash_ids": [10, 11, 14]}
{"session_id": "s-2", "timestamp": 0.0, "input_length": 1100, "output_length": 20, "hash_ids": [10, 15, 16]}
"#,
    );
    let trace = text(&trace);
    let report = json(&["plan", "--trace", trace, "--json"]);
    // Two share 1024 tokens, all three the first 512.
    assert_eq!(report["unique_kv_bytes"], (1300 + 1500 + 1100 - 1024 - 512) * 4096);
    let measured = pat(&["bench", "kernels", "--device", "cpu", "--trace", trace]);
    let message = String::from_utf8_lossy(&measured.stderr);
    assert!(message.contains("has 3 requests: batches of 32, 64, 128, 256 are left out"), "{message}");
    assert!(String::from_utf8_lossy(&measured.stdout).contains("trace: 3 of 3 verified"), "{measured:?}");
    assert_eq!(measured.status.code(), Some(0));
    refused(&["plan", "--trace", trace, "--first-request", "3"], &["--first-request", "got 3, expected less than 3"]);
    let zipped = folder.path().join("trace.jsonl.gz");
    fs::write(&zipped, [0x1f, 0x8b, 8, 0]).expect("writable");
    for command in ["plan", "run"] {
        refused(&[command, "--trace", text(&zipped)], &["--trace", "compressed by gzip, expected JSON lines"]);
    }
    let empty = file(&folder, "empty.jsonl", "\n");
    refused(&["bench", "kernels", "--device", "cpu", "--trace", text(&empty)], &["--trace", "has no requests"]);
    refused(&["plan", "--trace", text(&empty)], &["--trace", "the trace has 0 requests"]);
}

#[test]
fn nothing_measured_is_no_success() {
    refused(&[&SMALL_BENCH[..], &["--time-limit", "0"]].concat(), &["nothing was measured"]);
    refused(
        &["bench", "kernels", "--device", "cpu", "--quick", "--filter", "256_4096 64/8"],
        &["nothing was measured"],
    );
}

#[test]
fn a_time_limit_holds_within_a_configuration() {
    // On two cores this takes half a minute without a limit.
    let begin = Instant::now();
    let args = ["bench", "kernels", "--device", "cpu", "--suite", "unshared", "--filter", "decode_4x131072"];
    let output = pat(&[&args[..], &["--time-limit", "1"]].concat());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("time limit reached\n"), "there is no --output that --resume could continue: {printed}");
    assert_eq!(output.status.code(), Some(2), "nothing was measured");
}

#[test]
fn an_empty_batch_is_measured_and_drawn() {
    let folder = TempDir::new().expect("a temporary folder");
    let empty = r#"{"page_size": 16, "num_pages": 4, "lengths": [0, 0], "block_tables": [[], []]}"#;
    let (batch, result) = (file(&folder, "empty.json", empty), folder.path().join("result.json"));
    stdout(&["bench", "kernels", "--device", "cpu", "--batch", text(&batch), "--output", text(&result)]);
    let pictures = folder.path().join("pictures");
    let drawn = stdout(&["plot", "kernels", text(&result), "--output", text(&pictures), "--format", "svg,png"]);
    assert!(drawn.contains("nobody has measured what can be reached on the device"), "{drawn}");
    assert!(names(&pictures).contains(&"kernels-planning-light.png".to_owned()), "{drawn}");
    // The same figures as a GPU would have them.
    let mut gpu: Value = serde_json::from_str(&fs::read_to_string(&result).expect("readable")).expect("JSON");
    gpu["device"] = "NVIDIA H200".into();
    let gpu = file(&folder, "gpu.json", &gpu.to_string());
    let drawn = stdout(&["plot", "kernels", text(&gpu), "--output", text(&pictures), "--force"]);
    // Q and O take time to move; nothing has a sharing factor.
    assert!(drawn.contains("kernels-ceiling-light.svg\n"), "{drawn}");
    assert!(drawn.contains("kernels-sharing-light.svg: left out"), "{drawn}");
}

#[test]
fn a_closed_pipe_ends_the_tool_quietly() {
    let compared = format!("{RESULTS}/2026-11-24-h200-eb98a1f.json");
    for args in [
        &["plan", "--tree", "1,4,256_32,256,32", "--explain"][..],
        &["plan", "--tree", "1,4,256_32,256,32", "--json"],
        &["run", "--tree", "1,2_32,8", "--device", "cpu"],
        &["bench", "kernels", "--list", "--suite", "all"],
        &["bench", "kernels", "--device", "cpu", "--quick", "--suite", "unshared", "--filter", "decode_1x"],
        &["bench", "compare", &compared, "--new", &compared],
        &["doctor"],
        &["--help"],
    ] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pat starts");
        drop(child.stdout.take());
        let mut message = String::new();
        child.stderr.take().expect("piped").read_to_string(&mut message).expect("UTF-8");
        let status = child.wait().expect("it ends");
        assert_eq!((status.code(), message.as_str()), (Some(0), ""), "pat {args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error() {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let compared = format!("{RESULTS}/2026-11-24-h200-eb98a1f.json");
    let peers = format!("{RESULTS}/peers-h200-recorded.json");
    for args in [
        &["plan", "--tree", "1,4,256_32,256,32"][..],
        &["plan", "--tree", "1_32", "--json"],
        &["run", "--tree", "1,2_32,8", "--device", "cpu"],
        &["bench", "kernels", "--list"],
        &SMALL_BENCH,
        &["bench", "compare", &compared, "--new", &compared],
        &["bench", "peers", &compared, "--with", &peers],
        &["doctor"],
        &["models"],
        &["--help"],
        &["--version"],
    ] {
        let output = command(args).stdout(full()).output().expect("pat starts");
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "pat {args:?}: {message}");
        assert!(message.contains("error: standard output: No space left on device"), "pat {args:?}: {message}");
    }
    // Nobody can be told; there is still a status.
    let silent = command(&["plan", "--tree", "nonsense"]).stderr(full()).output().expect("pat starts");
    assert_eq!(silent.status.code(), Some(2));
    for option in ["--svg", "--save-batch"] {
        refused(&["plan", "--tree", "1_32", option, "/dev/full"], &[option, "/dev/full: No space left"]);
    }
    refused(&[&SMALL_BENCH[..], &["--output", "/dev/full"]].concat(), &["--output", "/dev/full: No space left"]);
}

#[test]
fn files_are_replaced_only_by_force() {
    let folder = TempDir::new().expect("a temporary folder");
    let mine = file(&folder, "mine", "mine");
    for option in ["--svg", "--save-batch"] {
        let args = [&["plan"][..], &TREE, &[option, text(&mine)]].concat();
        let output = pat(&args);
        assert!(output.stdout.is_empty(), "{output:?}");
        refused(&args, &[option, "mine exists: --force overwrites it"]);
        assert_eq!(fs::read(&mine).expect("readable"), b"mine");
        stdout(&[&args[..], &["--force"]].concat());
        assert_ne!(fs::read(&mine).expect("readable"), b"mine");
        fs::write(&mine, "mine").expect("writable");
    }
    refused(&["calibrate", "--output", text(&mine)], &["--output", "mine exists: --force overwrites it"]);
    let folder_path = text(folder.path());
    let calls: [&[&str]; 4] = [
        &["plan", "--tree", "1_32", "--svg", folder_path, "--force"],
        &["plan", "--tree", "1_32", "--save-batch", folder_path],
        &["bench", "kernels", "--device", "cpu", "--output", folder_path],
        &["calibrate", "--output", folder_path],
    ];
    for args in calls {
        refused(args, &["is a folder, expected a file"]);
    }
    assert_eq!(names(folder.path()), ["mine"], "no temporary file is left");
}

#[test]
fn the_models_shape_is_shown_kept_and_checked() {
    let folder = TempDir::new().expect("a temporary folder");
    let saved = folder.path().join("batch.json");
    let shape = ["--heads", "16/8", "--head-dim", "64", "--dtype", "bf16", "--page-size", "16"];
    let plan = [&["plan", "--tree", "1,2_32,8"][..], &shape].concat();
    let shown = stdout(&[&plan[..], &["--save-batch", text(&saved)]].concat());
    for line in ["model            16/8 heads, head dim 64, bf16", "pool             pages of 16 tokens, 4 of 4 read"] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    let run = stdout(&["run", "--batch", text(&saved), "--device", "cpu"]);
    assert!(run.contains("16/8 heads, head dim 64, bf16") && run.contains("pages of 16 tokens, 4 of 4 read"), "{run}");
    for args in [
        &["plan", "--batch", text(&saved), "--json"][..],
        &["run", "--batch", text(&saved), "--device", "cpu", "--json"],
    ] {
        let report = json(args);
        for (field, value) in [("q_heads", 16), ("kv_heads", 8), ("head_dim", 64), ("page_size", 16), ("num_pages", 4)]
        {
            assert_eq!(report[field], value, "{field}: {report}");
        }
        assert_eq!(report["dtype"], "bf16");
    }
    let result = folder.path().join("result.json");
    stdout(&["bench", "kernels", "--device", "cpu", "--batch", text(&saved), "--output", text(&result)]);
    let result: Value = serde_json::from_str(&fs::read_to_string(&result).expect("readable")).expect("JSON");
    let record = &result["records"][0];
    assert_eq!((&record["nheads_q"], &record["head_dim"], &record["dtype"]), (&16.into(), &64.into(), &"bf16".into()));
    for (option, value, own) in [("--heads", "32/8", "16/8"), ("--head-dim", "128", "64"), ("--dtype", "f16", "bf16")] {
        let part = format!("got {value}, expected {own}");
        refused(&["bench", "kernels", "--device", "cpu", "--batch", text(&saved), option, value], &[option, &part]);
        let part = format!("{option}: got {value}, expected the batch file's {own} or nothing");
        refused(&["plan", "--batch", text(&saved), option, value], &[&part]);
        stdout(&["plan", "--batch", text(&saved), option, own]);
    }
}

#[test]
fn batch_files_keep_the_head_dim_of_v_and_the_type_of_8_bit_caches() {
    let folder = TempDir::new().expect("a temporary folder");
    for (shape, shown, measured) in [
        (&["--head-dim=192", "--value-head-dim=128"][..], "V head dim 128", ("--value-head-dim", "192", "128")),
        (&["--head-dim=64", "--kv-dtype=e5m2"], "K and V e5m2", ("--kv-dtype", "e4m3", "e5m2")),
    ] {
        let saved = folder.path().join(format!("{}.json", measured.0));
        stdout(&[&["plan", "--tree", "1,2_32,32", "--save-batch", text(&saved)][..], shape].concat());
        let (batch, (option, other, own)) = (["--batch", text(&saved)], measured);
        for command in [&["plan"][..], &["run", "--device", "cpu"], &["bench", "kernels", "--device", "cpu"]] {
            let args = [command, &batch].concat();
            let output = stdout(&args);
            assert!(command[0] == "bench" || output.contains(shown), "{output}");
            refused(&[&args[..], &[option, other]].concat(), &[option, &format!("got {other}, expected ")]);
            stdout(&[&args[..], &[option, own]].concat());
        }
    }
}

#[test]
fn errors_name_the_option() {
    for (args, parts) in [
        (&["plan", "--tree", "1_32", "--heads", "30/8"][..], &["--heads 30/8: q_heads: got 30"][..]),
        (&["plan", "--tree", "1_32", "--head-dim", "80"], &["--head-dim 80: head_dim: got 80"]),
        (&["plan", "--tree", "1,2_32,8", "--mode", "fixed-chunk=33"], &["--mode: ", "fixed chunk: got 33"]),
        (&["plan", "--tree", "1_32", "--page-size", "70000"], &["error: --page-size: got 70000, expected"]),
        (&["bench", "compare", "none.json", "--new", "none.json"], &["error: OLD: none.json"]),
    ] {
        refused(args, parts);
    }
}

/// One validator: what `supports` refuses, every command refuses with the same words, after the option that gave it.
#[test]
fn the_commands_and_supports_agree_on_every_limit() {
    for (heads, page_size) in [((32, 8), 100_000), ((256, 1), 65_537)] {
        let shape = AttentionShape::new(heads.0, heads.1, 128, Dtype::F16).expect("a shape");
        let reason = supports(&Problem::new(shape, page_size), None, None).expect_err("a limit").to_string();
        let reason = reason.replace("page_size: ", "error: --page-size: ");
        let (heads, page_size) = (format!("{}/{}", heads.0, heads.1), page_size.to_string());
        for command in [&["plan"][..], &["run", "--device", "cpu"]] {
            let args = [command, &["--tree", "1_32", "--heads", &heads, "--page-size", &page_size]].concat();
            refused(&args, &[&reason]);
        }
    }
    for (heads, page_size) in [((129, 1), 16), ((256, 1), 16), ((32, 8), 65_536)] {
        let shape = AttentionShape::new(heads.0, heads.1, 128, Dtype::F16).expect("a shape");
        supports(&Problem::new(shape, page_size), None, None).expect("within the limits");
        let (heads, page_size) = (format!("{}/{}", heads.0, heads.1), page_size.to_string());
        stdout(&["plan", "--tree", "1_32", "--heads", &heads, "--page-size", &page_size]);
    }
}

#[test]
fn comparing_devices_is_said() {
    let folder = TempDir::new().expect("a temporary folder");
    let h200 = format!("{RESULTS}/2026-11-24-h200-eb98a1f.json");
    let other = fs::read_to_string(&h200).expect("a committed result").replace("NVIDIA H200", "NVIDIA L40S");
    let other = file(&folder, "l40s.json", &other);
    let compared = stdout(&["bench", "compare", &h200, "--new", text(&other)]);
    assert!(compared.starts_with("The files are of different devices (NVIDIA H200, NVIDIA L40S)"), "{compared}");
    assert!(!stdout(&["bench", "compare", &h200, "--new", &h200]).contains("different devices"));
}

#[test]
fn every_command_says_how_long_it_takes() {
    for command in [
        &["run"][..],
        &["plan"],
        &["calibrate"],
        &["doctor"],
        &["models"],
        &["workload", "make"],
        &["workload", "show"],
        &["bench", "kernels"],
        &["bench", "compare"],
        &["bench", "export"],
        &["bench", "peers"],
        &["plot", "kernels"],
    ] {
        let help = stdout(&[command, &["--help"]].concat());
        assert!(help.contains("Takes: "), "pat {command:?}: {help}");
    }
}
