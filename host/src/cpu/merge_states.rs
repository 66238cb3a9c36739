//! Merging two attention states: outputs over disjoint sets of tokens, with their log-sum-exps.

use super::Element;
use crate::arguments::{check_apart, check_lse, check_tensor};
use crate::{Result, RowStrides};
use std::cell::Cell;

/// Outputs and natural log-sum-exps of attention over some tokens. As cells: a result may lie where an input does.
#[derive(Clone, Copy, Debug)]
pub struct State<'a, T: Element> {
    /// `[rows, heads, head_dim]` in the order that `out_strides` give.
    pub out: &'a [Cell<T>],
    /// Layout of `out`.
    pub out_strides: RowStrides,
    /// `[rows, heads]`; −inf where there are no tokens, whatever the output is there.
    pub lse: &'a [Cell<f32>],
    /// Layout of `lse`.
    pub lse_strides: RowStrides,
}

/// Writes to `merged` attention over the tokens of both states. Rows without any token get output 0 and log-sum-exp −inf.
/// `merged` may be one of the states; it may not overlap them otherwise.
///
/// # Errors
/// A slice is too short for its strides, a stride is not accepted, or rows of the result overlap. Nothing is written then.
pub fn merge_states<T: Element>(
    (rows, heads, head_dim): (u32, u32, u32),
    [a, b]: [&State<'_, T>; 2],
    merged: &State<'_, T>,
) -> Result<()> {
    for (state, [out, lse]) in [(a, ["out_a", "lse_a"]), (b, ["out_b", "lse_b"]), (merged, ["out", "lse"])] {
        let extents = |strides: RowStrides| [("sequence", rows, strides.sequence), ("head", heads, strides.head)];
        check_tensor(out, state.out.len() as u64, &extents(state.out_strides), head_dim, T::DTYPE)?;
        check_lse(lse, state.lse.len() as u64, &extents(state.lse_strides))?;
        if std::ptr::eq(state, merged) {
            check_apart(out, &extents(state.out_strides), head_dim)?;
            check_apart(lse, &extents(state.lse_strides), 1)?;
        }
    }
    // Not negative and inside the slices: checked above.
    let at = |strides: RowStrides, row: u32, head: u32| {
        (i64::from(row) * strides.sequence + i64::from(head) * strides.head) as usize
    };
    for row in 0..rows {
        for head in 0..heads {
            let lse = [a, b].map(|state| state.lse[at(state.lse_strides, row, head)].get());
            let [out_a, out_b, out] =
                [a, b, merged].map(|state| &state.out[at(state.out_strides, row, head)..][..head_dim as usize]);
            let (weights, joint) = merge_weights(lse);
            for ((a, b), out) in out_a.iter().zip(out_b).zip(out) {
                // A state without tokens may hold anything, NaN included.
                let part =
                    |weight: f32, value: &Cell<T>| if weight != 0.0 { weight * value.get().to_f32() } else { 0.0 };
                out.set(T::from_f32(part(weights[0], a) + part(weights[1], b)));
            }
            merged.lse[at(merged.lse_strides, row, head)].set(joint);
        }
    }
    Ok(())
}

/// The shares of two states in their merger, and its log-sum-exp.
fn merge_weights(lse: [f32; 2]) -> ([f32; 2], f32) {
    let maximum = lse[0].max(lse[1]);
    if maximum == f32::NEG_INFINITY {
        return ([0.0; 2], maximum);
    }
    let [a, b] = lse.map(|lse| (lse - maximum).exp());
    ([a / (a + b), b / (a + b)], maximum + (a + b).ln())
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    const EMPTY: f32 = f32::NEG_INFINITY;

    fn merge(out: [[f32; 2]; 2], lse: [[f32; 1]; 2]) -> ([f32; 2], f32) {
        let strides = RowStrides { sequence: 8, head: 8 };
        let [mut a, mut b, mut merged] = [out[0], out[1], [7.0; 2]].map(|values| values.map(f16::from_f32));
        let ([mut lse_a, mut lse_b], mut merged_lse) = (lse, [7.0f32]);
        let cells = |values| Cell::from_mut(values).as_slice_of_cells();
        let state = |out, lse| State { out, out_strides: strides, lse, lse_strides: strides };
        let [a, b, of_merged] = [(&mut a[..], &mut lse_a[..]), (&mut b, &mut lse_b), (&mut merged, &mut merged_lse)]
            .map(|(out, lse)| state(cells(out), Cell::from_mut(lse).as_slice_of_cells()));
        merge_states((1, 1, 2), [&a, &b], &of_merged).unwrap();
        (merged.map(f16::to_f32), merged_lse[0])
    }

    #[test]
    fn shares_follow_the_log_sum_exps() {
        let (out, lse) = merge([[1.0, 2.0], [5.0, 10.0]], [[0.0], [3f32.ln()]]);
        assert_eq!(out, [4.0, 8.0]);
        assert!((lse - 4f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_state_without_tokens_is_neutral_whatever_it_holds() {
        let nan = [f32::NAN; 2];
        assert_eq!(merge([[1.0, 2.0], nan], [[0.5], [EMPTY]]), ([1.0, 2.0], 0.5));
        assert_eq!(merge([nan, [1.0, 2.0]], [[EMPTY], [0.5]]), ([1.0, 2.0], 0.5));
        assert_eq!(merge([nan, nan], [[EMPTY], [EMPTY]]), ([0.0, 0.0], EMPTY));
    }

    #[test]
    fn far_apart_log_sum_exps_do_not_overflow() {
        assert_eq!(merge([[1.0, 2.0], [5.0, 10.0]], [[1e30], [-1e30]]), ([1.0, 2.0], 1e30));
    }

    /// Three rows of two heads, each tensor with strides of its own: every row is where its strides say, and nothing else is
    /// written.
    #[test]
    fn rows_are_where_their_strides_say() {
        let places = |strides: RowStrides| {
            (0..6).map(move |index| (index / 2 * strides.sequence + index % 2 * strides.head) as usize)
        };
        let [of_a, of_b, of_merged] = [(16, 8), (8, 24), (24, 8)].map(|(sequence, head)| RowStrides { sequence, head });
        let [lse_of_a, lse_of_b, lse_of_merged] =
            [(2, 1), (1, 3), (5, 2)].map(|(sequence, head)| RowStrides { sequence, head });
        let (mut a, mut b, mut merged) = ([f16::NAN; 64], [f16::NAN; 64], [f16::ONE; 64]);
        let (mut lse_a, mut lse_b, mut lse) = ([f32::NAN; 16], [f32::NAN; 16], [7.0f32; 16]);
        for (index, (at_a, at_b)) in places(of_a).zip(places(of_b)).enumerate() {
            (a[at_a], b[at_b]) = (f16::from_f32(index as f32), f16::from_f32(index as f32 + 10.0));
        }
        for (index, (at_a, at_b)) in places(lse_of_a).zip(places(lse_of_b)).enumerate() {
            (lse_a[at_a], lse_b[at_b]) = (index as f32, index as f32);
        }
        let state = |out, out_strides, lse, lse_strides| State { out, out_strides, lse, lse_strides };
        let [out_a, out_b, out] =
            [&mut a, &mut b, &mut merged].map(|out| Cell::from_mut(&mut out[..]).as_slice_of_cells());
        let [all_a, all_b, all] =
            [&mut lse_a, &mut lse_b, &mut lse].map(|lse| Cell::from_mut(&mut lse[..]).as_slice_of_cells());
        let [first, second] = [state(out_a, of_a, all_a, lse_of_a), state(out_b, of_b, all_b, lse_of_b)];
        merge_states((3, 2, 1), [&first, &second], &state(out, of_merged, all, lse_of_merged)).unwrap();
        let (mut expected, mut expected_lse) = ([f16::ONE; 64], [7.0f32; 16]);
        for (index, (at, at_lse)) in places(of_merged).zip(places(lse_of_merged)).enumerate() {
            // Equal shares.
            expected[at] = f16::from_f32(index as f32 + 5.0);
            expected_lse[at_lse] = index as f32 + 2f32.ln();
        }
        assert_eq!(merged, expected);
        assert!(lse.iter().zip(expected_lse).all(|(lse, expected)| (lse - expected).abs() < 1e-5), "{lse:?}");
    }

    #[test]
    fn short_slices_are_named() {
        let strides = RowStrides { sequence: 8, head: 8 };
        let mut out = [f16::ZERO; 2];
        let mut lse = [0f32];
        let out = Cell::from_mut(&mut out[..]).as_slice_of_cells();
        let lse = Cell::from_mut(&mut lse[..]).as_slice_of_cells();
        let state = State { out, out_strides: strides, lse, lse_strides: strides };
        let error = merge_states((2, 1, 2), [&state, &state], &state).unwrap_err().to_string();
        assert!(error.starts_with("out_a: got 2"), "{error}");
    }
}
