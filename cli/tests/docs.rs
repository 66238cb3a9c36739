//! The documents: their links lead somewhere, the commands they show run.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository")
}

/// The Markdown files of the repository's root and of `docs/`, with their text.
fn documents() -> Vec<(PathBuf, String)> {
    let files = [root().to_path_buf(), root().join("docs")].into_iter().flat_map(|folder| {
        let entries = std::fs::read_dir(&folder).expect("a readable folder");
        entries.map(|entry| entry.expect("a readable folder").path()).collect::<Vec<_>>()
    });
    let documents: Vec<_> = files
        .filter(|file| file.extension().is_some_and(|extension| extension == "md"))
        .map(|file| (file.clone(), std::fs::read_to_string(&file).expect("a readable file")))
        .collect();
    assert!(documents.iter().any(|(file, _)| file.ends_with("README.md")));
    documents
}

#[test]
fn relative_links_lead_to_files() {
    for (file, text) in documents() {
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let path = target.split('#').next().unwrap_or(target);
            let folder = file.parent().expect("a file lies in a folder");
            assert!(folder.join(path).exists(), "{}: no {target}", file.display());
        }
    }
}

#[test]
fn the_commands_shown_run() {
    let mut shown = 0;
    for (file, text) in documents() {
        for line in text.lines() {
            let Some(arguments) = line.strip_prefix("$ cargo run --release -- ") else { continue };
            let status = Command::new(env!("CARGO_BIN_EXE_pat"))
                .args(arguments.split_whitespace())
                .env("CUDA_VISIBLE_DEVICES", "")
                .output()
                .expect("pat starts")
                .status;
            assert!(status.success(), "{}: {line}: {status}", file.display());
            shown += 1;
        }
    }
    assert!(shown >= 2, "the README shows commands");
}
