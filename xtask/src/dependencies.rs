//! The reasons for the dependencies (`docs/dependencies.md`) and the dependencies themselves go together.

use crate::workspace;
use std::collections::BTreeSet;
use std::fs;

/// Keys of `[workspace.dependencies]`, the workspace's own crates left out.
fn declared() -> BTreeSet<String> {
    let manifest = fs::read_to_string(workspace::root().join("Cargo.toml")).unwrap();
    let (_, section) = manifest.split_once("[workspace.dependencies]\n").unwrap();
    let section = section.split("\n[").next().unwrap();
    let keys = section.lines().filter_map(|line| line.split_once(" = "));
    keys.filter(|(_, value)| !value.contains("path = ")).map(|(key, _)| key.trim().to_owned()).collect()
}

/// Names in backticks in the first column of the table.
fn documented() -> BTreeSet<String> {
    let document = fs::read_to_string(workspace::root().join("docs/dependencies.md")).unwrap();
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    let first_columns = rows.filter_map(|row| row.split('|').next());
    let names = first_columns.flat_map(|cell| cell.split(',').map(|name| name.trim().trim_matches('`').to_owned()));
    names.collect()
}

#[test]
fn every_dependency_has_its_reason() {
    let (declared, documented) = (declared(), documented());
    assert!(declared.contains("cudarc"), "{declared:?}");
    assert_eq!(declared, documented, "Cargo.toml on the left, docs/dependencies.md on the right");
}
