//! `cargo xtask dist`: everything a release consists of, in one folder, checked: crate packages, the wheel, the changelog's
//! section, checksums. It publishes nothing.

use crate::{build_ptx, public_api, wheel, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The crates that are published, each behind those it depends on. The tools and tests are built from the repository.
pub(crate) const PUBLISHED: [&str; 2] = ["pat-abi", "pat-rs"];
/// What the changelog calls changes that no version has yet.
const UNRELEASED: &str = "Unreleased";

/// The version's section of the changelog: by it a folder is known as a release.
const CHANGES: &str = "CHANGES.md";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to put it.
    #[arg(long, default_value = "dist/release", value_name = "DIR")]
    out: PathBuf,
    /// To try: uncommitted changes are packaged, and the changelog's section may be the one of unreleased changes.
    #[arg(long)]
    draft: bool,
    /// Only the crates' packages and the checks of versions: no PTX is built, and no wheel.
    #[arg(long)]
    crates_only: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let root = workspace::root();
    let version = env!("CARGO_PKG_VERSION");
    let out = root.join(&args.out);
    if fs::read_dir(&out).is_ok_and(|mut entries| entries.next().is_some()) && !out.join(CHANGES).is_file() {
        bail!(
            "--out {}: got a folder with other things in it, expected an earlier release, an empty folder or none",
            out.display()
        );
    }

    let changelog = fs::read_to_string(root.join("CHANGELOG.md"))?;
    let section = match section(&changelog, version) {
        Some(section) => section,
        None if args.draft => {
            section(&changelog, UNRELEASED).context("CHANGELOG.md: no section of unreleased changes")?
        }
        None => {
            bail!("CHANGELOG.md has no section `## {version}`: write the version over `## {UNRELEASED}`, with the day")
        }
    };
    check_versions(root, version)?;
    public_api::check_since_release(root, version, !args.draft)?;
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&out)?;
    fs::write(out.join(CHANGES), section)?;
    if !args.crates_only {
        // The kernels in the packages are those of the sources.
        build_ptx::run(&build_ptx::Args { check: true })?;
    }
    package(root, &out, version, args.draft)?;
    if !args.crates_only {
        wheel::run(&wheel::Args { out: args.out.clone(), profile: "release".into() })?;
    }
    write_checksums(&out)
}

/// The text below `## TITLE`, up to the next heading of that level.
fn section<'a>(changelog: &'a str, title: &str) -> Option<&'a str> {
    let mut begin = None;
    let mut at = 0;
    for line in changelog.split_inclusive('\n') {
        if let Some(heading) = line.strip_prefix("## ") {
            if let Some(begin) = begin {
                return Some(changelog[begin..at].trim());
            }
            // A day may stand behind the version.
            if heading.split_whitespace().next() == Some(title) {
                begin = Some(at + line.len());
            }
        }
        at += line.len();
    }
    begin.map(|begin| changelog[begin..].trim())
}

/// Every crate has the workspace's version, and what they require of each other is that version.
fn check_versions(root: &Path, version: &str) -> Result<()> {
    let mut command = Command::new("cargo");
    command.args(["metadata", "--format-version=1", "--no-deps", "--locked"]).current_dir(root);
    let metadata: serde_json::Value = serde_json::from_slice(&workspace::output(&mut command)?.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata: packages")?;
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        if package["version"] != version {
            bail!("{name} has version {}, the workspace {version}", package["version"]);
        }
        if !PUBLISHED.contains(&name) {
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let is_published = PUBLISHED.iter().any(|published| dependency["name"] == *published);
            if is_published && dependency["req"] != format!("^{version}") {
                bail!("{name} requires {} {}, expected ^{version}", dependency["name"], dependency["req"]);
            }
        }
    }
    println!("versions: {} crates at {version}", packages.len());
    Ok(())
}

/// Packages the published crates, which builds each from its package.
fn package(root: &Path, out: &Path, version: &str, draft: bool) -> Result<()> {
    let target = workspace::target_dir().join("dist");
    forget_earlier_packages(&target, version)?;
    let mut command = Command::new("cargo");
    command.args(["package", "--locked", "--target-dir"]).arg(&target).current_dir(root);
    command.args(PUBLISHED.iter().flat_map(|name| ["--package", name]));
    if draft {
        command.arg("--allow-dirty");
    }
    workspace::run(&mut command)?;
    for name in PUBLISHED {
        let file = format!("{name}-{version}.crate");
        let package = target.join("package").join(&file);
        fs::copy(&package, out.join(&file)).with_context(|| format!("copying {}", package.display()))?;
    }
    let mut list = Command::new("tar");
    list.arg("-tzf").arg(out.join(format!("pat-rs-{version}.crate")));
    let contents = String::from_utf8(workspace::output(&mut list)?.stdout)?;
    for arch in pat_abi::Arch::ALL {
        let kernels = format!("pat-rs-{version}/src/cuda/ptx/{}.ptx", arch.name());
        if !contents.lines().any(|line| line == kernels) {
            bail!("the package of pat-rs has no {kernels}");
        }
    }
    Ok(())
}

/// cargo builds a package with those of the same run that it depends on, as from a registry, where a version never changes: it
/// takes what it has unpacked and built of the same name and version before, whatever has changed since. So nothing is left.
fn forget_earlier_packages(target: &Path, version: &str) -> Result<()> {
    if target.exists() {
        fs::remove_dir_all(target)?;
    }
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let Some(Ok(registries)) = home.map(|home| fs::read_dir(home.join("registry/src"))) else { return Ok(()) };
    for registry in registries {
        let registry = registry?;
        // That of a folder has no host in its name.
        if registry.file_name().to_string_lossy().starts_with('-') {
            for unpacked in PUBLISHED.map(|name| registry.path().join(format!("{name}-{version}"))) {
                if unpacked.exists() {
                    fs::remove_dir_all(&unpacked).with_context(|| format!("removing {}", unpacked.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// `SHA256SUMS`, as `sha256sum --check` takes it.
fn write_checksums(out: &Path) -> Result<()> {
    let mut names = fs::read_dir(out)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort();
    let sums = workspace::output(Command::new("sha256sum").args(&names).current_dir(out))?.stdout;
    fs::write(out.join("SHA256SUMS"), &sums)?;
    print!("{}:\n{}", out.display(), String::from_utf8_lossy(&sums));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_end_at_the_next_version() {
        let changelog = "# Changelog\n\n## Unreleased\n\n- later\n\n## 0.2.0 - 2027-01-02\n\n### Added\n\n- this\n\n\
                         ## 0.1.0\n\n- that\n";
        assert_eq!(section(changelog, "0.2.0"), Some("### Added\n\n- this"));
        assert_eq!(section(changelog, "0.1.0"), Some("- that"));
        assert_eq!(section(changelog, UNRELEASED), Some("- later"));
        assert_eq!(section(changelog, "0.2"), None);
    }

    #[test]
    fn the_changelog_has_a_section_for_what_comes_next() {
        let changelog = fs::read_to_string(workspace::root().join("CHANGELOG.md")).unwrap();
        let next = section(&changelog, env!("CARGO_PKG_VERSION")).or_else(|| section(&changelog, UNRELEASED));
        assert!(next.is_some_and(|text| text.contains("### ")), "{next:?}");
    }
}
