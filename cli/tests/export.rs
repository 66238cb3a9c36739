//! `pat bench export`: what other programs measure is what `pat bench kernels` measures.

use pat_workloads::{TreeSpec, read_batch};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn export(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(["bench", "export", "--output"]).arg(folder).args(args).output().expect("pat starts")
}

fn refused(output: &Output, part: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(part), "{message}");
}

#[test]
fn the_manifest_names_the_batches_that_are_measured() {
    let folder = TempDir::new().expect("a temporary folder");
    let output = export(folder.path(), &["--filter", "1,4,256_32,256,32", "--dtype", "bf16", "--head-dim", "64"]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("4 configurations, 1 batches"), "{output:?}");
    let manifest = std::fs::read_to_string(folder.path().join("manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    assert_eq!(manifest["exchange_version"], 1);
    assert_eq!(manifest["seed"], pat_bench::device::SEED);
    let configurations = manifest["configurations"].as_array().expect("a list");
    assert_eq!(configurations.len(), 4);
    let expected = "1,4,256_32,256,32".parse::<TreeSpec>().expect("a tree").batch(32, Some(1)).expect("a batch");
    for configuration in configurations {
        assert_eq!(configuration["name"], "1,4,256_32,256,32");
        assert_eq!(configuration["suite"], "figure10");
        assert_eq!(configuration["dtype"], "bf16");
        assert_eq!(configuration["head_dim"], 64);
        assert_eq!(configuration["softmax_scale"], 0.125);
        let kv_heads = configuration["nheads_kv"].as_u64().expect("a number");
        let sample = configuration["sample"].as_array().expect("a list");
        assert!(!sample.is_empty() && sample.iter().all(|pair| pair[0].as_u64() < Some(256)));
        assert!(sample.iter().all(|pair| pair[1].as_u64() < Some(kv_heads)));
        let file = configuration["batch"].as_str().expect("a file name");
        assert_eq!(read_batch(&folder.path().join(file)).expect("a batch file").0, expected);
    }
}

#[test]
fn folders_with_something_in_them_are_kept() {
    let folder = TempDir::new().expect("a temporary folder");
    std::fs::write(folder.path().join("manifest.json"), "mine").expect("a writable folder");
    let args = ["--filter", "1,10_4096,416 32/8"];
    refused(&export(folder.path(), &args), "is not empty: --force");
    assert_eq!(std::fs::read(folder.path().join("manifest.json")).expect("readable"), b"mine");
    assert!(export(folder.path(), &[&args[..], &["--force"]].concat()).status.success());
    assert_ne!(std::fs::read(folder.path().join("manifest.json")).expect("readable"), b"mine");
    let file = folder.path().join("manifest.json");
    refused(&export(&file.join("below"), &args), "--output");
}

#[test]
fn bad_options_are_refused() {
    let folder = TempDir::new().expect("a temporary folder");
    for (args, part) in [
        (["--dtype", "f32"], "'f32' for '--dtype <DTYPE>': expected f16 or bf16"),
        (["--head-dim", "80"], "head_dim: got 80"),
        (["--filter", "nothing"], "which no configuration"),
    ] {
        refused(&export(folder.path(), &args), part);
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0, "nothing was written");
    }
}
