//! Errors of the library as Python exceptions.

use pyo3::PyClass;
use pyo3::exceptions::{PyException, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::inspect::PyStaticExpr;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyFloat, PyInt, PyString, PyType};

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
    const NAMES: [(&str, &str); 4] = [
        ("v_head_dim: ", "value_head_dim: "),
        ("soft_cap: ", "softcap: "),
        ("a soft_cap", "a softcap"),
        ("softmax_scale: ", "scale: "),
    ];
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

/// The name of a value's type, for errors; a class is named itself.
pub(crate) fn type_name(value: &Bound<'_, PyAny>) -> String {
    let name = |class: &Bound<'_, PyType>| class.name().map_or_else(|_| "an object".into(), |name| name.to_string());
    match value.cast::<PyType>() {
        Ok(class) => format!("the class {}", name(class)),
        Err(_) => name(&value.get_type()),
    }
}

/// An argument that is an object of one of this package's classes.
pub(crate) fn expect<'a, 'py, T: PyClass>(name: &str, value: &'a Bound<'py, PyAny>) -> Result<&'a Bound<'py, T>> {
    let class = value.py().get_type::<T>();
    value.cast::<T>().map_err(|_| {
        let wanted = class.name().map_or_else(|_| "another object".into(), |class| format!("an object of {class}"));
        wrong_type(name, type_name(value), &wanted)
    })
}

/// Arguments of Python's own types, whose name pyo3's errors do not give: a function for each argument of that name, for
/// `from_py_with`.
pub(crate) mod argument {
    use super::{type_name, wrong_type};
    use pyo3::prelude::*;

    macro_rules! switches {
        ($($name:ident)*) => {
            $(pub(crate) fn $name(value: &Bound<'_, PyAny>) -> PyResult<bool> {
                value.extract().map_err(|_| wrong_type(stringify!($name), type_name(value), "True or False").into())
            })*
        };
    }

    macro_rules! texts {
        ($($name:ident)*) => {
            $(pub(crate) fn $name<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<&'a str> {
                value.extract().map_err(|_| wrong_type(stringify!($name), type_name(value), "a string").into())
            })*
        };
    }

    switches! { alibi page_runs query_tree return_lse sinks }
    texts! { kv_layout mode name text }
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
    /// What it is, and what it raised when it was asked for its number.
    OfType(String, Option<PyErr>),
}

impl<'py> FromPyObject<'_, 'py> for Integer {
    type Error = PyErr;
    const INPUT_TYPE: PyStaticExpr = <u64 as FromPyObject<'_, '_>>::INPUT_TYPE;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        Ok(match index_of(&object)? {
            Index::Is(number) => match number.extract() {
                Ok(number) => Self::Unsigned(number),
                Err(_) => Self::Other(number.to_string()),
            },
            Index::IsNot(what, cause) => Self::OfType(what, cause),
        })
    }
}

/// What an object is as an integer.
pub(crate) enum Index<'py> {
    Is(Bound<'py, PyInt>),
    /// What it is, and what it raised when it was asked.
    IsNot(String, Option<PyErr>),
}

/// The integer that an object is. Tensors and arrays are if they have no dimensions: of one element they may be a list of one.
pub(crate) fn index_of<'py>(object: &Bound<'py, PyAny>) -> PyResult<Index<'py>> {
    // Python takes True for 1; as a count or a page it is a slip.
    let py = object.py();
    let (truth, dimensions) = match truth_value(object).and_then(|truth| Ok((truth, dimensions(object)?))) {
        Ok(asked) => asked,
        Err(error) => return own_error(py, error).map(|error| Index::IsNot(type_name(object), Some(error))),
    };
    if let Some(what) = truth {
        return Ok(Index::IsNot(what, None));
    }
    if let Ok(number) = object.cast::<PyInt>() {
        return Ok(Index::Is(number.clone()));
    }
    let what = match dimensions {
        0 => type_name(object),
        some => with_dimensions(object, some),
    };
    // A class has the method of its objects.
    if dimensions > 0 || object.is_instance_of::<PyType>() || !has(object, intern!(py, "__index__"))? {
        return Ok(Index::IsNot(what, None));
    }
    match object.call_method0(intern!(py, "__index__")) {
        Ok(number) => Ok(match number.cast_into::<PyInt>() {
            Ok(number) => Index::Is(number),
            Err(_) => Index::IsNot(what, None),
        }),
        Err(error) => own_error(py, error).map(|error| Index::IsNot(what, Some(error))),
    }
}

/// A tensor that wants a gradient, which nobody would compute.
pub(crate) fn has_gradient(name: &str) -> Failure {
    invalid(
        name,
        "a tensor with requires_grad=True",
        "a tensor without gradient (tensor.detach()): there is no backward pass",
    )
}

/// What a truth value is, for errors: Python's, numpy's, a tensor or array of them. None of everything else.
///
/// # Errors
/// What the object raises when it is asked for its type.
pub(crate) fn truth_value(object: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    if object.is_exact_instance_of::<PyInt>() || object.is_exact_instance_of::<PyFloat>() {
        return Ok(None);
    }
    if object.is_instance_of::<PyBool>() {
        return Ok(Some("bool".into()));
    }
    let Some(dtype) = object.getattr_opt(intern!(object.py(), "dtype"))? else { return Ok(None) };
    let is_bool = dtype.str()?.to_string_lossy().trim_start_matches("torch.") == "bool";
    Ok(is_bool.then(|| match type_name(object) {
        // numpy's own, whose name tells enough.
        name if name.starts_with("bool") => name,
        name => format!("{name} of bool"),
    }))
}

/// A tensor or array, for errors.
pub(crate) fn with_dimensions(object: &Bound<'_, PyAny>, dimensions: usize) -> String {
    format!("{} of {dimensions} dimension{}", type_name(object), if dimensions == 1 { "" } else { "s" })
}

/// Dimensions of a tensor or array; 0 of everything else.
///
/// # Errors
/// What the object raises when it is asked for them.
pub(crate) fn dimensions(object: &Bound<'_, PyAny>) -> PyResult<usize> {
    let dimensions = object.getattr_opt(intern!(object.py(), "ndim"))?;
    // A class has the property of its objects.
    Ok(dimensions.and_then(|dimensions| dimensions.extract().ok()).unwrap_or(0))
}

/// Whether an object has an attribute. One that cannot be asked has none.
pub(crate) fn has(object: &Bound<'_, PyAny>, name: &Bound<'_, PyString>) -> PyResult<bool> {
    object.hasattr(name).or_else(|error| own_error(object.py(), error).map(|_| false))
}

/// An error that a refusal may take for its cause: what ends a program (Ctrl-C, `sys.exit`) goes on instead.
pub(crate) fn own_error(py: Python<'_>, error: PyErr) -> PyResult<PyErr> {
    if error.is_instance_of::<PyException>(py) { Ok(error) } else { Err(error) }
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
            Self::OfType(what, cause) => return Err(no_integer(argument, what, cause, "an integer")),
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
            Self::OfType(what, cause) => Err(no_integer(argument, what, cause, "an integer")),
        }
    }
}

/// What is said of an object that is no integer.
pub(crate) fn no_integer(argument: &str, what: String, cause: Option<PyErr>, expected: &str) -> Failure {
    let refusal = wrong_type(argument, what, expected);
    match cause {
        Some(cause) => Python::attach(|py| refusal.caused_by(py, cause)),
        None => refusal,
    }
}
