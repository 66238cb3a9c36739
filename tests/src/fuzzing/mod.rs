//! What the fuzz targets check of any bytes: an error, or an answer that is right; never a panic or a hang. `fuzz/` runs these
//! functions under libFuzzer, `tests/tests/fuzz_corpora.rs` runs them on the committed inputs.

mod advance;
mod batches;
mod files;
mod plan_records;
mod plans;
mod tensors;

use std::io::Write;
use std::path::Path;

/// A target: its name, which is that of its folder under `fuzz/corpus`, and its check.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// As in `fuzz/Cargo.toml`.
    pub name: &'static str,
    /// Panics where something is wrong.
    pub check: fn(&[u8]),
}

/// All of them.
pub const TARGETS: [Target; 10] = [
    Target { name: "batch_file", check: files::batch_file },
    Target { name: "trace", check: files::trace },
    Target { name: "requests", check: files::requests },
    Target { name: "result_file", check: files::result_file },
    Target { name: "spec_file", check: files::spec_file },
    Target { name: "profile", check: files::profile },
    Target { name: "plan", check: plans::plan },
    Target { name: "plan_records", check: plan_records::plan_records },
    Target { name: "advance", check: advance::advance },
    Target { name: "tensors", check: tensors::tensors },
];

/// Runs the check of a target.
///
/// # Panics
/// There is no such target, or its check fails.
pub fn check(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    (target.check)(bytes);
}

/// Reads these bytes as users have them read: from a file.
fn read_file<R>(bytes: &[u8], read: impl FnOnce(&Path) -> R) -> R {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("a writable file");
    read(file.path())
}
