//! The error type: every variant names the argument, what came and what is accepted.

use crate::Reason;

/// What can go wrong. Nothing has been launched or written when one of these is returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has a value that is not accepted.
    ///
    /// Fix: give the argument a value that the message accepts. In the tool the message begins with the option.
    #[error("{argument}: got {got}, expected {expected}")]
    InvalidArgument {
        /// The argument's name, with indices where it is a list (`lengths[3]`).
        argument: String,
        /// What came.
        got: String,
        /// What is accepted.
        expected: String,
    },
    /// No kernel can compute the problem.
    #[error(transparent)]
    Unsupported(#[from] Reason),
    /// A plan was used with something it was not made for (another shape, pool, capacity or generation).
    ///
    /// Fix: run the plan with the shape, page size and pool it was made for, or plan again; upload it again if another
    /// plan was uploaded in between.
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
    ///
    /// Fix: install an NVIDIA driver for CUDA 12.0 or later, or start the container with GPU access; `pat doctor` says
    /// more. Without a GPU use `Engine::cpu`.
    #[error("CUDA is not usable: {reason}")]
    CudaUnavailable {
        /// Why, and what would repair it.
        reason: String,
    },
    /// A CUDA driver call failed.
    ///
    /// Fix: read the driver's message. If it is out of memory, use a smaller pool or batch; if it is an illegal access,
    /// an address or stride given to an `unsafe` entry point is wrong.
    #[error("{call} failed: {reason}")]
    Cuda {
        /// The driver call and what it was about.
        call: String,
        /// The driver's message.
        reason: String,
    },
}

/// What kind of error it is, for callers that cannot match on [`Error`]. Numbers and names stay what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
pub enum ErrorCode {
    /// [`Error::InvalidArgument`].
    InvalidArgument = 1,
    /// [`Error::PlanMismatch`].
    PlanMismatch = 2,
    /// [`Error::CudaUnavailable`].
    CudaUnavailable = 3,
    /// [`Error::Cuda`].
    Cuda = 4,
    /// [`Error::Unsupported`].
    Unsupported = 5,
}

impl ErrorCode {
    /// The name, in snake case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid_argument",
            Self::PlanMismatch => "plan_mismatch",
            Self::CudaUnavailable => "cuda_unavailable",
            Self::Cuda => "cuda",
            Self::Unsupported => "unsupported",
        }
    }
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// What kind of error it is.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidArgument { .. } => ErrorCode::InvalidArgument,
            Self::PlanMismatch { .. } => ErrorCode::PlanMismatch,
            Self::CudaUnavailable { .. } => ErrorCode::CudaUnavailable,
            Self::Cuda { .. } => ErrorCode::Cuda,
            Self::Unsupported(_) => ErrorCode::Unsupported,
        }
    }

    /// Shorthand for [`Error::InvalidArgument`].
    pub fn invalid(argument: impl Into<String>, got: impl ToString, expected: impl Into<String>) -> Self {
        Self::InvalidArgument { argument: argument.into(), got: got.to_string(), expected: expected.into() }
    }
}
