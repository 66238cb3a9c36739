//! What becomes of the scores of a call, and factors of 8-bit caches: the arguments `scale`, `softcap`, `k_scale` and `v_scale`.

use crate::errors::{
    Result, dimensions, has_gradient, invalid, own_error, truth_value, type_name, with_dimensions, wrong_type,
};
use pat_rs::Problem;
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyFloat, PyInt};

/// As the caller gives them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    scale: Option<f32>,
    soft_cap: Option<f32>,
    /// Of all elements; where each head has its own, they are a tensor.
    pub(crate) k_scale: Option<f32>,
    pub(crate) v_scale: Option<f32>,
}

impl Scores {
    pub(crate) fn read(scale: Option<&Bound<'_, PyAny>>, softcap: Option<&Bound<'_, PyAny>>) -> Result<Self> {
        let (scale, soft_cap) = (read_positive("scale", scale)?, read_positive("softcap", softcap)?);
        Ok(Self { scale, soft_cap, k_scale: None, v_scale: None })
    }

    /// With factors of K and V; gives back those that are tensors, one factor for each head.
    pub(crate) fn with_kv_scales<'a, 'py>(
        self,
        k_scale: Option<&'a Bound<'py, PyAny>>,
        v_scale: Option<&'a Bound<'py, PyAny>>,
    ) -> Result<(Self, [Option<&'a Bound<'py, PyAny>>; 2])> {
        let split = |name, value: Option<&'a Bound<'py, PyAny>>| -> Result<_> {
            match value {
                Some(tensor) if is_tensor(name, tensor)? => Ok((None, Some(tensor))),
                value => Ok((read_positive(name, value)?, None)),
            }
        };
        let ((k_scale, of_k_heads), (v_scale, of_v_heads)) = (split("k_scale", k_scale)?, split("v_scale", v_scale)?);
        Ok((Self { k_scale, v_scale, ..self }, [of_k_heads, of_v_heads]))
    }

    /// A problem with such scores.
    pub(crate) fn of(self, problem: Problem) -> Problem {
        let problem = self.scale.map_or(problem, |scale| problem.with_scale(scale));
        self.soft_cap.map_or(problem, |cap| problem.with_soft_cap(cap))
    }
}

/// Whether this is a tensor, be it of one element: where that lies on a device, reading it as a number would wait.
fn is_tensor(name: &str, value: &Bound<'_, PyAny>) -> Result<bool> {
    let is_on_a_device =
        || value.getattr(intern!(value.py(), "is_cuda")).and_then(|is_cuda| is_cuda.is_truthy()).unwrap_or(false);
    Ok(dimensions(value).or_else(|error| no_number(name, value, error))? > 0 || is_on_a_device())
}

/// What an object raised when it was asked what it is, as the cause of its refusal.
fn no_number<T>(name: &str, value: &Bound<'_, PyAny>, error: PyErr) -> Result<T> {
    let error = own_error(value.py(), error)?;
    Err(wrong_type(name, type_name(value), "a number").caused_by(value.py(), error))
}

/// A positive number as Python gives it.
pub(crate) fn read_positive(name: &str, value: Option<&Bound<'_, PyAny>>) -> Result<Option<f32>> {
    let Some(value) = value else { return Ok(None) };
    let number = read_number(name, value)?;
    let single = number as f32;
    if single.is_finite() && single > 0.0 {
        Ok(Some(single))
    } else if number.is_finite() && number > 0.0 {
        // What float32 makes of it is not what came.
        Err(invalid(name, format!("{number:e}"), "a positive finite number of float32"))
    } else {
        Err(invalid(name, number, "a positive finite number"))
    }
}

/// A number as Python gives it. Tensors and arrays are one if they have no dimensions.
pub(crate) fn read_number(name: &str, value: &Bound<'_, PyAny>) -> Result<f64> {
    let py = value.py();
    match dimensions(value).or_else(|error| no_number(name, value, error))? {
        0 => {}
        some => return Err(wrong_type(name, with_dimensions(value, some), "a number")),
    }
    if let Some(what) = truth_value(value).or_else(|error| no_number(name, value, error))? {
        return Err(wrong_type(name, what, "a number"));
    }
    // Python's own numbers, of which each call has some, are not asked.
    let is_plain = value.is_exact_instance_of::<PyFloat>() || value.is_exact_instance_of::<PyInt>();
    if !is_plain && value.getattr(intern!(py, "requires_grad")).is_ok_and(|wanted| wanted.is_truthy().unwrap_or(true)) {
        return Err(has_gradient(name));
    }
    let error = match value.extract::<f64>() {
        Ok(number) => return Ok(number),
        Err(error) => own_error(py, error)?,
    };
    if error.is_instance_of::<PyOverflowError>(py) {
        return Err(invalid(name, "a number above all floating point ones", "a positive finite number"));
    }
    let refusal = wrong_type(name, type_name(value), "a number");
    // Python's own error for what is no number says nothing more.
    Err(if error.is_instance_of::<PyTypeError>(py) { refusal } else { refusal.caused_by(py, error) })
}
