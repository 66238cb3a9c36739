//! The numerics rule.
//!
//! Against the f64 oracle on the same 16-bit inputs, an implementation may err by twice what a plain two-pass one errs,
//! plus one unit in the last place of the output. The plain one computes in f32 and rounds where any tensor-core kernel
//! must round: P before P·V and O at the end.
//!
//! - Why twice: an online softmax that splits the KV rounds P relative to another maximum than the two-pass one, so its
//!   rounding errors are other draws from the same distribution, in a row as large as the plain one's in the mean but not
//!   element by element.
//! - Why one unit: where the plain result happens to be exact, twice its error is 0, while a correct result before
//!   rounding may still fall on the other side of a rounding boundary.
//!
//! Output: for each row `max|o - o64| <= 2 max|plain - o64| + ulp(max|o64|)`, and for all rows together
//! `|o - o64|_2 <= (2 |plain - o64|_2 + epsilon |o64|_2)`.
//!
//! Log-sum-exp (f32): a score is a dot product of `d` terms, whose error in f32 is at most `d * u * sum|q_x k_tx|`; the
//! log-sum-exp is 1-Lipschitz in the scores, and its own sum of `L` terms adds a relative error that grows like
//! `sqrt(L) * u`. With `u = 2^-23` (tensor cores truncate) the bound is `u * (d * score_magnitude + 8 + 4 sqrt(L))`, and
//! the scale folded with log2(e) and the final rounding add `4 u |lse|`.

use crate::Oracle;
use pat_rs::Element;
use serde::Serialize;

/// Errors of a result against the oracle, and whether they are within the rule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NumericsReport {
    /// Whether everything is within the rule.
    pub passed: bool,
    /// Which rows were checked.
    pub sample: String,
    /// Number of rows checked.
    pub rows: usize,
    /// Rows outside the rule.
    pub failed_rows: usize,
    /// Largest absolute error of an output element.
    pub max_abs_error: f64,
    /// The same of the plain two-pass implementation.
    pub plain_max_abs_error: f64,
    /// Largest (error of a row) / (its allowance); at most 1 when passed.
    pub worst_row_ratio: f64,
    /// Relative L2 error over all rows.
    pub relative_l2_error: f64,
    /// The same of the plain two-pass implementation.
    pub plain_relative_l2_error: f64,
    /// Largest absolute error of a log-sum-exp, if they were checked.
    pub lse_max_abs_error: Option<f64>,
    /// The worst row, in words, when a row failed.
    pub first_failure: Option<String>,
}

/// Applies the rule to an output `[sequences, q_heads, head_dim]` and log-sum-exps `[sequences, q_heads]`, contiguous.
///
/// # Panics
/// `out` or `lse` is shorter than the oracle's rows need.
pub fn check<T: Element>(oracle: &Oracle, q_heads: u32, out: &[T], lse: Option<&[f32]>) -> NumericsReport {
    let mut report = NumericsReport {
        passed: true,
        sample: oracle.sample.name.clone(),
        rows: oracle.rows.len(),
        failed_rows: 0,
        max_abs_error: 0.0,
        plain_max_abs_error: 0.0,
        worst_row_ratio: 0.0,
        relative_l2_error: 0.0,
        plain_relative_l2_error: 0.0,
        lse_max_abs_error: lse.map(|_| 0.0),
        first_failure: None,
    };
    let (mut norm, mut error_squares, mut plain_squares) = (0f64, 0f64, 0f64);
    for row in &oracle.rows {
        let head_dim = row.out.len();
        let at = row.sequence as usize * q_heads as usize + row.head as usize;
        let (mut error, mut plain_error, mut largest) = (0f64, 0f64, 0f64);
        for ((&exact, &plain), &actual) in row.out.iter().zip(&row.plain).zip(&out[at * head_dim..][..head_dim]) {
            let difference = (f64::from(actual.to_f32()) - exact).abs();
            // NaN would vanish in `max`.
            error = if difference.is_nan() { f64::INFINITY } else { error.max(difference) };
            let plain_difference = (f64::from(plain) - exact).abs();
            plain_error = plain_error.max(plain_difference);
            largest = largest.max(exact.abs());
            norm += exact * exact;
            error_squares += difference * difference;
            plain_squares += plain_difference * plain_difference;
        }
        let allowance = 2.0 * plain_error + ulp::<T>(largest);
        let ratio = if error == 0.0 { 0.0 } else { error / allowance };
        let mut failure = (ratio > 1.0).then(|| format!("output error {error:.3e}, allowed {allowance:.3e}"));
        if let (Some(lse), Some(worst)) = (lse, &mut report.lse_max_abs_error) {
            let actual = f64::from(lse[at]);
            let difference = if actual == row.lse { 0.0 } else { (actual - row.lse).abs() };
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            let unit = f64::from(f32::EPSILON);
            let tokens = f64::from(row.tokens);
            let allowance =
                unit * (head_dim as f64 * row.score_magnitude + 8.0 + 4.0 * tokens.sqrt() + 4.0 * row.lse.abs());
            *worst = worst.max(difference);
            if difference > 0.0 && !(row.lse.is_finite() && difference <= allowance) {
                failure = failure.or_else(|| Some(format!("lse {actual}, expected {} +- {allowance:.3e}", row.lse)));
            }
        }
        report.max_abs_error = report.max_abs_error.max(error);
        report.plain_max_abs_error = report.plain_max_abs_error.max(plain_error);
        report.worst_row_ratio = report.worst_row_ratio.max(ratio);
        if let Some(failure) = failure {
            report.failed_rows += 1;
            report.first_failure.get_or_insert(format!("sequence {}, head {}: {failure}", row.sequence, row.head));
        }
    }
    if norm > 0.0 {
        report.relative_l2_error = (error_squares / norm).sqrt();
        report.plain_relative_l2_error = (plain_squares / norm).sqrt();
    }
    let l2_allowance = 2.0 * report.plain_relative_l2_error + f64::from(T::EPSILON);
    report.passed = report.failed_rows == 0 && report.relative_l2_error <= l2_allowance;
    report
}

/// Distance between neighbouring elements at `magnitude`, for normal numbers of the type.
fn ulp<T: Element>(magnitude: f64) -> f64 {
    // Below the smallest normal f16 (2^-14) elements are spaced as there; attention outputs of standardised V never are
    // so small that the wider range of bf16 matters.
    magnitude.max(2f64.powi(-14)).log2().floor().exp2() * f64::from(T::EPSILON)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RowSample;
    use crate::oracle::ExpectedRow;
    use half::f16;

    /// A unit in the last place of f16 from 1 to 2.
    const ULP: f64 = 1.0 / 1024.0;

    /// One row of ones; the plain implementation errs by `plain_ulps` in the first element.
    fn oracle(plain_ulps: f64, elements: usize) -> Oracle {
        let mut plain = vec![1.0; elements];
        plain[0] += (plain_ulps * ULP) as f32;
        let row = ExpectedRow {
            sequence: 0,
            head: 0,
            out: vec![1.0; elements],
            lse: 8.0,
            plain,
            score_magnitude: 4.0,
            tokens: 25,
        };
        Oracle { sample: RowSample { name: "one row".into(), pairs: vec![(0, 0)] }, rows: vec![row] }
    }

    fn passes(oracle: &Oracle, error_ulps: f64, at: usize) -> bool {
        let mut out = vec![f16::ONE; oracle.rows[0].out.len()];
        out[at] = f16::from_f64(1.0 + error_ulps * ULP);
        check(oracle, 1, &out, None).passed
    }

    #[test]
    fn a_row_may_err_by_twice_the_plain_error_and_one_unit() {
        // Many elements: the error of all together stays small.
        assert!(passes(&oracle(0.0, 64), 1.0, 3) && !passes(&oracle(0.0, 64), 2.0, 3));
        assert!(passes(&oracle(2.0, 64), 5.0, 3) && !passes(&oracle(2.0, 64), 6.0, 3));
        // The unit is that of the row's largest element.
        let mut large = oracle(0.0, 64);
        large.rows[0].out[9] = 2.0;
        large.rows[0].plain[9] = 2.0;
        let mut out = vec![f16::ONE; 64];
        (out[9], out[3]) = (f16::from_f64(2.0), f16::from_f64(1.0 + 2.0 * ULP));
        assert!(check(&large, 1, &out, None).passed);
        out[3] = f16::from_f64(1.0 + 3.0 * ULP);
        assert!(!check(&large, 1, &out, None).passed);
    }

    #[test]
    fn all_rows_together_may_err_by_twice_the_plain_error_and_one_epsilon() {
        // Every element errs by one unit, as every row may: relative L2 of one epsilon, which is allowed; five units are not,
        // though the plain one's single error of two units allows them in one row.
        let all = |oracle: &Oracle, ulps: f64| {
            let out = vec![f16::from_f64(1.0 + ulps * ULP); 64];
            let report = check(oracle, 1, &out, None);
            assert_eq!(report.failed_rows, 0, "{report:?}");
            assert!((report.relative_l2_error - ulps * ULP).abs() < 1e-9, "{report:?}");
            report.passed
        };
        assert!(all(&oracle(0.0, 64), 1.0));
        // The plain one's relative L2 error is 2 / 8 units: 1.5 are allowed.
        assert!(all(&oracle(2.0, 64), 1.0) && !all(&oracle(2.0, 64), 2.0));
        // Some elements by two units and the others by one: with 33 of 64 it is 1.6, with 20 it is 1.4.
        for (elements, passes) in [(33, false), (20, true)] {
            let error = |index| if index < elements { 2.0 } else { 1.0 } * ULP;
            let out: Vec<f16> = (0..64).map(|index| f16::from_f64(1.0 + error(index))).collect();
            let report = check(&oracle(2.0, 64), 1, &out, None);
            assert_eq!((report.failed_rows, report.passed), (0, passes), "{report:?}");
        }
    }

    #[test]
    fn errors_of_all_rows_are_relative_to_their_size() {
        let mut large = oracle(2.0, 64);
        large.rows[0].out.fill(4.0);
        large.rows[0].plain.fill(4.0);
        large.rows[0].plain[0] = (4.0 + 8.0 * ULP) as f32;
        let report = check(&large, 1, &[f16::from_f64(4.0 + 4.0 * ULP); 64], None);
        assert!(report.passed, "{report:?}");
        assert!((report.relative_l2_error - ULP).abs() < 1e-9, "{report:?}");
        assert!((report.plain_relative_l2_error - 2.0 * ULP / 8.0).abs() < 1e-9, "{report:?}");
        assert_eq!((report.max_abs_error, report.plain_max_abs_error), (4.0 * ULP, 8.0 * ULP));
    }

    #[test]
    fn a_log_sum_exp_errs_in_proportion_to_its_scores() {
        let oracle = oracle(0.0, 64);
        let allowance = f64::from(f32::EPSILON) * (64.0 * 4.0 + 8.0 + 4.0 * 5.0 + 4.0 * 8.0);
        let judge = |lse: f64| check(&oracle, 1, &[f16::ONE; 64], Some(&[lse as f32])).passed;
        assert!(judge(8.0) && judge(8.0 + 0.99 * allowance) && judge(8.0 - 0.99 * allowance));
        assert!(!judge(8.0 + 1.01 * allowance) && !judge(8.0 - 1.01 * allowance));
        assert!(!judge(f64::NAN) && !judge(f64::NEG_INFINITY));
        let mut empty = oracle.clone();
        empty.rows[0].lse = f64::NEG_INFINITY;
        let of_empty = |lse: f32| check(&empty, 1, &[f16::ONE; 64], Some(&[lse])).passed;
        assert!(of_empty(f32::NEG_INFINITY) && !of_empty(-1e30) && !of_empty(f32::INFINITY));
    }

    #[test]
    fn what_is_no_number_fails() {
        let oracle = oracle(2.0, 64);
        for bad in [f16::NAN, f16::INFINITY] {
            let mut out = vec![f16::ONE; 64];
            out[5] = bad;
            let report = check(&oracle, 1, &out, None);
            assert_eq!((report.passed, report.failed_rows), (false, 1), "{report:?}");
            assert!(report.first_failure.is_some_and(|text| text.starts_with("sequence 0, head 0: output error inf")));
        }
    }
}
