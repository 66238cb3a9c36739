//! Errors of the library as Python exceptions.

use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::inspect::PyStaticExpr;
use pyo3::intern;
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
        Self::from(&error)
    }
}

impl From<&pat_rs::Error> for Failure {
    fn from(error: &pat_rs::Error) -> Self {
        let text = in_python(&error.to_string());
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

/// A message with the names that arguments have here.
pub(crate) fn in_python(message: &str) -> String {
    const NAMES: [(&str, &str); 3] =
        [("v_head_dim: ", "value_head_dim: "), ("soft_cap: ", "softcap: "), ("softmax_scale: ", "scale: ")];
    NAMES.iter().fold(message.to_owned(), |message, (name, here)| message.replace(name, here))
}

/// A `ValueError` in the words of [`pat_rs::Error::InvalidArgument`].
pub(crate) fn invalid(argument: impl Into<String>, got: impl ToString, expected: impl Into<String>) -> Failure {
    pat_rs::Error::invalid(argument, got, expected).into()
}

/// A `TypeError` in the same words.
pub(crate) fn wrong_type(argument: &str, got: impl ToString, expected: &str) -> Failure {
    Failure(PyTypeError::new_err(pat_rs::Error::invalid(argument, got, expected).to_string()))
}

impl Failure {
    /// The same, with another exception as its cause.
    pub(crate) fn caused_by(self, py: Python<'_>, cause: PyErr) -> Self {
        self.0.set_cause(py, Some(cause));
        self
    }
}

/// The name of a value's type, for errors.
pub(crate) fn type_name(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string())
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

/// An integer as Python gives it; pyo3's own error for one that is negative or too large names no argument.
#[derive(Debug)]
pub(crate) enum Integer {
    Unsigned(u64),
    /// Its text.
    Other(String),
    /// Its type's name.
    OfType(String),
}

impl<'py> FromPyObject<'_, 'py> for Integer {
    type Error = PyErr;
    const INPUT_TYPE: PyStaticExpr = <u64 as FromPyObject<'_, '_>>::INPUT_TYPE;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract() {
            Ok(number) => Ok(Self::Unsigned(number)),
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self::Other(object.str()?.to_string()))
            }
            // Not what its own `__index__` raises.
            Err(_) if !object.hasattr(intern!(object.py(), "__index__"))? => Ok(Self::OfType(type_name(&object))),
            Err(error) => Err(error),
        }
    }
}

impl Integer {
    /// A number of something. `least` is for the message: numbers below it, which are not negative, the library refuses.
    pub(crate) fn count(self, argument: &str, least: u32) -> Result<u32> {
        let got = match self {
            Self::Unsigned(number) => match u32::try_from(number) {
                Ok(count) => return Ok(count),
                Err(_) => number.to_string(),
            },
            Self::Other(text) => text,
            Self::OfType(what) => return Err(wrong_type(argument, what, "an integer")),
        };
        Err(invalid(argument, got, format!("{least} to 2^32 - 1")))
    }

    /// The lesser of the two.
    pub(crate) fn at_most(self, most: u32) -> Self {
        match self {
            Self::Unsigned(number) => Self::Unsigned(number.min(most.into())),
            other => other,
        }
    }

    /// Bytes, an address or a handle.
    pub(crate) fn unsigned(self, argument: &str) -> Result<u64> {
        match self {
            Self::Unsigned(number) => Ok(number),
            Self::Other(text) => Err(invalid(argument, text, "0 to 2^64 - 1")),
            Self::OfType(what) => Err(wrong_type(argument, what, "an integer")),
        }
    }
}
