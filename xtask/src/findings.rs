//! The scripts of `findings/` have the form that its index promises.

use crate::workspace;
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn every_finding_has_its_form_and_its_row() {
    let folder = workspace::root().join("findings");
    let index = fs::read_to_string(folder.join("README.md")).unwrap();
    let mut scripts = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name == "README.md" {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for part in [
            "#!/usr/bin/env bash\n# ",
            "\n# Seen on 20",
            "set -euo pipefail\nfolder=$(mktemp -d)\ntrap 'rm -rf \"$folder\"' EXIT\n",
        ] {
            assert!(text.contains(part), "{name}: {part:?}");
        }
        // The project's own code is no part of what it shows.
        for own in ["prefix_attn", "pat_rs", "pat-rs"] {
            assert!(!text.contains(own), "{name}: {own}");
        }
        assert!(path.metadata().unwrap().permissions().mode() & 0o100 != 0, "{name} is not executable");
        assert!(index.contains(&format!("\n| `{name}` |")), "{name} has no row in findings/README.md");
        scripts.push(name);
    }
    let rows = index.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, scripts.len(), "{scripts:?}");
}
