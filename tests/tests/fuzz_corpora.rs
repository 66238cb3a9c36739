//! The committed inputs of the fuzz targets, without a fuzzer: what it once found stays found.

use pat_tests::fuzzing::TARGETS;
use std::fs;
use std::path::{Path, PathBuf};

/// Of one folder, in the order of their names.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a readable folder").path()).collect();
    paths.sort();
    paths
}

#[test]
fn committed_inputs_are_judged_right() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for target in TARGETS {
        let inputs = entries(&corpus.join(target.name));
        assert!(inputs.len() >= 3, "{}: {} inputs", target.name, inputs.len());
        for input in inputs {
            println!("{}", input.display());
            (target.check)(&fs::read(&input).expect("a readable file"));
        }
    }
    let folders: Vec<_> =
        entries(&corpus).iter().map(|folder| folder.file_name().expect("a name").to_owned()).collect();
    let mut names = TARGETS.map(|target| target.name);
    names.sort_unstable();
    assert_eq!(folders, names, "a corpus without a target, or the other way around");
}
