//! When, of what, and where: what a result file says of itself.

use std::path::Path;
use std::process::Command;

/// Today, `YYYY-MM-DD`, UTC.
pub fn date() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d").to_string()
}

/// The commit this was built of, `-dirty` behind it where files have been changed: `PAT_COMMIT` at build time, or what git
/// says of the source folder if that is still there.
pub fn commit() -> Option<String> {
    option_env!("PAT_COMMIT")
        .filter(|commit| !commit.is_empty())
        .map(str::to_owned)
        .or_else(|| commit_of(Path::new(env!("CARGO_MANIFEST_DIR"))))
}

/// What git says of a folder; nothing without git, or where the folder is in no repository.
fn commit_of(folder: &Path) -> Option<String> {
    // Excluding every tag leaves the abbreviated hash.
    let arguments = ["describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"];
    let output = Command::new("git").args(arguments).current_dir(folder).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// `CPU (model name)`, or with the number of threads where the system does not name it.
pub fn cpu_name() -> String {
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    match model {
        Some(model) => format!("CPU ({model})"),
        None => format!("CPU ({} threads)", std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_has_ten_characters() {
        let date = date();
        assert_eq!(date.split('-').map(str::len).collect::<Vec<_>>(), [4, 2, 2], "{date}");
    }

    #[test]
    fn a_folder_without_a_repository_has_no_commit() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(commit_of(folder.path()), None);
        assert_eq!(commit_of(&folder.path().join("missing")), None);
    }

    #[test]
    fn the_cpu_has_a_name() {
        let name = cpu_name();
        assert!(name.starts_with("CPU (") && name.ends_with(')') && name.len() > "CPU ()".len(), "{name}");
    }
}
