//! What becomes of the scores of a call: the arguments `scale` and `softcap`.

use crate::errors::{Result, invalid, wrong_type};
use pat_rs::Problem;
use pyo3::prelude::*;

/// As the caller gives them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scores {
    scale: Option<f32>,
    soft_cap: Option<f32>,
}

impl Scores {
    pub(crate) fn read(scale: Option<&Bound<'_, PyAny>>, softcap: Option<&Bound<'_, PyAny>>) -> Result<Self> {
        Ok(Self { scale: read_positive("scale", scale)?, soft_cap: read_positive("softcap", softcap)? })
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
