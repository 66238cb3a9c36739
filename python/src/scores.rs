//! What becomes of the scores of a call, and factors of 8-bit caches: the arguments `scale`, `softcap`, `k_scale` and `v_scale`.

use crate::errors::{Result, invalid, wrong_type};
use pat_rs::Problem;
use pyo3::prelude::*;

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
        // A tensor of one element is no number: where it lies on a device, reading it would wait for that.
        let is_tensor = |value: &&Bound<'py, PyAny>| {
            let dimensions = value.getattr("ndim").and_then(|ndim| ndim.extract::<usize>());
            dimensions.is_ok_and(|dimensions| dimensions > 0)
                || value.getattr("is_cuda").is_ok_and(|is_cuda| is_cuda.is_truthy().unwrap_or(false))
        };
        let heads = [k_scale.filter(is_tensor), v_scale.filter(is_tensor)];
        let number =
            |name, value: Option<&'a Bound<'py, PyAny>>| read_positive(name, value.filter(|value| !is_tensor(value)));
        let scores = Self { k_scale: number("k_scale", k_scale)?, v_scale: number("v_scale", v_scale)?, ..self };
        Ok((scores, heads))
    }

    /// A problem with such scores.
    pub(crate) fn of(self, problem: Problem) -> Problem {
        let problem = self.scale.map_or(problem, |scale| problem.with_scale(scale));
        self.soft_cap.map_or(problem, |cap| problem.with_soft_cap(cap))
    }
}

/// A positive number as Python gives it.
pub(crate) fn read_positive(name: &str, value: Option<&Bound<'_, PyAny>>) -> Result<Option<f32>> {
    let Some(value) = value else { return Ok(None) };
    let Ok(number) = value.extract::<f64>() else {
        let got = value.get_type().name().map_or_else(|_| "an object".into(), |name| name.to_string());
        return Err(wrong_type(name, got, "a number"));
    };
    let number = number as f32;
    if number.is_finite() && number > 0.0 {
        Ok(Some(number))
    } else {
        Err(invalid(name, number, "a positive finite number"))
    }
}
