//! Factors of 8-bit K and V.

use crate::{Error, Result};

/// What the elements of an 8-bit K or V are multiplied with; of other types it is 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvScale<'a> {
    /// All with the same factor.
    Tensor(f32),
    /// Those of a KV head with that head's: `[kv_heads]`.
    Heads(&'a [f32]),
}

impl KvScale<'_> {
    /// None: elements are what they say.
    pub const ONE: Self = Self::Tensor(1.0);

    /// The factor of a head's elements. [`Self::check`] has made sure that there is one.
    pub(crate) fn of_head(self, kv_head: u32) -> f32 {
        match self {
            Self::Tensor(scale) => scale,
            Self::Heads(scales) => scales[kv_head as usize],
        }
    }

    /// Refuses factors that no executor takes; the error names `argument`.
    ///
    /// # Errors
    /// A factor is not finite or not positive, there are fewer than heads, or elements have more than 8 bits and a factor that is
    /// not 1.
    pub fn check(self, argument: &str, kv_heads: u32, is_eight_bit: bool) -> Result<()> {
        let scales = match &self {
            Self::Tensor(scale) => std::slice::from_ref(scale),
            Self::Heads(scales) => {
                let expected = format!("at least {kv_heads}, one for each KV head");
                let scales = scales.get(..kv_heads as usize);
                scales.ok_or_else(|| Error::invalid(argument, format!("{} factors", self.len()), expected))?
            }
        };
        for &scale in scales {
            if !(scale.is_finite() && scale > 0.0) {
                return Err(Error::invalid(argument, scale, "a finite number above 0"));
            }
            if !is_eight_bit && scale != 1.0 {
                return Err(Error::invalid(argument, scale, "1 where K and V do not have 8 bits"));
            }
        }
        Ok(())
    }

    fn len(&self) -> usize {
        match self {
            Self::Tensor(_) => 1,
            Self::Heads(scales) => scales.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_positive_and_there_is_one_for_each_head() {
        let refusal = |scale: KvScale<'_>, is_eight_bit| {
            scale.check("k_scale", 2, is_eight_bit).map_err(|error| error.to_string()).err()
        };
        assert_eq!(refusal(KvScale::ONE, false), None);
        assert_eq!(refusal(KvScale::Heads(&[0.5, 3.0, -1.0]), true), None);
        for (scale, got) in [(0.0, "0"), (-2.0, "-2"), (f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
            let expected = format!("k_scale: got {got}, expected a finite number above 0");
            assert!(refusal(KvScale::Tensor(scale), true).unwrap().contains(&expected));
            assert!(refusal(KvScale::Heads(&[1.0, scale]), true).unwrap().contains(&expected));
        }
        assert!(refusal(KvScale::Heads(&[1.0]), true).unwrap().contains("got 1 factors, expected at least 2"));
        assert!(refusal(KvScale::Tensor(2.0), false).unwrap().contains("k_scale: got 2, expected 1 where"));
    }
}
