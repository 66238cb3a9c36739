//! What a call returns: a status, and a message that the thread can ask for.

use pat_rs::{Error, ErrorCode, Result};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What came of a call. Numbers stay what they are.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatStatus {
    /// Done.
    Ok = 0,
    /// An argument has a value that is not accepted.
    InvalidArgument = 1,
    /// A plan was used with something it was not made for.
    PlanMismatch = 2,
    /// There is no usable CUDA device or driver.
    CudaUnavailable = 3,
    /// A call of the CUDA driver failed.
    Cuda = 4,
    /// No kernel can compute the problem.
    Unsupported = 5,
    /// A fault of this library: please report it.
    Internal = 6,
}

impl From<ErrorCode> for PatStatus {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidArgument => Self::InvalidArgument,
            ErrorCode::PlanMismatch => Self::PlanMismatch,
            ErrorCode::CudaUnavailable => Self::CudaUnavailable,
            ErrorCode::Cuda => Self::Cuda,
            ErrorCode::Unsupported => Self::Unsupported,
            _ => Self::Internal,
        }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs `body`; an error, or a panic, becomes the thread's last error. A panic ends here: C cannot unwind.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> PatStatus {
    // Objects that others see are behind locks, and each is written as a whole.
    let (status, message) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return PatStatus::Ok,
        Ok(Err(error)) => (error.code().into(), error.to_string()),
        Err(payload) => (PatStatus::Internal, panic_message(&*payload)),
    };
    keep(message);
    status
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    format!("a fault of pat-rs, please report it: {}", text.unwrap_or("a panic without a message"))
}

fn keep(mut message: String) {
    message.retain(|character| character != '\0');
    let message = CString::new(message).unwrap_or_default();
    // A thread that is ending has no place for it any more, and asks no more.
    let _ = LAST_ERROR.try_with(|last| *last.borrow_mut() = message);
}

/// The thread's last message; it stays where it is until the thread's next failed call.
pub(crate) fn last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Refuses a pointer that is NULL and must not be.
pub(crate) fn null(argument: &str, expected: &str) -> Error {
    Error::invalid(argument, "NULL", expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        LAST_ERROR.with_borrow(|last| last.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_failed_call_leaves_its_message_on_its_thread() {
        assert_eq!(guard(|| Ok(())), PatStatus::Ok);
        assert_eq!(message(), "");
        assert_eq!(guard(|| Err(Error::invalid("rows", 3, "4\0 or more"))), PatStatus::InvalidArgument);
        assert_eq!(message(), "rows: got 3, expected 4 or more");
        assert_eq!(guard(|| Ok(())), PatStatus::Ok);
        assert_eq!(message(), "rows: got 3, expected 4 or more");
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guard(|| panic!("on purpose: {}", 7)), PatStatus::Internal);
        assert_eq!(message(), "a fault of pat-rs, please report it: on purpose: 7");
        assert_eq!(guard(|| std::panic::panic_any(7)), PatStatus::Internal);
        assert!(message().ends_with("a panic without a message"));
    }

    #[test]
    fn every_code_has_the_status_of_its_number() {
        let codes = [
            ErrorCode::InvalidArgument,
            ErrorCode::PlanMismatch,
            ErrorCode::CudaUnavailable,
            ErrorCode::Cuda,
            ErrorCode::Unsupported,
        ];
        for code in codes {
            assert_eq!(PatStatus::from(code) as i32, code as i32);
        }
    }
}
