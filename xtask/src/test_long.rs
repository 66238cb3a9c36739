//! `cargo xtask test-long`: the property tests with many more cases.

use crate::workspace;
use anyhow::Result;
use std::process::Command;

pub(crate) fn run() -> Result<()> {
    workspace::run(
        Command::new("cargo")
            .args(["test", "--release", "--package", "pat-tests"])
            .env("PAT_LONG", "1")
            .current_dir(workspace::root()),
    )
}
