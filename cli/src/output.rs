//! Standard output and standard error. Everything the tool prints goes through here, so that a full disk is an error and a
//! closed pipe ends the tool; lints refuse `println!` and `eprintln!`, which panic in both cases.

use std::fmt::Display;
use std::io::{self, Write};

/// Standard output does not take what is printed.
///
/// Fix: make space where standard output goes. A reader that closes the pipe is no error.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub(crate) struct OutputError(#[source] io::Error);

impl OutputError {
    /// Whether the reader has gone (`pat ... | head -1`): nothing is wrong then.
    pub(crate) fn is_closed_pipe(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

/// Prints a text and ends its line.
pub(crate) fn print(text: impl Display) -> Result<(), OutputError> {
    writeln!(io::stdout().lock(), "{text}").map_err(OutputError)
}

/// What is still buffered must be out before the exit status is decided.
pub(crate) fn flush() -> Result<(), OutputError> {
    io::stdout().flush().map_err(OutputError)
}

/// A line for people on standard error. Nobody is left to be told where that fails.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
