//! `cargo xtask public-api`: what callers of the published crates can name, one item a line, as rustdoc has it. A change's diff
//! then shows what it changes for them. What has gone since the last release needs a version that allows it.

use crate::dist::PUBLISHED;
use crate::toolchain::Toolchain;
use crate::workspace::{self, Generated};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

pub(crate) fn run(listing: &Generated) -> Result<()> {
    for name in PUBLISHED {
        let text = list(name)?;
        println!("{name}: {} public items", text.lines().count());
        listing.put(&file(name), &text, "public-api")?;
    }
    check_since_release(workspace::root(), env!("CARGO_PKG_VERSION"), false)
}

fn file(name: &str) -> String {
    format!("xtask/public-api/{name}.txt")
}

/// Items of a crate with its default features. What every type has by a blanket implementation is left out.
fn list(name: &str) -> Result<String> {
    // Of its own: build scripts of dependencies run again where `RUSTC_BOOTSTRAP` has changed, without which no stable rustdoc
    // writes JSON.
    let target = workspace::target_dir().join("public-api");
    // That of the device code: another one's rustdoc may write JSON of another format, or name items in another way.
    let mut command = Toolchain::find()?.command("cargo");
    command.args(["rustdoc", "--quiet", "--locked", "--lib", "--package", name, "--target-dir"]).arg(&target);
    command.args(["--", "-Z", "unstable-options", "--output-format", "json", "--cap-lints", "allow"]);
    workspace::run(&mut command)?;
    let json = target.join("doc").join(name.replace('-', "_")).with_extension("json");
    let api = public_api::Builder::from_rustdoc_json(&json).omit_blanket_impls(true).build();
    let api = api.with_context(|| format!("{}: its format is that of rustdoc 1.95", json.display()))?;
    // Of the traits that a type has by itself, callers need `Send` and `Sync`.
    let is_said =
        |item: &String| !["Freeze", "Unpin", "UnsafeUnpin", "UnwindSafe"].iter().any(|name| has_by_itself(item, name));
    Ok(api.items().map(|item| format!("{item}\n")).filter(is_said).collect())
}

/// Whether an item says that a type has the automatic trait of that name, or has it not.
fn has_by_itself(item: &str, name: &str) -> bool {
    let Some((before, _)) = item.split_once(" for ") else { return false };
    item.starts_with("impl") && before.contains("core::") && before.ends_with(name)
}

/// Items that have gone since the last release are an error where the version promises that none has. A clone without the
/// history that has the release cannot say, which `for_release` makes an error.
pub(crate) fn check_since_release(root: &Path, version: &str, for_release: bool) -> Result<()> {
    let git = |args: &[&str]| -> Result<String> {
        let output = workspace::output(Command::new("git").args(args).current_dir(root))?;
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let is_shallow = git(&["rev-parse", "--is-shallow-repository"]);
    if for_release && is_shallow.as_deref().ok() != Some("false") {
        bail!("got {is_shallow:?} for a shallow clone, expected one with all tags: git fetch --unshallow --tags");
    }
    // A source tree without git is none that a release is made of.
    if is_shallow.is_err() || git(&["tag", "--list", "v[0-9]*"])?.is_empty() {
        println!("no release is known here whose callers could be broken");
        return Ok(());
    }
    let tag = git(&["describe", "--tags", "--abbrev=0", "--match", "v[0-9]*"])?;
    let mut gone = Vec::new();
    for name in PUBLISHED {
        let before = git(&["show", &format!("{tag}:{}", file(name))])?;
        let now = std::fs::read_to_string(root.join(file(name)))?;
        gone.extend(missing(&before, &now));
    }
    if !gone.is_empty() && !may_break(tag.trim_start_matches('v'), version)? {
        bail!("since {tag} callers have lost what version {version} promises them:\n{}", gone.join("\n"));
    }
    println!("{} items have gone since {tag}", gone.len());
    Ok(())
}

/// Lines of `before` that `now` has no more.
fn missing(before: &str, now: &str) -> Vec<String> {
    let now: BTreeSet<&str> = now.lines().collect();
    before.lines().filter(|line| !now.contains(line)).map(str::to_owned).collect()
}

/// Whether cargo takes `now` for a version that programs for `before` may not work with.
fn may_break(before: &str, now: &str) -> Result<bool> {
    let parts = |version: &str| -> Result<Vec<u64>> {
        let release = version.split(['-', '+']).next().unwrap_or_default();
        release.split('.').map(|part| part.parse().with_context(|| version.to_owned())).collect()
    };
    let (before, now) = (parts(before)?, parts(now)?);
    // The first part that is not 0 decides.
    let decides = before.iter().position(|&part| part != 0).unwrap_or(before.len().saturating_sub(1));
    Ok(now.iter().zip(&before).take(decides + 1).any(|(now, before)| now > before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_gone_needs_another_version() {
        assert_eq!(missing("pub a\npub b(u32)\n", "pub a\npub b(u64)\npub c\n"), ["pub b(u32)"]);
        for (before, now, expected) in [
            ("0.1.0", "0.1.1", false),
            ("0.1.9", "0.2.0", true),
            ("0.1.0", "1.0.0", true),
            ("1.2.3", "1.3.0", false),
            ("1.2.3", "2.0.0-rc.1", true),
            ("0.0.1", "0.0.2", true),
            ("0.1.0", "0.1.0", false),
        ] {
            assert_eq!(may_break(before, now).unwrap(), expected, "{before} {now}");
        }
        assert!(may_break("0.1.0", "next").is_err());
    }

    #[test]
    fn the_listings_name_what_the_guide_uses() {
        let listing = std::fs::read_to_string(workspace::root().join(file("pat-rs"))).unwrap();
        for item in ["pub struct pat_rs::cuda::CudaEngine", "pub fn pat_rs::eligibility::supports("] {
            assert!(listing.contains(item), "{item}");
        }
    }
}
