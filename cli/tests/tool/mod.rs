//! Calls of the tool, without any CUDA device in sight: messages are the same with a driver and without, up to the reason.

use serde_json::Value;
use std::process::{Command, Output};

pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pat"));
    command.args(args).env("CUDA_VISIBLE_DEVICES", "");
    command
}

pub(crate) fn pat(args: &[&str]) -> Output {
    command(args).output().expect("pat starts")
}

/// Standard output of a call that must succeed.
pub(crate) fn stdout(args: &[&str]) -> String {
    let output = pat(args);
    assert_eq!(output.status.code(), Some(0), "pat {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

pub(crate) fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).expect("JSON")
}

/// Asserts that a call is refused with status 2 and names `parts` in its message; gives back what it printed.
pub(crate) fn refused(args: &[&str], parts: &[&str]) -> Output {
    let output = pat(args);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "pat {args:?}: {message}");
    assert!(!message.contains("panicked"), "pat {args:?}: {message}");
    for part in parts {
        assert!(message.contains(part), "pat {args:?}: {part:?} is not in {message:?}");
    }
    output
}
