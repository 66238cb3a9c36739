//! The error type: every variant names the argument, what came and what is accepted.

/// What can go wrong. Nothing has been launched or written when one of these is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that is not accepted.
    #[error("{argument}: got {got}, expected {expected}")]
    InvalidArgument {
        /// The argument's name, with indices where it is a list (`lengths[3]`).
        argument: String,
        /// What came.
        got: String,
        /// What is accepted.
        expected: String,
    },
    /// A plan was used with something it was not made for (another shape, pool, capacity or generation).
    #[error("plan does not fit {what}: the plan has {plan}, the call has {call}")]
    PlanMismatch {
        /// What differs.
        what: String,
        /// The plan's value.
        plan: String,
        /// The caller's value.
        call: String,
    },
    /// No usable CUDA device or driver.
    #[error("CUDA is not usable: {reason}")]
    CudaUnavailable {
        /// Why, and what would repair it.
        reason: String,
    },
    /// A CUDA driver call failed.
    #[error("{call} failed: {reason}")]
    Cuda {
        /// The driver call and what it was about.
        call: String,
        /// The driver's message.
        reason: String,
    },
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Shorthand for [`Error::InvalidArgument`].
    pub fn invalid(argument: impl Into<String>, got: impl ToString, expected: impl Into<String>) -> Self {
        Self::InvalidArgument { argument: argument.into(), got: got.to_string(), expected: expected.into() }
    }
}
