//! Errors of the library as Python exceptions.

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// An exception that is about to be raised. Stands between the errors of `pat-rs` and `PyErr`, neither of which is ours.
#[derive(Debug)]
pub(crate) struct Failure(PyErr);

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

impl From<pat_rs::Error> for Failure {
    fn from(error: pat_rs::Error) -> Self {
        let text = error.to_string();
        Self(match error {
            pat_rs::Error::InvalidArgument { .. }
            | pat_rs::Error::PlanMismatch { .. }
            | pat_rs::Error::Unsupported(_) => PyValueError::new_err(text),
            pat_rs::Error::CudaUnavailable { .. } => own("CudaUnavailable", text),
            pat_rs::Error::Cuda { .. } => own("CudaError", text),
            _ => PyRuntimeError::new_err(text),
        })
    }
}

/// A `ValueError` in the words of [`pat_rs::Error::InvalidArgument`].
pub(crate) fn invalid(argument: impl Into<String>, got: impl ToString, expected: impl Into<String>) -> Failure {
    pat_rs::Error::invalid(argument, got, expected).into()
}

/// A `TypeError` in the same words.
pub(crate) fn wrong_type(argument: &str, got: impl ToString, expected: &str) -> Failure {
    Failure(PyTypeError::new_err(pat_rs::Error::invalid(argument, got, expected).to_string()))
}

/// An exception class of `prefix_attn._errors`.
fn own(class: &'static str, text: String) -> PyErr {
    static CLASSES: [PyOnceLock<Py<PyType>>; 2] = [PyOnceLock::new(), PyOnceLock::new()];
    Python::attach(|py| {
        let cell = &CLASSES[usize::from(class == "CudaError")];
        match cell.import(py, "prefix_attn._errors", class) {
            Ok(class) => PyErr::from_type(class.clone(), text),
            Err(error) => error,
        }
    })
}

/// A number of something; pyo3's own error for a negative one names no argument.
pub(crate) fn read_count(argument: &str, count: i64) -> Result<u32> {
    u32::try_from(count).map_err(|_| invalid(argument, count, "0 to 2^32 - 1"))
}
