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
fn lines_are_short_enough_to_read() {
    let mut long_lines = Vec::new();
    for (file, text) in documents() {
        let mut is_code = false;
        for (number, line) in (1..).zip(text.lines()) {
            if line.starts_with("```") {
                is_code = !is_code;
            }
            let may_be_long = is_code || line.trim_start().starts_with(['|', '<']);
            let length = line.chars().count();
            if !may_be_long && length > 130 {
                long_lines.push(format!("{}:{number}: {length} characters", file.display()));
            }
        }
    }
    assert!(long_lines.is_empty(), "{}", long_lines.join("\n"));
}

/// Phrases of a translation that readers have stumbled over.
#[test]
fn the_text_is_plain() {
    const STUMBLES: [&str; 6] = ["to be had", "whoever", "under way", "to and fro", "what repairs", "place for a CTA"];
    for (file, text) in documents() {
        // The log is history.
        if file.ends_with("performance-log.md") {
            continue;
        }
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for phrase in STUMBLES {
            assert!(!text.contains(phrase), "{}: {phrase:?}", file.display());
        }
    }
}

/// The arguments of the commands in `text` that begin with `prompt`, continued lines joined.
fn commands(text: &str, prompt: &str) -> Vec<Vec<String>> {
    let joined = text.replace("\\\n", " ");
    let arguments = joined.lines().filter_map(|line| line.strip_prefix(prompt));
    arguments.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

/// Runs `pat` as a reader would: in the repository's root, here without a GPU.
fn pat(arguments: &[String]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_pat"))
        .args(arguments)
        .current_dir(root())
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .expect("pat starts")
}

#[test]
fn the_commands_shown_run_and_draw_the_pictures_shown() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (mut shown, mut pictures) = (0, 0);
    for (file, text) in documents() {
        for shown_arguments in commands(&text, "$ cargo run --release -- ") {
            let command = format!("{}: pat {}", file.display(), shown_arguments.join(" "));
            // A picture goes elsewhere, to be compared with the one of the repository.
            let mut arguments = shown_arguments.clone();
            let picture = arguments.iter().position(|argument| argument == "--svg").map(|option| option + 1);
            if let Some(index) = picture {
                arguments[index] = folder.path().join(format!("{pictures}.svg")).display().to_string();
            }
            let output = pat(&arguments);
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            shown += 1;
            if let Some(index) = picture {
                let drawn = std::fs::read(&arguments[index]).expect("the picture just drawn");
                let kept = std::fs::read(root().join(&shown_arguments[index])).expect("a picture of the repository");
                assert!(
                    drawn == kept,
                    "another plan than the picture's, run it and read what is written of it: {command}"
                );
                pictures += 1;
            }
        }
    }
    assert!(shown >= 8 && pictures >= 3, "the documents show {shown} commands, {pictures} of which draw");
}

/// Those that need a GPU, many minutes or the reader's files: their options are known.
#[test]
fn the_commands_for_a_gpu_are_understood() {
    let mut shown = 0;
    for (file, text) in documents() {
        for mut arguments in commands(&text, "$ target/release/pat ") {
            let command = format!("{}: pat {}", file.display(), arguments.join(" "));
            // Help is given once everything before it has been understood.
            arguments.push("--help".into());
            let output = pat(&arguments);
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            shown += 1;
        }
    }
    assert!(shown >= 8, "the guide shows commands");
}
